"""Minigrid's expert bot: its actions, and whole episodes of it.

The bot's own planning may never end on some episodes, so it is cut off: not by a clock, but by
the number of times that it looks at its plan for one action, so that the same seed gives the same
result on every machine. Failures are values with a reason: they are counted, never recorded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np
from minigrid.envs.babyai.core.roomgrid_level import RoomGridLevel
from minigrid.utils.baby_ai_bot import BabyAIBot, DisappearedBoxError
from numpy.typing import NDArray

from demotools.environment import Environment, observed_cells
from demotools.fastbot import FastBot
from demotools.fastview import FastView
from demotools.grid import ACTIONS

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


class BotError(Exception):
    """The bot has no action: its text is the reason, the same for the same cause."""


@dataclass(frozen=True)
class Episode:
    """A solved episode of T steps.

    seed        the environment's seed
    cells       uint8 [T, 7, 7], packed views before each action
    direction   uint8 [T], 0 right, 1 down, 2 left, 3 up
    action      uint8 [T], 0..6
    """

    mission: str
    seed: int
    cells: NDArray[np.uint8]
    direction: NDArray[np.uint8]
    action: NDArray[np.uint8]


@dataclass(frozen=True)
class Failure:
    """An episode that the bot did not solve."""

    seed: int
    reason: str


def can_play(environment: Environment) -> bool:
    """Whether the bot knows how to play this environment: BabyAI's levels."""
    return isinstance(environment.unwrapped, RoomGridLevel)


class Expert:
    """The bot for the current episode of one environment, which must have been reset."""

    def __init__(self, environment: Environment) -> None:
        level: Any = environment.unwrapped
        kind: Any = FastBot if isinstance(level, FastView) else BabyAIBot
        self._bot = kind(level)
        self._plan = self._bot.stack = _CountedPlan(self._bot.stack)

    def action(self, taken: int | None = None) -> int:
        """The action that the bot advises in the environment's present state, 0..6.

        taken      the action taken since the last call; None: the one that was advised

        BotError   the bot gives up, or its plan does not come to an end
        """
        self._plan.looks_left = REPLANS_AT_MOST
        try:
            return int(self._bot.replan(taken))
        except _BOT_ERRORS as error:
            # an assertion names its cause, other texts may differ between versions of Python
            cause = f": {error}" if isinstance(error, AssertionError) and str(error) else ""
            raise BotError(f"{type(error).__name__}{cause}") from error


def record_episode(environment: Environment, seed: int) -> Episode | Failure:
    """The episode that the bot plays from `seed`, or why it did not solve it.

    Solved means reward > 0 within the level's step limit.
    """
    observation, _ = environment.reset(seed=seed)
    mission = str(observation["mission"])
    images: list[NDArray[np.uint8]] = []
    directions: list[int] = []
    actions: list[int] = []
    expert = Expert(environment)
    while True:
        try:
            action = expert.action()
        except BotError as error:
            return Failure(seed, str(error))
        images.append(observation["image"])
        directions.append(observation["direction"])
        actions.append(action)
        observation, reward, terminated, truncated, _ = environment.step(action)
        if terminated or truncated:
            break
        if action == _DONE:
            return Failure(seed, "the bot thought that it was done")
    if float(reward) <= 0:
        return Failure(seed, "terminated without reward" if terminated else "step limit")
    return Episode(
        mission=mission,
        seed=seed,
        cells=observed_cells(np.stack(images)),
        direction=np.array(directions, dtype=np.uint8),
        action=np.array(actions, dtype=np.uint8),
    )


class _CountedPlan(list[Any]):
    """The bot's stack of subgoals, which the bot reads once for every time it replans."""

    looks_left = REPLANS_AT_MOST

    def __getitem__(self, index: SupportsIndex | slice) -> Any:
        self.looks_left -= 1
        if self.looks_left < 0:
            raise BotError("replan limit")
        return super().__getitem__(index)
