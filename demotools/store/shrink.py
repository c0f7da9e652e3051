"""Small twins: a seeded choice of whole episodes out of a store, with its provenance."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from demotools.errors import StoreError
from demotools.output import progress_bar
from demotools.store.building import StoreBuilder, write_part
from demotools.store.reading import SUFFIX, Store, open_store, read_attributes

SMALL = "-small"
_EPISODES_A_PART = 4096


@dataclass(frozen=True)
class Shrunk:
    """What became of one store: the twin's path, and why it was skipped (None where made)."""

    parent: str
    path: Path
    episodes: int
    skipped: str | None


def chosen_episodes(episodes: int, wanted: int, seed: int) -> NDArray[np.int64]:
    """The `wanted` episodes of a twin, in ascending order.

    returns  int64 [wanted]; for one seed, a smaller choice is a part of a larger one

    The raw output of a bit generator is the one random stream that numpy promises never to change.
    """
    rank = np.argsort(np.random.PCG64(seed).random_raw(episodes), kind="stable")
    return np.sort(rank[:wanted]).astype(np.int64)


def shrink_store(
    path: Path,
    twin: Path | None = None,
    *,
    episodes: int,
    seed: int,
    overwrite: bool = False,
    quiet: bool = False,
) -> Shrunk:
    """Make the twin of one store; one that is right already is kept.

    twin        its path; None: beside the store, with `-small` behind its name

    StoreError  the store has fewer episodes than asked for, another twin is there already, or the
                twin would be the store itself
    """
    store = open_store(path)
    twin = twin or path.with_name(store.name + SMALL + SUFFIX)
    parent = {
        # the name of a folder may be no text, but an attribute is
        "name": os.fsencode(store.name).decode("utf-8", "replace"),
        "fingerprint": store.attributes.fingerprint,
        "episodes": store.episodes,
        "seed": seed,
    }
    if twin.resolve() == path.resolve():
        raise StoreError(
            "a small copy cannot replace its own store", path=path, fix="give another --name"
        )
    if store.episodes < episodes:
        raise StoreError(
            f"it has {store.episodes:,} episodes, {episodes:,} were asked for",
            path=path,
            fix=f"ask for at most --episodes {store.episodes}",
        )
    if _is_twin(twin, parent, episodes):
        return Shrunk(store.name, twin, episodes, "it exists already and is the same")
    with StoreBuilder(twin, {"shrink": parent, "wanted": episodes}, overwrite=overwrite) as builder:
        for number, rows in _blocks(store, episodes, seed, quiet):
            write_part(builder.parts, number, store.take(rows), {})
        store.check_unchanged()
        about = store.attributes
        builder.finish(
            level=about.level,
            split=about.split,
            environment_id=about.environment_id,
            licence=about.licence,
            citation=about.citation,
            source=about.source,
            parent=parent,
            subgoals=about.subgoals,
        )
    return Shrunk(store.name, twin, episodes, None)


def shrink_stores(
    paths: Sequence[Path],
    folder: Path,
    *,
    episodes: int,
    seed: int,
    overwrite: bool = False,
    quiet: bool = False,
) -> list[Shrunk]:
    """Make a twin of each store named; without a name, of every full training store of `folder`.

    returns     what became of each; without a name, a store that cannot be shrunk is skipped

    StoreError  a store named cannot be shrunk, or there is no full training store
    """
    full = [path for path in sorted(folder.glob(f"*{SUFFIX}")) if _is_full_training_store(path)]
    if not paths and not full:
        raise StoreError(
            "there is no full training store to shrink",
            path=folder,
            fix="make one with `demotools fetch`, `convert` or `generate`, or name a store",
        )
    results = []
    for path in paths or full:
        try:
            result = shrink_store(
                path, episodes=episodes, seed=seed, overwrite=overwrite, quiet=quiet
            )
        except StoreError as error:
            if paths:
                raise
            result = Shrunk(path.name.removesuffix(SUFFIX), path, 0, f"{error.what}; {error.fix}")
        results.append(result)
    return results


def _is_full_training_store(path: Path) -> bool:
    try:
        attributes = read_attributes(path)
    except StoreError:
        return False
    return attributes.split == "train" and attributes.parent is None


def _is_twin(twin: Path, parent: dict[str, object], episodes: int) -> bool:
    if not twin.exists():
        return False
    attributes = open_store(twin).attributes
    return attributes.parent == parent and attributes.episodes == episodes


def _blocks(
    store: Store, episodes: int, seed: int, quiet: bool
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    chosen = chosen_episodes(store.episodes, episodes, seed)
    with progress_bar(episodes, f"shrink {store.name}", "episodes", quiet=quiet) as bar:
        for number, start in enumerate(range(0, episodes, _EPISODES_A_PART)):
            rows = chosen[start : start + _EPISODES_A_PART]
            yield number, rows
            bar.update(len(rows))
