"""Many environments of one level, stepped together, in this process or in several.

Environment e plays the seeds of its own stream one after another, so what it does depends neither
on how many environments there are beside it nor on the processes that hold them: `Group` are those
of one process, `Worker` is the same in another process. What they show lies in memory shared by
all processes; pipes carry only "go on" and the texts of new missions.

Processes are spawned, not forked: the trainer's threads hold locks that a fork would copy.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from ctypes import c_uint8
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, Self
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from demotools.babyai.cells import ACTIONS, VIEW_SIZE
from demotools.babyai.levels import level_names, read_manifest
from demotools.errors import DemotoolsError, LevelError, SettingsError
from demotools.recording.bot import Expert, expert_of
from demotools.recording.environment import (
    Environment,
    Observation,
    level_environment_id,
    seen_as,
)
from demotools.recording.search import SearchExpert
from demotools.workers.processes import (
    SPAWN_ADVICE,
    signals_for_this_process_alone,
    what_hinders_spawning,
)
from trainer.settings.models import LevelSettings
from trainer.settings.user_code import (
    made_environment,
    recipe_folders,
    search_recipe_folders,
    users_code,
)

_VIEW = (VIEW_SIZE, VIEW_SIZE)


@cache
def _shown(view: tuple[int, ...]) -> np.dtype[Any]:
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


_SECONDS_TO_END = 5.0

Missions = dict[int, str]
"""The missions that are new, by the number of the environment in its process."""
Start = tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]]
"""The seeds that the environments of a process play, one stream each or one for all of them, and
the actions to be played at once in each."""


@dataclass(frozen=True)
class EnvironmentStep:
    """What n environments show now, and how the last action went.

    cells           uint8 [n, *view], packed views of 7 x 7, or what the kind says
    direction       uint8 [n], 0 right, 1 down, 2 left, 3 up
    missions        n texts
    mask            uint8 [n], memory mask: 0 where this observation begins an episode, else 1
    seed            int64 [n], seed of the episode that this observation belongs to
    expert_action   int64 [n], what the bot advises now; -1 where it does not know or was not asked
    active          bool [n], False once there is no seed left for the environment to play
    reward          float32 [n], of the last action; so are
    terminated      bool [n], the episode ended by the level's rules, and
    truncated       bool [n], the episode ended at the step limit
    final_cells, final_direction   where it ended: what its last observation showed
    """

    cells: NDArray[np.uint8]
    direction: NDArray[np.uint8]
    missions: tuple[str, ...]
    mask: NDArray[np.uint8]
    seed: NDArray[np.int64]
    expert_action: NDArray[np.int64]
    active: NDArray[np.bool_]
    reward: NDArray[np.float32]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    final_cells: NDArray[np.uint8]
    final_direction: NDArray[np.uint8]


def seed_streams(seeds: range, count: int) -> list[range]:
    """The seeds dealt out to `count` environments in turn.

    >>> seed_streams(range(100, 107), 3)
    [range(100, 107, 3), range(101, 107, 3), range(102, 107, 3)]
    """
    return [range(seeds.start + number, seeds.stop, count) for number in range(count)]


def dealt_levels(levels: Sequence[LevelSettings], count: int) -> tuple[str, ...]:
    """The level of each of `count` environments: in proportion, evenly spread.

    SettingsError  a level would get none

    >>> levels = [LevelSettings(name="A", proportion=3), LevelSettings(name="B", proportion=1)]
    >>> "".join(dealt_levels(levels, 8))
    'AABAAABA'
    """
    share = np.array([level.proportion for level in levels])
    share /= share.sum()
    dealt = np.zeros(len(levels))
    names = []
    for number in range(count):
        # the one that is furthest behind
        chosen = int(np.argmax(share * (number + 1) - dealt))
        dealt[chosen] += 1
        names.append(levels[chosen].name)
    if not dealt.all():
        raise SettingsError(
            f"{count} environments are too few for {len(levels)} levels in these proportions",
            path="on_policy.environments",
            fix=f"give more, or {levels[int(dealt.argmin())].name} a larger proportion",
        )
    return tuple(names)


class VectorEnvironment:
    """`count` environments of one kind over `processes` processes; a context manager.

    processes        0 or 1: in this process; at most one for every environment is started
    answer_seconds   after so long without an answer a process counts as hanging

    What making or stepping an environment raises is raised here; RemoteError where it was raised
    in another process; LevelError where a process died or hangs.
    """

    def __init__(
        self,
        kind: EnvironmentKind,
        count: int,
        *,
        processes: int = 1,
        answer_seconds: float = 120.0,
    ) -> None:
        self.count = count
        self._missions = [""] * count
        self._answer_seconds = answer_seconds
        self._taken: list[list[int]] = []
        self._workers: list[Worker] = []
        self._groups: Sequence[Group | Worker] = self._workers
        shown = _shown(kind.view)
        spans = _spans(count, max(1, min(processes, count)))
        if len(spans) == 1:
            self._shown = np.zeros(count, shown)
            self._groups = [Group(kind, spans[0], self._shown)]
        else:
            context = multiprocessing.get_context("spawn")
            memory: Any = context.RawArray(c_uint8, count * shown.itemsize)
            self._shown = np.frombuffer(memory, shown)
            self._workers.extend(Worker(kind, span, memory) for span in spans)

    def reset(
        self, streams: Sequence[range], taken: Sequence[Sequence[int]] | None = None
    ) -> EnvironmentStep:
        """Begin anew: environment e plays the seeds of `streams[e]`, one after another.

        taken   actions to be played at once in the first episode of each stream, which they must
                not end: with what `state` gave, everything is again as it was
        """
        assert len(streams) == self.count
        self._taken = [list(actions) for actions in taken or [()] * self.count]
        for group in self._groups:
            part = slice(group.span.start, group.span.stop)
            group.send((streams[part], self._taken[part]))
        return self._gathered()

    def play(self, seeds: Sequence[int]) -> EnvironmentStep:
        """Begin anew: each of these seeds is played once, by whichever environment is free.

        Every process has its share of the seeds, so none waits for another.
        """
        self._taken = [[] for _ in range(self.count)]
        for number, group in enumerate(self._groups):
            share = seeds[number :: len(self._groups)]
            group.send(([share], self._taken[group.span.start : group.span.stop]))
        return self._gathered()

    def step(self, actions: NDArray[np.int64]) -> EnvironmentStep:
        """Step every active environment; where an episode ends, the next one begins at once.

        actions   int64 [n], 0..6; ignored where an environment is not active
        """
        self._shown["action"] = actions
        for group in self._groups:
            group.send(None)
        step = self._gathered()
        for taken, action, mask in zip(self._taken, actions.tolist(), step.mask, strict=True):
            if mask:
                taken.append(action)
            else:
                taken.clear()
        return step

    def state(self) -> dict[str, list[Any]]:
        """For `reset`: the seed of each environment's present episode, its actions so far."""
        return {
            "seed": self._shown["seed"].tolist(),
            "taken": [list(taken) for taken in self._taken],
        }

    def _gathered(self) -> EnvironmentStep:
        for group in self._groups:
            for number, mission in group.receive(self._answer_seconds).items():
                self._missions[group.span.start + number] = mission
        names = [name for name in self._shown.dtype.fields or () if name != "action"]
        copies = {name: self._shown[name].copy() for name in names}
        return EnvironmentStep(missions=tuple(self._missions), **copies)

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.hang_up()
        for worker in self._workers:
            worker.end()
        self._workers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


