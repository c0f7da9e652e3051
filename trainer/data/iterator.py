"""Batches of parallel rollouts from demo stores, for truncated back-propagation through time.

Rollout b plays whole episodes one after another, across batches, so recurrent memory can be carried
from one batch to the next, and `masks` alone say where to reset it. docs/rollouts.md shows how to
use it outside our trainer.

    order     computes which step comes where
    batches   gathers the steps into the layouts, on CPU or GPU
"""

from __future__ import annotations

import os
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from mmap import PAGESIZE
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from demotools.errors import CheckpointError, SettingsError, printable_text
from demotools.output import counted
from demotools.store.reading import StepArray, Store
from trainer.batch import Batch, Layout
from trainer.data.augment import Augmenter
from trainer.data.batches import BatchWriter, MissionTable, Residence, step_table
from trainer.data.order import (
    Cursors,
    Index,
    Order,
    Queues,
    batch_indices,
    episodes_begun,
    parts_of,
    play_all,
)
from trainer.data.sources import (
    Given,
    Shuffle,
    Source,
    checked_sources,
    rollouts_of_sources,
    shared_words,
)

_PREFETCHED_BATCHES = 2
_STRIDE = 64
_CURSORS = ("epoch", "position", "step")


class ExpertTrajectoryIterator:
    """Batches of T consecutive steps for B parallel rollouts, endless unless `max_steps` is given.

    stores           an open demo store, its name or path, or a subset of its episodes; or several
                     of these; a `Source` sets the proportion of one
    rollouts         B, over all processes and stores; at most the number of episodes
    rollout_len      T
    seed             any integer; the order is a pure function of it
    layout           "tutorial" or "native": the arrays of a batch, see `trainer.batch`
    rank, world      this process gets rollouts [rank * B / world, (rank + 1) * B / world)
    device           where the batches go
    residence        where the store is: "map", memory-mapped, or "device", a copy in the device's
                     memory; "auto": on a GPU with four times the space needed, else memory-mapped
    shuffle          "full", or "windowed" for a store larger than memory: it is read mostly from
                     front to back, in windows of 256 MB whose episodes are shuffled
    instruction_len  L, longer missions are truncated; None: the longest mission of the stores
    max_steps        end after this many steps over all processes, rounded up to whole batches
    prefetch         whether a thread prepares batches ahead; None: if it pays off, which is for a
                     GPU, and with windows read from disk
    augmenter        changes every native batch, on the CPU, before it goes to the device; so
                     "auto" leaves the store memory-mapped

    SettingsError    B is not a multiple of the world, or exceeds the number of episodes; there are
                     no episodes; a store of images in the native layout; incompatible stores; an
                     augmenter with the tutorial's layout, or with residence "device"

    A batch is yours to keep: its memory is reused only once nothing refers to it.
    """

    def __init__(
        self,
        stores: Given,
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
        augmenter: Augmenter | None = None,
    ) -> None:
        self._sources = checked_sources(stores)
        _check(self._sources, rollouts, rollout_len, layout, rank, world)
        if augmenter is not None:
            _check_augmented(layout, residence)
        self._rollouts, self._rollout_len = rollouts, rollout_len
        self._max_steps = max_steps
        device = torch.device(device)
        opened = [source.store for source in self._sources]
        self._missions = missions = MissionTable(opened, instruction_len)
        self._augmenter = augmenter
        table = step_table(opened, "map" if augmenter else residence, device)
        self._writer = BatchWriter(table, missions, layout, device)
        self._share = slice(rank * rollouts // world, (rank + 1) * rollouts // world)
        counts = rollouts_of_sources(self._sources, rollouts)
        first = np.cumsum([0, *counts])
        # of all processes; `_mine` are those of this one
        self._queues = [
            Queues(
                order=Order(seed, source.count, source.window(shuffle)),
                offset=source.store.episode_offset,
                mission=source.store.episode_mission,
                chosen=source.chosen,
                mean_len=source.steps / source.count,
                rollouts=count,
                numbers=np.arange(count),
                first_row=table.first_row[number],
                first_mission=missions.first_row[number],
            )
            for number, (source, count) in enumerate(zip(self._sources, counts, strict=True))
        ]
        share = np.arange(rollouts)[self._share]
        self._mine = [
            replace(queues, numbers=share[(start <= share) & (share < stop)] - start)
            for queues, (start, stop) in zip(self._queues, pairwise(first.tolist()), strict=True)
        ]
        self._readers = []
        if shuffle == "windowed" and table.on_device is None:
            self._readers = [WindowReader(*pair) for pair in zip(opened, self._queues, strict=True)]
        self._turns = (0, 1)
        self._closed = False
        if prefetch is None:
            prefetch = device.type == "cuda" or bool(self._readers)
        self._prefetched_batches = _PREFETCHED_BATCHES if prefetch else 0
        self._start_thread()
        self._restart(0, np.zeros((3, rollouts), dtype=np.int64))

    def _start_thread(self) -> None:
        self._process = os.getpid()
        self._prefetched: deque[Future[tuple[int, Batch]]] = deque()
        self._thread = ThreadPoolExecutor(1, "rollouts") if self._prefetched_batches else None

    def _restart(self, batches: int, everyone: Cursors) -> None:
        """Go on after so many batches, where everyone's rollouts stand."""
        if self._process != os.getpid():
            self._start_thread()  # a fork has no threads
        while self._prefetched:
            future = self._prefetched.popleft()
            if not future.cancel():
                future.exception()  # waits
        self._made = self._make(batches, everyone[:, self._share])
        self._batches = batches
        # of all rollouts of all processes, as they stood after so many batches
        self._everyone, self._everyone_after = everyone, batches

    def _make(self, batches: int, cursors: Cursors) -> Iterator[tuple[int, Batch]]:
        """How many batches there were with this one, and what the writer gives on the host."""
        first, stride = self._turns
        begun = None if self._augmenter is None else episodes_begun(self._mine, cursors)
        for index in batch_indices(self._mine, cursors, self._rollout_len):
            batches += 1
            before = begun
            if begun is not None:
                begun = begun + np.count_nonzero(index.masks == 0, axis=0)
            if (batches - 1 - first) % stride == 0:
                for reader in self._readers:
                    reader.follow(batches * self._rollout_len)
                # no name for it here, which would keep its memory until the batch after it
                yield batches, self._augmented(self._writer.on_host(index), before)

    def _augmented(self, batch: Batch, begun: Index | None) -> Batch:
        """The batch under its symmetries, if there are any."""
        if self._augmenter is None or begun is None:
            return batch
        return self._augmenter(batch, self._missions.whole, begun, self._share.start)

    def __repr__(self) -> str:
        names = ", ".join(source.store.name for source in self._sources)
        shape = f"{self._rollouts} rollouts x {self._rollout_len} steps"
        text = f"<rollouts of {names}: {shape}, {counted(self._batches, 'batch')} so far>"
        return printable_text(text, 200)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """The next batch; see `trainer.batch` for its arrays.

        SettingsError  after `close`
        """
        if self._closed:
            raise SettingsError(
                "this iterator is closed and has no more batches",
                path=self._sources[0].store.path,
                fix="close it after the last batch; a new one continues after "
                "load_state(closed.state())",
            )
        if self._process != os.getpid():
            self._restart(self._batches, self._cursors())
        if self._thread is None:
            batches, batch = next(self._made)
        else:
            while len(self._prefetched) <= self._prefetched_batches:
                self._prefetched.append(self._thread.submit(next, self._made))
            batches, batch = self._prefetched.popleft().result()
        if self._max_steps is not None and batches > len(self):
            raise StopIteration
        self._batches = batches
        return self._writer.on_device(batch)

    def take_turns(self, first: int, stride: int) -> None:
        """From now on make only the batches first, first + stride, ... and count the others.

        For processes that share the work on one stream, see trainer.data.dataset.
        """
        self._turns = (first, stride)
        self._restart(self._batches, self._cursors())

    def one_pass(self) -> Iterator[tuple[Batch, Tensor]]:
        """Every step that is played exactly once: begins anew, and ends after epoch 0.

        yields   a batch, and which of its steps count: bool [T, B]. A rollout that has played all
                 its episodes goes on while others have not, and that does not count.
        """
        self._restart(0, np.zeros((3, self._rollouts), dtype=np.int64))
        left = np.concatenate([queues.first_pass() for queues in self._mine])
        while left.max() > 0:
            batch = next(self)
            counts = torch.from_numpy(np.arange(self._rollout_len)[:, None] < left)
            yield batch, counts.to(batch["masks"].device)
            left = left - self._rollout_len

    def __len__(self) -> int:
        """Batches until `max_steps`, from the beginning; TypeError where the stream is endless."""
        if self._max_steps is None:
            raise TypeError("the rollouts are endless: set max_steps")
        return -(-self._max_steps // (self._rollouts * self._rollout_len))

    def close(self) -> None:
        """End the thread that prepares batches ahead, if there is one: no batch comes after it."""
        self._closed = True
        if self._thread is not None and self._process == os.getpid():
            self._thread.shutdown(cancel_futures=True)

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
        return self._batches * self._rollouts * self._rollout_len

    @property
    def passes(self) -> float:
        """Steps shown so far, in passes over everything that is played."""
        return self.demo_steps / self.steps

    @property
    def passes_of_stores(self) -> dict[str, float]:
        """Steps shown so far of each store, in passes over what is played of it."""
        played, steps = Counter[str](), Counter[str]()
        for source, queues in zip(self._sources, self._queues, strict=True):
            played[source.store.name] += self._batches * self._rollout_len * queues.rollouts
            steps[source.store.name] += source.steps
        return {name: played[name] / steps[name] for name in steps}

    @property
    def epoch(self) -> int:
        """Epochs that every rollout of all processes has finished."""
        return int(self._cursors()[0].min())

    @property
    def mission_tokens(self) -> Tensor:
        """Token ids of every mission, 0 = padding, on the device of the batches: int64 [M, L].

        Made at its first use.
        """
        return self._writer.tokens

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The words of all stores; word k has the token id k + 1."""
        return shared_words([source.store for source in self._sources])

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as a JSON value: the same from every process."""
        cursors = dict(zip(_CURSORS, self._cursors().tolist(), strict=True))
        return {**self._identity(), "batches": self._batches, "cursors": cursors}

    def _cursors(self) -> Cursors:
        """Where all rollouts of all processes stand.

        They are not followed batch by batch: they are brought up to date when they are asked for,
        in large strides.
        """
        while self._everyone_after < self._batches:
            stride = min(self._batches - self._everyone_after, _STRIDE)
            steps = stride * self._rollout_len
            self._everyone = play_all(self._queues, self._everyone, steps)[1]
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
                    f"the saved rollouts differ in {key}: saved {state.get(key)}, now {mine}"
                )
        try:
            batches = int(state["batches"])
            everyone = np.array([state["cursors"][name] for name in _CURSORS], dtype=np.int64)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise self._refusal("the saved state of the rollouts is damaged") from error
        if batches < 0 or everyone.shape != (3, self._rollouts) or not self._hold(everyone):
            raise self._refusal("the saved state of the rollouts is damaged")
        self._restart(batches, everyone)

    def _hold(self, everyone: Cursors) -> bool:
        parts = zip(self._queues, parts_of(self._queues, everyone), strict=True)
        return all(queues.holds(part) for queues, part in parts)

    def _refusal(self, what: str) -> CheckpointError:
        return CheckpointError(
            what,
            path=self._sources[0].store.path,
            fix="use the stores and settings that the run started with, or start a new run",
        )

    def _identity(self) -> dict[str, Any]:
        """What a saved state must have in common with this stream."""
        return {
            "stores": [source.identity() for source in self._sources],
            "seed": self._queues[0].order.seed,
            "windows": [queues.order.window for queues in self._queues],
            "rollouts": [queues.rollouts for queues in self._queues],
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
            f"{rollouts} rollouts cannot be divided among {world} processes (this is rank {rank})",
            path=path,
            fix="choose a multiple of the number of processes",
        )
    if layout == "native" and not sources[0].store.packed:
        raise SettingsError(
            "the store has images, but this layout needs packed cells",
            path=path,
            fix="name a store with cells (see `demotools info`); "
            'in Python, layout="tutorial" gives images',
        )


def _check_augmented(layout: Layout, residence: Residence) -> None:
    if layout != "native":
        raise SettingsError(
            "symmetries change packed cells and missions, which this layout has unpacked",
            path=f"ExpertTrajectoryIterator(…, layout={layout!r}, augmenter=…)",
            fix='pass layout="native", or no augmenter',
        )
    if residence == "device":
        raise SettingsError(
            "symmetries are applied on the CPU, so the store cannot be copied to the device",
            path="ExpertTrajectoryIterator(…, residence='device', augmenter=…)",
            fix='leave residence at "auto", or pass no augmenter',
        )


class WindowReader:
    """Reads a store that is larger than memory: the next window of the order, front to back.

    While the rollouts play one window of neighbouring episodes, a thread reads the next one into
    the system's page cache, so that the gathers hardly ever wait for single pages. Nothing is
    kept: the system drops the pages when it needs the room.
    """

    def __init__(self, store: Store, queues: Queues) -> None:
        self._store = store
        self._queues = queues
        self._next = 0

    def follow(self, steps: int) -> None:
        """Begin to read the windows up to the one after that which is played now.

        steps   that each rollout has played
        """
        order = self._queues.order
        windows = -(-order.episodes // order.window)
        played = int(steps * self._queues.rollouts / self._queues.mean_len)
        epoch, place = divmod(played, order.episodes)
        present = epoch * windows + place // order.window
        for window in range(max(self._next, present), present + 2):
            self._next = window + 1
            threading.Thread(target=self._read, args=divmod(window, windows), daemon=True).start()

    def _read(self, epoch: int, slot: int) -> None:
        order, chosen, offset = self._queues.order, self._queues.chosen, self._queues.offset
        first = order.window_start(epoch, slot)
        last = first + min(order.window, order.episodes - slot * order.window)
        for begin, end in ((first, min(last, order.episodes)), (0, last - order.episodes)):
            if begin < end:
                low, high = (begin, end - 1) if chosen is None else chosen[[begin, end - 1]]
                for array in (self._store.view, self._store.action, self._store.direction):
                    _touch(array, int(offset[low]), int(offset[high + 1]))


def _touch(array: StepArray, start: int, stop: int) -> None:
    """Have the system read the steps [start, stop): a byte of each page is enough."""
    for number in range(start // array.chunk_length, (stop - 1) // array.chunk_length + 1):
        first = number * array.chunk_length
        rows = array.chunks[number][max(start - first, 0) : stop - first]
        rows.reshape(-1)[::PAGESIZE].max()
