"""Many environments of one level, stepped together, in this process or in several.

Environment e plays the seeds of its own stream one after another, so what it does depends neither
on how many environments there are beside it nor on the processes that hold them. Arrays lie in
memory shared by all processes; pipes carry only "go on" and the texts of new missions.

Processes are spawned, not forked: the trainer's threads hold locks that a fork would copy.

The environments that one process holds: they begin, step and begin anew by themselves.

`trainer.acting.vector` puts several such groups side by side.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import signal
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from ctypes import c_uint8
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any, NamedTuple, Self
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from demotools.babyai.cells import VIEW_SIZE
from demotools.babyai.levels import level_names, read_manifest
from demotools.errors import DemotoolsError, LevelError, SettingsError
from demotools.recording.bot import BotError, Expert
from demotools.recording.environment import (
    Environment,
    Observation,
    level_environment_id,
    observed_cells,
)
from demotools.workers.processes import (
    SPAWN_ADVICE,
    ctrl_c_for_this_process_alone,
    what_hinders_spawning,
)
from trainer.settings.user_code import (
    FOREIGN,
    made_environment,
    recipe_folders,
    search_recipe_folders,
    told,
)
from trainer.team import stopping_held_back

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EnvironmentStep:
    """What n environments show now, and how the last action went.

    cells           uint8 [n, 7, 7], packed views
    direction       uint8 [n], 0 right, 1 down, 2 left, 3 up
    missions        n texts
    mask            uint8 [n], memory mask: 0 where this observation begins an episode, else 1
    seed            int64 [n], seed of the episode that this observation belongs to
    expert_action   int64 [n], what the bot advises now; -1 where it gave up or was not asked for
    active          bool [n], False once an environment has played all seeds of its stream
    reward          float32 [n], of the last action; so are
    terminated      bool [n], the episode ended by the level's rules, and
    truncated       bool [n], the episode ended at the step limit
    final_cells, final_direction   where it was truncated: what its last observation showed
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


class VectorEnvironment:
    """`count` environments of one kind over `processes` processes; a context manager.

    processes        0 or 1: in this process; at most one for every environment is started
    answer_seconds   after so long without an answer a process counts as hanging

    A process that dies or hangs is started again, once, with its episodes played up to where
    they were; the log says at which seed it happened.

    DemotoolsError  what making or stepping an environment raises, or that a process died again
    """

    def __init__(
        self,
        kind: EnvironmentKind,
        count: int,
        *,
        processes: int = 1,
        answer_seconds: float = 120.0,
    ) -> None:
        self.kind = kind
        self.count = count
        self._missions = [""] * count
        self._workers: list[Worker] = []
        self._group: Group | None = None
        self._answer_seconds = answer_seconds
        self._restarted = False
        self._start = Start((), ())
        self._taken: list[list[int]] = []
        self._arrays: dict[str, NDArray[Any]]
        spans = _spans(count, max(1, min(processes, count)))
        if len(spans) == 1:
            self._arrays = {
                name: np.zeros((count, *shape), dtype) for name, (dtype, shape) in FIELDS.items()
            }
            self._group = Group(kind, self._arrays)
        else:
            context = multiprocessing.get_context("spawn")
            memory = {
                name: context.RawArray(c_uint8, count * np.dtype(dtype).itemsize * _size(shape))
                for name, (dtype, shape) in FIELDS.items()
            }
            self._shared = Shared(kind, memory, count)
            self._arrays = self._shared.arrays()
            self._workers = [Worker(self._shared, span) for span in spans]

    def reset(
        self, streams: Sequence[range], taken: Sequence[Sequence[int]] | None = None
    ) -> EnvironmentStep:
        """Begin anew: environment e plays the seeds of `streams[e]`, one after another.

        taken   actions to be played at once in the first episode of each stream, which they must
                not end: with what `state` gave, everything is again as it was
        """
        assert len(streams) == self.count
        self._start = Start(streams, taken or [()] * self.count)
        self._taken = [list(actions) for actions in self._start.taken]
        if self._group is not None:
            self._take(self._group.reset(*self._start), 0)
        for worker in self._workers:
            worker.send(_part(self._start, worker.span))
        return self._gathered(stepped=False)

    def step(self, actions: NDArray[np.int64]) -> EnvironmentStep:
        """Step every active environment; where an episode ends, the next one begins at once.

        actions   int64 [n], 0..6; ignored where an environment is not active
        """
        self._arrays["action"][:] = actions
        if self._group is not None:
            self._take(self._group.step(), 0)
        for worker in self._workers:
            worker.send(None)
        step = self._gathered(stepped=True)
        for taken, action, mask in zip(self._taken, actions.tolist(), step.mask, strict=True):
            if mask:
                taken.append(action)
            else:
                taken.clear()
        return step

    def state(self) -> dict[str, list[Any]]:
        """For `reset`: the seed of each environment's present episode, its actions so far."""
        return {
            "seed": self._arrays["seed"].tolist(),
            "taken": [list(taken) for taken in self._taken],
        }

    def _gathered(self, *, stepped: bool) -> EnvironmentStep:
        for number, worker in enumerate(self._workers):
            try:
                missions = worker.receive(self._answer_seconds)
            except WorkerLostError as loss:
                missions = self._recovered(number, str(loss), stepped=stepped)
            self._take(missions, worker.span.start)
        copies = {
            name: array.copy()
            for name, array in self._arrays.items()
            if name not in ("action", "busy")
        }
        step = EnvironmentStep(missions=tuple(self._missions), **copies)
        self._before = step
        return step

    def _recovered(self, number: int, loss: str, *, stepped: bool) -> dict[int, str]:
        """The answer of a process that was lost, from one that takes its place."""
        worker = self._workers[number]
        span = slice(worker.span.start, worker.span.stop)
        busy = np.flatnonzero(self._arrays["busy"][span])
        seeds = ", ".join(map(str, self._arrays["seed"][span][busy])) or "none"
        if self._restarted:
            raise self._lost_for_good(loss, seeds)
        self._restarted = True
        _log.warning("an environment process %s at seed %s: it is started again", loss, seeds)
        start = self._start
        if stepped:
            before = self._before
            streams = [
                range(seed, stream.stop, stream.step) if active else range(0)
                for seed, stream, active in zip(
                    before.seed.tolist(), start.streams, before.active, strict=True
                )
            ]
            start = Start(streams, self._taken)
        worker.hang_up()
        worker.end()
        self._arrays["busy"][span] = False
        self._workers[number] = worker = Worker(self._shared, worker.span)
        try:
            worker.send(_part(start, worker.span))
            missions = worker.receive(self._answer_seconds)
            if stepped:
                worker.send(None)
                missions |= worker.receive(self._answer_seconds)
        except WorkerLostError as again:
            raise self._lost_for_good(str(again), seeds) from again
        return missions

    def _lost_for_good(self, loss: str, seeds: str) -> LevelError:
        return LevelError(
            f"an environment process {loss} at seed {seeds}, though it had been started anew",
            path=self.kind.level,
            fix="look above for its own message; if it was out of memory, use fewer environments",
        )

    def _take(self, missions: dict[int, str], first: int) -> None:
        for number, mission in missions.items():
            self._missions[first + number] = mission

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.hang_up()
        for worker in self._workers:
            worker.end()
        self._workers = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _part(start: Start, span: range) -> Start:
    part = slice(span.start, span.stop)
    return Start(start.streams[part], start.taken[part])


