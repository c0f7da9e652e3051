"""From a plan to a batch: where the steps lie, the two layouts, on the CPU or on a GPU.

Gathering steps: where the step arrays lie, and the memory that batches are written into.

Residence "map" gathers from the memory-mapped chunk files (the system keeps in RAM what is used),
"host" from a copy in RAM, "device" from a copy in GPU memory, on the GPU.

Many chunk files as one array: mapped one behind another into one range of addresses.

One gather over one array is about six times as fast as one gather per chunk file and a scatter
(docs/log.md). Python's own `mmap` cannot choose the address, so the C library is asked. Nothing
is copied: the bytes stay in the files and in the system's page cache.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
import weakref
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from demotools.babyai.cells import UNPACKING_TABLE
from demotools.errors import from_os_error
from demotools.output import open_regular
from demotools.store.reading import StepArray, Store, chunk_files
from trainer.batch import Batch, Layout
from trainer.data.order import Index, Plan


class MissionTable:
    """The token ids of all missions of some stores, one store after another.

    stores   with vocabularies that begin alike
    length   L, missions are padded with 0 or cut; None means the longest mission
    """

    def __init__(self, stores: Sequence[Store], length: int | None) -> None:
        tables = [store.mission_tokens for store in stores]
        self.first_row = np.cumsum([0, *map(len, tables)]).tolist()
        self.length = length or max(table.shape[1] for table in tables)
        # one store's table stays on disk: a million missions of 40 words are 40 MB there
        self._stored = tables[0] if len(tables) == 1 else _stacked(tables)

    def tokens(self, rows: NDArray[np.int32]) -> NDArray[np.int64]:
        """Token ids of some missions, 0 = padding: int64 [..., L]."""
        stored = self._stored[rows][..., : self.length]
        result = np.zeros((*rows.shape, self.length), dtype=np.int64)
        result[..., : stored.shape[-1]] = stored
        return result

    @cached_property
    def whole(self) -> Tensor:
        """Token ids of every mission: int64 [M, L], in RAM."""
        return torch.from_numpy(self.tokens(np.arange(len(self._stored), dtype=np.int32)))


def _stacked(tables: Sequence[NDArray[np.uint8] | NDArray[np.uint16]]) -> NDArray[np.uint16]:
    result = np.zeros(
        (sum(map(len, tables)), max(table.shape[1] for table in tables)), dtype=np.uint16
    )
    row = 0
    for table in tables:
        result[row : row + len(table), : table.shape[1]] = table
        row += len(table)
    return result


class BatchWriter:
    """Writes batches of one layout for one device.

    On the CPU a batch is written once, where the user gets it. For a GPU the native arrays (or,
    where the steps lie in its memory, only the plan) are written to page-locked memory, sent one
    by one without waiting, and unpacked over there.
    """

    def __init__(
        self, table: StepTable, missions: MissionTable, layout: Layout, device: torch.device
    ) -> None:
        self._table = table
        self._missions = missions
        self._layout = layout
        self._device = device
        self._is_local = device.type == "cpu" and table.on_device is None
        self._buffers = Buffers(pinned=device.type == "cuda")
        self._unpack = len(table.step_shape) == 2
        self._images = ImageWriter() if layout == "tutorial" and self._is_local else None

    def on_host(self, plan: Plan) -> Batch:
        """What is written on this side; it may run in another thread."""
        if self._table.on_device is not None:
            return {
                "row": self._copied(plan.row),
                "mission": self._mission(plan),
                "masks": self._copied(plan.masks),
            }
        if self._images is not None:
            return self._tutorial(plan, self._images)
        return self._native(plan)

    def on_device(self, batch: Batch) -> Batch:
        """The batch as the user gets it, from what `on_host` gave."""
        if self._is_local:
            return batch
        sent = {name: values.to(self._device, non_blocking=True) for name, values in batch.items()}
        if self._table.on_device is not None:
            sent = self._gathered(sent, self._table.on_device)
        return sent if self._layout == "native" else self._unpacked(sent)

    def _native(self, plan: Plan) -> Batch:
        shape = plan.row.shape
        index = plan.row.reshape(-1)
        return {
            "cells": self._taken(self._table.view, index, (*shape, *self._table.step_shape)),
            "mission": self._mission(plan),
            "expert_action": self._taken(self._table.action, index, shape),
            "masks": self._copied(plan.masks),
            "direction": self._taken(self._table.direction, index, shape),
        }

    def _tutorial(self, plan: Plan, images: ImageWriter) -> Batch:
        shape = plan.row.shape
        index = plan.row.reshape(-1)
        view = self._table.step_shape
        if self._unpack:
            image = self._image(index, images).view(*shape, *view, 3)
        else:
            image = self._taken(self._table.view, index, (*shape, *view))
        mission = self._buffers.lease((*shape, self._missions.length), torch.int64)
        tokens = self._missions.tokens(plan.mission)
        np.take(tokens, plan.run, axis=0, out=mission.numpy(), mode="clip")
        action = self._buffers.lease(shape, torch.int64)
        action.copy_(self._taken(self._table.action, index, shape))
        masks = self._buffers.lease((*shape, 1), torch.float32)
        np.copyto(masks.numpy()[..., 0], plan.masks)
        return {
            "minigrid_ego_image": image,
            "minigrid_mission": mission,
            "expert_action": action,
            "masks": masks,
        }

    def _image(self, index: NDArray[np.int64], images: ImageWriter) -> Tensor:
        cells_bytes = len(index) * math.prod(self._table.step_shape)
        cells = self._buffers.lease((images.padded_cells(cells_bytes),), torch.uint8)
        self._table.view.take(index, cells.numpy()[:cells_bytes].reshape(len(index), -1))
        image = self._buffers.lease((images.padded_image(cells_bytes),), torch.uint8)
        images.write(cells.numpy(), image.numpy())
        return image[: 3 * cells_bytes]

    def _taken(self, rows: Rows, index: NDArray[np.int64], shape: tuple[int, ...]) -> Tensor:
        taken = self._buffers.lease(shape, torch.uint8)
        rows.take(index, taken.numpy().reshape(len(index), -1))
        return taken

    def _mission(self, plan: Plan) -> Tensor:
        mission = self._buffers.lease(plan.run.shape, torch.int32)
        np.take(plan.mission, plan.run, out=mission.numpy(), mode="clip")
        return mission

    def _copied(self, values: NDArray[np.int64] | NDArray[np.uint8]) -> Tensor:
        source = torch.from_numpy(values)
        return self._buffers.lease(values.shape, source.dtype).copy_(source)

    def _gathered(self, plan: Batch, steps: dict[str, Tensor]) -> Batch:
        shape, index = plan["row"].shape, plan["row"].reshape(-1)
        taken = {name: rows.index_select(0, index) for name, rows in steps.items()}
        return {
            "cells": taken["view"].view(*shape, *self._table.step_shape),
            "mission": plan["mission"],
            "expert_action": taken["action"].view(shape),
            "masks": plan["masks"],
            "direction": taken["direction"].view(shape),
        }

    def _unpacked(self, native: Batch) -> Batch:
        image = native["cells"]
        if self._unpack:
            image = self._cells_on_device[image.int()]
        return {
            "minigrid_ego_image": image,
            "minigrid_mission": self._tokens_on_device[native["mission"]],
            "expert_action": native["expert_action"].long(),
            "masks": native["masks"][..., None].float(),
        }

    @cached_property
    def _cells_on_device(self) -> Tensor:
        return torch.from_numpy(UNPACKING_TABLE.copy()).to(self._device)

    @cached_property
    def _tokens_on_device(self) -> Tensor:
        return self._missions.whole.to(self._device)


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


_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000


@dataclass(frozen=True)
class Piece:
    """The rows of one chunk file, and where they go in the joined array.

    row   the first row of the joined array that it fills
    rows  how many
    """

    file: Path
    row: int
    rows: int


def can_be_joined(pieces: Sequence[Piece], row_bytes: int) -> bool:
    """Whether every piece begins at a border of memory pages, on a system that we know."""
    starts_at_page = all(piece.row * row_bytes % mmap.PAGESIZE == 0 for piece in pieces)
    return sys.platform == "linux" and starts_at_page


def joined_map(pieces: Sequence[Piece], row_bytes: int) -> NDArray[np.uint8]:
    """The rows of all pieces as one read-only array over the files: uint8 [rows, row_bytes].

    pieces  those of which `can_be_joined` is true, sorted by row; rows between two pieces are 0

    DemotoolsError  a file cannot be opened or mapped
    """
    rows = pieces[-1].row + pieces[-1].rows
    # pages that only hold the place; they take no memory until they are written to
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    space = mmap.mmap(-1, _whole_pages(rows * row_bytes), flags=flags)
    joined = np.frombuffer(space, dtype=np.uint8)
    for piece in pieces:
        address = joined.ctypes.data + piece.row * row_bytes
        _map_file_at(address, piece.file, piece.rows * row_bytes)
    joined.flags.writeable = False
    return joined[: rows * row_bytes].reshape(rows, row_bytes)


def _whole_pages(size_bytes: int) -> int:
    return -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _map_file_at(address: int, file: Path, size_bytes: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [
        *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int),
        ctypes.c_long,
    ]
    try:
        with open_regular(file) as stream:
            flags = mmap.MAP_SHARED | _MAP_FIXED
            got = library.mmap(address, size_bytes, mmap.PROT_READ, flags, stream.fileno(), 0)
            if got != address:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(file))
    except OSError as error:
        raise from_os_error(error, file) from error
