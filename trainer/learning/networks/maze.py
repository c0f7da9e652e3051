"""A network for mazes: `small` with a map of what it has seen, kept in its memory.

The map follows from observations alone. Turning shows in `direction`; a step forward by the
view, which is another one wherever the cell ahead lets the agent in. Places are counted from the
first cell of the episode on a torus of 32 x 32 cells, larger than any grid of BabyAI (22 x 22).

What the network gets of the map is a bag of the things on it (doors, keys, balls, boxes) and of
the nearest cell not yet seen. Each is a pair: what it is, in the light of the mission (FiLM), and
how it lies: steps to it over known free cells and the first moves of the shortest ways
(breadth-first search on bitboards, a row of the grid an integer), where it lies from here and from
where the episode began, whether the agent has stood before it.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from demotools.babyai.cells import (
    ACTIONS,
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
from trainer.batch import Batch
from trainer.learning.networks.base import (
    Output,
    check_sizes,
    head,
    in_order,
    is_traced,
    lstm_by_runs,
    runs_of,
)
from trainer.learning.networks.small import SmallNetwork

SIDE = 32
"""Cells of the torus each way."""
_PLACES = SIDE * SIDE
_BOX = 24
"""Cells each way of the part of it that a search looks at; BabyAI's grids are at most 22."""
_CELLS = VIEW_SIZE * VIEW_SIZE
_START = SIDE // 2
_AHEAD = AGENT_COLUMN * VIEW_SIZE + AGENT_ROW - 1
_HERE = AGENT_COLUMN * VIEW_SIZE + AGENT_ROW
# x and y of one step, by direction: right, down, left, up
_STEP = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]], dtype=np.int16)
_FARTHEST = 63
_CHUNK = 512


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
        return 2 * _PLACES + _CELLS + 6

    @classmethod
    def unpacked(cls, memory: Tensor) -> MapState:
        """Of float [B, size]."""
        numbers = memory.detach().numpy()
        parts = np.split(numbers, np.cumsum([_PLACES, _PLACES, _CELLS, 2, 2]), axis=1)
        kinds = (np.uint8, np.uint8, np.uint8, np.int16, np.int16, np.uint8)
        return cls(*(part.astype(kind) for part, kind in zip(parts, kinds, strict=True)))

    def packed(self) -> Tensor:
        """As float32 [B, size]."""
        return torch.from_numpy(np.concatenate([part.astype(np.float32) for part in self], axis=1))


class Seen(NamedTuple):
    """The maps of a batch of T x B steps, each with all that was seen up to that step.

    cells      uint8 [T, B, 1024]
    faced      uint8 [T, B, 1024], without the step's own cell ahead
    place      int16 [T, B, 2]
    low        int16 [T, B, 2]
    first      uint8 [T, B], the direction in which the episode began
    """

    cells: NDArray[np.uint8]
    faced: NDArray[np.uint8]
    place: NDArray[np.int16]
    low: NDArray[np.int16]
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
    kept = Seen(
        np.empty((T, B, _PLACES), np.uint8),
        np.empty((T, B, _PLACES), np.uint8),
        np.empty((T, B, 2), np.int16),
        np.empty((T, B, 2), np.int16),
        np.empty((T, B), np.uint8),
    )
    place, low, first = state.place.copy(), state.low.copy(), state.direction[:, 1].copy()
    for t in range(T):
        place += steps[t]
        place[~masks[t]] = _START
        first = np.where(masks[t], first, direction[t])
        kept.place[t], kept.first[t] = place, first
    # places of all cells of all views, at once
    x = kept.place[..., None, 0] + offsets[..., 0]
    y = kept.place[..., None, 1] + offsets[..., 1]
    least_x = np.where(shown, x, 99).min(-1)
    least_y = np.where(shown, y, 99).min(-1)
    flat = (y & (SIDE - 1)).astype(np.int64) * SIDE + (x & (SIDE - 1))
    ahead = flat[..., _AHEAD].copy()
    flat[~shown] = _PLACES
    width = _PLACES + 1  # the last place takes what is to be forgotten
    flat += np.arange(B)[:, None] * width
    ahead += np.arange(B) * width
    now, faced = np.zeros((B, width), np.uint8), np.zeros((B, width), np.uint8)
    now[:, :-1], faced[:, :-1] = state.cells, state.faced
    by_place, by_faced = now.reshape(-1), faced.reshape(-1)
    for t in range(T):
        begins = np.flatnonzero(~masks[t])
        if len(begins):
            now[begins] = 0
            faced[begins] = 0
            now[begins, _START * SIDE + _START] = EMPTY * 18
            low[begins] = _START
        by_place[flat[t]] = cells[t]
        kept.cells[t] = now[:, :-1]
        kept.faced[t] = faced[:, :-1]
        by_faced[ahead[t]] = 1
        np.minimum(low[:, 0], least_x[t], out=low[:, 0])
        np.minimum(low[:, 1], least_y[t], out=low[:, 1])
        kept.low[t] = low
    after = MapState(
        now[:, :-1].copy(),
        faced[:, :-1].copy(),
        cells[-1].copy(),
        place,
        low,
        np.stack([direction[-1], first], axis=1),
    )
    return kept, after


