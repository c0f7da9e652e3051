"""Batches of parallel rollouts out of a demo store, for truncated back-propagation through time.

Rollout b plays whole episodes one after another, across the borders of batches, so recurrent
memory that is carried from one batch to the next is right, and `masks` alone say where it begins
anew. The order is that of `trainer.order`; docs/rollouts.md shows the use outside our trainer.
"""

from __future__ import annotations

from typing import Any, Literal, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from demotools.errors import CheckpointError, SettingsError
from demotools.grid import unpacked_cells
from demotools.store import Store
from trainer.order import Cursors, Order, Queues

Layout = Literal["tutorial", "native"]
Batch = dict[str, Tensor]
_Scalar = TypeVar("_Scalar", bound=np.generic)


class ExpertTrajectoryIterator:
    """Endless batches of T consecutive steps for B parallel rollouts.

    store            an open demo store
    rollouts         B, over all processes; at most the number of episodes
    rollout_len      T
    layout           "tutorial": minigrid_ego_image uint8 [T, B, 7, 7, 3],
                     minigrid_mission int64 [T, B, L], expert_action int64 [T, B],
                     masks float32 [T, B, 1];
                     "native": cells uint8 [T, B, 7, 7], mission int32 [T, B] (row of
                     `mission_tokens`), action, masks, direction uint8 [T, B]
    rank, world      this process gets rollouts [rank * B / world, (rank + 1) * B / world)
    instruction_len  L; None means the longest mission of the store

    SettingsError    B that the world does not divide or that exceeds the episodes; a store of
                     images in the native layout
    """

    def __init__(
        self,
        store: Store,
        *,
        rollouts: int,
        rollout_len: int,
        seed: int = 0,
        layout: Layout = "tutorial",
        rank: int = 0,
        world: int = 1,
        instruction_len: int | None = None,
    ) -> None:
        _check(store, rollouts, layout, rank, world)
        self._store = store
        self._rollout_len = rollout_len
        self._layout = layout
        self._rows = slice(rank * rollouts // world, (rank + 1) * rollouts // world)
        self._queues = Queues(
            order=Order(seed, store.episodes, store.episodes),
            length=np.diff(store.episode_offset),
            rollouts=rollouts,
        )
        self._cursors = Cursors.start(rollouts)
        self._batches = 0
        stored = store.mission_tokens
        tokens = np.zeros((len(stored), instruction_len or stored.shape[1]), dtype=np.int64)
        width = min(tokens.shape[1], stored.shape[1])
        tokens[:, :width] = stored[:, :width]
        self.mission_tokens = torch.from_numpy(tokens)
        """Token ids of every mission, 0 = padding: int64 [M, L]."""

    @property
    def steps(self) -> int:
        """Steps in one pass over the store."""
        return self._store.steps

    @property
    def demo_steps(self) -> int:
        """Steps shown so far, over all processes."""
        return self._batches * self._rollout_len * self._queues.rollouts

    @property
    def passes(self) -> float:
        """Steps shown so far, in passes over the store."""
        return self.demo_steps / self.steps

    @property
    def epoch(self) -> int:
        """Epochs that every rollout has finished."""
        return int(self._cursors.epoch.min())

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """The next batch; see the class for its arrays."""
        everyone = slice(0, self._queues.rollouts)
        runs, self._cursors = self._queues.play(self._cursors, everyone, self._rollout_len)
        self._batches += 1
        shape = (self._queues.rollouts, self._rollout_len)
        begin = self._store.episode_offset[runs.episode] + runs.first
        before = np.cumsum(runs.length) - runs.length
        index = np.repeat(begin - before, runs.length) + np.arange(shape[0] * shape[1])
        mask = np.ones(len(index), dtype=np.uint8)
        mask[before[runs.first == 0]] = 0
        mission = np.repeat(self._store.episode_mission[runs.episode], runs.length)
        index = self._by_time(index)
        mask = self._by_time(mask)
        mission = self._by_time(mission)
        view = self._store.view.take(index)
        action = torch.from_numpy(self._store.action.take(index))
        if self._layout == "native":
            return {
                "cells": torch.from_numpy(view),
                "mission": torch.from_numpy(mission),
                "action": action,
                "masks": torch.from_numpy(mask),
                "direction": torch.from_numpy(self._store.direction.take(index)),
            }
        return {
            "minigrid_ego_image": torch.from_numpy(
                unpacked_cells(view) if self._store.packed else view
            ),
            "minigrid_mission": self.mission_tokens[torch.from_numpy(mission)],
            "expert_action": action.long(),
            "masks": torch.from_numpy(mask)[..., None].float(),
        }

    def _by_time(self, values: NDArray[_Scalar]) -> NDArray[_Scalar]:
        """This process's rollouts, time first: [B_all * T] to [T, B]."""
        table = values.reshape(self._queues.rollouts, self._rollout_len)[self._rows]
        return np.ascontiguousarray(table.T)

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as a JSON value; see `load_state`."""
        return {
            **self._identity(),
            "batches": self._batches,
            "epoch": self._cursors.epoch.tolist(),
            "position": self._cursors.position.tolist(),
            "step": self._cursors.step.tolist(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken: the next batch is bit-identical.

        CheckpointError  the state belongs to another store, vocabulary, seed or shape
        """
        for key, mine in self._identity().items():
            if state.get(key) != mine:
                raise CheckpointError(
                    f"the rollouts were saved with another {key.replace('_', ' ')}: "
                    f"{state.get(key)} there, {mine} here",
                    path=self._store.path,
                    fix="give the settings and the store that the run began with, or begin anew",
                )
        self._batches = int(state["batches"])
        self._cursors = Cursors(
            *(np.array(state[key], dtype=np.int64) for key in ("epoch", "position", "step"))
        )

    def _identity(self) -> dict[str, Any]:
        attributes = self._store.attributes
        return {
            "fingerprint": attributes.fingerprint,
            "vocabulary_hash": attributes.vocabulary_hash,
            "seed": self._queues.order.seed,
            "rollouts": self._queues.rollouts,
            "rollout_len": self._rollout_len,
        }


def _check(store: Store, rollouts: int, layout: Layout, rank: int, world: int) -> None:
    if not 0 <= rank < world or rollouts < 1 or rollouts % world:
        raise SettingsError(
            f"{rollouts} rollouts cannot be shared out to {world} processes (this is rank {rank})",
            path=store.path,
            fix="choose a number of rollouts that the number of processes divides",
        )
    if rollouts > store.episodes:
        raise SettingsError(
            f"{rollouts} rollouts are more than the {store.episodes} episodes of the store",
            path=store.path,
            fix=f"choose at most {store.episodes} rollouts, or a larger store",
        )
    if layout == "native" and not store.packed:
        raise SettingsError(
            "the store holds images, and the network takes packed cells",
            path=store.path,
            fix='choose layout = "tutorial" and a network that takes images',
        )
