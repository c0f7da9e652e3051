"""What the rollout iterator plays: stores, chosen episodes of them, and their proportions."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from demotools.errors import SettingsError
from demotools.store import Store
from trainer.order import Index


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
