"""The map that `maze` keeps: what has been seen where, the ways over it, and the things on it.

The map follows from observations alone. Turning shows in `direction`; a step forward by the
view, which is another one wherever the cell ahead lets the agent in. Places are counted from the
first cell of the episode on a torus of 32 x 32 cells, larger than any grid of BabyAI (22 x 22).

What is told of it are the things on it (doors, keys, balls, boxes) and the nearest cell not yet
seen, and how each lies: steps to it over known free cells and the first moves of the shortest ways
(breadth-first search in all maps at once, a bit each), where it lies from here and from where the
episode began, whether the agent has stood before it.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from demotools.babyai.cells import (
    AGENT_COLUMN,
    AGENT_ROW,
    BALL,
    BOX,
    CELL_CODES,
    DOOR,
    EMPTY,
    FLOOR,
    GOAL,
    KEY,
    OPEN,
    UNPACKING_TABLE,
    VIEW_SIZE,
)

SIDE = 32
"""Cells of the torus each way."""
_PLACES = SIDE * SIDE
_BOX = 24
"""Cells each way of the part of it that a search looks at; BabyAI's grids are at most 22."""
CELLS = VIEW_SIZE * VIEW_SIZE
_START = SIDE // 2
_AHEAD = AGENT_COLUMN * VIEW_SIZE + AGENT_ROW - 1
_HERE = AGENT_COLUMN * VIEW_SIZE + AGENT_ROW
# x and y of one step, by direction: right, down, left, up
_STEP = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]], dtype=np.int16)
_FARTHEST = 63
_CHUNK = 12
"""Words, of 64 maps each, that are searched together."""


def _codes(kinds: tuple[int, ...], *, doors: tuple[int, ...] = ()) -> NDArray[np.bool_]:
    kind, _, state = UNPACKING_TABLE.T
    chosen = np.isin(kind, kinds) | ((kind == DOOR) & np.isin(state, doors))
    return np.asarray(chosen & (np.arange(256) < CELL_CODES))


_UNSEEN_BIT, _FREE_BIT, _THING_BIT, _ROOM_BIT, _BLOCKER_BIT = 1, 2, 4, 8, 16


@cache
def _free() -> NDArray[np.bool_]:
    """By cell code: whether the agent can stand there."""
    return _codes((EMPTY, FLOOR, GOAL), doors=(OPEN,))


@cache
def _bits() -> NDArray[np.uint8]:
    """By cell code: all that a search asks of a cell, uint8 [256]."""
    things = _codes((DOOR, KEY, BALL, BOX))
    room = _codes((EMPTY, FLOOR, GOAL, KEY, BALL, BOX))
    blockers = _codes((KEY, BALL, BOX))
    return (
        (np.arange(256) < 18).astype(np.uint8) * _UNSEEN_BIT
        + _free().astype(np.uint8) * _FREE_BIT
        + things.astype(np.uint8) * _THING_BIT
        + room.astype(np.uint8) * _ROOM_BIT
        + blockers.astype(np.uint8) * _BLOCKER_BIT
    ).astype(np.uint8)


@cache
def _view_offsets() -> NDArray[np.int16]:
    """x and y of each cell of a view from the agent's: int16 [4 directions, 49, 2]."""
    across = np.repeat(np.arange(VIEW_SIZE) - AGENT_COLUMN, VIEW_SIZE)
    ahead = np.tile(AGENT_ROW - np.arange(VIEW_SIZE), VIEW_SIZE)
    right = np.roll(_STEP, -1, axis=0)
    offsets = _STEP[:, None] * ahead[:, None] + right[:, None] * across[:, None]
    return np.asarray(offsets, dtype=np.int16)


