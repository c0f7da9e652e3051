"""Many environments of one level, stepped together, in this process or in several.

Environment e plays the seeds of its own stream one after another, so what it does depends neither
on how many environments there are beside it nor on the processes that hold them. Arrays lie in
memory shared by all processes; pipes carry only "go on" and the texts of new missions.

Processes are spawned, not forked: the trainer's threads hold locks that a fork would copy.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Sequence
from ctypes import c_uint8
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from demotools.errors import DemotoolsError, LevelError
from trainer.envgroup import FIELDS, EnvironmentKind, Group

__all__ = ["EnvironmentKind", "EnvironmentStep", "VectorEnvironment", "seed_streams"]

_SECONDS_TO_END = 5.0


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


def seed_streams(seeds: range, count: int) -> list[range]:
    """The seeds dealt out to `count` environments in turn.

    >>> seed_streams(range(100, 107), 3)
    [range(100, 107, 3), range(101, 107, 3), range(102, 107, 3)]
    """
    return [range(seeds.start + number, seeds.stop, count) for number in range(count)]


class VectorEnvironment:
    """`count` environments of one kind over `processes` processes; a context manager.

    processes   0 or 1: in this process; at most one for every environment is started

    DemotoolsError  what making or stepping an environment raises, or that a process died
    """

    def __init__(self, kind: EnvironmentKind, count: int, *, processes: int = 1) -> None:
        self.kind = kind
        self.count = count
        self._missions = [""] * count
        self._workers: list[_Worker] = []
        self._group: Group | None = None
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
            self._arrays = _shared_arrays(memory, count)
            self._workers = [_Worker(kind, memory, count, span) for span in spans]

    def reset(self, streams: Sequence[range]) -> EnvironmentStep:
        """Begin anew: environment e plays the seeds of `streams[e]`, one after another."""
        assert len(streams) == self.count
        if self._group is not None:
            self._take(self._group.reset(streams), 0)
        for worker in self._workers:
            worker.send([streams[number] for number in worker.span])
        return self._gathered()

    def step(self, actions: NDArray[np.int64]) -> EnvironmentStep:
        """Step every active environment; where an episode ends, the next one begins at once.

        actions   int64 [n], 0..6; ignored where an environment is not active
        """
        self._arrays["action"][:] = actions
        if self._group is not None:
            self._take(self._group.step(), 0)
        for worker in self._workers:
            worker.send(None)
        return self._gathered()

    def _gathered(self) -> EnvironmentStep:
        for worker in self._workers:
            self._take(worker.receive(), worker.span.start)
        copies = {name: array.copy() for name, array in self._arrays.items() if name != "action"}
        return EnvironmentStep(missions=tuple(self._missions), **copies)

    def _take(self, missions: dict[int, str], first: int) -> None:
        for number, mission in missions.items():
            self._missions[first + number] = mission

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.connection.close()
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


class _Worker:
    """One process that holds the environments of `span`, seen from the main process."""

    def __init__(
        self, kind: EnvironmentKind, memory: dict[str, Any], count: int, span: range
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.span = span
        self._level = kind.level
        self.connection, theirs = context.Pipe()
        self._process: SpawnProcess = context.Process(
            target=_serve, args=(theirs, kind, memory, count, span), daemon=True
        )
        # the process inherits the blocked signal: Ctrl-C is for the main process alone
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        theirs.close()

    def send(self, streams: list[range] | None) -> None:
        try:
            self.connection.send(streams)
        except OSError as error:
            raise self._death() from error

    def receive(self) -> dict[int, str]:
        try:
            reply: dict[int, str] | DemotoolsError = self.connection.recv()
        except (EOFError, OSError) as error:
            raise self._death() from error
        if isinstance(reply, DemotoolsError):
            raise reply
        return reply

    def end(self) -> None:
        self._process.join(_SECONDS_TO_END)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _death(self) -> LevelError:
        self._process.join(_SECONDS_TO_END)
        return LevelError(
            f"an environment process died (exit code {self._process.exitcode})",
            path=self._level,
            fix="look above for its own message; if it was out of memory, use fewer environments",
        )


def _serve(
    connection: Connection, kind: EnvironmentKind, memory: dict[str, Any], count: int, span: range
) -> None:
    """A worker's life: one reply for every message, until the other end is closed."""
    arrays = _shared_arrays(memory, count)
    group: Group | None = None
    while True:
        try:
            streams: list[range] | None = connection.recv()
            try:
                if group is None:
                    mine = {name: array[span.start : span.stop] for name, array in arrays.items()}
                    group = Group(kind, mine)
                connection.send(group.step() if streams is None else group.reset(streams))
            except DemotoolsError as error:
                connection.send(error)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return


def _spans(count: int, processes: int) -> list[range]:
    """Consecutive environments for each process, as equal as can be.

    >>> _spans(5, 2)
    [range(0, 2), range(2, 5)]
    """
    bounds = [count * number // processes for number in range(processes + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _shared_arrays(memory: dict[str, Any], count: int) -> dict[str, NDArray[Any]]:
    return {
        name: np.frombuffer(memory[name], dtype).reshape(count, *shape)
        for name, (dtype, shape) in FIELDS.items()
    }
