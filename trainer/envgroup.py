"""The environments that one process holds: they begin, step and begin anew by themselves.

`trainer.envs` puts several such groups side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from demotools.bot import BotError, Expert
from demotools.environment import Environment, Observation, observed_cells
from demotools.errors import DemotoolsError, LevelError
from demotools.grid import VIEW_SIZE
from trainer.making import made_environment
from trainer.named import FOREIGN, told

FIELDS: dict[str, tuple[type, tuple[int, ...]]] = {
    "cells": (np.uint8, (VIEW_SIZE, VIEW_SIZE)),
    "direction": (np.uint8, ()),
    "mask": (np.uint8, ()),
    "reward": (np.float32, ()),
    "terminated": (np.bool_, ()),
    "truncated": (np.bool_, ()),
    "seed": (np.int64, ()),
    "active": (np.bool_, ()),
    "expert_action": (np.int64, ()),
    "final_cells": (np.uint8, (VIEW_SIZE, VIEW_SIZE)),
    "final_direction": (np.uint8, ()),
    "action": (np.int64, ()),
    "busy": (np.bool_, ()),
}
"""What a group shows of each environment, the action that it reads, and whether it is at work on
it (so that a death has a seed): dtype and shape."""


@dataclass(frozen=True)
class EnvironmentKind:
    """How to make one environment.

    level    handed to `make`
    make     `package.module:function` from a level to a gymnasium environment
    expert   whether the bot advises an action at each step
    """

    level: str
    make: str = "demotools.environment:make_environment"
    expert: bool = False


class Group:
    """The environments of one process.

    arrays   the fields of these environments: views of what the main process reads
    """

    def __init__(self, kind: EnvironmentKind, arrays: dict[str, NDArray[Any]]) -> None:
        self._kind = kind
        self._arrays = arrays
        self._environments: list[Environment] = [
            made_environment(kind.make, kind.level) for _ in arrays["seed"]
        ]
        self._images = np.zeros((*arrays["cells"].shape, 3), dtype=np.uint8)
        self._streams: list[Iterator[int]] = []
        self._experts: list[Expert | None] | None = [None for _ in arrays["seed"]]
        if not kind.expert:
            self._experts = None
        self._missions: dict[int, str] = {}

    def reset(self, streams: Sequence[range], taken: Sequence[Sequence[int]]) -> dict[int, str]:
        """Begin the first episode of every stream; the missions by environment.

        taken   actions that are played at once, the expert alongside
        """
        self._streams = [iter(stream) for stream in streams]
        self._clear()
        self._arrays["expert_action"][:] = -1
        self._arrays["active"][:] = True
        for number, actions in enumerate(taken):
            self._arrays["busy"][number] = True
            self._begin(number)
            for action in actions:
                self._step_one(number, action)
            self._arrays["busy"][number] = False
        return self._finished_step()

    def step(self) -> dict[int, str]:
        """Step the active environments by the array `action`; the missions that are new."""
        self._clear()
        for number in np.flatnonzero(self._arrays["active"]).tolist():
            self._arrays["busy"][number] = True
            self._step_one(number, int(self._arrays["action"][number]))
            self._arrays["busy"][number] = False
        return self._finished_step()

    def _clear(self) -> None:
        for name in ("reward", "terminated", "truncated"):
            self._arrays[name][:] = 0

    def _step_one(self, number: int, action: int) -> None:
        with self._foreign(number, f"step({action})"):
            ended = self._play(number, action)
        if ended:
            self._begin(number)
            return
        self._arrays["mask"][number] = 1
        self._ask_expert(number, action)

    def _play(self, number: int, action: int) -> bool:
        """Whether this action ends the episode."""
        arrays = self._arrays
        observation, reward, terminated, truncated, _ = self._environments[number].step(action)
        arrays["reward"][number] = reward
        arrays["terminated"][number] = terminated
        arrays["truncated"][number] = truncated
        if truncated:
            arrays["final_cells"][number] = observed_cells(observation["image"])
            arrays["final_direction"][number] = observation["direction"]
        if terminated or truncated:
            return True
        self._show(number, observation)
        return False

    def _begin(self, number: int) -> None:
        arrays = self._arrays
        seed = next(self._streams[number], None)
        arrays["mask"][number] = 0
        if seed is None:
            arrays["active"][number] = False
            return
        arrays["seed"][number] = seed
        environment = self._environments[number]
        with self._foreign(number, f"reset(seed={seed})"):
            observation, _ = environment.reset(seed=seed)
            self._show(number, observation)
            self._missions[number] = str(observation["mission"])
            if self._experts is not None:
                self._experts[number] = Expert(environment)
        self._ask_expert(number, None)

    def _show(self, number: int, observation: Observation) -> None:
        self._images[number] = observation["image"]
        self._arrays["direction"][number] = observation["direction"]

    @contextmanager
    def _foreign(self, number: int, call: str) -> Iterator[None]:
        """LevelError where the environment itself fails, with what repeats it."""
        try:
            yield
        except DemotoolsError:
            raise
        except FOREIGN as error:
            seed = self._arrays["seed"][number]
            raise LevelError(
                f"the environment of `{self._kind.level}` fails at `{call}` in the episode of "
                f"seed {seed}: {told(error)}",
                path=f"environment = {self._kind.make!r}",
                fix="correct it: the same seed and actions show the failure again",
            ) from error

    def _ask_expert(self, number: int, taken: int | None) -> None:
        if self._experts is None:
            return
        advised = -1
        if (expert := self._experts[number]) is not None:
            try:
                advised = expert.action(taken)
            except BotError:
                # its plan is broken for the rest of this episode
                self._experts[number] = None
        self._arrays["expert_action"][number] = advised

    def _finished_step(self) -> dict[int, str]:
        self._arrays["cells"][:] = observed_cells(self._images)
        missions, self._missions = self._missions, {}
        return missions
