"""Egocentric views: cells packed into one byte, and the three object encodings of BabyAI's history.

A view is an image uint8 [7, 7, 3], indexed [column, row], channels (object, colour, state); the
agent is at (3, 6) and faces row 0. All functions are pure; each table names its source.
"""

from __future__ import annotations

from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

VIEW_SIZE = 7
AGENT_COLUMN, AGENT_ROW = 3, 6

# Source: minigrid.core.constants, unchanged since 2019-01-08.
OBJECTS = (
    *("unseen", "empty", "wall", "floor", "door", "key", "ball", "box", "goal", "lava", "agent"),
)
COLOURS = ("red", "green", "blue", "purple", "yellow", "grey")
STATES = ("open", "closed", "locked")
UNSEEN, EMPTY, WALL, FLOOR, DOOR, KEY, BALL, BOX, GOAL, LAVA, AGENT = range(len(OBJECTS))
OPEN, CLOSED, LOCKED = range(len(STATES))
TYPES = ("key", "ball", "box")
"""The things that can be carried."""
ACTIONS = ("left", "right", "forward", "pickup", "drop", "toggle", "done")
PACKING = "object*18 + colour*3 + state"
CELL_CODES = len(OBJECTS) * len(COLOURS) * len(STATES)
EGOCENTRIC_CODES = AGENT * len(COLOURS) * len(STATES)
"""Codes from here on show the agent. An egocentric view never does: its own cell shows what it
carries, or nothing. A 7 x 7 view that shows it is one of the whole room."""


class Encoding(StrEnum):
    """The object encoding of a file, named by the day it came into force.

    Source: Minigrid history, commits a6678d06 and 0a771181.
    """

    FIRST = "2018-08-28"
    """Before 2018-11-16: no code for a cell out of sight, which is written as empty."""
    SECOND = "2018-11-16"
    """Until 2019-01-08: unseen is 0, doors and locked doors are two objects."""
    TODAY = "2019-01-08"
    """Since 2019-01-08: one door object with three states."""


# Of the second encoding; the first has no `unseen`.
_OLD_OBJECTS = (
    *("unseen", "empty", "wall", "floor", "door", "locked_door"),
    *("key", "ball", "box", "goal", "lava"),
)

LAST_VALUES = np.array([len(OBJECTS) - 1, len(COLOURS) - 1, len(STATES) - 1], np.uint8)
"""The largest (object, colour, state) that there is: uint8 [3]."""
_LAST_OF_TABLE = np.tile(LAST_VALUES, VIEW_SIZE * VIEW_SIZE * 16)

