"""Small copies of stores: a random sample of each store's episodes, named after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from demotools.errors import StoreError
from demotools.store.format import SUFFIX, read_attributes, store_exists, stores_in
from demotools.store.reading import open_store
from demotools.store.reshape import Plan, make_store, parent_of, sampled

SMALL = "-small"


@dataclass(frozen=True)
class Shrunk:
    """What became of one store: the twin's path, and why it was skipped (None where made)."""

    parent: str
    path: Path
    episodes: int
    skipped: str | None


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
    parent = parent_of(store, seed=seed)
    if store.episodes < episodes:
        raise StoreError(
            f"it has {store.episodes:,} episodes, but {episodes:,} were requested",
            path=path,
            fix=f"use at most --episodes {store.episodes}",
        )
    if _is_twin(twin, parent, episodes):
        return Shrunk(store.name, twin, episodes, "the same copy already exists")
    rows = sampled(store.episodes, episodes, seed)
    plan = Plan(twin, [(store, rows)], store.attributes.split, parent)
    make_store(plan, overwrite=overwrite, quiet=quiet)
    return Shrunk(store.name, twin, episodes, None)


def shrink_stores(
    paths: Sequence[Path],
    folder: Path,
    twin: Path | None = None,
    *,
    episodes: int,
    seed: int,
    overwrite: bool = False,
    quiet: bool = False,
) -> list[Shrunk]:
    """Make a twin of each store named; without a name, of every full training store of `folder`.

    twin        of the only store named, see `shrink_store`
    returns     what became of each; without a name, a store that cannot be shrunk is skipped

    StoreError  a store named cannot be shrunk, or there is no full training store
    """
    full = [path for path in stores_in(folder) if _is_full_training_store(path)]
    if not paths and not full:
        raise StoreError(
            "there is no full training store to shrink",
            path=folder,
            fix="create one with `demotools fetch`, `convert` or `generate`, or name a store",
        )
    results = []
    for path in paths or full:
        try:
            result = shrink_store(
                path, twin, episodes=episodes, seed=seed, overwrite=overwrite, quiet=quiet
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
    if not store_exists(twin):
        return False
    attributes = open_store(twin).attributes
    return attributes.parent == parent and attributes.episodes == episodes