def _in_box(places: NDArray[np.int16]) -> NDArray[np.int64]:
    """Places counted from the least seen; in grids too large for the box, its last cell."""
    return np.asarray(np.minimum(places & (SIDE - 1), _BOX - 1), dtype=np.int64)


def _rows(bits: NDArray[np.uint8], bit: int, low: NDArray[np.int16]) -> NDArray[np.uint32]:
    """The 24 x 24 cells from `low` on that have a bit: uint32 [N, 24]."""
    packed = np.packbits((bits & bit).reshape(len(bits), SIDE, SIDE), axis=2, bitorder="little")
    rows = packed.view("<u4")[..., 0]
    turn = (low[:, 0] & 31).astype(np.uint32)[:, None]
    pick = (low[:, 1, None] + np.arange(_BOX)) & 31
    rows = np.take_along_axis(rows, pick.astype(np.int64), axis=1)
    return np.asarray(((rows >> turn) | (rows << ((np.uint32(32) - turn) & np.uint32(31)))) & _MASK)


_MASK = np.uint32((1 << _BOX) - 1)
_ONE = np.uint32(1)


class Routes(NamedTuple):
    """Breadth-first search from the agent over N maps.

    planes    uint32 [6, N, 24], the bits of the distance of each cell reached
    moves     uint32 [4, N, 24], the cells that shortest ways reach by a first move ahead, to the
              right, back, to the left
    distance  uint8 [N], to the nearest unseen cell; 63 where none is reached
    first     uint8 [N], the first moves towards all unseen cells at that distance, 4 bits
    """

    planes: NDArray[np.uint32]
    moves: NDArray[np.uint32]
    distance: NDArray[np.uint8]
    first: NDArray[np.uint8]


def routes(
    free: NDArray[np.uint32],
    unseen: NDArray[np.uint32],
    column: NDArray[np.int64],
    row: NDArray[np.int64],
    direction: NDArray[np.uint8],
) -> Routes:
    """Ways over `free` cells from (column, row) of each of N maps."""
    N = len(free)
    planes = np.zeros((6, N, _BOX), np.uint32)
    moves = np.zeros((4, N, _BOX), np.uint32)
    for start in range(0, N, _CHUNK):
        part = slice(start, start + _CHUNK)
        search = (free[part], column[part], row[part], direction[part])
        _search(*search, planes[:, part], moves[:, part])
    # the nearest of the unseen cells, one bit of their distance after another
    nearest = (moves[0] | moves[1] | moves[2] | moves[3]) & unseen
    distance = np.zeros(N, np.uint8)
    distance[~nearest.any(1)] = _FARTHEST
    for plane in reversed(range(6)):
        nearer = nearest & ~planes[plane]
        has_nearer = nearer.any(1)
        distance |= (~has_nearer).astype(np.uint8) << np.uint8(plane)
        nearest = np.where(has_nearer[:, None], nearer, nearest)
    towards = (moves & nearest).any(2)
    first = towards[0] + 2 * towards[1] + 4 * towards[2] + 8 * towards[3]
    return Routes(planes, moves, distance, first.astype(np.uint8))


