"""Plans of batches: for each step of each rollout its row in the table of steps, time first."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from trainer.order import Index
from trainer.queues import Cursors, Queues, Runs


@dataclass(frozen=True)
class Part:
    """The share of one store in this process's rollouts.

    rows           of the queues' rollouts, those that this process plays
    first_row      row at which the store begins in the table of all stores' steps
    first_mission  the same for the tables of missions
    """

    queues: Queues
    rows: slice
    first_row: int
    first_mission: int


@dataclass(frozen=True)
class Plan:
    """Which steps make up the next batches, T steps in all: time first, as the batches are.

    row      int64 [T, B], row in the table of steps
    run      int64 [T, B], number of the run that the step belongs to
    masks    uint8 [T, B], memory mask
    mission  int32 [R], row in the table of missions
    epoch    int64 [R], in which a rollout plays the run
    """

    row: Index
    run: Index
    masks: NDArray[np.uint8]
    mission: NDArray[np.int32]
    epoch: Index

    def part(self, times: slice) -> Plan:
        """The plan of some of the steps."""
        return Plan(self.row[times], self.run[times], self.masks[times], self.mission, self.epoch)


class Planner:
    """Plans batch after batch, several at a time.

    A block of about 2^16 steps costs less per step than one batch, and its arrays still fit into
    the processor's cache (docs/log.md).
    """

    _STEPS = 1 << 16
    _BATCHES_AT_MOST = 8

    def __init__(self, parts: list[Part], batch_len: int) -> None:
        self.parts = parts
        self._batch_len = batch_len
        self._rollouts = sum(part.rows.stop - part.rows.start for part in parts)
        whole = self._STEPS // (batch_len * self._rollouts)
        self._batches = min(max(whole, 1), self._BATCHES_AT_MOST)
        shape = (batch_len * self._batches, self._rollouts)
        # one set of arrays for all blocks: new ones would cost more in page faults than in sums
        self._row, self._run = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.int64)
        self._masks = np.empty(shape, dtype=np.uint8)
        self._clock = np.arange(len(self._row))[:, None]
        self.restart([Cursors.start(part.queues.rollouts) for part in parts])

    def restart(self, everyone: list[Cursors]) -> None:
        """Go on from these cursors, for each part of all rollouts of all processes."""
        self._cursors = [
            cursors.part(part.rows) for cursors, part in zip(everyone, self.parts, strict=True)
        ]
        self._waiting: deque[tuple[Plan, list[Cursors]]] = deque()

    def next(self) -> tuple[Plan, list[Cursors]]:
        """The plan of the next batch, and where this process's rollouts stand after it.

        The plan is good until the next call.
        """
        if not self._waiting:
            plan, after = self._block()
            self._cursors = after[-1]
            for number, moved in enumerate(after):
                first = number * self._batch_len
                self._waiting.append((plan.part(slice(first, first + self._batch_len)), moved))
        return self._waiting.popleft()

    def _block(self) -> tuple[Plan, list[list[Cursors]]]:
        played = [
            part.queues.play(cursor, part.rows, self._batch_len, self._batches)
            for part, cursor in zip(self.parts, self._cursors, strict=True)
        ]
        after = [list(moved) for moved in zip(*(moved for _, moved in played), strict=True)]
        runs = _joined([runs for runs, _ in played], self.parts)
        begin = runs.time * self._rollouts + runs.rollout
        # a run's number at all its steps: 1 where a run begins, added up over time
        self._run[:] = 0
        self._run.reshape(-1)[begin] = 1
        self._run[0] = np.searchsorted(runs.rollout, np.arange(self._rollouts))
        np.cumsum(self._run, axis=0, out=self._run)
        np.take(runs.row - runs.time, self._run, out=self._row, mode="clip")
        self._row += self._clock
        self._masks[:] = 1
        self._masks.reshape(-1)[begin[runs.is_fresh]] = 0
        plan = Plan(self._row, self._run, self._masks, runs.mission, runs.epoch)
        return plan, after


def _joined(runs: list[Runs], parts: list[Part]) -> Runs:
    """The runs of all parts, with rollouts, rows and missions counted over all of them."""
    rollouts = np.cumsum([0, *(part.rows.stop - part.rows.start for part in parts)]).tolist()
    moved = [
        replace(
            part_runs,
            rollout=part_runs.rollout + first,
            row=part_runs.row + part.first_row,
            mission=part_runs.mission + np.int32(part.first_mission),
        )
        for part_runs, part, first in zip(runs, parts, rollouts, strict=False)
    ]
    if len(moved) == 1:
        return moved[0]
    names = [field.name for field in fields(Runs)]
    return Runs(*(np.concatenate([getattr(part, name) for part in moved]) for name in names))