def _spans(count: int, processes: int) -> list[range]:
    """Consecutive environments for each process, as equal as can be.

    >>> _spans(5, 2)
    [range(0, 2), range(2, 5)]
    """
    bounds = [count * number // processes for number in range(processes + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]


@dataclass(frozen=True)
class EnvironmentKind:
    """How to make one environment.

    level    handed to `make`; several: that of each environment
    make     `package.module:function` from a level to a gymnasium environment
    expert   whether the bot advises an action at each step
    view     what it shows: (H, W) of cells, or (H, W, C) of an image
    """

    level: str | tuple[str, ...]
    make: str = "demotools.recording.environment:make_environment"
    expert: bool = False
    view: tuple[int, ...] = _VIEW

    def level_of(self, number: int) -> str:
        """The level of environment `number` of all."""
        return self.level if isinstance(self.level, str) else self.level[number]


class Group:
    """The environments of one process.

    span    their numbers among all environments
    shown   [n] of _SHOWN, what the main process reads of them
    """

    def __init__(self, kind: EnvironmentKind, span: range, shown: NDArray[Any]) -> None:
        self.span = span
        self._kind = kind
        self._shown = {name: shown[name] for name in shown.dtype.fields or ()}
        self._environments: list[Environment] = [
            made_environment(kind.make, kind.level_of(number)) for number in span
        ]
        self._images = np.zeros(
            (len(span), *(kind.view if len(kind.view) == 3 else (*kind.view, 3))), dtype=np.uint8
        )
        self._streams: list[Iterator[int]] = []
        self._experts: list[Expert | SearchExpert | None] = [None for _ in span]
        self._missions: Missions = {}

    def send(self, start: Start | None) -> None:
        """Begin the first episode of every stream, or step the active environments."""
        self._missions = {}
        for name in ("reward", "terminated", "truncated"):
            self._shown[name][:] = 0
        if start is None:
            for number in np.flatnonzero(self._shown["active"]).tolist():
                self._step(number, int(self._shown["action"][number]))
        else:
            streams, taken = start
            self._streams = [iter(stream) for stream in streams]
            self._streams *= len(self._environments) // len(streams)
            self._shown["expert_action"][:] = -1
            self._shown["active"][:] = True
            for number, actions in enumerate(taken):
                self._begin(number)
                for action in actions:
                    self._step(number, action)
        self._shown["cells"][:] = seen_as(self._images, self._kind.view)

    def receive(self, _seconds: float) -> Missions:
        """The missions that are new after `send`."""
        return self._missions

    def _step(self, number: int, action: int) -> None:
        with self._with_note(number, f"step({action})"):
            ended = self._play(number, action)
        if ended:
            self._begin(number)
            return
        self._shown["mask"][number] = 1
        self._ask_expert(number, action)

    def _play(self, number: int, action: int) -> bool:
        """Whether this action ends the episode."""
        shown = self._shown
        observation, reward, terminated, truncated, _ = self._environments[number].step(action)
        shown["reward"][number] = reward
        shown["terminated"][number] = terminated
        shown["truncated"][number] = truncated
        if terminated or truncated:
            shown["final_cells"][number] = seen_as(observation["image"], self._kind.view)
            shown["final_direction"][number] = observation["direction"]
            return True
        self._show(number, observation)
        return False

    def _begin(self, number: int) -> None:
        shown = self._shown
        seed = next(self._streams[number], None)
        shown["mask"][number] = 0
        if seed is None:
            shown["active"][number] = False
            return
        shown["seed"][number] = seed
        environment = self._environments[number]
        with self._with_note(number, f"reset(seed={seed})"):
            observation, _ = environment.reset(seed=seed)
            self._show(number, observation)
            self._missions[number] = str(observation["mission"])
            if self._kind.expert:
                self._experts[number] = expert_of(environment)
        self._ask_expert(number, None)

    def _show(self, number: int, observation: Observation) -> None:
        self._images[number] = observation["image"]
        self._shown["direction"][number] = observation["direction"]

    @contextmanager
    def _with_note(self, number: int, call: str) -> Iterator[None]:
        """What the environment raises, with a note of what repeats it."""
        try:
            with users_code("environment", self._kind.make):
                yield
        except DemotoolsError:
            raise
        except Exception as error:
            seed = self._shown["seed"][number]
            error.add_note(
                f"at `{call}` in the episode of seed {seed} of "
                f"`{self._kind.level_of(self.span.start + number)}`: the same seed and actions "
                "show it again"
            )
            raise

    def _ask_expert(self, number: int, taken: int | None) -> None:
        expert = self._experts[number]
        advised = -1 if expert is None else expert.advice(taken)
        self._shown["expert_action"][number] = advised


class RemoteError(Exception):
    """What an environment raised in another process; its text is the traceback there."""


class Worker:
    """A Group in a process of its own.

    memory   of _SHOWN, of all environments
    """

    def __init__(self, kind: EnvironmentKind, span: range, memory: Any) -> None:
        self.span = span
        self._kind = kind
        self._seeds = np.frombuffer(memory, _shown(kind.view))["seed"][span.start : span.stop]
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(
            target=_serve, args=(theirs, kind, span, memory, recipe_folders()), daemon=True
        )
        # only here: the processes themselves do without torch
        from trainer.team import STOPPING

        # the loop needs its helpers until its state is whole
        with signals_for_this_process_alone(STOPPING):
            self.process.start()
        theirs.close()
        self._started = False
        _workers.add(self)

    def send(self, start: Start | None) -> None:
        """Have it begin anew, or take a step."""
        # that it is gone is noticed, and said, where the answer is awaited
        with suppress(OSError):
            self._connection.send(start)

    def receive(self, seconds: float) -> Missions:
        """Its answer: the missions that are new; raises where that is the answer, or there is none.

        seconds   to wait for it
        """
        try:
            if not self._connection.poll(seconds):
                self.process.kill()
                raise self._lost(f"did not answer for {seconds:.0f} seconds")
            reply: Missions | Exception = self._connection.recv()
        except (EOFError, OSError) as error:
            self.process.join(_SECONDS_TO_END)
            if not self._started and (why := what_hinders_spawning()):
                raise SettingsError(
                    f"no environment process could be started: {why}",
                    path="processes",
                    fix=SPAWN_ADVICE,
                ) from error
            raise self._lost(f"died (exit code {self.process.exitcode})") from error
        self._started = True
        if isinstance(reply, Exception):
            raise reply
        return reply

    def _lost(self, what: str) -> LevelError:
        seeds = " or ".join(map(str, self._seeds.tolist()))
        return LevelError(
            f"an environment process {what} at seed {seeds}",
            path=", ".join(dict.fromkeys(map(self._kind.level_of, self.span))),
            fix="look above for its own message; if it was out of memory, use fewer environments",
        )

    def hang_up(self) -> None:
        """Tell it to end."""
        self._connection.close()

    def end(self) -> None:
        """Wait for its end, not for long."""
        self.process.join(_SECONDS_TO_END)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


_workers: WeakSet[Worker] = WeakSet()


@atexit.register
def _end_all() -> None:
    # multiprocessing would send SIGTERM, which they do not see, and wait
    for worker in list(_workers):
        worker.hang_up()


def _serve(
    connection: Connection, kind: EnvironmentKind, span: range, memory: Any, folders: list[str]
) -> None:
    """A worker's life: one reply for every message, until the other end is closed.

    folders   see `recipe_folders`
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    search_recipe_folders(folders)
    group: Group | None = None
    while True:
        try:
            start: Start | None = connection.recv()
            reply: Missions | Exception
            try:
                shown = np.frombuffer(memory, _shown(kind.view))[span.start : span.stop]
                group = group or Group(kind, span, shown)
                group.send(start)
                reply = group.receive(0)
            except DemotoolsError as error:
                reply = error
            except Exception:  # noqa: BLE001, whatever it is, it is raised where it is read
                reply = RemoteError(traceback.format_exc())
            connection.send(reply)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return


def check_playable(level: str) -> None:
    """LevelError where the level is one without an environment, ManifestError where unknown."""
    if ":" in level:
        return  # known once its module has been imported
    try:
        level_environment_id(level)
    except LevelError as error:
        playable = [name for name in level_names() if read_manifest(name).environment_id]
        raise LevelError(
            error.what, path=error.path, fix=f"these can be played: {', '.join(playable)}"
        ) from error


def check_named(actions: int, level: str) -> None:
    """LevelError where a level has actions that have no names, which could not be shown."""
    if actions > len(ACTIONS):
        raise LevelError(
            f"it has {actions} actions, of which only {len(ACTIONS)} have names",
            path=level,
            fix="measure it with `trainer evaluate`, and leave out evaluation.gifs",
        )
