"""Many environments of one level, stepped together, in this process or in several.

Environment e plays the seeds of its own stream one after another, so what it does depends neither
on how many environments there are beside it nor on the processes that hold them. Arrays lie in
memory shared by all processes; pipes carry only "go on" and the texts of new missions.

Processes are spawned, not forked: the trainer's threads hold locks that a fork would copy.
"""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Sequence
from ctypes import c_uint8
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from demotools.errors import LevelError
from trainer.envgroup import FIELDS, EnvironmentKind, Group
from trainer.envworker import Shared, Start, Worker, WorkerLostError

__all__ = ["EnvironmentKind", "EnvironmentStep", "VectorEnvironment", "seed_streams"]

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
