"""Batches of parallel rollouts out of demo stores, for truncated back-propagation through time.

Rollout b plays whole episodes one after another, across the borders of batches, so recurrent
memory that is carried from one batch to the next is right, and `masks` alone say where it begins
anew. docs/rollouts.md shows the use outside our trainer.

    order    which episode comes where: arithmetic       queues   what each rollout plays
    planner  the rows that a batch is made of
    sources  stores, filters, proportions                gather   where the steps lie, buffers
    batches  the layouts, on CPU or GPU                  ahead    the thread
    windows  stores larger than memory                   maps     chunk files as one array
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from demotools.errors import CheckpointError, SettingsError
from demotools.store import Store
from trainer.ahead import Ahead
from trainer.batches import Batch, BatchWriter, Layout, MissionTable
from trainer.gather import Residence, step_table
from trainer.order import Order
from trainer.planner import Part, Planner
from trainer.queues import Cursors, Queues
from trainer.sources import Source, checked_sources, rollouts_of_sources, vocabulary
from trainer.windows import WindowReader

Shuffle = Literal["full", "windowed"]
__all__ = ["Batch", "ExpertTrajectoryIterator", "Layout", "Residence", "Shuffle", "Source"]

_WINDOW_BYTES = 1 << 28
_BATCHES_AHEAD = 2
_STRIDE = 64


@dataclass(frozen=True)
class _Made:
    """A batch as it leaves the thread, its number from 1, where each part stands after it."""

    batch: Batch
    batches: int
    after: list[Cursors]


class ExpertTrajectoryIterator:
    """Batches of T consecutive steps for B parallel rollouts, endless unless `max_steps` is given.

    stores           an open demo store, a Source (a store, chosen episodes of it), or several
                     with their proportions
    rollouts         B, over all processes and stores; at most the number of episodes
    rollout_len      T
    seed             any integer; the order is a pure function of it
    layout           "tutorial": minigrid_ego_image uint8 [T, B, 7, 7, 3],
                     minigrid_mission int64 [T, B, L], expert_action int64 [T, B],
                     masks float32 [T, B, 1];
                     "native": cells uint8 [T, B, 7, 7], mission int32 [T, B] (row of
                     `mission_tokens`), action, masks, direction uint8 [T, B]
    rank, world      this process gets rollouts [rank * B / world, (rank + 1) * B / world)
    device           where the batches go
    residence        "map", "host" or "device": where the store lies (see trainer.gather); "auto"
                     chooses, and `describe` says what and why
    shuffle          "full", or "windowed" for a store larger than memory: it is read mostly from
                     front to back, in windows of 256 MB whose episodes are shuffled
    instruction_len  L, longer missions are cut; None means the longest mission of the stores
    max_steps        the stream ends after so many steps over all processes, rounded up to batches
    prefetch         whether a thread prepares batches ahead; None means where it pays: for a
                     GPU, and with windows read from disk

    SettingsError    B that the world does not divide or that exceeds the episodes; no episode; a
                     store of images in the native layout; stores that do not go together

    A batch is yours: its memory is used again only when nothing refers to it any more.
    """

    def __init__(
        self,
        stores: Store | Source | Sequence[Store | Source],
        *,
        rollouts: int,
        rollout_len: int,
        seed: int = 0,
        layout: Layout = "tutorial",
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        residence: Residence = "auto",
        shuffle: Shuffle = "full",
        instruction_len: int | None = None,
        max_steps: int | None = None,
        prefetch: bool | None = None,
    ) -> None:
        self._sources = checked_sources(stores)
        _check(self._sources, rollouts, rollout_len, layout, rank, world)
        self._rollouts, self._rollout_len = rollouts, rollout_len
        self._max_steps = max_steps
        device = torch.device(device)
        opened = [source.store for source in self._sources]
        self._missions = MissionTable(opened, instruction_len)
        self._table = step_table(opened, residence, device)
        self._writer = BatchWriter(self._table, self._missions, layout, device)
        share = slice(rank * rollouts // world, (rank + 1) * rollouts // world)
        self._planner = Planner(self._share_out(share, seed, shuffle), rollout_len)
        self._readers = [
            WindowReader(store, part.queues)
            for store, part in zip(opened, self._planner.parts, strict=True)
            if shuffle == "windowed" and self._table.residence == "map"
        ]
        self._turns = (0, 1)
        ahead = device.type == "cuda" or bool(self._readers) if prefetch is None else prefetch
        self._ahead = Ahead(self._made, _BATCHES_AHEAD if ahead else 0)
        self._restart(0, [Cursors.start(part.queues.rollouts) for part in self._planner.parts])

    def _share_out(self, share: slice, seed: int, shuffle: Shuffle) -> list[Part]:
        """What this process plays of every source; its rollouts are `share` of all rollouts."""
        counts = rollouts_of_sources(self._sources, self._rollouts)
        first = np.cumsum([0, *counts]).tolist()
        return [
            Part(
                queues=Queues(
                    order=Order(seed, source.count, self._window(source, shuffle)),
                    offset=source.store.episode_offset,
                    mission=source.store.episode_mission,
                    chosen=source.episodes,
                    rollouts=count,
                    mean_len=source.steps / source.count,
                ),
                rows=slice(
                    min(max(share.start - first[number], 0), count),
                    min(max(share.stop - first[number], 0), count),
                ),
                first_row=self._table.first_row[number],
                first_mission=self._missions.first_row[number],
            )
            for number, (source, count) in enumerate(zip(self._sources, counts, strict=True))
        ]

    def _window(self, source: Source, shuffle: Shuffle) -> int:
        if shuffle == "full":
            return source.count
        episode_bytes = source.steps / source.count * self._table.step_bytes
        return min(max(int(_WINDOW_BYTES / episode_bytes), 1), source.count)

    def _made(self) -> _Made:
        first, stride = self._turns
        while True:
            plan, after = self._planner.next()
            self._planned += 1
            if (self._planned - 1 - first) % stride == 0:
                break
        for reader, part, cursors in zip(self._readers, self._planner.parts, after, strict=False):
            if len(cursors.epoch):
                reader.follow(cursors, part.rows.start)
        return _Made(self._writer.on_host(plan), self._planned, after)

    def _restart(self, batches: int, everyone: list[Cursors]) -> None:
        self._ahead.forget()
        self._planner.restart(everyone)
        self._batches = self._planned = batches
        parts = zip(everyone, self._planner.parts, strict=True)
        self._mine = [cursors.part(part.rows) for cursors, part in parts]
        # of all rollouts of all processes, as they stood after so many batches
        self._everyone, self._everyone_after = everyone, batches

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """The next batch; see the class for its arrays."""
        if self._ahead.forked:
            self._restart(self._batches, self._caught_up())
        made = self._ahead.next()
        if self._max_steps is not None and made.batches > len(self):
            raise StopIteration
        self._mine, self._batches = made.after, made.batches
        return self._writer.on_device(made.batch)

    def take_turns(self, first: int, stride: int) -> None:
        """From now on make only the batches first, first + stride, ... and count the others.

        For processes that share the work on one stream, see trainer.dataset.
        """
        self._turns = (first, stride)
        self._restart(self._batches, self._caught_up())

    def epoch_steps(self, epoch: int) -> NDArray[np.int64]:
        """How many steps each rollout of this process plays in an epoch: int64 [B]."""
        steps = [part.queues.epoch_steps(epoch)[part.rows] for part in self._planner.parts]
        return np.concatenate(steps)

    def __len__(self) -> int:
        """Batches until `max_steps`, from the beginning; TypeError where the stream is endless."""
        if self._max_steps is None:
            raise TypeError("the rollouts are endless: give max_steps")
        return -(-self._max_steps // self._batch_steps)

    @property
    def _batch_steps(self) -> int:
        return self._rollouts * self._rollout_len

    @property
    def batches(self) -> int:
        """Batches made so far, those of other ranks' rollouts being the same ones."""
        return self._batches

    @property
    def steps(self) -> int:
        """Steps in one pass over everything that is played."""
        return sum(source.steps for source in self._sources)

    @property
    def demo_steps(self) -> int:
        """Steps shown so far, over all processes."""
        return self._batches * self._batch_steps

    @property
    def passes(self) -> float:
        """Steps shown so far, in passes over everything that is played."""
        return self.demo_steps / self.steps

    @property
    def passes_of_stores(self) -> dict[str, float]:
        """Steps shown so far of each store, in passes over what is played of it."""
        shown = self._batches * self._rollout_len
        return {
            source.store.name: shown * part.queues.rollouts / source.steps
            for source, part in zip(self._sources, self._planner.parts, strict=True)
        }

    @property
    def epoch(self) -> int:
        """Epochs that every rollout of this process has finished."""
        return min(int(cursors.epoch.min()) for cursors in self._mine if len(cursors.epoch))

    @property
    def mission_tokens(self) -> Tensor:
        """Token ids of every mission, 0 = padding: int64 [M, L]. In RAM from the first use on."""
        return self._missions.whole

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The words of all stores; word k has the token id k + 1."""
        return vocabulary(self._sources)

    def describe(self) -> str:
        """One line for a log: what is played, where it lies and why."""
        names = ", ".join(source.store.name for source in self._sources)
        thread = f"{_BATCHES_AHEAD} batches ahead" if self._ahead.depth else "no thread"
        return (
            f"{names}: {sum(source.count for source in self._sources)} episodes, "
            f"{self.steps} steps; residence {self._table.residence} ({self._table.reason}); "
            f"{thread}"
        )

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as a JSON value: the same from every process."""
        everyone = Cursors.joined(self._caught_up())
        return {
            **self._identity(),
            "batches": self._batches,
            "cursors": {
                "epoch": everyone.epoch.tolist(),
                "position": everyone.position.tolist(),
                "step": everyone.step.tolist(),
            },
        }

    def _caught_up(self) -> list[Cursors]:
        """The cursors of all rollouts of all processes.

        Those of other processes are not followed batch by batch: they are brought up to date
        when they are asked for, in large strides.
        """
        parts = self._planner.parts
        while self._everyone_after < self._batches:
            stride = min(self._batches - self._everyone_after, _STRIDE)
            self._everyone = [
                part.queues.play(
                    cursors, slice(0, part.queues.rollouts), stride * self._rollout_len
                )[1][-1]
                for part, cursors in zip(parts, self._everyone, strict=True)
            ]
            self._everyone_after += stride
        return self._everyone

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken: the next batch is bit-identical, on any world size.

        CheckpointError  the state belongs to another store, vocabulary, seed or shape, or is
                         damaged
        """
        for key, mine in self._identity().items():
            if state.get(key) != mine:
                raise self._refusal(
                    f"the saved rollouts differ in {key}: {state.get(key)} there, {mine} here"
                )
        try:
            batches = int(state["batches"])
            epoch, position, step = (
                np.array(state["cursors"][name], dtype=np.int64)
                for name in ("epoch", "position", "step")
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise self._refusal("the saved state of the rollouts is damaged") from error
        everyone = self._split(Cursors(epoch, position, step))
        if batches < 0 or not all(
            part.queues.holds(cursors)
            for part, cursors in zip(self._planner.parts, everyone, strict=True)
        ):
            raise self._refusal("the saved state of the rollouts is damaged")
        self._restart(batches, everyone)

    def _split(self, everyone: Cursors) -> list[Cursors]:
        borders = np.cumsum([0, *(part.queues.rollouts for part in self._planner.parts)])
        return [everyone.part(slice(start, stop)) for start, stop in pairwise(borders.tolist())]

    def _refusal(self, what: str) -> CheckpointError:
        return CheckpointError(
            what,
            path=self._sources[0].store.path,
            fix="give the stores and settings that the run began with, or begin a new run",
        )

    def _identity(self) -> dict[str, Any]:
        """What a saved state must have in common with this stream."""
        parts = self._planner.parts
        return {
            "stores": [source.identity() for source in self._sources],
            "seed": parts[0].queues.order.seed,
            "windows": [part.queues.order.window for part in parts],
            "rollouts": [part.queues.rollouts for part in parts],
            "rollout_len": self._rollout_len,
        }


def _check(
    sources: Sequence[Source], rollouts: int, rollout_len: int, layout: str, rank: int, world: int
) -> None:
    path = sources[0].store.path
    if rollouts < 1 or rollout_len < 1:
        raise SettingsError(
            f"{rollouts} rollouts of {rollout_len} steps", path=path, fix="choose 1 or more of each"
        )
    if not 0 <= rank < world or rollouts % world:
        raise SettingsError(
            f"{rollouts} rollouts cannot be shared out to {world} processes (this is rank {rank})",
            path=path,
            fix="choose a number of rollouts that the number of processes divides",
        )
    if layout == "native" and not sources[0].store.packed:
        raise SettingsError(
            "the store holds images, and the network takes packed cells",
            path=path,
            fix="name a store of cells: `demotools info` tells which it holds; "
            'in Python, layout="tutorial" gives images',
        )
