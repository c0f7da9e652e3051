"""An expert for minigrid's other environments: a search on the full grid, visible or not.

It knows what ends an episode with a reward: reaching a goal, picking up an object, opening a door.
The cheapest path may lead through locked doors and objects in the way, each at a cost; the first of
these obstacles is removed first: fetch the key, or carry the object away. The plan depends only on
the current state, so it can advise wherever a policy has wandered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any

from minigrid.envs.blockedunlockpickup import BlockedUnlockPickupEnv
from minigrid.envs.fetch import FetchEnv
from minigrid.envs.keycorridor import KeyCorridorEnv
from minigrid.envs.unlock import UnlockEnv
from minigrid.envs.unlockpickup import UnlockPickupEnv
from minigrid.minigrid_env import MiniGridEnv

from demotools.babyai.cells import ACTIONS, TYPES
from demotools.recording.environment import FORWARD

_LEFT, _RIGHT, _FORWARD, _PICKUP, _DROP, _TOGGLE, _DONE = range(len(ACTIONS))
_FREE = ("empty", "floor", "goal")
# Prices in steps: of what takes a detour first, so that no way of moderate length costs more.
_LOCKED, _IN_THE_WAY = 10_000, 1_000
_MOST_SUBGOALS = 12

Position = tuple[int, int]
Pose = tuple[int, int, int]
"""Column, row and direction of the agent."""


class ExpertError(Exception):
    """An expert has no action: its text is the reason."""


@dataclass(frozen=True)
class Goal:
    """What is to be done.

    places   where, any of them
    action   pickup: facing the place; forward: by going there, which opens a door
    """

    places: frozenset[Position]
    action: int


def goal_of(environment: Any) -> Goal | None:
    """What ends the present episode with a reward, if it is something that a search can find.

    environment   of minigrid, after a reset
    """
    level = environment.unwrapped
    if not isinstance(level, MiniGridEnv):
        return None
    if isinstance(level, KeyCorridorEnv | UnlockPickupEnv | BlockedUnlockPickupEnv):
        return Goal(_places(level, lambda thing: thing is level.obj), _PICKUP)
    if isinstance(level, FetchEnv):
        wanted = (level.targetType, level.targetColor)
        return Goal(_places(level, lambda thing: (thing.type, thing.color) == wanted), _PICKUP)
    if isinstance(level, UnlockEnv):
        return Goal(_places(level, lambda thing: thing is level.door), _FORWARD)
    goals = _places(level, lambda thing: thing.type == "goal")
    return Goal(goals, _FORWARD) if goals else None


def _places(level: Any, wanted: Callable[[Any], bool]) -> frozenset[Position]:
    grid = level.grid
    return frozenset(
        (number % grid.width, number // grid.width)
        for number, thing in enumerate(grid.grid)
        if thing is not None and wanted(thing)
    )


def is_searchable(environment: Any) -> bool:
    """Whether there is a goal for a search, in a first episode; the environment is reset for it."""
    if not isinstance(environment.unwrapped, MiniGridEnv):
        return False
    environment.reset(seed=0)
    return goal_of(environment) is not None and environment.action_space.n == len(ACTIONS)


class SearchExpert:
    """The expert of one environment, which must have been reset."""

    def __init__(self, environment: Any) -> None:
        self._level = environment.unwrapped
        # elsewhere a thing picked up ends no episode
        self._may_carry = not isinstance(self._level, FetchEnv)
        self._planned: list[int] = []
        self._advised = -1

    def action(self, taken: int | None = None) -> int:
        """The action that it advises in the environment's present state, 0..6.

        taken         the action taken since the last call; None: the one that was advised

        ExpertError   there is no way to the goal
        """
        if taken is not None and taken != self._advised:
            self._planned = []
        if not self._planned:
            self._planned = self._plan()
        self._advised = self._planned.pop(0)
        return self._advised

    def advice(self, taken: int | None = None) -> int:
        """As `action`; -1 where there is no way to the goal."""
        try:
            return self.action(taken)
        except ExpertError:
            return -1

    def subgoal(self) -> int:
        """It has none of those that the bot has: 0."""
        return 0

    def _plan(self) -> list[int]:
        """The next actions: up to the first one that changes more than the agent's pose."""
        last, subgoals = goal_of(self._level), 0
        if last is None:
            raise ExpertError("there is no goal left to reach")
        goal = last
        while (subgoals := subgoals + 1) <= _MOST_SUBGOALS:
            path = self._cheapest(goal)
            if path is None:
                raise ExpertError("there is no path to the goal")
            obstacle = self._first_obstacle(path, goal)
            if obstacle is None:
                full = goal.action == _PICKUP and self._level.carrying is not None
                if full and not any(map(self._is_locked, path)):
                    return self._drop(goal, last)
                return self._actions(path, goal)
            thing = self._level.grid.get(*obstacle)
            if thing.type == "door":  # locked, and its key is not in hand
                goal = Goal(_places(self._level, _key_of(thing)), _PICKUP)
                if not goal.places:
                    raise ExpertError("there is no key for a locked door")
            else:
                goal = Goal(frozenset([obstacle]), _PICKUP)
        raise ExpertError("the obstacles on the paths to the goal block each other")

    def _first_obstacle(self, path: list[Position], goal: Goal) -> Position | None:
        """The first place on a path that must be dealt with before one can go on."""
        for place in _inner(path, goal):
            if (self._price(place) or 0) >= _IN_THE_WAY:
                return place
        return None

    def _is_locked(self, place: Position) -> bool:
        thing = self._level.grid.get(*place)
        return thing is not None and thing.type == "door" and bool(thing.is_locked)

    def _price(self, place: Position) -> int | None:
        """Steps that it costs to enter a place beyond the one step; None where one cannot."""
        thing = self._level.grid.get(*place)
        if thing is None or thing.type in _FREE:
            return 0
        if thing.type == "door":
            if thing.is_open:
                return 0
            if not thing.is_locked:
                return 1
            carried = self._level.carrying
            return 1 if carried is not None and _key_of(thing)(carried) else _LOCKED
        return _IN_THE_WAY if thing.type in TYPES and self._may_carry else None

    def _cheapest(
        self, goal: Goal, start: Pose | None = None, closed: Position | None = None
    ) -> list[Position] | None:
        """The places of the cheapest way, the agent's first and the goal's last; None: no way.

        start    where the agent stands and looks; None: as it does
        closed   a place that it cannot enter
        """
        pose = start or self._pose()
        costs, parents = {pose: 0}, {pose: pose}
        queue = [(0, pose)]
        while queue:
            cost, pose = heappop(queue)
            if cost > costs[pose]:
                continue
            column, row, direction = pose
            ahead = (column + FORWARD[direction][0], row + FORWARD[direction][1])
            if ahead in goal.places and goal.action == _PICKUP:
                return [*_trace(parents, pose), ahead]
            if (column, row) in goal.places and goal.action == _FORWARD:
                return _trace(parents, pose)
            steps = [((column, row, (direction + turn) % 4), 1) for turn in (-1, 1)]
            price = None if ahead == closed else self._price(ahead)
            if price is not None:
                steps.append(((*ahead, direction), 1 + price))
            for following, more in steps:
                if cost + more < costs.get(following, cost + more + 1):
                    costs[following], parents[following] = cost + more, pose
                    heappush(queue, (cost + more, following))
        return None

    def _pose(self) -> Pose:
        column, row = (int(number) for number in self._level.agent_pos)
        return column, row, int(self._level.agent_dir)

    def _actions(self, path: list[Position], goal: Goal) -> list[int]:
        """Along a path that nothing stands on: up to the first door, or to the end."""
        column, row, direction = self._pose()
        actions: list[int] = []
        for place in path[1:]:
            wanted = FORWARD.index((place[0] - column, place[1] - row))
            actions += _turns(direction, wanted)
            (column, row), direction = place, wanted
            thing = self._level.grid.get(*place)
            if place in goal.places and goal.action == _PICKUP:
                return [*actions, _PICKUP]
            if thing is not None and thing.type == "door" and not thing.is_open:
                return [*actions, _TOGGLE]
            actions.append(_FORWARD)
        return actions or [_DONE]

    def _drop(self, goal: Goal, last: Goal) -> list[int]:
        """To the nearest place where what is carried lies in no way, and drop it there.

        goal, last   the present goal, and that of the episode
        """
        start = self._pose()
        burden = self._burden(last, start)
        parents: dict[Pose, tuple[Pose, int]] = {}
        poses = [start]
        for pose in poses:
            column, row, direction = pose
            ahead = (column + FORWARD[direction][0], row + FORWARD[direction][1])
            if (
                self._level.grid.get(*ahead) is None
                and not self._burden(goal, pose, ahead)
                and self._burden(last, pose, ahead) <= burden
            ):
                actions = [_DROP]
                while pose != start:
                    pose, action = parents[pose]
                    actions.insert(0, action)
                return actions
            turns = ((-1, _LEFT), (1, _RIGHT))
            moves = [((column, row, (direction + turn) % 4), action) for turn, action in turns]
            if self._price(ahead) == 0:
                moves.append(((*ahead, direction), _FORWARD))
            for following, action in moves:
                if following not in parents and following != start:
                    parents[following] = (pose, action)
                    poses.append(following)
        raise ExpertError("there is no free place to drop the carried object")

    def _burden(self, goal: Goal, pose: Pose, closed: Position | None = None) -> int:
        """How many places of the cheapest way from a pose must be dealt with first.

        closed   a place that cannot be entered
        """
        path = self._cheapest(goal, pose, closed)
        if path is None:
            return _LOCKED
        return sum((self._price(place) or 0) >= _IN_THE_WAY for place in _inner(path, goal))


def _inner(path: list[Position], goal: Goal) -> list[Position]:
    """The places of a path that are entered."""
    return path[1:-1] if goal.action == _PICKUP else path[1:]


def _key_of(door: Any) -> Callable[[Any], bool]:
    return lambda thing: bool(thing.type == "key" and thing.color == door.color)


def _turns(direction: int, wanted: int) -> list[int]:
    """The turns from one direction to another."""
    return [[], [_RIGHT], [_RIGHT, _RIGHT], [_LEFT]][(wanted - direction) % 4]


def _trace(parents: dict[Pose, Pose], pose: Pose) -> list[Position]:
    """The places of a way that ends at a pose, each once."""
    places = [pose[:2]]
    while parents[pose] != pose:
        pose = parents[pose]
        if pose[:2] != places[-1]:
            places.append(pose[:2])
    return places[::-1]