class MapState(NamedTuple):
    """What is carried from batch to batch, of B rollouts.

    cells      uint8 [B, 1024], the map: packed cells, 0 where nothing has been seen
    faced      uint8 [B, 1024], 1 where the agent has stood before
    view       uint8 [B, 49], the last one
    place      int16 [B, 2], x and y, the episode having begun at 16, 16
    low        int16 [B, 2], the least x and y of all that has been seen
    direction  uint8 [B, 2], the last one, and the first of the episode
    """

    cells: NDArray[np.uint8]
    faced: NDArray[np.uint8]
    view: NDArray[np.uint8]
    place: NDArray[np.int16]
    low: NDArray[np.int16]
    direction: NDArray[np.uint8]

    @staticmethod
    def size() -> int:
        """Numbers that a rollout's state takes."""
        return 2 * _PLACES + CELLS + 6

    @classmethod
    def unpacked(cls, memory: Tensor) -> MapState:
        """Of float [B, size]."""
        numbers = memory.detach().cpu().numpy()
        parts = np.split(numbers, np.cumsum([_PLACES, _PLACES, CELLS, 2, 2]), axis=1)
        kinds = (np.uint8, np.uint8, np.uint8, np.int16, np.int16, np.uint8)
        return cls(*(part.astype(kind) for part, kind in zip(parts, kinds, strict=True)))

    def packed(self) -> Tensor:
        """As float32 [B, size]."""
        return torch.from_numpy(np.concatenate([part.astype(np.float32) for part in self], axis=1))


class Seen(NamedTuple):
    """The maps of a batch of T x B steps, each with all that was seen up to that step.

    cells      uint8 [V, 1024], the maps that differ: most steps show nothing new
    low        int16 [V, 2], the least x and y of all that was seen on each of them
    number     int64 [T, B], which of them is a step's
    faced      uint8 [T, B, 1024], without the step's own cell ahead
    place      int16 [T, B, 2]
    first      uint8 [T, B], the direction in which the episode began
    """

    cells: NDArray[np.uint8]
    low: NDArray[np.int16]
    number: NDArray[np.int64]
    faced: NDArray[np.uint8]
    place: NDArray[np.int16]
    first: NDArray[np.uint8]