def _spans(count: int, processes: int) -> list[range]:
    """Consecutive environments for each process, as equal as can be.

    >>> _spans(5, 2)
    [range(0, 2), range(2, 5)]
    """
    bounds = [count * number // processes for number in range(processes + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


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
    make: str = "demotools.recording.environment:make_environment"
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


_SECONDS_TO_END = 5.0


class WorkerLostError(Exception):
    """The process died or hangs; its text says which."""


class RemoteError(Exception):
    """What caused a failure in the process; its text is the traceback there."""


class Failure(NamedTuple):
    """An answer: what was raised in the process, and the traceback of its cause, if it has one."""

    error: DemotoolsError
    cause: str


class Start(NamedTuple):
    """Where environments begin: see `VectorEnvironment.reset`."""

    streams: Sequence[range]
    taken: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Shared:
    """What every process of a vector has of it.

    memory   of all environments, by the names of FIELDS
    count    of all environments
    """

    kind: EnvironmentKind
    memory: dict[str, Any]
    count: int

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The memory as arrays [count, ...]."""
        return {
            name: np.frombuffer(self.memory[name], dtype).reshape(self.count, *shape)
            for name, (dtype, shape) in FIELDS.items()
        }


class Worker:
    """The process of the environments `span`; WorkerLostError where it does not answer."""

    def __init__(self, shared: Shared, span: range) -> None:
        context = multiprocessing.get_context("spawn")
        self.span = span
        self._connection, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(
            target=_serve, args=(theirs, shared, span, recipe_folders()), daemon=True
        )
        with ctrl_c_for_this_process_alone(), stopping_held_back():
            self.process.start()
        theirs.close()
        self._started = False
        _workers.add(self)

    def send(self, start: Start | None) -> None:
        """Have it begin anew, or take a step."""
        # that it is gone is noticed, and said, where the answer is awaited
        with suppress(OSError):
            self._connection.send(start)

    def receive(self, seconds: float) -> dict[int, str]:
        """Its answer: the missions that are new; DemotoolsError where that is the answer."""
        try:
            if not self._connection.poll(seconds):
                self.process.kill()
                raise WorkerLostError(f"did not answer for {seconds:.0f} seconds")
            reply: dict[int, str] | Failure = self._connection.recv()
        except (EOFError, OSError) as error:
            self.process.join(_SECONDS_TO_END)
            if not self._started and (why := what_hinders_spawning()):
                raise SettingsError(
                    f"no environment process could be started: {why}",
                    path="processes",
                    fix=SPAWN_ADVICE,
                ) from error
            raise WorkerLostError(f"died (exit code {self.process.exitcode})") from error
        self._started = True
        if isinstance(reply, Failure):
            raise reply.error from (RemoteError(reply.cause) if reply.cause else None)
        return reply

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


def _serve(connection: Connection, shared: Shared, span: range, folders: list[str]) -> None:
    """A worker's life: one reply for every message, until the other end is closed.

    folders   see `recipe_folders`
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    search_recipe_folders(folders)
    arrays = {name: array[span.start : span.stop] for name, array in shared.arrays().items()}
    group: Group | None = None
    while True:
        try:
            start: Start | None = connection.recv()
            try:
                group = group or Group(shared.kind, arrays)
                connection.send(group.step() if start is None else group.reset(*start))
            except DemotoolsError as error:
                cause = traceback.format_exception(error.__cause__) if error.__cause__ else []
                connection.send(Failure(error, "".join(cause)))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return


def check_playable(level: str) -> None:
    """LevelError where the level is one without an environment, ManifestError where unknown."""
    try:
        level_environment_id(level)
    except LevelError as error:
        playable = [name for name in level_names() if read_manifest(name).environment_id]
        raise LevelError(
            error.what, path=error.path, fix=f"these can be played: {', '.join(playable)}"
        ) from error
