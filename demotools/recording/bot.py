"""Minigrid's expert bot: its actions, found several times as fast, and whole episodes.

The bot's planning may never end on some episodes, so it is cut off: not after some time, but after
a number of replanning steps for one action, so that the same seed gives the same result on every
machine. Failures are values with a reason: they are counted, and recorded only on request.

On a `FastView` level the bot is that of demotools/recording/fast_bot.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, SupportsIndex

import numpy as np
from minigrid.envs.babyai.core.roomgrid_level import RoomGridLevel
from minigrid.envs.babyai.core.verifier import AfterInstr, SeqInstr
from minigrid.utils.baby_ai_bot import (
    BabyAIBot,
    DisappearedBoxError,
    DropSubgoal,
    GoNextToSubgoal,
)
from numpy.typing import NDArray

from demotools.babyai.cells import ACTIONS
from demotools.recording.environment import Environment, FastView, observed_cells
from demotools.recording.fast_bot import FastBot, fast_subgoal
from demotools.recording.search import ExpertError, SearchExpert, is_searchable
from demotools.recording.subgoals import subgoal_code
from demotools.store.format import OUTCOMES

# The most that an action of a solved episode took is 8 (docs/log.md).
REPLANS_AT_MOST = 50
"""Looks at its plan that the bot may take for one action."""

_DONE = ACTIONS.index("done")
# What the bot's assertions and its searches that find nothing end in.
_BOT_ERRORS = (
    AssertionError,
    AttributeError,
    DisappearedBoxError,
    IndexError,
    TypeError,
    ValueError,
)


class BotError(ExpertError):
    """The bot has no action: its text is the reason, the same for the same cause."""


@dataclass(frozen=True)
class Episode:
    """A solved episode of T steps.

    seed        the environment's seed
    cells       uint8 [T, 7, 7], packed views before each action
    direction   uint8 [T], 0 right, 1 down, 2 left, 3 up
    action      uint8 [T], 0..6, what the bot advised
    optional    [T] each: the action `taken`, the `subgoal`, `terminated`, uint8, the `reward`,
                float32, as the style asks for them
    failure     why it was not solved, and kept all the same; empty where it was solved
    """

    mission: str
    seed: int
    cells: NDArray[np.uint8]
    direction: NDArray[np.uint8]
    action: NDArray[np.uint8]
    optional: dict[str, NDArray[Any]] = field(default_factory=dict)
    failure: str = ""


@dataclass(frozen=True)
class Style:
    """How episodes are played, and what is kept of them beside the bot's actions.

    noise      0 <= noise <= 1, probability at each step that random actions begin
    burst      the most of them in a row, at least 1; as many as that are equally likely as fewer
    subgoals   keep the bot's subgoals
    failures   keep episodes that are not solved, up to where they end, and how every step ended
    """

    noise: float = 0.0
    burst: int = 5
    subgoals: bool = False
    failures: bool = False

    @property
    def arrays(self) -> list[str]:
        """The optional arrays that such episodes have."""
        wanted = {"taken": self.noise, "subgoal": self.subgoals}
        return [
            *(name for name, kept in wanted.items() if kept),
            *(OUTCOMES if self.failures else ()),
        ]


PLAIN = Style()


@dataclass(frozen=True)
class Failure:
    """An episode that the bot did not solve."""

    seed: int
    reason: str


def can_play(environment: Environment) -> bool:
    """Whether there is an expert for this environment; it may be reset to find out.

    The bot plays BabyAI's levels, `SearchExpert` minigrid's with a goal that a search can find.
    """
    return is_bots(environment) or is_searchable(environment)


def is_bots(environment: Environment) -> bool:
    """Whether minigrid's bot knows how to play this environment: BabyAI's levels."""
    return isinstance(environment.unwrapped, RoomGridLevel)


def expert_name(environment: Environment) -> str:
    """What plays an environment, as `module.Name`."""
    kind = BabyAIBot if is_bots(environment) else SearchExpert
    return f"{kind.__module__}.{kind.__qualname__}"


def expert_of(environment: Environment) -> Expert | SearchExpert:
    """The expert for the current episode of one environment, which must have been reset."""
    return Expert(environment) if is_bots(environment) else SearchExpert(environment)


class Expert:
    """The bot for the current episode of a BabyAI level, which must have been reset."""

    def __init__(self, environment: Environment) -> None:
        self._level: Any = environment.unwrapped
        self._begin()

    def _begin(self) -> None:
        is_fast = isinstance(self._level, FastView)
        kind: Any = FastBot if is_fast else BabyAIBot
        made_own: Any = fast_subgoal if is_fast else lambda subgoal: subgoal
        self._bot = kind(self._level)
        self._plan = self._bot.stack = _CountedPlan(self._bot.stack, made_own)
        self._asked = False

    def action(self, taken: int | None = None) -> int:
        """The action that the bot advises in the environment's present state, 0..6.

        taken      the action taken since the last call; None: the one that was advised

        BotError   the bot gives up, or its plan does not come to an end
        """
        self._plan.looks_left = REPLANS_AT_MOST
        try:
            action = int(self._bot.replan(taken if self._asked else None))
            self._asked = True
            return action
        except _BOT_ERRORS as error:
            # an assertion names its cause, other texts may differ between versions of Python
            cause = f": {error}" if isinstance(error, AssertionError) and str(error) else ""
            raise BotError(f"{type(error).__name__}{cause}") from error

    def advice(self, taken: int | None = None) -> int:
        """What the bot would do now, whatever has been done before; -1 where it does not know.

        Where an agent's own actions have broken its plan, the bot begins anew: it knows all that
        it has seen, and does the parts of the mission that are left.

        taken      as for `action`
        """
        for _ in range(2):
            with suppress(BotError):
                if (action := self.action(taken)) != _DONE:
                    return action
            try:
                self._begin_anew()
            except (BotError, *_BOT_ERRORS):
                break
        return -1

    def _begin_anew(self) -> None:
        parts, seen = _unfinished(self._level.instrs), self._bot.vis_mask
        if not all(_can_be_done(part, self._level) for part in parts):
            raise BotError("an object that the mission needs is gone")
        self._begin()
        self._bot.vis_mask |= seen
        self._bot._process_obs()
        self._plan.clear()
        for part in reversed(parts):
            self._bot._process_instr(part)
        if self._level.carrying:
            self._plan.append(DropSubgoal(self._bot))
            self._plan.append(GoNextToSubgoal(self._bot, self._bot._find_drop_pos()))

    def subgoal(self) -> int:
        """What the action that was advised last is for: a code of `SUBGOALS`."""
        return subgoal_code(next(reversed(self._plan), None), self._level)


def _unfinished(instruction: Any) -> list[Any]:
    """The parts of an instruction that are not done, in the order in which they are to be done."""
    if not isinstance(instruction, SeqInstr):
        return [instruction]
    both: Any = instruction
    halves = [(both.instr_a, both.a_done), (both.instr_b, both.b_done)]
    if isinstance(instruction, AfterInstr):
        halves.reverse()
    return [part for half, done in halves if done != "success" for part in _unfinished(half)]


def _can_be_done(part: Any, level: Any) -> bool:
    """Whether there still is one of each kind of thing that it speaks of: an opened box is gone."""
    kinds = (getattr(part, name, None) for name in ("desc", "desc_move", "desc_fixed"))
    return all(
        any(one is level.carrying or level.grid.get(*one.cur_pos) is one for one in kind.obj_set)
        for kind in kinds
        if kind is not None
    )


# One stream for an environment seed, which has nothing to do with the level's own.
_NOISE_STREAM = 0x6E6F697365
_RANDOM_ACTIONS = _DONE
"""The random actions are those before `done`, which does nothing in BabyAI."""


def random_actions(seed: int, style: Style) -> Iterator[int | None]:
    """At each step the random action to take, or None where the bot's is to be taken.

    The raw output of a bit generator is the one random stream that numpy promises never to change.
    """
    draw = np.random.PCG64([seed, _NOISE_STREAM]).random_raw
    while True:
        if draw() >= style.noise * 2.0**64:
            yield None
            continue
        for _step in range(1 + draw() % style.burst):
            yield draw() % _RANDOM_ACTIONS


def record_episode(environment: Environment, seed: int, style: Style = PLAIN) -> Episode | Failure:
    """The episode that the bot plays from `seed`, or why it did not solve it.

    Solved means reward > 0 within the level's step limit. One that is not solved is kept where the
    style asks for it, and the bot had an action at all.
    """
    observation, _ = environment.reset(seed=seed)
    mission = str(observation["mission"])
    images: list[NDArray[np.uint8]] = []
    directions: list[int] = []
    actions: list[int] = []
    optional: dict[str, list[float]] = {name: [] for name in style.arrays}
    expert, taken, failure = expert_of(environment), None, ""
    for random_action in random_actions(seed, style):
        try:
            action = expert.action(taken)
        except ExpertError as error:
            failure = str(error)
            break
        taken = action if random_action is None else random_action
        images.append(observation["image"])
        directions.append(observation["direction"])
        actions.append(action)
        if style.noise:
            optional["taken"].append(taken)
        if style.subgoals:
            optional["subgoal"].append(expert.subgoal())
        observation, reward, terminated, truncated, _ = environment.step(taken)
        if style.failures:
            optional["reward"].append(float(reward))
            optional["terminated"].append(terminated)
        if terminated or truncated:
            if float(reward) <= 0:
                failure = "terminated without reward" if terminated else "step limit"
            break
        if action == _DONE:
            failure = "the bot stopped before the mission was solved"
            break
    if failure and not (style.failures and actions):
        return Failure(seed, failure)
    return Episode(
        mission=mission,
        seed=seed,
        cells=observed_cells(np.stack(images)),
        direction=np.array(directions, dtype=np.uint8),
        action=np.array(actions, dtype=np.uint8),
        optional={
            name: np.array(values, OUTCOMES.get(name, "uint8")) for name, values in optional.items()
        },
        failure=failure,
    )


class _CountedPlan(list[Any]):
    """The bot's stack of subgoals, which the bot reads once for every time it replans.

    made_own   applied to every subgoal
    """

    looks_left = REPLANS_AT_MOST

    def __init__(self, subgoals: Iterable[Any], made_own: Callable[[Any], Any]) -> None:
        super().__init__(map(made_own, subgoals))
        self._made_own = made_own

    def append(self, subgoal: Any) -> None:
        super().append(self._made_own(subgoal))

    def __getitem__(self, index: SupportsIndex | slice) -> Any:
        self.looks_left -= 1
        if self.looks_left < 0:
            raise BotError("replan limit")
        return super().__getitem__(index)
