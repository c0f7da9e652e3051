"""The environments of one process: their observations, their seeds, and the expert's advice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from demotools.babyai.cells import VIEW_SIZE
from demotools.errors import DemotoolsError, SettingsError
from demotools.recording.batch import Batch, can_be_batched
from demotools.recording.bot import Expert, expert_of
from demotools.recording.environment import Environment, FastView, seen_as
from demotools.recording.search import SearchExpert
from trainer.settings.models import LEVELS
from trainer.settings.user_code import made_environment, users_code

_VIEW = (VIEW_SIZE, VIEW_SIZE)

Missions = dict[int, str]
"""The missions that are new, by the number of the environment in its process."""
Start = tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]]
"""The seeds that the environments of a process play, one stream each or one for all of them, and
the actions to be played at once in each."""


@cache
def shown_of(view: tuple[int, ...]) -> np.dtype[Any]:
    """What is shown of an environment, by the names of EnvironmentStep, and the action it reads."""
    fields: list[Any] = [
        ("cells", np.uint8, view),
        ("direction", np.uint8),
        ("mask", np.uint8),
        ("reward", np.float32),
        ("terminated", np.bool_),
        ("truncated", np.bool_),
        ("seed", np.int64),
        ("active", np.bool_),
        ("expert_action", np.int64),
        ("final_cells", np.uint8, view),
        ("final_direction", np.uint8),
        ("action", np.int64),
    ]
    return np.dtype(fields, align=True)


@dataclass(frozen=True)
class EnvironmentKind:
    """How to make one environment.

    level    handed to `make`; several: that of each environment
    make     `package.module:function` from a level to a gymnasium environment
    expert   whether the bot advises an action at each step
    view     what it shows: (H, W) of cells, or (H, W, C) of an image
    """

    level: str | tuple[str, ...]
    make: str = LEVELS
    expert: bool = False
    view: tuple[int, ...] = _VIEW

    def level_of(self, number: int) -> str:
        """The level of environment `number` of all."""
        return self.level if isinstance(self.level, str) else self.level[number]


def steps_as_batch(
    environments: Sequence[Environment], kind: EnvironmentKind
) -> TypeGuard[Sequence[FastView]]:
    """Whether these environments, all there are or one of each level, step as one `Batch`."""
    # an expert looks at its level before every step
    return kind.view == _VIEW and not kind.expert and all(map(can_be_batched, environments))


class Group:
    """The environments of one process.

    span    their numbers among all environments
    shown   [n] of `shown_of`, what the main process reads of them
    """

    def __init__(self, kind: EnvironmentKind, span: range, shown: NDArray[Any]) -> None:
        self.span = span
        self._kind = kind
        self._shown = {name: shown[name] for name in shown.dtype.fields or ()}
        self._environments: list[Environment] = [
            made_environment(kind.make, kind.level_of(number)) for number in span
        ]
        self._levels: Batch | _OneByOne
        if steps_as_batch(self._environments, kind):
            self._levels = Batch(self._environments)
        else:
            self._levels = _OneByOne(self._environments, kind.view, self._with_note)
        self._streams: list[Iterator[int]] = []
        self._experts: list[Expert | SearchExpert | None] = [None for _ in span]
        self._missions: Missions = {}

    def send(self, start: Start | None) -> None:
        """Begin the first episode of every stream, or step the active environments."""
        self._missions = {}
        for name in ("reward", "terminated", "truncated"):
            self._shown[name][:] = 0
        if start is None:
            rows = np.flatnonzero(self._shown["active"])
            self._step(rows, self._shown["action"][rows])
        else:
            streams, taken = start
            self._streams = [iter(stream) for stream in streams]
            self._streams *= len(self._environments) // len(streams)
            self._shown["expert_action"][:] = -1
            self._shown["active"][:] = True
            for number in range(len(taken)):
                self._begin(number)
            for time in range(max(map(len, taken))):
                going = [number for number, actions in enumerate(taken) if len(actions) > time]
                actions = [taken[number][time] for number in going]
                self._step(np.array(going), np.array(actions))
        rows = np.flatnonzero(self._shown["active"])
        self._shown["cells"][rows] = self._levels.views(rows)
        self._shown["direction"][rows] = self._levels.direction[rows]

    def receive(self, _seconds: float) -> Missions:
        """The missions that are new after `send`."""
        return self._missions

    def _step(self, rows: NDArray[np.int64], actions: NDArray[np.int64]) -> None:
        """One step of these environments, and the next episode where one ends."""
        shown = self._shown
        reward, terminated, truncated = self._levels.step(rows, actions)
        shown["reward"][rows] = reward
        shown["terminated"][rows] = terminated
        shown["truncated"][rows] = truncated
        shown["mask"][rows] = 1
        over = terminated | truncated
        if over.any():
            ended = rows[over]
            shown["final_cells"][ended] = self._levels.views(ended)
            shown["final_direction"][ended] = self._levels.direction[ended]
            for number in ended.tolist():
                self._begin(number)
        if self._kind.expert:
            for number, action in zip(rows[~over].tolist(), actions[~over].tolist(), strict=True):
                self._ask_expert(number, action)

    def _begin(self, number: int) -> None:
        shown = self._shown
        seed = next(self._streams[number], None)
        shown["mask"][number] = 0
        if seed is None:
            shown["active"][number] = False
            return
        shown["seed"][number] = seed
        with self._with_note(number, f"reset(seed={seed})"):
            self._missions[number] = self._levels.reset(number, seed)
            if self._kind.expert:
                self._experts[number] = expert_of(self._environments[number])
        self._ask_expert(number, None)

    @contextmanager
    def _with_note(self, number: int, call: str) -> Iterator[None]:
        """What the environment raises, with a note of what repeats it."""
        try:
            with users_code("environment", self._kind.make):
                yield
        except Exception as error:
            seed = self._shown["seed"][number]
            note = (
                f"at `{call}` in the episode of seed {seed} of "
                f"`{self._kind.level_of(self.span.start + number)}`: the same seed and actions "
                "reproduce it"
            )
            if isinstance(error, SettingsError):  # what it gave is not as it must be
                error.fix += f"; it happened {note}"
            elif not isinstance(error, DemotoolsError):
                error.add_note(note)
            raise

    def _ask_expert(self, number: int, taken: int | None) -> None:
        expert = self._experts[number]
        advised = -1 if expert is None else expert.advice(taken)
        self._shown["expert_action"][number] = advised


class _OneByOne:
    """Environments of any kind, one step after another; as `Batch`.

    view   what they show, see EnvironmentKind
    note   what is around each call of an environment
    """

    def __init__(
        self,
        environments: Sequence[Environment],
        view: tuple[int, ...],
        note: Callable[[int, str], AbstractContextManager[None]],
    ) -> None:
        self._environments = environments
        self._view = view
        self._note = note
        size = view if len(view) == 3 else (*view, 3)
        self._images = np.zeros((len(environments), *size), dtype=np.uint8)
        self.direction = np.zeros(len(environments), dtype=np.int64)

    def reset(self, number: int, seed: int) -> str:
        observation, _ = self._environments[number].reset(seed=seed)
        self._see(number, observation)
        return str(observation["mission"])

    def step(
        self, rows: NDArray[np.int64], actions: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.bool_]]:
        reward = np.zeros(len(rows), dtype=np.float32)
        terminated, truncated = np.zeros((2, len(rows)), dtype=np.bool_)
        taken = zip(rows.tolist(), actions.tolist(), strict=True)
        for index, (number, action) in enumerate(taken):
            with self._note(number, f"step({action})"):
                observation, reward[index], terminated[index], truncated[index], _ = (
                    self._environments[number].step(action)
                )
                self._see(number, observation)
        return reward, terminated, truncated

    def views(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        return seen_as(self._images[rows], self._view)

    def _see(self, number: int, observation: dict[str, Any]) -> None:
        self._images[number] = observation["image"]
        self.direction[number] = observation["direction"]
