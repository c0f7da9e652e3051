"""Which step comes where: the order of episodes, the queue of each rollout, the steps of a batch.

Epoch e has one permutation p_e of the episodes, a pure function of (seed, e). It is computed
element by element with a keyed bijection (a Feistel network), so an epoch needs no setup and no
memory, and any process can compute any position of any epoch at once (`Order`). Rollout b of B
plays p_e[b], p_e[b + B], p_e[b + 2B], ... of epoch e, then continues with epoch e + 1 on its own
(`Queues`, for all rollouts at once); `batch_indices` computes which steps a batch takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Index = NDArray[np.int64]
_Word = NDArray[np.uint64]
_Half = NDArray[np.uint32]

# Constants of the 64-bit mixing function `splitmix64` (Steele, Lea, Flood, OOPSLA 2014).
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_ODD = np.uint32(0x85EBCA6B)
# Measured (docs/log.md): 8 rounds cannot be told from chance above some thousand episodes; below,
# the halves are so short that it takes 16.
_FEW, _ROUNDS, _ROUNDS_OF_FEW = 1 << 13, 8, 16
_BLOCK_STEPS, _BLOCK_BATCHES = 1 << 16, 8


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
        place = _shuffled(place, mixed_bits(key + slot.astype(np.uint64) + GOLDEN), size)
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
        turn = (mixed_bits(key ^ _SECOND) >> np.uint64(1)).astype(np.int64)
        first = np.where(is_whole, moved, slot) * self.window
        return (first + place + turn % self.episodes) % self.episodes

    def _key(self, epoch: Index) -> _Word:
        return mixed_bits(epoch.astype(np.uint64) * GOLDEN + self._seed_word)

    @cached_property
    def _whole(self) -> int:
        return self.episodes // self.window

    @cached_property
    def _seed_word(self) -> np.uint64:
        words = np.random.SeedSequence(abs(self.seed) * 2 + (self.seed < 0))
        return np.uint64(words.generate_state(1, np.uint64)[0])


def mixed_bits(word: _Word) -> _Word:
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
    keys = mixed_bits(
        key + np.arange(1, rounds + 1, dtype=np.uint64).reshape(-1, *[1] * key.ndim) * GOLDEN
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


Cursors = Index
"""Where each rollout stands, int64 [3, B]: epochs that it has finished, episodes of this epoch that
it has finished (it is at p_epoch[b + position * B]), steps of that episode that it has played."""


class Segments(NamedTuple):
    """What rollouts play over some steps: stretches of consecutive steps of one episode. All [N].

    Sorted by rollout, then by time; one ends where the rollout's next one begins.

    rollout   int64, counted from 0 among those asked for
    time      int64, when the segment begins
    row       int64, the row of the step table with which it begins
    mission   int32, row of the mission table
    is_fresh  bool, whether it begins with the first step of the episode
    """

    rollout: Index
    time: Index
    row: Index
    mission: NDArray[np.int32]
    is_fresh: NDArray[np.bool_]


@dataclass(frozen=True)
class Queues:
    """The queues of B rollouts over the chosen episodes of one store.

    order          of the chosen episodes
    offset         int64 [E_store + 1], first step of each episode of the store
    mission        int32 [E_store], row of each episode in the store's token table
    chosen         int64 [E], the episodes of the store that are played; None means all
    mean_len       mean length of the chosen episodes
    rollouts       B, 1..E, of all processes
    numbers        int64 [B'], which of them are played here
    first_row      row of the step table at which the store begins
    first_mission  the same of the mission table
    """

    order: Order
    offset: Index
    mission: NDArray[np.int32]
    chosen: Index | None
    mean_len: float
    rollouts: int
    numbers: Index
    first_row: int
    first_mission: int

    def play(self, cursors: Cursors, steps: int) -> tuple[Segments, Cursors]:
        """What the rollouts play in their next `steps` steps, and where they stand after it."""
        needed = steps / self.mean_len
        count = int(needed + 2 * math.sqrt(needed)) + 4
        while True:
            epoch, position, episode = self._upcoming(cursors, count)
            # mode="clip" only spares the check of indices that are right by construction
            first = np.take(self.offset, episode, mode="clip")
            stop = np.take(self.offset, episode + 1, mode="clip") - first
            np.cumsum(stop, axis=1, out=stop)
            stop -= cursors[2, :, None]
            if (stop[:, -1] > steps).all():
                break
            count *= 2
        # times, counted from the first of the `steps`: an episode begun before has start < 0
        start = np.empty_like(stop)
        start[:, 0], start[:, 1:] = -cursors[2], stop[:, :-1]
        played = np.flatnonzero(start < steps)
        begin = start.reshape(-1)[played]
        time = np.maximum(begin, 0)
        mission = np.take(self.mission, episode.reshape(-1)[played], mode="clip")
        segments = Segments(
            rollout=played // count,
            time=time,
            row=first.reshape(-1)[played] + (time - begin) + self.first_row,
            mission=mission + np.int32(self.first_mission),
            is_fresh=begin >= 0,
        )
        current = np.arange(len(self.numbers)), np.count_nonzero(stop <= steps, axis=1)
        epoch = np.broadcast_to(epoch, episode.shape)
        return segments, np.stack([epoch[current], position[current], steps - start[current]])

    def first_pass(self) -> Index:
        """How many steps each rollout plays in epoch 0: int64 [B']. Looks at every episode."""
        place = np.arange(self.order.episodes)
        episode = self._episode(np.zeros(1, dtype=np.int64), place)
        steps = np.zeros(self.rollouts, dtype=np.int64)
        np.add.at(steps, place % self.rollouts, self.offset[episode + 1] - self.offset[episode])
        return steps[self.numbers]

    def holds(self, cursors: Cursors) -> bool:
        """Whether these can be cursors of the rollouts."""
        if cursors.min() < 0 or (cursors[1] >= self.in_epoch).any():
            return False
        episode = self._upcoming(cursors, 1)[2][:, 0]
        return bool((cursors[2] < self.offset[episode + 1] - self.offset[episode]).all())

    @property
    def in_epoch(self) -> Index:
        """How many episodes of an epoch each rollout plays."""
        return (self.order.episodes - self.numbers + self.rollouts - 1) // self.rollouts

    def _upcoming(self, cursors: Cursors, count: int) -> tuple[Index, Index, Index]:
        """(epoch, position, episode) of the next `count` episodes of each rollout, [B', count]."""
        in_epoch = self.in_epoch[:, None]
        epoch, position = cursors[0, :, None], cursors[1, :, None] + np.arange(count)
        if (position[:, -1:] >= in_epoch).any():
            later, position = np.divmod(position, in_epoch)
            epoch = epoch + later
        place = self.numbers[:, None] + position * self.rollouts
        return epoch, position, self._episode(epoch, place)

    def _episode(self, epoch: Index, place: Index) -> Index:
        episode = self.order.episode(epoch, place)
        return episode if self.chosen is None else self.chosen[episode]


def parts_of(queues: Sequence[Queues], cursors: Cursors) -> list[Cursors]:
    """The cursors of each store's rollouts, out of those of all."""
    return np.split(cursors, np.cumsum([len(one.numbers) for one in queues])[:-1], axis=1)


def episodes_begun(queues: Sequence[Queues], cursors: Cursors) -> Index:
    """How many episodes each rollout of several stores has begun: int64 [B]."""
    in_epoch = np.concatenate([one.in_epoch for one in queues])
    return np.asarray(cursors[0] * in_epoch + cursors[1] + (cursors[2] > 0))


def play_all(queues: Sequence[Queues], cursors: Cursors, steps: int) -> tuple[Segments, Cursors]:
    """What the rollouts of several stores play, counted one store after another."""
    parts = zip(queues, parts_of(queues, cursors), strict=True)
    played = [one.play(part, steps) for one, part in parts]
    columns = zip(*(segments for segments, _ in played), strict=True)
    rollout, *others = (np.concatenate(arrays) for arrays in columns)
    first = np.cumsum([0, *(len(one.numbers) for one in queues[:-1])])
    rollout += np.repeat(first, [len(segments.time) for segments, _ in played])
    return Segments(rollout, *others), np.concatenate([after for _, after in played], axis=1)


@dataclass(frozen=True)
class BatchIndex:
    """Which steps make up a batch.

    row      int64 [T, B], row of the step table
    segment  int64 [T, B], number of the segment that the step belongs to
    masks    uint8 [T, B], memory mask
    mission  int32 [N], row of the mission table, of each segment
    """

    row: Index
    segment: Index
    masks: NDArray[np.uint8]
    mission: NDArray[np.int32]


def batch_indices(
    queues: Sequence[Queues], cursors: Cursors, batch_len: int
) -> Iterator[BatchIndex]:
    """Batch after batch, from these cursors on; each is good until the next one is asked for.

    Several are computed at a time: a block of about 2^16 steps costs less per step than one
    batch, and its arrays still fit into the processor's cache (docs/log.md).
    """
    rollouts = cursors.shape[1]
    batches = min(max(_BLOCK_STEPS // (batch_len * rollouts), 1), _BLOCK_BATCHES)
    shape = (batch_len * batches, rollouts)
    # one set of arrays for all blocks: new ones would cost more in page faults than in sums
    row, segment = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.int64)
    masks = np.empty(shape, dtype=np.uint8)
    clock = np.arange(shape[0])[:, None]
    while True:
        segments, cursors = play_all(queues, cursors, shape[0])
        begin = segments.time * rollouts + segments.rollout
        # a segment's number at all its steps: 1 where one begins, added up over time
        segment[:] = 0
        segment.reshape(-1)[begin] = 1
        segment[0] = np.searchsorted(segments.rollout, np.arange(rollouts))
        np.cumsum(segment, axis=0, out=segment)
        np.take(segments.row - segments.time, segment, out=row, mode="clip")
        row += clock
        masks[:] = 1
        masks.reshape(-1)[begin[segments.is_fresh]] = 0
        for first in range(0, shape[0], batch_len):
            part = slice(first, first + batch_len)
            yield BatchIndex(row[part], segment[part], masks[part], segments.mission)
