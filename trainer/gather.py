"""Gathering steps: where the step arrays lie, and the memory that batches are written into.

Residence "map" gathers from the memory-mapped chunk files (the system keeps in RAM what is used),
"host" from a copy in RAM, "device" from a copy in GPU memory, on the GPU.
"""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from demotools.grid import UNPACKING_TABLE
from demotools.store import StepArray, Store, chunk_files
from trainer.maps import Piece, can_be_joined, joined_map
from trainer.order import Index

Residence = Literal["auto", "map", "host", "device"]
# A store begins at a multiple of this many rows: whole pages, whatever the size of a row.
_ALIGNMENT = 4096
_SHARE_OF_GPU = 0.25


class Rows(Protocol):
    """Rows of bytes to gather from: [rows, row bytes]."""

    def take(self, index: Index, out: NDArray[np.uint8]) -> None:
        """Write the rows of `index`, int64 [N], to `out`, uint8 [N, row bytes]."""


@dataclass(frozen=True)
class JoinedRows:
    """All rows in one array."""

    array: NDArray[np.uint8]

    def take(self, index: Index, out: NDArray[np.uint8]) -> None:
        """See Rows."""
        # any mode but "raise" writes straight to `out`; every index is in range by construction
        np.take(self.array, index, axis=0, out=out, mode="clip")


@dataclass(frozen=True)
class PiecedRows:
    """Rows in several arrays, where they cannot be mapped as one.

    first   int64 [N], the first row of each piece, ascending
    """

    pieces: Sequence[NDArray[np.uint8]]
    first: Index

    def take(self, index: Index, out: NDArray[np.uint8]) -> None:
        """See Rows."""
        number = np.searchsorted(self.first, index, side="right") - 1
        by_piece = np.argsort(number, kind="stable")
        borders = np.searchsorted(number[by_piece], np.arange(len(self.pieces) + 1))
        for piece, first, start, stop in zip(
            self.pieces, self.first, borders, borders[1:], strict=False
        ):
            chosen = by_piece[start:stop]
            out[chosen] = piece[index[chosen] - first]


@dataclass(frozen=True)
class StepTable:
    """The step arrays of several stores, the rows of one store after those of another.

    view, action, direction   rows of bytes on this machine; empty where `on_device` is used
    on_device                 view, action, direction as tensors uint8 [rows, row bytes], or None
    first_row                 the row at which each store begins
    step_shape                of a view: (7, 7) packed cells, else (H, W, C)
    residence, reason         where the arrays lie, and why there
    """

    view: Rows
    action: Rows
    direction: Rows
    on_device: dict[str, Tensor] | None
    first_row: tuple[int, ...]
    step_shape: tuple[int, ...]
    residence: Residence
    reason: str

    @property
    def step_bytes(self) -> int:
        """Bytes of one step in all arrays."""
        return math.prod(self.step_shape) + 2


