"""Batches of parallel rollouts out of demo stores, for truncated back-propagation through time.

Rollout b plays whole episodes one after another, across the borders of batches, so recurrent
memory that is carried from one batch to the next is right, and `masks` alone say where it begins
anew. docs/rollouts.md shows the use outside our trainer.

    order     which step comes where: arithmetic
    batches   where the steps lie, the layouts, on CPU or GPU
    windows   stores larger than memory
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Generic, Literal, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from demotools.errors import CheckpointError, SettingsError
from demotools.store.reading import Store
from trainer.batch import Batch, Layout
from trainer.data.batches import BatchWriter, MissionTable, Residence, step_table
from trainer.data.order import Cursors, Index, Order, Part, Planner, Queues
from trainer.data.windows import WindowReader

Shuffle = Literal["full", "windowed"]

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
                     `mission_tokens`), expert_action, masks, direction
                     uint8 [T, B]
    rank, world      this process gets rollouts [rank * B / world, (rank + 1) * B / world)
    device           where the batches go
    residence        "map", "host" or "device": where the store lies (see trainer.data.batches);
                     "auto" chooses, and `describe` says what and why
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

        For processes that share the work on one stream, see trainer.data.dataset.
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


@dataclass(frozen=True)
class Source:
    """One store of a mixture.

    proportion  share of the rollouts, relative to the other sources, above 0
    episodes    int64 [E], the episodes to play, see `matching_episodes`; None means all
    """

    store: Store
    proportion: float = 1.0
    episodes: Index | None = None

    @property
    def count(self) -> int:
        """E, how many episodes are played."""
        return self.store.episodes if self.episodes is None else len(self.episodes)

    @property
    def steps(self) -> int:
        """Steps of these episodes."""
        if self.episodes is None:
            return self.store.steps
        offset = self.store.episode_offset
        return int((offset[self.episodes + 1] - offset[self.episodes]).sum())

    def identity(self) -> dict[str, Any]:
        """What must be the same when a saved stream is resumed, as a JSON value."""
        chosen = None
        if self.episodes is not None:
            chosen = hashlib.sha256(self.episodes.astype("<i8").tobytes()).hexdigest()
        attributes = self.store.attributes
        return {
            "fingerprint": attributes.fingerprint,
            "vocabulary_hash": attributes.vocabulary_hash,
            "episodes": chosen,
        }


def matching_episodes(
    store: Store,
    *,
    mission: str | Callable[[str], bool] | None = None,
    shortest: int = 1,
    longest: int | None = None,
) -> Index:
    """The episodes of a store whose mission and length fit, ascending: int64 [E], E >= 1.

    mission            a regular expression to be found in the mission, or a function of its text
    shortest, longest  limits of the length in steps, both inclusive

    SettingsError      no episode fits, or the expression cannot be parsed
    """
    length = np.diff(store.episode_offset)
    fits = length >= shortest
    if longest is not None:
        fits &= length <= longest
    if mission is not None:
        test = _test(mission, store)
        fits_mission = np.array([test(text) for text in store.mission_text], dtype=np.bool_)
        fits &= fits_mission[store.episode_mission]
    episodes = np.flatnonzero(fits)
    if not len(episodes):
        raise SettingsError(
            f"no episode fits: mission {mission!r}, {shortest} to {longest or 'any number of'} "
            f"steps (the store's episodes have {length.min()} to {length.max()})",
            path=store.path,
            fix="widen the filter; `demotools info` shows what the store holds",
        )
    return episodes


def _test(mission: str | Callable[[str], bool], store: Store) -> Callable[[str], bool]:
    if callable(mission):
        return mission
    try:
        pattern = re.compile(mission)
    except re.error as error:
        raise SettingsError(
            f"the filter {mission!r} is not a regular expression: {error}",
            path=store.path,
            fix="correct the expression",
        ) from error
    return lambda text: pattern.search(text) is not None


def checked_sources(stores: Store | Source | Sequence[Store | Source]) -> tuple[Source, ...]:
    """The sources, checked to go together: one kind of view, one vocabulary.

    SettingsError  no source, no episode, a proportion that is not above 0, different views
    """
    given = [stores] if isinstance(stores, Store | Source) else list(stores)
    sources = tuple(Source(item) if isinstance(item, Store) else item for item in given)
    if not sources:
        raise SettingsError("there is no store to play", path="-", fix="name at least one store")
    for source in sources:
        _check_source(source, sources[0])
    longest = vocabulary(sources)
    for source in sources:
        words = source.store.attributes.vocabulary
        if words != longest[: len(words)]:
            raise SettingsError(
                "the stores of this mixture number their words differently",
                path=source.store.path,
                fix="mix only stores whose vocabularies begin alike; `demotools info` shows them",
            )
    return sources


def _check_source(source: Source, first: Source) -> None:
    path = source.store.path
    if not source.count:
        raise SettingsError("no episode of this store is chosen", path=path, fix="widen the filter")
    chosen = source.episodes
    if chosen is not None and not 0 <= chosen.min() <= chosen.max() < source.store.episodes:
        raise SettingsError(
            f"a chosen episode is not in the store, which has {source.store.episodes}",
            path=path,
            fix="choose episodes of this store, for example by matching_episodes",
        )
    if not 0 < source.proportion < float("inf"):
        raise SettingsError(
            f"a proportion is {source.proportion}", path=path, fix="give a number above 0"
        )
    shape, expected = source.store.view.shape[1:], first.store.view.shape[1:]
    if shape != expected:
        raise SettingsError(
            f"the views of this store have the shape {shape}, those of "
            f"{first.store.name} {expected}",
            path=path,
            fix="mix only stores with one kind of view",
        )


def vocabulary(sources: Sequence[Source]) -> tuple[str, ...]:
    """The words of the source that knows most of them; word k has the token id k + 1."""
    return max((source.store.attributes.vocabulary for source in sources), key=len)


def rollouts_of_sources(sources: Sequence[Source], rollouts: int) -> list[int]:
    """How many of the rollouts play each source: in proportion, rounded by largest remainder.

    SettingsError  a source would get none, or more rollouts than it has episodes
    """
    proportion = np.array([source.proportion for source in sources], dtype=np.float64)
    exact = proportion / proportion.sum() * rollouts
    counts = np.floor(exact).astype(int)
    for number in np.argsort(counts - exact, kind="stable")[: rollouts - counts.sum()]:
        counts[number] += 1
    for source, count in zip(sources, counts.tolist(), strict=True):
        if not count:
            raise SettingsError(
                f"{rollouts} rollouts are too few for {len(sources)} stores in these proportions",
                path=source.store.path,
                fix="choose more rollouts, or a larger proportion for this store",
            )
        if count > source.count:
            raise SettingsError(
                f"{count} rollouts are more than the {source.count} episodes to play",
                path=source.store.path,
                fix=f"choose at most {source.count} rollouts for this store, or a larger store",
            )
    return [int(count) for count in counts]


_Result = TypeVar("_Result")


class Ahead(Generic[_Result]):
    """The results of calling `produce` again and again, in order, some of them ahead of time.

    produce  is only ever called by one thread at a time
    depth    how many results are computed ahead; 0 calls `produce` in the caller's thread
    """

    def __init__(self, produce: Callable[[], _Result], depth: int) -> None:
        self._produce = produce
        self.depth = depth
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._waiting: deque[Future[_Result]] = deque()
        self._thread = ThreadPoolExecutor(1, "rollouts") if self.depth else None

    @property
    def forked(self) -> bool:
        """Whether this is a copy in a forked process, where the thread is missing."""
        return self._process != os.getpid()

    def next(self) -> _Result:
        """The next result; what `produce` raised is raised here."""
        if self._thread is None:
            return self._produce()
        while len(self._waiting) <= self.depth:
            self._waiting.append(self._thread.submit(self._produce))
        return self._waiting.popleft().result()

    def forget(self) -> None:
        """Throw away what was computed ahead; returns when `produce` is not running."""
        if self.forked:
            self._begin()
        while self._waiting:
            future = self._waiting.popleft()
            if not future.cancel():
                future.exception()
