"""Gathers the steps of a batch into its arrays: where the steps are, and the two layouts.

The step arrays are the memory maps of the open store (the system keeps in RAM what is used), or a
copy in GPU memory, gathered there. If there are many chunk files, they are mapped again, one after
another into one range of addresses: one gather over one array is about six times as fast as one
gather per chunk file and a scatter (docs/log.md). Python's own `mmap` cannot choose the address, so
the C library is called directly; nothing is copied, and no file is opened again.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
import weakref
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from demotools.babyai.cells import UNPACKING_TABLE
from demotools.store.reading import StepArray, Store
from trainer.batch import Batch, Layout
from trainer.data.order import BatchIndex, Index
from trainer.data.sources import shared_subgoals

Residence = Literal["auto", "map", "device"]
_Bytes = NDArray[np.uint8]
# A store begins at a multiple of this many rows: whole pages, whatever the size of a row.
_ALIGNMENT = 4096
_SHARE_OF_GPU = 0.25
_MREMAP_MAYMOVE_FIXED = 3
_MAP_NORESERVE = 0x4000
# the three channels of a cell in a word of 4 bytes: twice as fast as a table of 3 (docs/log.md)
_CELL_WORDS = np.pad(UNPACKING_TABLE, ((0, 0), (0, 1))).view(np.uint32).reshape(-1)


class MissionTable:
    """The token ids of all missions of some stores, one store after another.

    stores   with vocabularies that begin alike
    length   L, missions are padded with 0 or cut; None means the longest mission
    """

    def __init__(self, stores: Sequence[Store], length: int | None) -> None:
        tables = [store.mission_tokens for store in stores]
        self.first_row = np.cumsum([0, *map(len, tables)]).tolist()
        width = max(table.shape[1] for table in tables)
        self.length = length or width
        self._stored: NDArray[np.uint8] | NDArray[np.uint16] = tables[0]
        # one store's table stays on disk: a million missions of 40 words are 40 MB there
        if len(tables) > 1:
            padded = [np.pad(table, ((0, 0), (0, width - table.shape[1]))) for table in tables]
            self._stored = np.concatenate(padded)

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


class BatchWriter:
    """Writes batches of one layout for one device.

    On the CPU a batch is written once, where the user gets it. For a GPU the native arrays (or,
    where the steps lie in its memory, only the index) are written to page-locked memory, sent one
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
        self._unpacks = len(table.step_shape) == 2

    def on_host(self, index: BatchIndex) -> Batch:
        """What is written on this side; it may run in another thread."""
        shape, rows = index.row.shape, index.row.reshape(-1)
        mission = self._buffers.lease(shape, torch.int32)
        np.take(index.mission, index.segment, out=mission.numpy(), mode="clip")
        batch = {"mission": mission, "masks": self._copied(torch.from_numpy(index.masks))}
        if self._table.on_device is not None:
            return batch | {"row": self._copied(torch.from_numpy(index.row))}
        for name, column in self._table.columns.items():
            step_shape = self._table.step_shape if name == "cells" else ()
            batch[name] = self._buffers.lease((*shape, *step_shape), torch.uint8)
            column.take(rows, batch[name].numpy().reshape(len(rows), -1))
        if self._layout == "tutorial" and self._is_local:
            return self._tutorial(batch, index)
        return batch

    def _tutorial(self, native: Batch, index: BatchIndex) -> Batch:
        image = native["cells"]
        if self._unpacks:
            words = np.take(_CELL_WORDS, image.numpy().reshape(-1), mode="clip")
            memory = self._buffers.lease((3 * len(words) + 1,), torch.uint8)
            # every 3 bytes: each word overwrites the surplus byte of the one before
            np.ndarray(words.shape, np.uint32, memory.numpy(), strides=(3,))[:] = words
            image = memory[:-1].view(*image.shape, 3)
        mission = self._buffers.lease((*index.row.shape, self._missions.length), torch.int64)
        tokens = self._missions.tokens(index.mission)
        np.take(tokens, index.segment, axis=0, out=mission.numpy(), mode="clip")
        return {
            "minigrid_ego_image": image,
            "minigrid_mission": mission,
            "expert_action": self._copied(native["expert_action"], torch.int64),
            "masks": self._copied(native["masks"][..., None], torch.float32),
        }

    def _copied(self, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return self._buffers.lease(tuple(values.shape), dtype or values.dtype).copy_(values)

    def on_device(self, batch: Batch) -> Batch:
        """The batch as the user gets it, from what `on_host` gave."""
        if self._is_local:
            return batch
        pinned = self._device.type == "cuda"
        if pinned:  # an augmenter's arrays are not page-locked yet
            batch = {name: values.pin_memory() for name, values in batch.items()}
        # without that what is still being sent might be written over
        sent = {name: one.to(self._device, non_blocking=pinned) for name, one in batch.items()}
        if self._table.on_device is not None:
            row = sent.pop("row")
            for name, column in self._table.on_device.items():
                step_shape = self._table.step_shape if name == "cells" else ()
                taken = column.index_select(0, row.reshape(-1))
                sent[name] = taken.view(*row.shape, *step_shape)
        if self._layout == "native":
            return sent
        image = sent["cells"]
        return {
            "minigrid_ego_image": self._images[image.int()] if self._unpacks else image,
            "minigrid_mission": self.tokens[sent["mission"]],
            "expert_action": sent["expert_action"].long(),
            "masks": sent["masks"][..., None].float(),
        }

    @cached_property
    def _images(self) -> Tensor:
        return torch.from_numpy(UNPACKING_TABLE.copy()).to(self._device)

    @cached_property
    def tokens(self) -> Tensor:
        """Token ids of every mission, where the batches are: int64 [M, L]."""
        return self._missions.whole.to(self._device)


@dataclass(frozen=True)
class Column:
    """One array of all steps, in as few pieces as can be.

    pieces  uint8 [rows, row bytes] each
    first   int64 [N], the first row of each piece, ascending
    """

    pieces: Sequence[_Bytes]
    first: Index

    def take(self, index: Index, out: _Bytes) -> None:
        """Write the rows of `index`, int64 [N], to `out`, uint8 [N, row bytes]."""
        if len(self.pieces) == 1:
            # any mode but "raise" writes straight to `out`; every index is in range
            np.take(self.pieces[0], index, axis=0, out=out, mode="clip")
            return
        number = np.searchsorted(self.first, index, side="right") - 1
        for place, (piece, first) in enumerate(zip(self.pieces, self.first, strict=True)):
            chosen = number == place
            out[chosen] = piece[index[chosen] - first]


@dataclass(frozen=True)
class StepTable:
    """The step arrays of several stores, the rows of one store after those of another.

    columns     by the names of a native batch
    on_device   the same as tensors uint8 [rows, row bytes] where the GPU holds them, else None
    first_row   the row at which each store begins
    step_shape  of a view: (7, 7) packed cells, else (H, W, C)
    """

    columns: dict[str, Column]
    on_device: dict[str, Tensor] | None
    first_row: list[int]
    step_shape: tuple[int, ...]


def step_table(stores: Sequence[Store], residence: Residence, device: torch.device) -> StepTable:
    """The step arrays of the stores; "auto" takes a GPU that has room to spare, else the map."""
    first_row = [0]
    for store in stores:
        first_row.append(-(-(first_row[-1] + store.steps) // _ALIGNMENT) * _ALIGNMENT)
    columns, on_device = {}, {}
    step_shape = stores[0].view.shape[1:]
    if residence == "auto":
        size_bytes = first_row[-1] * (math.prod(step_shape) + 2)
        residence = "device" if _has_room(device, size_bytes) else "map"
    for name, arrays in {
        "cells": [store.view for store in stores],
        "expert_action": [store.action for store in stores],
        "direction": [store.direction for store in stores],
        **_optional(stores),
    }.items():
        pieces = [chunk.reshape(len(chunk), -1) for array in arrays for chunk in array.chunks]
        rows = [
            first + number * array.chunk_length
            for array, first in zip(arrays, first_row, strict=False)
            for number in range(len(array.chunks))
        ]
        if residence == "device":
            on_device[name] = _copied_to(device, pieces, rows)
        else:
            columns[name] = mapped_column(pieces, rows)
    return StepTable(columns, on_device or None, first_row, step_shape)


def _optional(stores: Sequence[Store]) -> dict[str, list[StepArray]]:
    """The arrays `taken` and `subgoal`, where all of the stores have them and mean the same."""
    names = [name for name in ("taken",) if all(name in store.optional for store in stores)]
    names += ["subgoal"] if shared_subgoals(stores) else []
    return {name: [store.optional[name] for store in stores] for name in names}


def _has_room(device: torch.device, size_bytes: int) -> bool:
    # without a GPU a copy in RAM would be no faster than the page cache, and take the memory twice
    if device.type != "cuda":
        return False
    return size_bytes <= torch.cuda.mem_get_info(device)[0] * _SHARE_OF_GPU


def _copied_to(device: torch.device, pieces: Sequence[_Bytes], rows: Sequence[int]) -> Tensor:
    size = rows[-1] + len(pieces[-1]), pieces[0].shape[1]
    whole = torch.empty(size, dtype=torch.uint8, device=device)
    for piece, row in zip(pieces, rows, strict=True):
        # a copy first: torch warns of arrays that it may not write to
        whole[row : row + len(piece)] = torch.from_numpy(piece.copy()).to(device)
    return whole


def mapped_column(pieces: Sequence[_Bytes], rows: Sequence[int]) -> Column:
    """The maps of chunk files, as one read-only array where the system can.

    pieces   uint8 [n, row bytes] each, from the beginning of a map
    rows     the first row of each, ascending; those between two pieces are never read
    """
    joined = [] if len(pieces) == 1 else _joined(pieces, rows)
    return Column(joined, np.zeros(1, np.int64)) if joined else Column(pieces, np.array(rows))


def _joined(pieces: Sequence[_Bytes], rows: Sequence[int]) -> list[_Bytes]:
    """The one array; empty where it cannot be."""
    count, row_bytes = rows[-1] + len(pieces[-1]), pieces[0].shape[1]
    if sys.platform != "linux" or any(row * row_bytes % mmap.PAGESIZE for row in rows):
        return []
    library = ctypes.CDLL(None)
    library.mremap.restype = address = ctypes.c_void_p
    library.mremap.argtypes = [address, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, address]
    # pages that only hold the place; they take no memory until they are written to
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    space = mmap.mmap(-1, -(-count * row_bytes // mmap.PAGESIZE) * mmap.PAGESIZE, flags=flags)
    whole = np.frombuffer(space, dtype=np.uint8)
    for piece, row in zip(pieces, rows, strict=True):
        target = whole.ctypes.data + row * row_bytes
        # of a shared map an old size of 0 leaves the old map in place
        arguments = piece.ctypes.data, 0, piece.nbytes, _MREMAP_MAYMOVE_FIXED, target
        if library.mremap(*arguments) != target:
            return []
    whole.flags.writeable = False
    return [whole[: count * row_bytes].reshape(count, row_bytes)]


class Buffers:
    """Memory for batches, used again as soon as nothing refers to it any more.

    So a batch is its user's for as long as they keep it (or a view of it), and a loop that drops
    its batches runs in the same few buffers, without page faults.

    pinned  page-locked memory, for transfers to a GPU that do not wait; PyTorch's own allocator
            of such memory uses it again, once the transfer has ended
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._free: dict[int, list[_Bytes]] = defaultdict(list)

    def lease(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor with unspecified content."""
        if self._pinned:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        size_bytes = math.prod(shape) * dtype.itemsize
        free = self._free[size_bytes]
        memory = free.pop() if free else np.empty(size_bytes, dtype=np.uint8)
        # the tensor's memory keeps this array, all views of the tensor keep the tensor's memory:
        # the array ends when the last of them ends
        lease = memory[:]
        weakref.finalize(lease, free.append, memory).atexit = False
        return torch.from_numpy(lease).view(dtype).view(shape)