def step_table(stores: Sequence[Store], residence: Residence, device: torch.device) -> StepTable:
    """The step arrays of the stores, where `residence` says."""
    first_row = [0]
    for store in stores:
        first_row.append(-(-(first_row[-1] + store.steps) // _ALIGNMENT) * _ALIGNMENT)
    step_shape = stores[0].view.shape[1:]
    size_bytes = sum(store.steps for store in stores) * (math.prod(step_shape) + 2)
    chosen, reason = _chosen_residence(residence, device, size_bytes)
    names = ("cells" if stores[0].packed else "image", "action", "direction")
    rows = {name: _rows(stores, name, first_row, chosen) for name in names}
    on_device = None
    if chosen == "device":
        on_device = {
            key: _copied_to(device, stores, name, first_row)
            for key, name in zip(("view", "action", "direction"), names, strict=True)
        }
    view, action, direction = rows.values()
    return StepTable(
        *(view, action, direction, on_device, tuple(first_row[:-1]), step_shape, chosen, reason)
    )


def _chosen_residence(
    residence: Residence, device: torch.device, size_bytes: int
) -> tuple[Residence, str]:
    size = f"{size_bytes / 1e6:.1f} MB of steps"
    if residence != "auto":
        return residence, f"{size}, as asked for"
    if device.type != "cuda":
        # measured: a copy in RAM is no faster than the page cache, and takes the memory twice
        return "map", f"{size}, memory-mapped; no GPU is used"
    free = torch.cuda.mem_get_info(device)[0]
    if size_bytes <= free * _SHARE_OF_GPU:
        return "device", f"{size} fit into a quarter of the GPU's free {free / 1e9:.1f} GB"
    return "map", f"{size} are more than a quarter of the GPU's free {free / 1e9:.1f} GB"


def _array(store: Store, name: str) -> StepArray:
    arrays = {"action": store.action, "direction": store.direction}
    return arrays.get(name, store.view)


def _rows(stores: Sequence[Store], name: str, first_row: list[int], residence: str) -> Rows:
    arrays = [_array(store, name) for store in stores]
    row_bytes = math.prod(arrays[0].shape[1:])
    pieces = [
        Piece(file, first + number * array.chunk_length, len(array.chunks[number]))
        for store, array, first in zip(stores, arrays, first_row, strict=False)
        for number, file in enumerate(chunk_files(store.path, name))
    ]
    chunks = [chunk.reshape(-1, row_bytes) for array in arrays for chunk in array.chunks]
    if residence == "host":
        # rows between two stores are never written, so they take no memory
        whole = np.empty((pieces[-1].row + pieces[-1].rows, row_bytes), dtype=np.uint8)
        for piece, chunk in zip(pieces, chunks, strict=True):
            whole[piece.row : piece.row + piece.rows] = chunk
        return JoinedRows(whole)
    if len(chunks) == 1:
        return JoinedRows(chunks[0])
    if can_be_joined(pieces, row_bytes):
        return JoinedRows(joined_map(pieces, row_bytes))
    return PiecedRows(chunks, np.array([piece.row for piece in pieces]))


def _copied_to(
    device: torch.device, stores: Sequence[Store], name: str, first_row: list[int]
) -> Tensor:
    arrays = [_array(store, name) for store in stores]
    row_bytes = math.prod(arrays[0].shape[1:])
    whole = torch.empty(first_row[-1], row_bytes, dtype=torch.uint8, device=device)
    for array, first in zip(arrays, first_row, strict=False):
        for number, chunk in enumerate(array.chunks):
            row = first + number * array.chunk_length
            # a copy first: torch warns of arrays that it may not write to
            rows = torch.from_numpy(chunk.reshape(-1, row_bytes).copy())
            whole[row : row + len(chunk)] = rows.to(device)
    return whole


class Buffers:
    """Memory for batches, used again as soon as nothing refers to it any more.

    So a batch is its user's for as long as they keep it (or a view of it), and a loop that drops
    its batches runs in the same few buffers, without page faults.

    pinned  page-locked memory, for transfers to a GPU that do not wait; PyTorch's own allocator
            of such memory uses it again, once the transfer has ended
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._free: dict[int, list[NDArray[np.uint8]]] = defaultdict(list)

    def lease(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor with unspecified content."""
        if self._pinned:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        return self._leased(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)

    def _leased(self, size_bytes: int) -> Tensor:
        free = self._free[size_bytes]
        memory = free.pop() if free else np.empty(size_bytes, dtype=np.uint8)
        # the tensor's memory keeps this array, all views of the tensor keep the tensor's memory:
        # the array ends when the last of them ends
        lease = memory[:]
        weakref.finalize(lease, free.append, memory).atexit = False
        return torch.from_numpy(lease)


def _pair_table() -> NDArray[np.uint64]:
    pair = np.arange(1 << 16)
    table = np.zeros((len(pair), 8), dtype=np.uint8)
    table[:, 0:3] = UNPACKING_TABLE[pair & 255]
    table[:, 3:6] = UNPACKING_TABLE[pair >> 8]
    return table.view(np.uint64).reshape(-1)


class ImageWriter:
    """Unpacks cells to images on the CPU, two cells at a time.

    A pair of bytes is looked up in a table of 65,536 words of 8 bytes, of which 6 are the two
    cells' channels. The words are written every 6 bytes, in ascending order, so that each one
    overwrites the 2 surplus bytes of the one before. Measured: docs/log.md.
    """

    _BLOCK = 1 << 17

    def __init__(self) -> None:
        self._table = _pair_table()
        self._index = np.empty(self._BLOCK, dtype=np.int64)
        self._words = np.empty(self._BLOCK, dtype=np.uint64)

    @staticmethod
    def padded_cells(cells: int) -> int:
        """Bytes to provide for that many cells: an even number."""
        return cells + cells % 2

    @staticmethod
    def padded_image(cells: int) -> int:
        """Bytes to provide for the images of that many cells, the last word's surplus included."""
        return 3 * (cells + cells % 2) + 2

    def write(self, cells: NDArray[np.uint8], images: NDArray[np.uint8]) -> None:
        """Write the images of packed cells, both in memory of padded size.

        cells   uint8 [padded_cells]
        images  uint8 [padded_image]
        """
        pairs = cells.view(np.uint16)
        for start in range(0, len(pairs), self._BLOCK):
            block = pairs[start : start + self._BLOCK]
            index, words = self._index[: len(block)], self._words[: len(block)]
            np.copyto(index, block)
            np.take(self._table, index, out=words, mode="clip")
            np.ndarray(words.shape, np.uint64, images, 6 * start, (6,))[:] = words
