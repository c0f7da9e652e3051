"""The order in which rollouts play the episodes of a store: pure arithmetic, no state, no tables.

Epoch e has one permutation p_e of the episodes, a pure function of (seed, e). It is computed
element by element with a keyed bijection (a Feistel network), so nothing is set up when an epoch
begins, nothing is kept in memory, and any process finds any place of any epoch at once.

Rollout b of B plays p_e[b], p_e[b + B], p_e[b + 2B], ... and goes on alone with p_(e+1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Index = NDArray[np.int64]
_Words = NDArray[np.uint64]

# Constants of the 64-bit mixing function `splitmix64` (Steele, Lea, Flood, OOPSLA 2014).
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_ROUNDS = 8


@dataclass(frozen=True)
class Order:
    """The permutations p_0, p_1, ... of `episodes` numbers.

    seed      any integer
    episodes  E, at least 1
    window    episodes that are shuffled among each other, 1..E; E shuffles all of them. A smaller
              window keeps the reading in one place: windows of neighbouring episodes are played
              one after another, in an order and with borders that are new in each epoch.
    """

    seed: int
    episodes: int
    window: int

    def episode(self, epoch: Index, index: Index) -> Index:
        """p_epoch[index], element by element.

        epoch    int64 [...], at least 0
        index    int64 [...], 0 <= index < E
        returns  int64 [...], 0 <= episode < E
        """
        key = _mixed(epoch.astype(np.uint64) * _GOLDEN + _seed_word(self.seed))
        whole = self.episodes // self.window
        if whole == 1 and self.window == self.episodes:
            return _shuffled(index, key, np.int64(self.episodes))
        slot, place = np.divmod(index, self.window)
        in_whole = slot < whole
        size = np.where(in_whole, self.window, max(self.episodes - whole * self.window, 1))
        moved = _shuffled(np.where(in_whole, slot, 0), key, np.int64(whole))
        slot = np.where(in_whole, moved, slot)
        place = _shuffled(place, _mixed(key + slot.astype(np.uint64) + np.uint64(1)), size)
        turn = (_mixed(key ^ _SECOND) >> np.uint64(1)).astype(np.int64) % self.episodes
        return (slot * self.window + place + turn) % self.episodes


def permutation(seed: int, epoch: int, episodes: int, window: int | None = None) -> Index:
    """p_epoch as a whole: int64 [E]. For looking at; the iterator never builds it.

    >>> sorted(permutation(seed=1, epoch=0, episodes=5).tolist())
    [0, 1, 2, 3, 4]
    """
    order = Order(seed, episodes, window or episodes)
    return order.episode(np.full(episodes, epoch, dtype=np.int64), np.arange(episodes))


def _seed_word(seed: int) -> np.uint64:
    return np.uint64(np.random.SeedSequence(abs(seed) * 2 + (seed < 0)).generate_state(1, "u8")[0])


def _mixed(word: _Words) -> _Words:
    """A word that depends on every bit of the given one; a bijection of 64 bits."""
    word = (word ^ (word >> np.uint64(30))) * _FIRST
    word = (word ^ (word >> np.uint64(27))) * _SECOND
    return np.asarray(word ^ (word >> np.uint64(31)))


def _shuffled(index: Index, key: _Words, size: Index | np.int64) -> Index:
    """The place of `index` in the permutation of 0..size-1 that `key` names.

    A number is written as left * columns + right; in turn a keyed function of one half is added
    to the other, which can be undone, so the whole is a bijection of rows * columns >= size
    numbers. Numbers from `size` on are sent round again until they land inside.
    """
    rows = np.ceil(np.sqrt(size)).astype(np.uint64)
    columns = ((size + rows.astype(np.int64) - 1) // rows.astype(np.int64)).astype(np.uint64)
    limit = np.asarray(size).astype(np.uint64)
    number = _one_way(index.astype(np.uint64), key, rows, columns)
    outside = np.nonzero(number >= limit)
    while len(outside[0]):
        again = tuple(_chosen(values, number.shape, outside) for values in (key, rows, columns))
        number[outside] = _one_way(number[outside], *again)
        outside = np.nonzero(number >= limit)
    return number.astype(np.int64)


def _chosen(values: _Words | np.uint64, shape: tuple[int, ...], where: tuple[Index, ...]) -> _Words:
    return np.broadcast_to(values, shape)[where]


def _one_way(
    number: _Words, key: _Words, rows: _Words | np.uint64, columns: _Words | np.uint64
) -> _Words:
    left, right = np.divmod(number, columns)
    for turn in range(_ROUNDS):
        if turn % 2:
            right = _added(right, left, key, turn, columns)
        else:
            left = _added(left, right, key, turn, rows)
    return np.asarray(left * columns + right)


def _added(half: _Words, other: _Words, key: _Words, turn: int, size: _Words | np.uint64) -> _Words:
    word = (other + key + np.uint64(turn << 40)) * _FIRST
    word = (word ^ (word >> np.uint64(29))) * _SECOND
    # the upper 32 bits as a fraction of 2^32, times size: a number below size without a division
    total = half + ((word >> np.uint64(32)) * size >> np.uint64(32))
    return np.asarray(total - size * (total >= size))


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


@dataclass(frozen=True)
class Runs:
    """What rollouts play over T steps, as runs of consecutive steps of one episode; all int64 [R].

    Runs are sorted by rollout, then by time. `length` adds up to rollouts * T.

    episode  which one
    first    the step of the episode at which the run begins; 0 unless it continues one
    length   steps, at least 1
    epoch    the epoch that the rollout plays it in
    """

    episode: Index
    first: Index
    length: Index
    epoch: Index


@dataclass(frozen=True)
class Queues:
    """The queues of B rollouts over one set of episodes, of which this process plays some.

    length    int64 [E], steps of each episode
    rollouts  B, of all processes
    """

    order: Order
    length: Index
    rollouts: int

    def play(self, cursors: Cursors, rows: slice, steps: int) -> tuple[Runs, Cursors]:
        """The next `steps` steps of the rollouts `rows`, and where they stand afterwards.

        cursors  of the rollouts `rows` only
        """
        number = np.arange(self.rollouts)[rows, None]
        in_epoch = (self.order.episodes - number + self.rollouts - 1) // self.rollouts
        ahead = math.ceil(1.3 * steps / float(self.length.mean())) + 4
        while True:
            position = cursors.position[:, None] + np.arange(ahead)
            later, position = np.divmod(position, in_epoch)
            epoch = cursors.epoch[:, None] + later
            episode = self.order.episode(epoch, number + position * self.rollouts)
            length = self.length[episode]
            stop = np.cumsum(length, axis=1) - cursors.step[:, None]
            if stop[:, -1].min() > steps:
                break
            ahead *= 2
        start = stop - length
        played = start < steps
        first = np.maximum(-start, 0)
        runs = Runs(
            episode=episode[played],
            first=first[played],
            length=(np.minimum(stop, steps) - start - first)[played],
            epoch=epoch[played],
        )
        row, current = np.arange(len(number)), (stop <= steps).sum(axis=1)
        moved = Cursors(
            epoch=epoch[row, current],
            position=position[row, current],
            step=steps - start[row, current],
        )
        return runs, moved