_CODES = np.arange(256, dtype=np.uint8)
UNPACKING_TABLE: NDArray[np.uint8] = np.stack([_CODES // 18, _CODES % 18 // 3, _CODES % 3], axis=1)
"""uint8 [256, 3]: code of a cell to (object, colour, state)."""
_OBJECT, _, _STATE = UNPACKING_TABLE.T
SIGHT_ENDS: NDArray[np.bool_] = (_OBJECT == WALL) | ((_OBJECT == DOOR) & (_STATE != OPEN))
"""bool [256], by the code of a cell: walls and shut doors."""


def fits_cells(images: NDArray[np.uint8], size: tuple[int, ...] = (VIEW_SIZE, VIEW_SIZE)) -> bool:
    """Whether these views can be packed: size x 3 and every channel inside its table.

    images  uint8 [..., H, W, C]
    """
    return images.shape[-3:] == (*size, 3) and _inside_tables(images)


def _inside_tables(images: NDArray[np.uint8]) -> bool:
    """Whether every channel is inside its table.

    images   uint8 [..., 3]
    """
    flat = np.ascontiguousarray(images).reshape(-1)
    # the largest of each place over rows of many views: nothing is written but one row, and
    # numpy is slow on a last axis of three
    whole = len(flat) // len(_LAST_OF_TABLE) * len(_LAST_OF_TABLE)
    if whole:
        largest = flat[:whole].reshape(-1, len(_LAST_OF_TABLE)).max(axis=0)
        if (largest > _LAST_OF_TABLE).any():
            return False
    rest = flat[whole:]
    return bool((rest <= _LAST_OF_TABLE[: len(rest)]).all())


def packed_cells(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """One byte a cell: object*18 + colour*3 + state.

    images   uint8 [..., 3], inside the tables (see `fits_cells`)
    returns  uint8 [...]

    >>> packed_cells(np.array([[4, 2, 1]], dtype=np.uint8))
    array([79], dtype=uint8)
    """
    flat = np.ascontiguousarray(images).reshape(-1)
    # object + 256*colour, times 18*256 + 3, has object*18 + colour*3 in its high byte: object*3
    # carries nothing into it, colour*18 falls out at the top
    pairs = np.ndarray(len(flat) // 3, "<u2", flat.data, strides=(3,))
    products = np.empty(len(pairs), "<u2")
    np.multiply(pairs, np.uint16(18 * 256 + 3), out=products)
    return (products.view(np.uint8)[1::2] + flat[2::3]).reshape(images.shape[:-1])


def shows_agent(cells: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which views show the agent, and so are views of the whole room, not egocentric ones.

    cells    uint8 [..., 7, 7], packed
    returns  bool [...]

    >>> shows_agent(np.array([[[18, 179]], [[18, 180]]], dtype=np.uint8))
    array([False,  True])
    """
    return np.asarray((cells >= EGOCENTRIC_CODES).any(axis=(-2, -1)))


def unpacked_cells(cells: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The views of packed cells: (object, colour, state) for every cell.

    cells    uint8 [...]
    returns  uint8 [..., 3]

    >>> unpacked_cells(np.array([79], dtype=np.uint8))
    array([[4, 2, 1]], dtype=uint8)
    """
    return UNPACKING_TABLE[cells]


def recoding_table(encoding: Encoding) -> NDArray[np.uint8]:
    """Packed code in today's encoding for every (object, colour, state) of an old one.

    returns  uint8 [11, 6, 3]; 255 where the old encoding has no such cell

    Doors need both channels (commit 0a771181): state 1 was an open door of either kind, state 0
    a closed `door` or a still locked `locked_door`.
    """
    table = np.full((len(OBJECTS), len(COLOURS), len(STATES)), 255, dtype=np.uint8)
    if encoding is Encoding.TODAY:
        codes = np.arange(CELL_CODES, dtype=np.uint8)
        return codes.reshape(table.shape)
    for number, name in enumerate(_OLD_OBJECTS[encoding is Encoding.FIRST :]):
        for colour in range(len(COLOURS)):
            if name in ("door", "locked_door"):
                shut = LOCKED if name == "locked_door" else CLOSED
                table[number, colour, 0] = DOOR * 18 + colour * 3 + shut
                table[number, colour, 1] = DOOR * 18 + colour * 3 + OPEN
            else:
                table[number, colour, 0] = OBJECTS.index(name) * 18 + colour * 3
    return table


def visible(opaque: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The cells that the agent sees, by the rule of gym-minigrid before 2018-11-16.

    opaque   bool [S, 7, 7] ([column, row]): walls, closed and locked doors
    returns  bool [S, 7, 7]

    Sight spreads from the agent's cell to the left and right and one row ahead, only through
    cells that are seen and not opaque. That version's loop stops at row 1: nothing spreads
    along row 0, which only receives from row 1. Source: `Grid.process_vis` of that time.
    """
    # steps last, so that each operation runs over neighbouring bytes
    clear = ~np.ascontiguousarray(np.moveaxis(opaque, 0, -1))
    seen = np.zeros_like(clear)
    seen[AGENT_COLUMN, AGENT_ROW] = True
    for row in range(VIEW_SIZE - 1, 0, -1):
        for columns, towards in (
            (range(VIEW_SIZE - 1), 1),
            (range(VIEW_SIZE - 1, 0, -1), -1),
        ):
            for column in columns:
                spreads = seen[column, row] & clear[column, row]
                seen[column + towards, row] |= spreads
                seen[column + towards, row - 1] |= spreads
                seen[column, row - 1] |= spreads
    return np.moveaxis(seen, -1, 0)


def recoded_cells(images: NDArray[np.uint8], encoding: Encoding) -> NDArray[np.uint8]:
    """Views of an old encoding as packed cells of today's.

    images   uint8 [S, 7, 7, 3] in `encoding`
    returns  uint8 [S, 7, 7]; 255 at a cell that the encoding does not have

    Cells out of sight, which the first encoding wrote as empty, become unseen.
    """
    cells = packed_cells(images)
    if encoding is not Encoding.TODAY:
        # bytes.translate is several times faster than indexing with uint8
        table = np.full(256, 255, dtype=np.uint8)
        table[:CELL_CODES] = recoding_table(encoding).reshape(-1)
        recoded = bytearray(cells.tobytes().translate(table.tobytes()))
        cells = np.frombuffer(recoded, np.uint8).reshape(cells.shape)
    if not _inside_tables(images):
        cells[(images > LAST_VALUES).any(axis=-1)] = 255
    if encoding is Encoding.FIRST:
        cells[~visible(SIGHT_ENDS[cells]) & (cells != 255)] = UNSEEN
    return cells
