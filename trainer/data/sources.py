"""What an iterator reads: stores, subsets of their episodes, and the proportions of a mixture."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from demotools.babyai.vocabulary import WORDS
from demotools.errors import SettingsError
from demotools.store.episodes import EpisodeDataset
from demotools.store.reading import Store, open_store
from trainer.data.order import Index
from trainer.settings.models import Settings, StoreSettings

Shuffle = Literal["full", "windowed"]

_WINDOW_BYTES = 1 << 28


@dataclass(frozen=True)
class Source:
    """One part of a mixture.

    episodes    an open store, or a subset of its episodes
    proportion  share of the rollouts, relative to the other sources, above 0
    """

    episodes: EpisodeDataset
    proportion: float = 1.0

    @property
    def store(self) -> Store:
        """Whose episodes they are."""
        store = self.episodes.store
        assert isinstance(store, Store)
        return store

    @property
    def chosen(self) -> Index | None:
        """The numbers of the episodes in the store, int64 [E]; None means all of them."""
        return None if isinstance(self.episodes, Store) else self.episodes.numbers

    @property
    def count(self) -> int:
        """E, how many episodes are played."""
        return len(self.episodes)

    @property
    def steps(self) -> int:
        """Steps of these episodes."""
        return self.episodes.steps

    def window(self, shuffle: Shuffle) -> int:
        """How many episodes are shuffled among each other."""
        if shuffle == "full":
            return self.count
        step_bytes = int(np.prod(self.store.view.shape[1:])) + 2
        episode_bytes = self.steps / self.count * step_bytes
        return min(max(int(_WINDOW_BYTES / episode_bytes), 1), self.count)

    def identity(self) -> dict[str, Any]:
        """What must be the same when a saved stream is resumed, as a JSON value."""
        chosen = None
        if self.chosen is not None:
            chosen = hashlib.sha256(self.chosen.astype("<i8").tobytes()).hexdigest()
        attributes = self.store.attributes
        return {
            "fingerprint": attributes.fingerprint,
            "vocabulary_hash": attributes.vocabulary_hash,
            "episodes": chosen,
        }


Part = EpisodeDataset | Source
Given = Part | str | Path | Sequence[Part | str | Path]
"""What `ExpertTrajectoryIterator` takes."""


StageSources = Sequence[Sequence[Source]]
"""What each stage plays; nothing in a stage without a section off_policy."""


def stage_sources(settings: Settings, stores: Mapping[str, Store]) -> StageSources:
    """What the stages choose from these stores, by name.

    SettingsError  no episode fits a filter, its expression cannot be parsed, or there are not
                   enough episodes for the stage's rollouts
    """
    stages = []
    for number, stage in enumerate(settings.stages):
        shown, played = stage.off_policy, list[Source]()
        for one in shown.store if shown else ():
            store = stores[one.name]
            played.append(Source(_chosen(one, store) if one.filters else store, one.proportion))
        if played and shown and shown.iterator is None:
            key = f"--set stages.{number}.off_policy.rollouts"
            rollouts_of_sources(played, shown.rollouts, key)
        stages.append(played)
    return stages


def _chosen(settings: StoreSettings, store: Store) -> EpisodeDataset:
    seeds = store.seeds
    fits = np.ones(len(seeds), dtype=np.bool_)
    if settings.min_seed is not None:
        fits &= seeds >= settings.min_seed
    if settings.max_seed is not None:
        fits &= seeds <= settings.max_seed
    episodes = store.select(fits).filter(
        mission=settings.mission,
        min_length=settings.min_length or 1,
        max_length=settings.max_length,
    )
    if not len(episodes):
        low, high = store.lengths.min(), store.lengths.max()
        raise SettingsError(
            f"no episode of this store matches {settings.filters} (its episodes have {low} to "
            f"{high} steps and seeds from {seeds.min()} to {seeds.max()})",
            path=store.path,
            fix="relax the filter; `demotools info` shows what the store has",
        )
    return episodes


def mixture_lines(sources: Sequence[Source], rollouts: int) -> list[str]:
    """What there is to say of more than one whole store: the share of each, and what is played."""
    return [
        f"{source.store.name}: {count} of {rollouts} rollouts, {source.count:,} of "
        f"{source.store.episodes:,} episodes"
        for source, count in zip(sources, rollouts_of_sources(sources, rollouts), strict=True)
    ]


def checked_sources(stores: Given) -> tuple[Source, ...]:
    """The sources, checked to go together: one kind of view, one vocabulary.

    StoreError     one that is given by its name or path cannot be opened
    SettingsError  no source, no episode, no store, a proportion that is not above 0, or different
                   views
    """
    one = isinstance(stores, Part | str | Path) or not isinstance(stores, Iterable)
    given: Any = [stores] if one else stores
    sources = tuple(map(_source, given))
    if not sources:
        raise SettingsError("there is no store to play", path="-", fix="name at least one store")
    for source in sources:
        _check_source(source, sources[0])
    shared_words([source.store for source in sources])
    return sources


def _source(given: Any) -> Source:
    """A source, of whatever the user names a store by."""
    source = given if isinstance(given, Source) else Source(given)
    episodes: Any = source.episodes
    if isinstance(episodes, str | Path):
        return replace(source, episodes=open_store(episodes))
    if not isinstance(episodes, EpisodeDataset):
        raise SettingsError(
            f"this is {type(episodes).__name__}, not a store",
            path=repr(episodes),
            fix="give a store's name, its path, or what `demotools.open` returns",
        )
    return source


def _check_source(source: Source, first: Source) -> None:
    path = source.store.path
    if not source.count:
        raise SettingsError("no episode of this store is selected", path=path, fix="select more")
    if not 0 < source.proportion < float("inf"):
        raise SettingsError(
            f"a proportion is {source.proportion}", path=path, fix="give a number above 0"
        )
    shape, expected = source.store.view.shape[1:], first.store.view.shape[1:]
    if shape != expected:
        raise SettingsError(
            f"the views of this store have shape {shape}, but those of "
            f"{first.store.name} have {expected}",
            path=path,
            fix="mix only stores whose views have the same shape",
        )


def shared_words(stores: Sequence[Store]) -> tuple[str, ...]:
    """The vocabulary of all stores: the longest, which the others must be beginnings of.

    SettingsError  two stores give different words the same id
    """
    longest = max((store.vocabulary for store in stores), key=len, default=WORDS)
    for store in stores:
        if store.vocabulary != longest[: len(store.vocabulary)]:
            raise SettingsError(
                "the stores number their words differently",
                path=store.path,
                fix="combine only stores whose vocabularies begin with the same words; "
                "`demotools info` shows them",
            )
    return longest


def shared_subgoals(stores: Sequence[Store]) -> tuple[str, ...]:
    """What the codes of `subgoal` stand for in all of these stores; none where one has no such
    array, or other codes.
    """
    tables = {one.attributes.subgoals if "subgoal" in one.optional else () for one in stores}
    return tables.pop() if len(tables) == 1 else ()


def rollouts_of_sources(
    sources: Sequence[Source], rollouts: int, key: str = "rollouts"
) -> list[int]:
    """How many of the rollouts play each source: in proportion, rounded by largest remainder.

    key   by which the user gives `rollouts`

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
                fix=f"use more rollouts with {key}, or a larger proportion for this store",
            )
        if count > source.count:
            raise SettingsError(
                f"there are {count} rollouts, but only {source.count} episodes",
                path=source.store.path,
                fix=f"use {key}={source.count}, or a larger store"
                if len(sources) == 1
                else f"use fewer rollouts with {key}, or a smaller proportion for this store",
            )
    return [int(count) for count in counts]