def moved_forward(
    before: NDArray[np.uint8], after: NDArray[np.uint8], turned: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Whether the agent took a step between two views: bool [...].

    before, after  uint8 [..., 49], packed
    turned         bool [...], whether the direction has changed

    Exact wherever the first wall, closed door or end of sight ahead tells two neighbouring cells
    apart: in rooms of up to 8 cells, walls included, always.
    """
    changed = (before != after) & (before >= 18) & (after >= 18)
    changed[..., [_AHEAD, _HERE]] = False
    return np.asarray(~turned & _free()[before[..., _AHEAD]] & changed.any(-1))


def explored(
    cells: NDArray[np.uint8],
    direction: NDArray[np.uint8],
    masks: NDArray[np.bool_],
    state: MapState,
) -> tuple[Seen, MapState]:
    """The maps of T x B steps, and the state after them.

    cells      uint8 [T, B, 49]
    direction  uint8 [T, B]
    masks      bool [T, B], False where an episode begins
    """
    T, B = direction.shape
    before = np.concatenate([state.view[None], cells[:-1]])
    heading = np.concatenate([state.direction[None, :, 0], direction[:-1]])
    moved = moved_forward(before, cells, heading != direction) & masks
    steps = _STEP[direction] * moved[..., None]
    offsets = _view_offsets()[direction]  # [T, B, 49, 2]
    shown = cells >= 18
    shown[..., _HERE] = False
    faced_by = np.empty((T, B, _PLACES), np.uint8)
    places, firsts = np.empty((T, B, 2), np.int16), np.empty((T, B), np.uint8)
    place, low, first = state.place.copy(), state.low.copy(), state.direction[:, 1].copy()
    for t in range(T):
        place += steps[t]
        place[~masks[t]] = _START
        first = np.where(masks[t], first, direction[t])
        places[t], firsts[t] = place, first
    # places of all cells of all views, at once
    x = places[..., None, 0] + offsets[..., 0]
    y = places[..., None, 1] + offsets[..., 1]
    least = np.stack([np.where(shown, axis, 99).min(-1) for axis in (x, y)], axis=-1)
    flat = (y & (SIDE - 1)).astype(np.int64) * SIDE + (x & (SIDE - 1))
    ahead = flat[..., _AHEAD].copy()
    flat[~shown] = _PLACES
    width = _PLACES + 1  # the last place takes what is to be forgotten
    flat += np.arange(B)[:, None] * width
    ahead += np.arange(B) * width
    now, faced = np.zeros((B, width), np.uint8), np.zeros((B, width), np.uint8)
    now[:, :-1], faced[:, :-1] = state.cells, state.faced
    by_place, by_faced = now.reshape(-1), faced.reshape(-1)
    maps, lows, count = [], [], 0
    number = np.empty((T, B), np.int64)
    for t in range(T):
        begins = ~masks[t]
        if begins.any():
            now[begins] = 0
            faced[begins] = 0
            now[begins, _START * SIDE + _START] = EMPTY * 18
            low[begins] = _START
        new = ((by_place[flat[t]] != cells[t]) & shown[t]).any(1) | begins | (t == 0)
        by_place[flat[t]] = cells[t]
        lower = np.minimum(low, least[t])
        new |= (lower != low).any(1)
        low = lower
        maps.append(now[new, :-1])
        lows.append(low[new])
        number[t] = np.where(new, count + np.cumsum(new) - 1, number[t - 1])
        count += len(maps[-1])
        faced_by[t] = faced[:, :-1]
        by_faced[ahead[t]] = 1
    after = MapState(
        now[:, :-1].copy(),
        faced[:, :-1].copy(),
        cells[-1].copy(),
        place,
        low,
        np.stack([direction[-1], first], axis=1),
    )
    seen = Seen(np.concatenate(maps), np.concatenate(lows), number, faced_by, places, firsts)
    return seen, after


def _in_box(places: NDArray[np.int16]) -> NDArray[np.int64]:
    """Places counted from the least seen; in grids too large for the box, its last cell."""
    return np.asarray(np.minimum(places & (SIDE - 1), _BOX - 1), dtype=np.int64)


def _rows(bits: NDArray[np.uint8], bit: int, low: NDArray[np.int16]) -> NDArray[np.uint32]:
    """The 24 x 24 cells from `low` on that have a bit, of V maps: uint32 [24, V]."""
    packed = np.packbits((bits & bit).reshape(len(bits), SIDE, SIDE), axis=2, bitorder="little")
    rows = packed.view("<u4")[..., 0]
    turn = (low[:, 0] & 31).astype(np.uint32)
    pick = ((low[:, 1] + np.arange(_BOX)[:, None]) & 31).astype(np.int64)
    rows = rows[np.arange(len(bits)), pick]
    return np.asarray(((rows >> turn) | (rows << ((np.uint32(32) - turn) & np.uint32(31)))) & _MASK)


_MASK = np.uint32((1 << _BOX) - 1)
_ONE = np.uint32(1)


class Routes(NamedTuple):
    """Breadth-first search from the agent over N maps; of 64 maps a word holds a bit of each.

    planes    uint64 [10, 24, 24, W]: the bits of the distance of each cell reached, least first;
              then the cells that shortest ways reach by a first move right, down, left, up
    distance  uint8 [N], to the nearest unseen cell; 63 where none is reached
    first     uint8 [N], the first moves towards all unseen cells at that distance, 4 bits
    """

    planes: NDArray[np.uint64]
    distance: NDArray[np.uint8]
    first: NDArray[np.uint8]

    def to(
        self, number: NDArray[np.int64], x: NDArray[np.int64], y: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Distance to cells, 0 where one is not reached, and the first moves, 4 bits: uint8 [R].

        number   of the map, of each cell
        """
        at = (y * _BOX + x) * self.planes.shape[3] + (number >> 6)
        bit = (number & 63).astype(np.uint64)
        distance, first = np.zeros(len(at), np.uint8), np.zeros(len(at), np.uint8)
        for plane, words in enumerate(self.planes.reshape(10, -1)):
            has = (words.take(at) >> bit).astype(np.uint8) & 1
            if plane < 6:
                distance |= has << np.uint8(plane)
            else:
                first |= has << np.uint8(plane - 6)
        return distance, first

    def reach(self, cells: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Whether any of these cells is reached, uint64 [24, 24, W]: bool [N]."""
        reached = np.bitwise_or.reduce(self.planes[6:]) & cells
        return _of_each(_anywhere(reached), len(self.first)).astype(bool)


def by_map(rows: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """The cells of N maps, of 64 maps a bit each: uint64 [24, 24, W], of uint32 [24, N]."""
    N = rows.shape[1]
    cells = np.zeros((_BOX, _BOX, (N + 63) // 64 * 64), np.uint8)
    by_row = np.unpackbits(
        rows.astype("<u4")[..., None].view(np.uint8), axis=2, count=_BOX, bitorder="little"
    )
    cells[..., :N] = by_row.transpose(0, 2, 1)
    return np.packbits(cells, axis=2, bitorder="little").view("<u8")


def _of_each(words: NDArray[np.uint64], count: int) -> NDArray[np.uint8]:
    """The bits of words, one of each map: uint8 [..., count] of [..., W]."""
    parts = words.astype("<u8").view(np.uint8)
    return np.unpackbits(parts, axis=-1, count=count, bitorder="little")


def _anywhere(cells: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """On which maps any cell is meant: uint64 [..., W] of [..., 24, 24, W]."""
    flat = cells.reshape(*cells.shape[:-3], _BOX * _BOX, -1)
    return np.asarray(np.bitwise_or.reduce(flat, axis=-2))


def routes(
    free: NDArray[np.uint64],
    unseen: NDArray[np.uint64],
    column: NDArray[np.int64],
    row: NDArray[np.int64],
) -> Routes:
    """Ways over `free` cells, uint64 [24, 24, W], from (column, row) of each of N maps.

    Maps side by side are searched together, until the last of them comes to its end: it is
    quickest where those of a size are.
    """
    N, words = len(column), free.shape[2]
    planes = np.zeros((10, _BOX, _BOX, words), np.uint64)
    for start in range(0, words, _CHUNK):
        part, maps = slice(start, start + _CHUNK), slice(start * 64, (start + _CHUNK) * 64)
        found = _search(free[..., part], column[maps], row[maps])
        planes[:, : found.shape[1], : found.shape[2], part] = found
    # the nearest of the unseen cells, one bit of their distance after another
    nearest = np.bitwise_or.reduce(planes[6:]) & unseen
    distance = np.zeros(N, np.uint8)
    for plane in reversed(range(6)):
        nearer = nearest & ~planes[plane]
        has_nearer = _anywhere(nearer)
        distance |= _of_each(~has_nearer, N) << np.uint8(plane)
        nearest = nearer | (nearest & ~has_nearer)
    towards = _of_each(_anywhere(planes[6:] & nearest), N)
    first = towards[0] + 2 * towards[1] + 4 * towards[2] + 8 * towards[3]
    return Routes(planes, distance, first)


def _search(
    free: NDArray[np.uint64], column: NDArray[np.int64], row: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """The planes of `Routes`, one distance after another, as far as anybody comes.

    Cells lie in one row, each followed by the one to its right; a column of walls keeps the rows
    apart. So the cell beside one is so many words away, in whatever direction.
    """
    # up to the row and the column beyond the last where anybody can stand
    somewhere = np.bitwise_or.reduce(free, axis=2)
    height, width = (
        min(_BOX, 2 + int(np.flatnonzero(somewhere.any(axis)).max(initial=at.max())))
        for axis, at in ((1, row), (0, column))
    )
    words = free.shape[2]
    box, down = (height, width + 1, words), (width + 1) * words
    size, edge = height * down, down + words
    walled = np.zeros(box, np.uint64)
    walled[:, :width] = free[:height, :width]
    open_cells, unvisited = walled.reshape(-1), np.full(size, ~np.uint64(0))
    maps = np.arange(len(column))
    bit = np.uint64(1) << (maps & 63).astype(np.uint64)
    at = row * down + column * words + (maps >> 6)
    np.bitwise_and.at(unvisited, at, ~bit)
    buffers = np.zeros((2, 4, edge + size + edge), np.uint64)
    steps = (words, down, -words, -down)
    for move, ((x, y), step) in enumerate(zip(_STEP.tolist(), steps, strict=True)):
        to_row, to_column = row + y, column + x
        inside = (to_row >= 0) & (to_row < height) & (to_column >= 0) & (to_column < width)
        np.bitwise_or.at(buffers[0, move], edge + step + at[inside], bit[inside])
    # of each buffer the cells, and those that each step leads to
    now, later = (
        [one[:, edge - step : edge - step + size] for step in (0, *steps)] for one in buffers
    )
    planes = np.zeros((10, size), np.uint64)
    levels, moves = np.zeros((_FARTHEST + 1, size), np.uint64), planes[6:]
    for distance in range(1, _FARTHEST):
        here, there = now[0], later[0]
        reached = np.bitwise_or.reduce(here, axis=0, out=levels[distance])
        if not reached.any():
            break
        moves |= here
        here &= open_cells
        # with `out`: `a[i] |= b` would copy a[i] onto itself beside
        np.bitwise_or(now[1], now[2], out=there)
        np.bitwise_or(there, now[3], out=there)
        np.bitwise_or(there, now[4], out=there)
        unvisited ^= reached
        there &= unvisited
        now, later = later, now
    for plane in range(6):
        of_bit = levels.reshape(-1, 2, 1 << plane, size)[: (distance >> plane + 1) + 1, 1]
        np.bitwise_or.reduce(of_bit, axis=(0, 1), out=planes[plane])
    return planes.reshape(10, *box)[:, :, :width]


def _flooded(
    inside: NDArray[np.uint32], column: NDArray[np.int64], row: NDArray[np.int64]
) -> NDArray[np.uint32]:
    """The cells of `inside` that hang together with (column, row): uint32 [24, V]."""
    result = np.zeros_like(inside)
    result[row, np.arange(len(row))] = _ONE << column.astype(np.uint32)
    for _ in range(2 * _BOX):
        more = result | result << _ONE | result >> _ONE
        more[1:] |= result[:-1]
        more[:-1] |= result[1:]
        more &= inside
        more |= result
        if np.array_equal(more, result):
            break
        result = more
    return result


class Things(NamedTuple):
    """What lies on the maps of N steps, R things in the order of the steps.

    step     int64 [R], to which a thing belongs
    first    int64 [N], the first thing of each step, which is its nearest unseen cell
    code     uint8 [R], its packed cell; 0 is the nearest unseen cell
    how      float32 [HOW, R], how it lies
    """

    step: NDArray[np.int64]
    first: NDArray[np.int64]
    code: NDArray[np.uint8]
    how: NDArray[np.float32]


_NEAR = np.array([1, 2, 3, 4, 6, 9, 13, 19, 27, 63])
"""The first distances of ranges of distances; from 63 on: not reached."""
_RANGE = np.searchsorted(_NEAR, np.arange(64), side="right") - 1
_RANGE[0] = len(_NEAR)
HOW = len(_NEAR) + 1 + 4 + 4 + 1 + 4 + 4 + 4 + 1 + 3


class _Listed(NamedTuple):
    """What lies on V maps, in the order of the maps, an unseen cell before each.

    first    int64 [V + 1], the first of each map, then how many there are
    code     uint8 [Q], 0 for the unseen cell, of which nothing more is said
    at       int64 [Q], its place on the map
    x, y     int64 [Q], in the box
    begun    int64 [2, Q], x and y from the first cell of the episode
    in_room  bool [Q], whether it lies in the room where the episode began
    """

    first: NDArray[np.int64]
    code: NDArray[np.uint8]
    at: NDArray[np.int64]
    x: NDArray[np.int64]
    y: NDArray[np.int64]
    begun: NDArray[np.int64]
    in_room: NDArray[np.bool_]


def _listed(cells: NDArray[np.uint8], bits: NDArray[np.uint8], low: NDArray[np.int16]) -> _Listed:
    flat = np.flatnonzero((bits & _THING_BIT).reshape(-1))
    number, at = np.divmod(flat, _PLACES)
    x = _in_box((at & 31) - low[number, 0])
    y = _in_box((at >> 5) - low[number, 1])
    origin = _in_box(_START - low).T
    room = _flooded(_rows(bits, _ROOM_BIT, low), *origin)
    in_room = ((room[y, number] >> x.astype(np.uint32)) & _ONE).astype(bool)
    begun = np.stack([x, y]) - origin[:, number]
    before = np.zeros(len(cells) + 1, np.int64)
    np.cumsum(np.bincount(number, minlength=len(cells)), out=before[1:])
    order = np.arange(len(flat)) + number + 1
    columns = []
    for values in (cells.reshape(-1)[flat], at, x, y, begun, in_room):
        columns.append(np.zeros((*values.shape[:-1], len(flat) + len(cells)), values.dtype))
        columns[-1][..., order] = values
    return _Listed(before + np.arange(len(before)), *columns)


def things(seen: Seen, direction: NDArray[np.uint8], *, search: bool = True) -> Things:
    """The things on the maps of T x B steps, and the nearest unseen cell of each step.

    search   whether distances and first moves are given, or only where things lie
    """
    N = direction.size
    bits, low = _bits()[seen.cells], seen.low - np.int16(1)
    number, heading = seen.number.reshape(N), direction.reshape(N)
    column, row = _in_box(seen.place.reshape(N, 2) - low[number]).T
    listed = _listed(seen.cells, bits, low)
    size = np.diff(listed.first)[number]
    first = np.cumsum(size) - size
    step = np.repeat(np.arange(N), size)
    of = np.arange(len(step)) + np.repeat(listed.first[number] - first, size)
    code, x, y = listed.code[of], listed.x[of], listed.y[of]
    x[first], y[first] = column, row

    how = np.zeros((HOW, len(step)), np.float32)
    ranges = len(_NEAR) + 1
    where = ranges + 9
    ahead, right = _turned(x - column[step], y - row[step], heading[step])
    np.divide(ahead, 8, out=how[where], casting="same_kind")
    np.divide(right, 8, out=how[where + 1], casting="same_kind")
    how[where + 2] = (right == 0) & (ahead == 1)
    how[where + 3] = np.abs(ahead) + np.abs(right) == 1
    in_room = listed.in_room[of]
    begun_x, begun_y = listed.begun[:, of]
    beyond, aside = _turned(begun_x, begun_y, seen.first.reshape(N)[step])
    for side, lies in enumerate((beyond > 0, beyond < 0, aside > 0, aside < 0)):
        how[where + 4 + side] = lies
        how[where + 8 + side] = lies & in_room
    how[where + 12] = in_room
    how[where + 13] = seen.faced.reshape(-1)[step * _PLACES + listed.at[of]]
    how[where + 13, first] = 0
    if search:
        distance, moves, through = _ways(bits, low, number, (column, row), step, first, (x, y))
        how[_RANGE[distance], np.arange(len(step))] = 1
        closeness = (4 / (3 + distance.astype(np.float32))) * (distance < _FARTHEST)
        moves = _TURNED_MOVES[heading[step], moves]
        for move in range(4):
            flag = (moves >> np.uint8(move)) & 1
            how[ranges + move] = flag
            how[ranges + 4 + move] = flag * closeness
        how[ranges + 8] = through
        how[where + 14] = _is_nearest(step, code // 3, distance)
        # a ball, whatever its colour; a closed door, whatever its colour
        how[where + 15] = _is_nearest(step, code // 18 * 3 + code % 3, distance)
        how[where + 14 :, first] = 0
    return Things(step, first, code, how)


def _ways(
    bits: NDArray[np.uint8],
    low: NDArray[np.int16],
    number: NDArray[np.int64],
    place: tuple[NDArray[np.int64], NDArray[np.int64]],
    step: NDArray[np.int64],
    first: NDArray[np.int64],
    target: tuple[NDArray[np.int64], NDArray[np.int64]],
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.bool_]]:
    """The ways to R things from N places on V maps.

    bits, low   of the maps; `number` [N] says on which of them a place (x, y) is
    target      x and y of the things; those that `first` says stand for the unseen cells
    returns     distance uint8 [R], 63 where there is no way; first moves uint8 [R], right, down,
                left, up, 4 bits; whether a way leads through things that can be moved, bool [R]
    """
    rows = [_rows(bits, one, low) for one in (_FREE_BIT, _UNSEEN_BIT, _BLOCKER_BIT)]
    # steps in a row are often on one map at one place
    column, row = place
    key = (number * _BOX + row) * _BOX + column
    _, at, search = np.unique(key, return_index=True, return_inverse=True)
    by_size = np.argsort(np.bitwise_count(rows[0]).sum(0)[number[at]], kind="stable")
    at, search = at[by_size], np.argsort(by_size)[search]
    number, column, row = number[at], column[at], row[at]
    free, unseen, blockers = (one[:, number] for one in rows)
    passable = np.concatenate([free, free | blockers], axis=1)
    # few maps fill no word: both searches at once
    both = 2 * len(number) <= 64
    of = np.tile(np.arange(len(number)), 1 + both)
    ways = routes(by_map(passable[:, : len(of)]), by_map(unseen[:, of]), column[of], row[of])
    of_thing = search[step]
    distance, moves = ways.to(of_thing, *target)
    here = (target[0] == column[of_thing]) & (target[1] == row[of_thing])
    distance[(distance == 0) & ~here] = _FARTHEST
    distance[first], moves[first] = ways.distance[search], ways.first[search]
    # where there is none: through things that can be moved
    without = np.flatnonzero(distance == _FARTHEST)
    blocked = np.zeros(len(of), bool)
    blocked[of_thing[without]] = True
    blocked &= ways.reach(by_map(blockers[:, of]))
    through = np.zeros(len(step), bool)
    if blocked.any():
        again, second = ways, np.arange(len(number)) + len(number)
        if not both:
            on = np.flatnonzero(blocked)
            again = routes(
                by_map(passable[:, second[on]]), by_map(unseen[:, on]), column[on], row[on]
            )
            second = np.cumsum(blocked) - 1
        without = without[blocked[of_thing[without]]]
        of_thing = second[of_thing[without]]
        longer, towards = again.to(of_thing, target[0][without], target[1][without])
        longer[longer == 0] = _FARTHEST
        unseen_cell = first[step[without]] == without
        distance[without] = np.where(unseen_cell, again.distance[of_thing], longer)
        moves[without] = np.where(unseen_cell, again.first[of_thing], towards)
        through[without] = distance[without] < _FARTHEST
    return distance, moves, through


def _is_nearest(
    step: NDArray[np.int64], kind: NDArray[np.uint8], distance: NDArray[np.uint8]
) -> NDArray[np.bool_]:
    """Which things are the nearest of their kind and step, one each: bool [R]."""
    key = step * CELL_CODES + kind
    rank = distance * np.int64(len(step)) + np.arange(len(step))
    least = np.full((step[-1] + 1) * CELL_CODES, np.iinfo(np.int64).max)
    np.minimum.at(least, key, rank)
    return np.asarray(least[key] == rank)


# first moves to the right, down, left, up as ahead, right, back, left of who looks in a direction
_TURNED_MOVES = np.array(
    [[(moves | moves << 4) >> turn & 15 for moves in range(16)] for turn in range(4)], np.uint8
)


def _turned(
    x: NDArray[np.int64], y: NDArray[np.int64], direction: NDArray[np.uint8]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How far (x, y) is ahead, and to the right, of who looks in a direction: [R] each."""
    along_x, along_y = _STEP.astype(np.int64).T
    across = (direction + 1) & 3
    return (
        x * along_x[direction] + y * along_y[direction],
        x * along_x[across] + y * along_y[across],
    )