def _search(
    free: NDArray[np.uint32],
    column: NDArray[np.int64],
    row: NDArray[np.int64],
    direction: NDArray[np.uint8],
    planes: NDArray[np.uint32],
    moves: NDArray[np.uint32],
) -> None:
    """Writes the planes and moves of `Routes`, one distance after another."""
    going = np.arange(len(free))  # the maps whose search has not come to an end
    visited = np.zeros_like(free)
    visited[going, row] = _ONE << column.astype(np.uint32)
    new = np.zeros((4, *free.shape), np.uint32)
    for move in range(4):
        step = _STEP[(direction + move) & 3]
        to_row, to_column = row + step[:, 1], column + step[:, 0]
        inside = (to_row >= 0) & (to_row < _BOX) & (to_column >= 0) & (to_column < _BOX)
        new[move, going[inside], to_row[inside]] = _ONE << to_column[inside].astype(np.uint32)
    my_planes, my_moves = np.zeros_like(planes), np.zeros_like(moves)
    aside, other = np.empty_like(new), np.empty_like(new)
    for distance in range(1, _FARTHEST):
        reached = new[0] | new[1]
        reached |= new[2]
        reached |= new[3]
        if distance % 4 == 0:
            goes_on = reached.any(1)
            left = int(goes_on.sum())
            if left < 0.8 * len(going):
                planes[:, going], moves[:, going] = my_planes, my_moves
                if not left:
                    return
                going, reached, free, visited = (
                    each[goes_on] for each in (going, reached, free, visited)
                )
                my_planes, my_moves, new = (each[:, goes_on] for each in (my_planes, my_moves, new))
                aside, other = np.empty_like(new), np.empty_like(new)
        visited |= reached
        my_moves |= new
        for plane in range(6):
            if distance >> plane & 1:
                my_planes[plane] |= reached
        new &= free
        np.left_shift(new, _ONE, out=aside)
        np.right_shift(new, _ONE, out=other)
        aside |= other
        aside[:, :, 1:] |= new[:, :, :-1]
        aside[:, :, :-1] |= new[:, :, 1:]
        aside &= ~visited
        new, aside = aside, new
    planes[:, going], moves[:, going] = my_planes, my_moves


def _flooded(
    inside: NDArray[np.uint32], column: NDArray[np.int64], row: NDArray[np.int64]
) -> NDArray[np.uint32]:
    """The cells of `inside` that hang together with (column, row): uint32 [N, 24]."""
    result = np.zeros_like(inside)
    result[np.arange(len(inside)), row] = _ONE << column.astype(np.uint32)
    for _ in range(2 * _BOX):
        more = result | result << _ONE | result >> _ONE
        more[:, 1:] |= result[:, :-1]
        more[:, :-1] |= result[:, 1:]
        more &= inside
        more |= result
        if np.array_equal(more, result):
            break
        result = more
    return result


class Things(NamedTuple):
    """What lies on the maps of N steps, R things in the order of the steps.

    step     int64 [R], to which a thing belongs
    code     uint8 [R], its packed cell; 0 is the nearest unseen cell
    how      float32 [R, HOW], how it lies
    """

    step: NDArray[np.int64]
    code: NDArray[np.uint8]
    how: NDArray[np.float32]


_NEAR = np.array([1, 2, 3, 4, 6, 9, 13, 19, 27, 63])
"""The first distances of ranges of distances; from 63 on: not reached."""
_RANGE = np.searchsorted(_NEAR, np.arange(64), side="right") - 1
_RANGE[0] = len(_NEAR)
HOW = len(_NEAR) + 1 + 4 + 4 + 1 + 4 + 4 + 4 + 1 + 3


