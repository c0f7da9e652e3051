"""From a plan to a batch: the two layouts, on the CPU or on a GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from demotools.grid import UNPACKING_TABLE
from demotools.store import Store
from trainer.gather import Buffers, ImageWriter, Rows, StepTable
from trainer.planner import Plan

Layout = Literal["tutorial", "native"]
Batch = dict[str, Tensor]


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
            "action": self._taken(self._table.action, index, shape),
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
            "action": taken["action"].view(shape),
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
            "expert_action": native["action"].long(),
            "masks": native["masks"][..., None].float(),
        }

    @cached_property
    def _cells_on_device(self) -> Tensor:
        return torch.from_numpy(UNPACKING_TABLE.copy()).to(self._device)

    @cached_property
    def _tokens_on_device(self) -> Tensor:
        return self._missions.whole.to(self._device)
