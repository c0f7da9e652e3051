"""Minigrid's bot, with searches that visit all cells of the grid at once, as bits of one integer.

The bot runs several breadth-first searches of the grid for one action, and the order in which it
visits cells decides between equally short paths. It expands every cell in the same order (straight
on, to the sides, back), so it visits cells of the same distance in the order of their paths,
compared move by move: of the shortest paths to a place, it takes the one with the earlier move
wherever there is a choice. Here a search is a list of sets: the cells at distance 0, 1, 2, … Going
back through them from a place leaves the cells on its shortest paths, and the first move that stays
on these is the bot's.

Doors, keys and boxes are still handled by minigrid's code. tests/recording/test_fast.py compares
every action with stock minigrid.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from minigrid.core.world_object import WorldObj
from minigrid.envs.babyai.core.verifier import ObjDesc
from minigrid.utils.baby_ai_bot import (
    BabyAIBot,
    CloseSubgoal,
    DropSubgoal,
    ExploreSubgoal,
    GoNextToSubgoal,
    OpenSubgoal,
    PickupSubgoal,
)
from numpy.typing import NDArray

from demotools.babyai.cells import ACTIONS, CLOSED, DOOR, EMPTY, OPEN, UNPACKING_TABLE, WALL
from demotools.recording.environment import BORDER, FORWARD, FastView

Position = tuple[int, int]

_LEFT, _RIGHT, _FORWARD = (ACTIONS.index(name) for name in ("left", "right", "forward"))
_SIDEWAYS_IN_VIEW = 3
"""Cells beside the agent that are in its view, to one side."""


def _digits(cells: NDArray[np.bool_]) -> bytes:
    """For `bytes.translate`: by packed cell, the digit 1 or 0."""
    return bytes(np.where(cells, ord("1"), ord("0")).astype(np.uint8))


_KIND, _STATE = UNPACKING_TABLE[:, 0], UNPACKING_TABLE[:, 2]
_IS_WALL = _KIND == WALL
_IS_EMPTY = _KIND == EMPTY
_IS_DOOR = _KIND == DOOR
_IS_SHUT = _IS_DOOR & (_STATE != OPEN)
_WALLS = _digits(_IS_WALL)
_EMPTY = _digits(_IS_EMPTY)
_FREE = _digits(_IS_EMPTY | (_IS_DOOR & ~_IS_SHUT))
# where the bot goes on once it has moved away what stands there
_PASSABLE = _digits(~_IS_WALL & ~_IS_SHUT)
_SHUT_DOORS = _digits(_IS_SHUT)
_UNLOCKED_DOORS = _digits(_IS_DOOR & (_STATE == CLOSED))


@cache
def _moves(width: int) -> list[list[tuple[int, int]]]:
    """By direction: (step in the grid, direction) of the four neighbours in the bot's order.

    source   `BabyAIBot._breadth_first_search`: straight on, the two sides, back
    """
    number = {vector: direction for direction, vector in enumerate(FORWARD)}
    orders = [[(di, dj), (dj, di), (-dj, -di), (-di, -dj)] for di, dj in FORWARD]
    return [[(dj * width + di, number[di, dj]) for di, dj in order] for order in orders]


class _Search:
    """A breadth-first search over sets of cells, continued on demand.

    levels    the cells at distance 0, 1, 2, … from where it began, as far as it has gone
    reached   all of them
    """

    def __init__(self, start: int, onward: int, width: int) -> None:
        self.levels = [start]
        self.reached = start
        self._onward = onward
        self._width = width

    def distance(self, targets: int) -> int | None:
        """How far the nearest of these cells is; None: none can be reached."""
        levels, reached = self.levels, self.reached
        if targets & reached:
            return next(at for at, level in enumerate(levels) if level & targets)
        onward, width, level = self._onward, self._width, levels[-1]
        while level:
            out = level & onward
            level = (out << 1 | out >> 1 | out << width | out >> width) & ~reached
            if level:
                reached |= level
                levels.append(level)
            if level & targets:
                break
        self.reached = reached
        return len(levels) - 1 if level else None

    def ways(self, targets: int, distance: int) -> list[int]:
        """The cells on the shortest paths to those at `distance`: at distance 0, 1, …"""
        onward, width = self._onward, self._width
        way = targets & self.levels[distance]
        ways = [way]
        for level in self.levels[distance - 1 :: -1] if distance else []:
            way = (way << 1 | way >> 1 | way << width | way >> width) & level & onward
            ways.append(way)
        ways.reverse()
        return ways


class _Route(NamedTuple):
    """A way to a cell.

    end       column and row where it ends
    step      those of its first cell; None where it has no length
    length    in cells
    blocked   there are things to be moved out of the way
    """

    end: Position
    step: Position | None
    length: int
    blocked: bool = False


class FastBot(BabyAIBot):
    """The bot of one episode of a `FastView` level, which must have been reset.

    Cells are numbered as in minigrid's `Grid.grid`, row by row. What is said here of the present
    is true from one look at the environment to the next.

    vis_mask    bool [columns, rows] of the grid, what the bot has seen
    width       columns of the grid
    position    the agent's column and row; `place` is the number of its cell
    direction   0 right, 1 down, 2 left, 3 up
    front       column and row of the cell in front of it; `ahead` is what stands there
    """

    vis_mask: NDArray[np.bool_]

    def __init__(self, level: FastView) -> None:
        super().__init__(level)  # type: ignore[no-untyped-call]
        self.level = level
        layout = level.current_world().layout
        self._seen = np.zeros(layout.height * layout.width, dtype=np.bool_)
        self._seen_inside = self._inside(self._seen)
        self.vis_mask = self._seen_inside.T
        self.width, self.height = self.vis_mask.shape
        self._every_cell = (1 << self.width * self.height) - 1
        self._cells = b""
        self._walkable = self._reached = 0
        self._search = _Search(0, 0, self.width)
        self._search_on: _Search | None = None

    def _inside(self, cells: NDArray[Any]) -> NDArray[Any]:
        """[rows, columns] of the grid, without the border."""
        layout = self.level.current_world().layout
        return cells.reshape(layout.height, layout.width)[BORDER:-BORDER, BORDER:-BORDER]

    def cells_that(self, digits: bytes) -> int:
        """The cells whose packed cell has the digit 1."""
        return int(self._inside_cells.translate(digits)[::-1], 2)

    def _process_obs(self) -> None:
        """As minigrid's: what the last view showed is known from now on."""
        level, world = self.level, self.level.current_world()
        self._seen[level.places[level.seen]] = True
        bits = np.packbits(self._seen_inside, bitorder="little")
        self._known = known = int.from_bytes(bits.tobytes(), "little")
        if (cells := world.cells.tobytes()) != self._cells:
            self._cells = cells
            self._inside_cells = self._inside(world.cells).tobytes()
            self._free = self.cells_that(_FREE)
            self._passable = self.cells_that(_PASSABLE)
        column, row = level.agent_pos
        self.position = column, row = int(column), int(row)
        self.direction = int(level.agent_dir)
        across, down = FORWARD[self.direction]
        self.front = column + across, row + down
        self.place = row * self.width + column
        self.ahead = level.grid.grid[self.place + down * self.width + across]
        self._find_what_is_in_reach(self._free & known)

    def _find_what_is_in_reach(self, walkable: int) -> None:
        """Begin the searches anew; what could be reached still can where nothing was shut."""
        self._reached |= self._search.reached
        if self._walkable & ~walkable or not self._reached >> self.place & 1:
            self._reached = 0
        self._walkable = walkable
        self._search, self._search_on = _Search(1 << self.place, walkable, self.width), None

    def _remember_current_state(self) -> None:
        """As minigrid's."""
        self.prev_agent_pos = self.level.agent_pos
        self.prev_carrying = self.level.carrying
        self.prev_fwd_cell = self.ahead
        if self.ahead is not None and self.ahead.type == "door":
            self.fwd_door_was_open = self.ahead.is_open

    @property
    def unknown(self) -> int:
        """The cells that have not been seen."""
        unknown: int = self._every_cell & ~self._known
        return unknown

    def beside(self, turn: int) -> Any:
        """What stands to the right hand of the agent (`turn` 1), or to the left (-1)."""
        across, down = FORWARD[(self.direction + turn) % 4]
        return self.level.grid.grid[self.place + down * self.width + across]

    def room_beside(self, turn: int) -> int:
        """How far off the next wall or door on that side is, as far as it is in view.

        source   `BabyAIBot._closest_wall_or_door_given_dir`
        """
        across, down = FORWARD[(self.direction + turn) % 4]
        step, cells = down * self.width + across, self.level.grid.grid
        for distance in range(1, _SIDEWAYS_IN_VIEW + 1):
            thing = cells[self.place + distance * step]
            if thing is not None and thing.type in ("door", "wall"):
                return distance
        return _SIDEWAYS_IN_VIEW

    def cell(self, position: Position) -> int:
        """The set of one cell; of none where the position is outside the grid."""
        column, row = int(position[0]), int(position[1])
        inside = 0 <= column < self.width and 0 <= row < self.height
        return 1 << row * self.width + column if inside else 0

    def route(self, targets: int, *, through_blockers: bool = True) -> _Route | None:
        """The way to the first of these cells that the bot's search comes upon.

        through_blockers   where there is none, look for one that moves things out of the way
        source             `BabyAIBot._shortest_path`
        """
        first = self._search
        if (distance := first.distance(targets)) is not None:
            ways = first.ways(targets, distance)
            step, end = self._walk(self.place, self.direction, ways)
            return _Route(end, step, distance)
        if not through_blockers:
            return None
        if (second := self._search_on) is None:
            second = _Search(first.reached, self._passable & self._known, self.width)
            self._search_on = second
        if (distance := second.distance(targets)) is None:
            return None
        # it begins in all cells of the first search, in the order in which that came upon them
        ways = second.ways(targets, distance)
        start = self.route(ways[0], through_blockers=False)
        assert start is not None
        column, row = start.end
        step, end = self._walk(row * self.width + column, 0, ways)
        return _Route(end, start.step or step, start.length + distance, blocked=True)

    def _walk(
        self, place: int, direction: int, ways: list[int]
    ) -> tuple[Position | None, Position]:
        """The first step of the bot's choice among the paths of `ways`, if any, and its end."""
        moves, first, end = _moves(self.width), None, ways[-1]
        for way in ways[1:]:
            for step, heading in moves[direction]:
                if way >> place + step & 1:
                    place, direction = place + step, heading
                    break
            first = place if first is None else first
            if not end & (end - 1):
                # all paths have the same end
                place = end.bit_length() - 1
                break
        row, column = divmod(place, self.width)
        if first is None:
            return None, (column, row)
        return (first % self.width, first // self.width), (column, row)

    def _find_obj_pos(self, obj_desc: Any, adjacent: bool = False) -> tuple[Any, Any]:
        """As minigrid's: the nearest object that is known, and where it is."""
        assert len(obj_desc.obj_set) > 0
        known, carried = self._known, self.level.carrying
        # minigrid skips the last objects where there are fewer positions than objects
        found = [
            (cell, thing, position)
            for thing, position in zip(obj_desc.obj_set, obj_desc.obj_poss, strict=False)
            if thing.type != "wall" and thing is not carried
            if (cell := self.cell(position)) & known
        ]
        if not found:
            return None, None
        wanted = 0
        for cell, _, _ in found:
            wanted |= cell
        at, all_in_reach = 0, self._all_in_reach(wanted)
        if len(found) > 1 or not all_in_reach:
            near = self._search.distance(wanted) if all_in_reach else None
            if near is not None and near >= (2 if adjacent else 1):
                hits = self._search.levels[near]
                at = next(at for at, (cell, _, _) in enumerate(found) if cell & hits)
            else:
                steps = [self._steps_to(cell, adjacent=adjacent) for cell, _, _ in found]
                at = steps.index(min(steps))
        return found[at][1:]

    def _all_in_reach(self, targets: int) -> bool:
        """Whether all of these cells can be reached with nothing moved out of the way."""
        search = self._search
        while missing := targets & ~(self._reached | search.reached):
            if search.distance(missing) is None:
                return False
        return True

    def _steps_to(self, target: int, *, adjacent: bool) -> int:
        """How far the bot takes a known object to be; what is not to be reached is an error."""
        route = self.route(target)
        assert route is not None
        if route.blocked:
            return route.length + (7 if self.level.carrying else 4)
        # standing on it, or being too near to put something next to it, costs steps
        if adjacent and route.length <= 1:
            return 3
        return route.length or 2

    def _find_drop_pos(self, except_pos: Any = None) -> Any:
        """As minigrid's: where something can be dropped, if possible without blocking a way."""
        kept = 1 << self.place | (self.cell(except_pos) if except_pos else 0)
        empty = self.cells_that(_EMPTY) & self._known & ~kept
        harmless = self._harmless(empty, self.cell(except_pos) if except_pos else 0)
        for through_blockers in (False, True):
            for targets in (harmless, empty):
                if route := self.route(targets, through_blockers=through_blockers):
                    return route.end
        return None

    def _harmless(self, cells: int, taken: int) -> int:
        """Those of `cells` where an object leaves free neighbours connected, and others in reach.

        taken    a cell that will hold something
        source   `match_unblock` of `BabyAIBot._find_drop_pos`, for all cells at once
        """
        known = self._known
        free = known & (self._free | 1 << self.place) & ~taken
        things = self._every_cell & ~free & ~(known & self.cells_that(_WALLS))
        width = self.width
        # once around a cell, beginning at the upper left
        around = (-width - 1, -width, -width + 1, 1, width + 1, width, width - 1, -1)
        free_at = [free >> step if step > 0 else free << -step for step in around]
        thing_at = [things >> step if step > 0 else things << -step for step in around]
        one, more, cut_off = 0, 0, 0
        for side in range(8):
            before, after = free_at[side - 1], free_at[(side + 1) % 8]
            begins = free_at[side] & ~before
            more |= one & begins
            one |= begins
            cut_off |= thing_at[side] & ~before & ~after
        return cells & ~more & ~cut_off


class _Now:
    """What a subgoal knows of the agent, read from the bot when it is asked."""

    bot: Any

    def update_agent_attributes(self) -> None:
        """Nothing is copied."""

    @property
    def pos(self) -> Any:
        return self.bot.level.agent_pos

    @property
    def dir_vec(self) -> Any:
        return self.bot.level.dir_vec

    @property
    def right_vec(self) -> Any:
        return self.bot.level.right_vec

    @property
    def fwd_pos(self) -> Any:
        return self.bot.front

    @property
    def fwd_cell(self) -> Any:
        return self.bot.ahead

    @property
    def carrying(self) -> Any:
        return self.bot.level.carrying


def _reading_the_bot(kind: type) -> Any:
    return type(kind.__name__, (_Now, kind), {})


_Close, _Drop = _reading_the_bot(CloseSubgoal), _reading_the_bot(DropSubgoal)
_Open, _Pickup = _reading_the_bot(OpenSubgoal), _reading_the_bot(PickupSubgoal)


class _Explore(_Now, ExploreSubgoal):
    def replan_before_action(self) -> None:
        """As minigrid's: to the nearest cell that is unknown, else to the nearest shut door."""
        bot: FastBot = self.bot
        if route := bot.route(bot.unknown):
            bot.stack.append(_GoNextTo(bot, route.end, "Explore"))
            return
        route = bot.route(bot.cells_that(_UNLOCKED_DOORS)) or bot.route(bot.cells_that(_SHUT_DOORS))
        assert route is not None, "0nothing left to explore"
        door: Any = bot.level.grid.get(*route.end)
        key = self.carrying
        has_key = key and key.type == "key" and key.color == door.color
        bot.stack.pop()
        bot.stack.append(_Open(bot, reason="KeepKey" if door.is_locked and has_key else None))
        bot.stack.append(_GoNextTo(bot, door, "Open"))


class _GoNextTo(_Now, GoNextToSubgoal):
    def replan_before_action(self) -> int | None:
        """As minigrid's."""
        bot: FastBot = self.bot
        thing, position = self._target()
        if position is None:
            bot.stack.append(_Explore(bot))
            return None
        if self._lacks_a_key(thing):
            self._get_the_key(thing)
            return None
        column, row = position
        beside = abs(column - bot.position[0]) + abs(row - bot.position[1])
        if beside == (1 if self.reason == "PutNext" else 0):
            return self._step_away()
        if self.reason == "PutNext":
            if self._can_put_next_to(position):
                return None
        elif position == bot.front:
            bot.stack.pop()
            return None
        route = bot.route(bot.cell(position))
        if route is None or route.step is None:
            bot.stack.append(_Explore(bot))
            return None
        return self._move_to(route.step)

    def _target(self) -> tuple[Any, Any]:
        """The object that it goes next to, if it is one, and where; None: nobody knows."""
        if isinstance(self.datum, ObjDesc):
            thing, position = self.bot._find_obj_pos(self.datum, self.reason == "PutNext")
            return thing, position or None
        if isinstance(self.datum, WorldObj):
            return self.datum, self.datum.cur_pos
        return None, tuple(self.datum)

    def _lacks_a_key(self, thing: Any) -> bool:
        """Whether a door is locked; what is carried, be it the key or not, is taken there."""
        is_door = self.reason == "Open" and thing is not None and thing.type == "door"
        return bool(is_door and thing.is_locked and not self.carrying)

    def _get_the_key(self, door: Any) -> None:
        bot = self.bot
        key: Any = ObjDesc("key", door.color)  # type: ignore[no-untyped-call]
        key.find_matching_objs(bot.mission)
        bot.stack.pop()
        bot.stack.append(_GoNextTo(bot, door, "Open"))
        bot.stack.append(_Pickup(bot))
        bot.stack.append(_GoNextTo(bot, key))

    def _can_put_next_to(self, target: Position) -> bool:
        """Whether the cell in front is beside the target; the plan is changed where it is."""
        bot: FastBot = self.bot
        column, row = bot.front
        if abs(target[0] - column) + abs(target[1] - row) != 1:
            return False
        if bot.ahead is None:
            bot.stack.pop()
            return True
        if bot.ahead.type == "door" and bot.ahead.is_open:
            # nothing can be dropped in a door: the target has to be moved
            across, down = FORWARD[bot.direction]
            bot.stack.append(_GoNextTo(bot, (column + 2 * across, row + 2 * down)))
            return True
        return False

    def _step_away(self) -> int:
        bot: FastBot = self.bot
        if _is_open(bot.ahead):
            return _FORWARD
        return _RIGHT if _is_open(bot.beside(1)) else _LEFT

    def _move_to(self, cell: Position) -> int | None:
        bot: FastBot = self.bot
        if cell == bot.front:
            return _FORWARD if bot.ahead is None else self._clear_the_way()
        across, down = FORWARD[(bot.direction + 1) % 4]
        column, row = bot.position
        if cell == (column + across, row + down):
            return _RIGHT
        if cell == (column - across, row - down):
            return _LEFT
        # it is behind: to the side on which there is more room
        return _LEFT if bot.room_beside(-1) > bot.room_beside(1) else _RIGHT

    def _clear_the_way(self) -> int | None:
        bot: FastBot = self.bot
        if bot.ahead.type == "door":
            assert not bot.ahead.is_locked
            if bot.ahead.is_open:
                return _FORWARD
            bot.stack.append(_Open(bot))
            return None
        spot = bot._find_drop_pos()
        if not self.carrying:
            plan = [_Drop(bot), _GoNextTo(bot, spot), _Pickup(bot)]
        else:
            elsewhere = bot._find_drop_pos(spot)
            plan = [_Pickup(bot), _GoNextTo(bot, spot)]
            plan += [_Drop(bot), _GoNextTo(bot, elsewhere)]
            plan += [_Pickup(bot), _GoNextTo(bot, bot.front)]
            plan += [_Drop(bot), _GoNextTo(bot, spot)]
        for subgoal in plan:
            bot.stack.append(subgoal)
        return None


def _is_open(thing: Any) -> bool:
    return thing is None or (thing.type == "door" and thing.is_open)


_OURS = {kind.__mro__[2]: kind for kind in (_Close, _Drop, _Explore, _GoNextTo, _Open, _Pickup)}


def fast_subgoal(subgoal: Any) -> Any:
    """The same subgoal, as one of this module's."""
    subgoal.__class__ = _OURS.get(type(subgoal), type(subgoal))
    return subgoal