def things(seen: Seen, direction: NDArray[np.uint8], *, search: bool = True) -> Things:
    """The things on the maps of T x B steps, and the nearest unseen cell of each step.

    search   whether distances and first moves are given, or only where things lie
    """
    N = direction.size
    cells = seen.cells.reshape(N, _PLACES)
    bits = _bits()[cells]
    low = seen.low.reshape(N, 2) - np.int16(1)
    place = seen.place.reshape(N, 2)
    heading = direction.reshape(N)
    column, row = _in_box(place - low).T
    free = _rows(bits, _FREE_BIT, low)
    unseen = _rows(bits, _UNSEEN_BIT, low)
    flat = np.flatnonzero((bits & _THING_BIT).reshape(-1))
    step, at = np.divmod(flat, _PLACES)
    code = cells.reshape(-1)[flat]
    x = ((at & 31) - low[step, 0]) & 31
    y = ((at >> 5) - low[step, 1]) & 31

    ways = routes(free, unseen, column, row, heading)
    bit = x.astype(np.uint32)
    of = (step, y)
    distance = np.zeros(len(step), np.uint8)
    for plane in range(6):
        distance |= ((ways.planes[plane][of] >> bit) & _ONE).astype(np.uint8) << np.uint8(plane)
    first = np.zeros(len(step), np.uint8)
    for move in range(4):
        first |= ((ways.moves[move][of] >> bit) & _ONE).astype(np.uint8) << np.uint8(move)
    here = (x == column[step]) & (y == row[step])
    distance[(distance == 0) & ~here] = _FARTHEST
    # where the way is blocked: through things that can be moved
    blocked = np.zeros(N, bool)
    blocked[step[distance == _FARTHEST]] = True
    blocked |= ways.distance == _FARTHEST
    blockers = _rows(bits, _BLOCKER_BIT, low)
    blocked &= (blockers != 0).any(1)
    far = np.flatnonzero(blocked)
    through_thing = np.zeros(len(step), bool)
    through_step = np.zeros(N, bool)
    nearest, towards = ways.distance, ways.first
    if len(far):
        again = routes(free[far] | blockers[far], unseen[far], column[far], row[far], heading[far])
        number = np.full(N, -1)
        number[far] = np.arange(len(far))
        todo = np.flatnonzero((distance == _FARTHEST) & (number[step] >= 0))
        of = (number[step[todo]], y[todo])
        bit = x[todo].astype(np.uint32)
        longer = np.zeros(len(todo), np.uint8)
        moves = np.zeros(len(todo), np.uint8)
        for plane in range(6):
            longer |= ((again.planes[plane][of] >> bit) & _ONE).astype(np.uint8) << np.uint8(plane)
        for move in range(4):
            moves |= ((again.moves[move][of] >> bit) & _ONE).astype(np.uint8) << np.uint8(move)
        distance[todo] = np.where(longer == 0, _FARTHEST, longer)
        first[todo] = moves
        through_thing[todo] = longer > 0
        use = far[nearest[far] == _FARTHEST]
        nearest[use] = again.distance[number[use]]
        towards[use] = again.first[number[use]]
        through_step[use] = nearest[use] < _FARTHEST
    # the room where the episode began, and the sides of its first cell
    origin = _in_box(_START - low)
    room = _flooded(_rows(bits, _ROOM_BIT, low), origin[:, 0], origin[:, 1])
    in_room = ((room[step, y] >> x.astype(np.uint32)) & _ONE).astype(bool)
    beside = np.stack([x - origin[step, 0], y - origin[step, 1]], axis=1)
    beside[np.abs(beside) > SIDE] = 0
    begun = _turned(beside, seen.first.reshape(N)[step])
    relative = _turned(np.stack([x - column[step], y - row[step]], axis=1), heading[step])

    count = N + len(step)
    how = np.zeros((count, HOW), np.float32)
    # the unseen cell of a step comes before its things
    order = np.arange(len(step)) + step + 1
    own = np.ones(count, bool)
    own[order] = False
    all_step = np.empty(count, np.int64)
    all_step[order], all_step[own] = step, np.arange(N)
    all_code = np.zeros(count, np.uint8)
    all_code[order] = code
    all_distance = np.empty(count, np.uint8)
    all_distance[order], all_distance[own] = distance, nearest
    all_first = np.empty(count, np.uint8)
    all_first[order], all_first[own] = first, towards
    through = np.empty(count, bool)
    through[order], through[own] = through_thing, through_step
    ranges = len(_NEAR) + 1
    if search:
        how[np.arange(count), _RANGE[all_distance]] = 1
        closeness = (4 / (3 + all_distance.astype(np.float32))) * (all_distance < _FARTHEST)
        for move in range(4):
            flag = (all_first >> move) & 1
            how[:, ranges + move] = flag
            how[:, ranges + 4 + move] = flag * closeness
        how[:, ranges + 8] = through
    where = ranges + 9
    near = relative.astype(np.float32)
    how[order, where] = near[:, 0] / 8
    how[order, where + 1] = near[:, 1] / 8
    how[order, where + 2] = (near[:, 1] == 0) & (near[:, 0] == 1)
    how[order, where + 3] = np.abs(near).sum(1) == 1
    how[order, where + 4] = begun[:, 0] > 0
    how[order, where + 5] = begun[:, 0] < 0
    how[order, where + 6] = begun[:, 1] > 0
    how[order, where + 7] = begun[:, 1] < 0
    how[order, where + 8 : where + 12] = how[order, where + 4 : where + 8] * in_room[:, None]
    how[order, where + 12] = in_room
    how[order, where + 13] = seen.faced.reshape(-1)[flat]
    if search:
        how[order, where + 14] = _is_nearest(step, code // 3, distance)
        # a ball, whatever its colour; a closed door, whatever its colour
        how[order, where + 15] = _is_nearest(step, code // 18 * 3 + code % 3, distance)
    return Things(all_step, all_code, how)


def _is_nearest(
    step: NDArray[np.int64], kind: NDArray[np.uint8], distance: NDArray[np.uint8]
) -> NDArray[np.bool_]:
    """Which things are the nearest of their kind and step, one each: bool [R]."""
    key = step * 256 + kind
    rank = np.argsort(key * 64 + distance, kind="stable")
    begins = np.ones(len(rank), bool)
    begins[1:] = key[rank][1:] != key[rank][:-1]
    result = np.zeros(len(rank), bool)
    result[rank] = begins
    return result


def _turned(offset: NDArray[Any], direction: NDArray[np.uint8]) -> NDArray[Any]:
    """(ahead, to the right) of (x, y) for who looks in a direction: [R, 2]."""
    ahead = _STEP[direction]
    right = _STEP[(direction + 1) & 3]
    return np.stack([(offset * ahead).sum(1), (offset * right).sum(1)], axis=1)


WORD_HEADS = 2


class MazeNetwork(SmallNetwork):
    """A FiLM + LSTM policy for CPUs that keeps a map.

    vocabulary_size   N, words that token ids 1..N stand for
    channels          of the bag of things
    heads             with which the things are looked through after the LSTM; 0: not at all
    words             size of a head with which memory asks the words of the mission; 0: not at all
    search            whether the network gets distances and first moves
    """

    def __init__(
        self,
        vocabulary_size: int,
        *,
        embedding: int = 64,
        features: int = 256,
        memory: int = 256,
        instruction: int = 128,
        channels: int = 96,
        heads: int = 3,
        words: int = 32,
        search: bool = True,
    ) -> None:
        super().__init__(
            vocabulary_size,
            embedding=embedding,
            features=features,
            memory=memory,
            instruction=instruction,
        )
        check_sizes(channels=channels)
        self.search = search
        self.kinds = nn.Embedding(CELL_CODES, channels)
        self.film_kinds = nn.Linear(instruction, 2 * channels)
        self.lie = nn.Linear(HOW, channels)
        self.bag = nn.Linear(channels, features)
        self.told = nn.Linear(features, features)
        self.heads, self.words = heads, words
        self._read_before: tuple[int, Tensor, Tensor] | None = None
        if words:
            self.mission = nn.Linear(instruction, features)
            self.asked = nn.Linear(memory, WORD_HEADS * words)
            self.spoken = nn.Linear(instruction, 2 * WORD_HEADS * words)
        if heads:
            self.query = nn.Linear(memory + WORD_HEADS * words, channels)
        both = memory + features + bool(heads) * channels + WORD_HEADS * words
        self.actor = nn.Sequential(nn.Linear(both, 128), nn.Tanh(), nn.Linear(128, len(ACTIONS)))
        self.critic = head(both, 1)

    def initial_memory(self, rollouts: int) -> Tensor:
        """Zeros [B, 2 * memory + map]: hidden and cell state, and an empty map."""
        size = 2 * self.cell.hidden_size + MapState.size()
        return self.cell.weight_hh.new_zeros(rollouts, size)

    def forward(self, batch: Batch, memory: Tensor) -> Output:
        """Logits, values and the memory after; see `trainer.learning.building`."""
        if is_traced():
            raise TypeError("its map is computed with numpy")
        T, B = batch["masks"].shape[:2]
        size = 2 * self.cell.hidden_size
        direction = batch["direction"].numpy().astype(np.uint8)
        seen, state = explored(
            batch["cells"].numpy().reshape(T, B, _CELLS),
            direction,
            batch["masks"].numpy() != 0,
            MapState.unpacked(memory[:, size:]),
        )
        found = things(seen, direction, search=self.search)
        tokens = batch["mission_tokens"]
        states = self._states(tokens)
        final = ((tokens != 0).sum(1) - 1).clamp(min=0)
        instruction = states[torch.arange(len(tokens)), final]
        kinds, lying = self._things(found, batch["mission"].reshape(-1), instruction)
        step = torch.from_numpy(found.step)
        borders = torch.searchsorted(step, torch.arange(T * B))
        told = torch.relu(self.bag(_summed(kinds * lying, borders)))

        runs = runs_of(batch["masks"])
        cells = in_order(batch["cells"], runs).flatten(1)
        mission = in_order(batch["mission"], runs)
        scale, shift = self.film(instruction).chunk(2, dim=1)
        told = told[runs.order]
        view = self._summed_cells(cells, mission, scale, shift) + self.view.bias
        told_here = self.told(told)
        if self.words:
            told_here = told_here + self.mission(instruction)[mission.long()]
        features = torch.relu(view + told_here)
        hidden, after = lstm_by_runs(self.cell, features, runs, memory[:, :size])
        parts = [hidden, told]
        asked = hidden
        if self.words:
            parts.append(self._heard(self.asked(hidden), states, tokens, mission.long()))
            asked = torch.cat([hidden, parts[-1].to(hidden.dtype)], dim=1)
        if self.heads:
            query = self.query(asked)[runs.inverse]
            parts.append(self._read(query, kinds, lying, step, borders)[runs.order])
        both = torch.cat([part.to(hidden.dtype) for part in parts], dim=1)
        logits = self.actor(both)[runs.inverse].unflatten(0, (T, B))
        values = self.critic(both)[runs.inverse].reshape(T, B)
        carried = torch.cat([after.to(memory.dtype), state.packed()], dim=1)
        return Output(logits, values, carried, lambda: both[runs.inverse].reshape(T, B, -1))

    def _states(self, tokens: Tensor) -> Tensor:
        """The instruction encoder's state at every word, [M, L, instruction].

        Acting asks for the same missions again and again: without gradient they are read once.
        """
        version = self.instruction.gru.weight_hh_l0._version
        before = None if torch.is_grad_enabled() else self._read_before
        if before is not None and before[0] == version and torch.equal(before[1], tokens):
            return before[2]
        states: Tensor = self.instruction.gru(self.instruction.words(tokens))[0]
        if not torch.is_grad_enabled():
            self._read_before = (version, tokens, states)
        return states

    def _things(self, found: Things, mission: Tensor, instruction: Tensor) -> tuple[Tensor, Tensor]:
        """What R things are, and how they lie: [R, channels] each."""
        step, code = torch.from_numpy(found.step), torch.from_numpy(found.code).long()
        scale, shift = self.film_kinds(instruction).chunk(2, dim=1)
        present, number = torch.unique(code, return_inverse=True)
        table = torch.relu(self.kinds(present) * (1 + scale[:, None]) + shift[:, None])
        row = mission.long()[step] * len(present) + number
        kinds = nn.functional.embedding(row, table.flatten(0, 1))
        return kinds, torch.relu(self.lie(torch.from_numpy(found.how)))

    def _heard(self, query: Tensor, states: Tensor, tokens: Tensor, mission: Tensor) -> Tensor:
        """What those words say that memory asks for: [N, heads * words].

        query    [N, heads * words]
        states   [M, L, instruction], of the words
        mission  int64 [N], row of
        """
        shape = (*tokens.shape, WORD_HEADS, self.words)
        keys, values = self.spoken(states).chunk(2, dim=2)
        keys = keys.view(shape).permute(0, 2, 1, 3)[mission]  # [N, heads, L, words]
        values = values.view(shape).permute(0, 2, 1, 3)[mission]
        score = (keys @ query.view(len(query), WORD_HEADS, self.words, 1))[..., 0]
        score = score.float() / self.words**0.5
        score = score.masked_fill((tokens == 0)[mission][:, None], -1e4)
        weight = score.softmax(2).to(values.dtype)
        heard: Tensor = (weight[:, :, None] @ values)[:, :, 0].flatten(1)
        return heard

    def _read(
        self, query: Tensor, kinds: Tensor, lying: Tensor, step: Tensor, borders: Tensor
    ) -> Tensor:
        """How those things lie that memory asks for: [N, channels].

        query   [N, channels]
        """
        heads = (len(step), self.heads, -1)
        score = (query[step] * kinds).view(heads).sum(2) / (kinds.shape[1] / self.heads) ** 0.5
        weight = score.float().clamp(max=40).exp()
        total = _summed(weight, borders)
        values = (lying.view(heads) * weight[..., None]).flatten(1)
        shape = (len(query), self.heads, -1)
        return (_summed(values, borders).view(shape) / (total[..., None] + 1e-6)).flatten(1)


def _summed(rows: Tensor, borders: Tensor) -> Tensor:
    """Sums of rows from each border to the next: float32 [N, channels] of [R, channels]."""
    index = torch.arange(len(rows))
    return nn.functional.embedding_bag(index, rows.float(), borders, mode="sum")
