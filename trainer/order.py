"""The order in which episodes are played: pure arithmetic, no state, no tables.

Epoch e has one permutation p_e of the episodes, a pure function of (seed, e). It is computed
element by element with a keyed bijection (a Feistel network), so nothing is set up when an epoch
begins, nothing is kept in memory, and any process finds any place of any epoch at once.
"""

from __future__ import annotations

from dataclasses import dataclass
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
