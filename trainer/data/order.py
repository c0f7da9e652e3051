"""Which step comes where: the order of episodes, what each rollout plays of it, plans of batches.

Epoch e has one permutation p_e of the episodes, a pure function of (seed, e). It is computed
element by element with a keyed bijection (a Feistel network), so nothing is set up when an epoch
begins, nothing is kept in memory, and any process finds any place of any epoch at once.

Which steps B parallel rollouts play next: runs of whole episodes, one queue per rollout.

Rollout b of B plays p_e[b], p_e[b + B], p_e[b + 2B], ... of epoch e and goes on alone with
epoch e + 1. All arithmetic is over all rollouts at once.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Index = NDArray[np.int64]
_Word = NDArray[np.uint64]
_Half = NDArray[np.uint32]

# Constants of the 64-bit mixing function `splitmix64` (Steele, Lea, Flood, OOPSLA 2014).
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_ODD = np.uint32(0x85EBCA6B)
# Measured (docs/log.md): 8 rounds cannot be told from chance above some thousand episodes; below,
# the halves are so short that it takes 16.
_FEW, _ROUNDS, _ROUNDS_OF_FEW = 1 << 13, 8, 16


@dataclass(frozen=True)
class Order:
    """The permutations p_0, p_1, ... of `episodes` numbers.

    seed      any integer
    episodes  E, 1..2^31
    window    how many episodes are shuffled among each other, 1..E; E shuffles all of them. A
              smaller window keeps the reading in one place: windows of neighbouring episodes are
              played one after another, in an order and with borders that are new in each epoch.
    """

    seed: int
    episodes: int
    window: int

    def episode(self, epoch: Index, index: Index) -> Index:
        """p_epoch[index], element by element.

        epoch    int64 [...], at least 0; broadcast to the shape of `index`
        index    int64 [...], 0 <= index < E
        returns  int64 [...], 0 <= episode < E
        """
        key = self._key(epoch)
        if self.window == self.episodes:
            return _shuffled(index, key, self.episodes)
        slot, place = np.divmod(index, self.window)
        # a last, smaller window stays last; the turn puts other episodes there in each epoch
        is_whole = slot < self._whole
        size = np.where(is_whole, self.window, self.episodes - self._whole * self.window)
        place = _shuffled(place, _mixed(key + slot.astype(np.uint64) + _GOLDEN), size)
        return self._placed(key, slot, is_whole, place)

    def window_start(self, epoch: int, slot: int) -> int:
        """The first episode of the window that is played as number `slot` of an epoch.

        slot     0 <= slot < ceil(E / window)
        returns  0 <= episode < E; the window goes on from there, and after E - 1 comes 0
        """
        number = np.array([slot])
        start = self._placed(
            self._key(np.array([epoch])), number, number < self._whole, np.zeros(1, np.int64)
        )
        return int(start[0])

    def _placed(self, key: _Word, slot: Index, is_whole: NDArray[np.bool_], place: Index) -> Index:
        moved = _shuffled(np.where(is_whole, slot, 0), key, self._whole)
        turn = (_mixed(key ^ _SECOND) >> np.uint64(1)).astype(np.int64)
        first = np.where(is_whole, moved, slot) * self.window
        return (first + place + turn % self.episodes) % self.episodes

    def _key(self, epoch: Index) -> _Word:
        return _mixed(epoch.astype(np.uint64) * _GOLDEN + self._seed_word)

    @cached_property
    def _whole(self) -> int:
        return self.episodes // self.window

    @cached_property
    def _seed_word(self) -> np.uint64:
        words = np.random.SeedSequence(abs(self.seed) * 2 + (self.seed < 0))
        return np.uint64(words.generate_state(1, np.uint64)[0])


def permutation(seed: int, epoch: int, episodes: int, window: int | None = None) -> Index:
    """p_epoch as a whole: int64 [E]. For looking at; the iterator never builds it.

    >>> sorted(permutation(seed=1, epoch=0, episodes=5).tolist())
    [0, 1, 2, 3, 4]
    """
    order = Order(seed, episodes, window or episodes)
    return order.episode(np.array([epoch]), np.arange(episodes))


def _mixed(word: _Word) -> _Word:
    """A word that depends on every bit of the given one; a bijection of 64 bits."""
    word = (word ^ (word >> np.uint64(30))) * _FIRST
    word = (word ^ (word >> np.uint64(27))) * _SECOND
    return np.asarray(word ^ (word >> np.uint64(31)))


def _shuffled(index: Index, key: _Word, size: Index | int) -> Index:
    """The place of `index` in the permutation of 0..size-1 that `key` names.

    A number is written as left * columns + right; in turn a keyed function of one half is added
    to the other, which can be undone, so the whole is a bijection of rows * columns >= size
    numbers. Numbers from `size` on are sent round again until they land inside.
    """
    sizes = np.asarray(size)
    rows = np.ceil(np.sqrt(sizes)).astype(np.int64)
    rows += rows % 2  # with an even number of rows odd permutations occur too
    columns = (sizes + rows - 1) // rows
    rounds = _ROUNDS if sizes.max() >= _FEW else _ROUNDS_OF_FEW
    keys = _mixed(
        key + np.arange(1, rounds + 1, dtype=np.uint64).reshape(-1, *[1] * key.ndim) * _GOLDEN
    )
    state = [keys.astype(np.uint32), (keys >> np.uint64(32)).astype(np.uint32) | np.uint32(1)]
    shape = [rows.astype(np.uint32), columns.astype(np.uint32)]
    number = _one_way(index.astype(np.uint32), state, shape)
    while len((outside := np.nonzero(number >= sizes))[0]):
        state_there = [
            np.array([np.broadcast_to(k, number.shape)[outside] for k in half]) for half in state
        ]
        shape_there = [np.broadcast_to(half, number.shape)[outside] for half in shape]
        number[outside] = _one_way(number[outside], state_there, shape_there)
    return number.astype(np.int64)


def _one_way(number: _Half, keys: list[_Half], shape: list[_Half]) -> _Half:
    rows, columns = shape
    left = number // columns
    right = number - left * columns
    for turn, (first, second) in enumerate(zip(*keys, strict=True)):
        if turn % 2:
            right = _added(right, left, first, second, columns)
        else:
            left = _added(left, right, first, second, rows)
    return left * columns + right


def _added(half: _Half, other: _Half, first: _Half, second: _Half, size: _Half) -> _Half:
    """(half + f(other)) mod size, where the keys name f; the halves are below 2^16."""
    word = (other ^ first) * _ODD
    word ^= word >> np.uint32(15)
    word *= second
    # the upper 16 bits as a fraction of 2^16, times size: below size, without a division
    word >>= np.uint32(16)
    word *= size
    word >>= np.uint32(16)
    word += half
    # below 2 * size; where it is below size, the subtraction wraps round to something huge
    return np.asarray(np.minimum(word, word - size))


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
