"""Minigrid's levels with views from an encoded grid: the same bits, several times as fast.

Stock minigrid builds each view object by object: it slices the grid, rotates it up to four times,
walks over it to find what is in sight and encodes what is left. Here the grid is encoded once an
episode, one byte a cell, with a border of walls as wide as the view reaches. A view is then one
gather, and what is in sight is seven look-ups, a row of the view at a time. Levels, missions and
rules stay minigrid's own code. tests/test_fast.py compares every bit with stock.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from minigrid.core.constants import COLOR_TO_IDX, OBJECT_TO_IDX
from minigrid.envs.babyai.core.roomgrid_level import RoomGridLevel
from minigrid.envs.babyai.core.verifier import SeqInstr
from numpy.typing import NDArray

from demotools.grid import (
    AGENT_COLUMN,
    AGENT_ROW,
    CLOSED,
    DOOR,
    EMPTY,
    LOCKED,
    OPEN,
    UNPACKING_TABLE,
    VIEW_SIZE,
    WALL,
)

# The minigrid versions whose every bit was compared (tests/test_fast.py).
PROVEN_VERSIONS = ("3.2.0",)

BORDER = VIEW_SIZE - 1
"""Cells of wall around the encoded grid: as far as a view reaches beyond the agent."""

_GREY_WALL = WALL * 18 + COLOR_TO_IDX["grey"] * 3
_EMPTY_CELL = EMPTY * 18
# By direction: right, down, left, up. Forward, and to the right hand, as (column, row).
FORWARD = ((1, 0), (0, 1), (-1, 0), (0, -1))
_RIGHT_HAND = ((0, 1), (-1, 0), (0, -1), (1, 0))
_FORWARD_VECTORS = tuple(np.array(vector) for vector in FORWARD)
_RIGHT_VECTORS = tuple(np.array(vector) for vector in _RIGHT_HAND)


def cell_code(thing: Any) -> int:
    """The packed cell of a minigrid object, or of None: an empty cell."""
    if thing is None:
        return _EMPTY_CELL
    kind: int = OBJECT_TO_IDX[thing.type]
    state = 0
    if kind == DOOR:
        state = OPEN if thing.is_open else LOCKED if thing.is_locked else CLOSED
    colour: int = COLOR_TO_IDX[thing.color]
    return kind * 18 + colour * 3 + state


def _opaque_codes() -> bytes:
    kinds, states = UNPACKING_TABLE[:, 0], UNPACKING_TABLE[:, 2]
    return bytes(((kinds == WALL) | ((kinds == DOOR) & (states != OPEN))).astype(np.uint8))


OPAQUE = _opaque_codes()
"""By packed cell: 1 where sight ends, walls and shut doors."""


@cache
def _reversed_bits() -> list[int]:
    return [int(f"{bits:07b}"[::-1], 2) for bits in range(128)]


@cache
def _sight_of_a_row() -> list[tuple[int, int]]:
    """What is seen of a row and of the row ahead, by (clear << 7 | seen so far), 7 bits each.

    source   minigrid's `Grid.process_vis`: sight goes on from a seen, clear cell to the next one
             in its row, and ahead; first from left to right, then from right to left
    """
    index = np.arange(1 << 14)
    seen, clear = index & 127, index >> 7
    ahead = np.zeros_like(seen)
    last = VIEW_SIZE - 1
    for cell, beside in [
        *((i, i + 1) for i in range(last)),
        *((i, i - 1) for i in range(last, 0, -1)),
    ]:
        spreads = (seen >> cell) & (clear >> cell) & 1
        seen = seen | spreads << beside
        ahead = ahead | spreads << beside | spreads << cell
    return list(zip(seen.tolist(), ahead.tolist(), strict=True))


@cache
def _row_masks() -> list[bytes]:
    return [bytes(bits >> column & 1 for column in range(VIEW_SIZE)) for bits in range(128)]


@dataclass(frozen=True)
class Layout:
    """How a grid of one size lies in memory once it has its border, row by row.

    width     cells in a row, border included
    view      by direction: int64 [7, 7] ([column, row] of a view), from the agent's place
    place     by place: (column, row) in minigrid's grid
    """

    width: int
    height: int
    view: tuple[NDArray[np.int64], ...]
    place: list[tuple[int, int]]

    def at(self, column: int, row: int) -> int:
        """The place of a cell of minigrid's grid."""
        return (row + BORDER) * self.width + column + BORDER


