"""Which steps B parallel rollouts play next: runs of whole episodes, one queue per rollout.

Rollout b of B plays p_e[b], p_e[b + B], p_e[b + 2B], ... of epoch e and goes on alone with
epoch e + 1. All arithmetic is over all rollouts at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.order import Index, Order


@dataclass(frozen=True)
class Cursors:
    """Where each rollout stands: the next step that it plays. All int64 [B].

    epoch     epochs that the rollout has finished
    position  episodes of this epoch that it has finished: it is at p_epoch[b + position * B]
    step      steps of that episode that it has played
    """

    epoch: Index
    position: Index
    step: Index

    @staticmethod
    def start(rollouts: int) -> Cursors:
        """At the first step of epoch 0."""
        return Cursors(*(np.zeros(rollouts, dtype=np.int64) for _ in range(3)))

    def part(self, rows: slice) -> Cursors:
        """The cursors of some rollouts."""
        return Cursors(self.epoch[rows], self.position[rows], self.step[rows])

    @staticmethod
    def joined(parts: list[Cursors]) -> Cursors:
        """The cursors of several groups of rollouts, one after another."""
        return Cursors(
            np.concatenate([part.epoch for part in parts]),
            np.concatenate([part.position for part in parts]),
            np.concatenate([part.step for part in parts]),
        )


@dataclass(frozen=True)
class Runs:
    """What rollouts play over T steps: runs of consecutive steps of one episode. All int64 [R].

    Sorted by rollout, then by time; a run ends where the rollout's next one begins, or at T.

    rollout   counted from 0 among the rollouts asked for
    time      0 <= time < T, when the run begins
    row       the step of the store with which it begins
    mission   int32 [R], row in the store's token table
    epoch     in which the rollout plays it
    is_fresh  bool [R], whether the run begins with the first step of the episode
    """

    rollout: Index
    time: Index
    row: Index
    mission: NDArray[np.int32]
    epoch: Index
    is_fresh: NDArray[np.bool_]


@dataclass(frozen=True)
class Queues:
    """The queues of B rollouts over the chosen episodes of one store.

    order      of the chosen episodes
    offset     int64 [E_store + 1], first step of each episode of the store
    mission    int32 [E_store], row of each episode in the store's token table
    chosen     int64 [E], the episodes of the store that are played; None means all
    rollouts   B, 1..E, of all processes
    mean_len   mean length of the chosen episodes
    """

    order: Order
    offset: Index
    mission: NDArray[np.int32]
    chosen: Index | None
    rollouts: int
    mean_len: float

    def play(
        self, cursors: Cursors, rows: slice, batch_len: int, batches: int = 1
    ) -> tuple[Runs, list[Cursors]]:
        """The next batch_len * batches steps of the rollouts `rows`.

        cursors  of the rollouts `rows` only
        returns  the runs, over all these steps, and the cursors after each batch
        """
        steps = batch_len * batches
        numbers = np.arange(self.rollouts)[rows, None]
        needed = steps / self.mean_len
        ahead = int(needed + 2 * math.sqrt(needed)) + 4
        while True:
            epoch, position, episode = self._upcoming(cursors, numbers, ahead)
            # mode="clip" only spares the check of indices that are right by construction
            first = np.take(self.offset, episode, mode="clip")
            stop = np.take(self.offset, episode + 1, mode="clip") - first
            np.cumsum(stop, axis=1, out=stop)
            stop -= cursors.step[:, None]
            if (stop[:, -1] > steps).all():
                break
            ahead *= 2
        # times, counted from the first of the `steps`: an episode begun before has start < 0
        start = np.empty_like(stop)
        start[:, 0], start[:, 1:] = -cursors.step, stop[:, :-1]
        played = np.flatnonzero(start < steps)
        begin = start.reshape(-1)[played]
        time = np.maximum(begin, 0)
        runs = Runs(
            rollout=played // ahead,
            time=time,
            row=first.reshape(-1)[played] + (time - begin),
            mission=np.take(self.mission, episode.reshape(-1)[played], mode="clip"),
            epoch=np.broadcast_to(epoch, episode.shape).reshape(-1)[played],
            is_fresh=begin >= 0,
        )
        after: list[Cursors] = []
        for time_after in range(batch_len, steps + 1, batch_len):
            current = np.arange(len(numbers)), np.count_nonzero(stop <= time_after, axis=1)
            after.append(
                Cursors(
                    epoch=np.broadcast_to(epoch, episode.shape)[current],
                    position=position[current],
                    step=time_after - start[current],
                )
            )
        return runs, after

    def epoch_steps(self, epoch: int) -> Index:
        """How many steps each rollout plays in an epoch: int64 [B]. Looks at every episode."""
        place = np.arange(self.order.episodes)
        episode = self.order.episode(np.array([epoch]), place)
        if self.chosen is not None:
            episode = self.chosen[episode]
        steps = np.zeros(self.rollouts, dtype=np.int64)
        np.add.at(steps, place % self.rollouts, self.offset[episode + 1] - self.offset[episode])
        return steps

    def holds(self, cursors: Cursors) -> bool:
        """Whether these can be cursors of all rollouts of these queues."""
        arrays = (cursors.epoch, cursors.position, cursors.step)
        if any(array.shape != (self.rollouts,) or array.min() < 0 for array in arrays):
            return False
        numbers = np.arange(self.rollouts)[:, None]
        if (cursors.position >= self._in_epoch(numbers)[:, 0]).any():
            return False
        episode = self._upcoming(cursors, numbers, 1)[2][:, 0]
        return bool((cursors.step < self.offset[episode + 1] - self.offset[episode]).all())

    def _in_epoch(self, numbers: Index) -> Index:
        """How many episodes of an epoch the given rollouts play."""
        return (self.order.episodes - numbers + self.rollouts - 1) // self.rollouts

    def _upcoming(self, cursors: Cursors, numbers: Index, ahead: int) -> tuple[Index, Index, Index]:
        """(epoch, position, episode) of the next `ahead` episodes of each rollout, [B', ahead]."""
        in_epoch = self._in_epoch(numbers)
        position = cursors.position[:, None] + np.arange(ahead)
        epoch = cursors.epoch[:, None]
        if (position[:, -1:] >= in_epoch).any():
            later, position = np.divmod(position, in_epoch)
            epoch = epoch + later
        episode = self.order.episode(epoch, numbers + position * self.rollouts)
        return epoch, position, episode if self.chosen is None else self.chosen[episode]