@cache
def layout(columns: int, rows: int) -> Layout:
    """The layout of minigrid grids of this size."""
    width, height = columns + 2 * BORDER, rows + 2 * BORDER
    across = np.arange(VIEW_SIZE)[:, None] - AGENT_COLUMN
    ahead = AGENT_ROW - np.arange(VIEW_SIZE)[None, :]
    view = tuple(
        (forward[1] * width + forward[0]) * ahead + (right[1] * width + right[0]) * across
        for forward, right in zip(FORWARD, _RIGHT_HAND, strict=True)
    )
    place = [(at % width - BORDER, at // width - BORDER) for at in range(width * height)]
    return Layout(width, height, view, place)


class World:
    """The grid of the current episode, one byte a cell, kept up to date by its environment.

    cells   uint8 [height * width], packed cells with the border
    """

    def __init__(self, grid: Any) -> None:
        self.layout = layout(grid.width, grid.height)
        bordered = np.full((self.layout.height, self.layout.width), _GREY_WALL, dtype=np.uint8)
        codes = np.array([cell_code(thing) for thing in grid.grid], dtype=np.uint8)
        bordered[BORDER:-BORDER, BORDER:-BORDER] = codes.reshape(grid.height, grid.width)
        self.cells = bordered.reshape(-1)
        # one integer a row and a column of the grid, a bit for every cell that one sees through
        clear = 1 - np.frombuffer(OPAQUE, np.uint8)[bordered]
        self._rows = _as_integers(clear)
        self._columns = _as_integers(clear.T)

    def update(self, at: int, code: int) -> None:
        """Write the packed cell of one place."""
        if self.cells[at] == code:
            return
        self.cells[at] = code
        row, column = divmod(at, self.layout.width)
        if OPAQUE[code]:
            self._rows[row] &= ~(1 << column)
            self._columns[column] &= ~(1 << row)
        else:
            self._rows[row] |= 1 << column
            self._columns[column] |= 1 << row

    def view(
        self, column: int, row: int, direction: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.bool_]]:
        """Packed cells uint8 [7, 7] of a view with 0 out of sight, their places, and what is seen.

        column, row   the agent's, in minigrid's grid
        returns       cells, places int64 [7, 7], seen bool [7, 7]
        """
        column, row = column + BORDER, row + BORDER
        upright = direction % 2 == 1
        lines = self._rows if upright else self._columns
        start, shift = (row, column - AGENT_COLUMN) if upright else (column, row - AGENT_COLUMN)
        step = 1 if direction < 2 else -1
        sight, masks, flip = _sight_of_a_row(), _row_masks(), _reversed_bits()
        mirrored = direction in (1, 2)
        seen, rows = 1 << AGENT_COLUMN, []
        for line in range(start, start + step * VIEW_SIZE, step):
            clear = lines[line] >> shift & 127
            if mirrored:
                clear = flip[clear]
            now, seen = sight[clear << 7 | seen]
            rows.append(masks[now])
        rows.reverse()
        mask = np.frombuffer(b"".join(rows), np.uint8).reshape(VIEW_SIZE, VIEW_SIZE).T
        places = self.layout.view[direction] + (row * self.layout.width + column)
        return self.cells[places] * mask, places, mask.view(np.bool_)


def _as_integers(bits: NDArray[np.uint8]) -> list[int]:
    packed = np.packbits(bits, axis=1, bitorder="little")
    return [int.from_bytes(row.tobytes(), "little") for row in packed]


class FastView(RoomGridLevel):
    """Mixed in before a BabyAI level: its views come from a `World`.

    A step changes nothing but the cell in front of the agent, so that one is looked at again
    before every view. Code outside that changes the grid must call `reset`.

    world    of the current episode; None before the first view of an episode
    places   int64 [7, 7], places of the last view's cells in `world`
    seen     bool [7, 7], where the last view was in sight
    """

    world: World | None = None
    places: NDArray[np.int64]
    seen: NDArray[np.bool_]
    instrs: Any

    def reset(self, **kwargs: Any) -> Any:
        """As minigrid's."""
        self.world = None
        result = super().reset(**kwargs)  # type: ignore[no-untyped-call]
        if _changes_what_reset_made(type(self)):
            self.world = None
        return result

    def current_world(self) -> World:
        """The world that belongs to the last view; makes both where there is none."""
        if self.world is None:
            self.gen_obs()
        assert self.world is not None
        return self.world

    @property
    def dir_vec(self) -> NDArray[np.int64]:
        """As minigrid's."""
        return _FORWARD_VECTORS[self.agent_dir]

    @property
    def right_vec(self) -> NDArray[np.int64]:
        """As minigrid's."""
        return _RIGHT_VECTORS[self.agent_dir]

    def update_objs_poss(self, instr: Any = None) -> None:
        """As minigrid's, which walks over the whole grid at each `drop`."""
        instr = self.instrs if instr is None else instr
        if isinstance(instr, SeqInstr):
            self.update_objs_poss(instr.instr_a)
            self.update_objs_poss(instr.instr_b)
            return
        for name in ("desc", "desc_move", "desc_fixed"):
            if (description := getattr(instr, name, None)) is not None:
                _find_again(description, self)

    def gen_obs(self) -> dict[str, Any]:
        """As minigrid's."""
        world = self.world or World(self.grid)
        self.world = world
        column, row = int(self.agent_pos[0]), int(self.agent_pos[1])
        across, down = FORWARD[self.agent_dir]
        ahead = self.grid.grid[(row + down) * self.grid.width + column + across]
        world.update(world.layout.at(column + across, row + down), cell_code(ahead))
        cells, self.places, self.seen = world.view(column, row, self.agent_dir)
        # the agent sees what it carries at its own place
        cells[AGENT_COLUMN, AGENT_ROW] = cell_code(self.carrying)
        return {
            "image": UNPACKING_TABLE[cells],
            "direction": self.agent_dir,
            "mission": self.mission,
        }


def _find_again(description: Any, level: FastView) -> None:
    """Where the objects that a description stands for are now, in the order of minigrid's walk."""
    tracked = description.obj_set
    if any(thing.cur_pos is None for thing in tracked):
        # walls do not know where they are
        description.find_matching_objs(level, use_location=False)
        return
    cells, width = level.grid.grid, level.grid.width
    found = []
    for thing in tracked:
        column, row = int(thing.cur_pos[0]), int(thing.cur_pos[1])
        if column >= 0 and cells[row * width + column] is thing:
            found.append((column, row))
    description.obj_poss = sorted(found)


def _changes_what_reset_made(level: type) -> bool:
    """Whether a level changes the grid after minigrid's own reset has shown it."""
    between = level.__mro__[level.__mro__.index(FastView) + 1 : level.__mro__.index(RoomGridLevel)]
    return any("reset" in vars(parent) for parent in between)


@cache
def with_fast_views(level: type[RoomGridLevel]) -> type[RoomGridLevel]:
    """A level of minigrid's that shows the same views sooner."""
    return type(level.__name__, (FastView, level), {})
