"""Demo stores of random episodes in any size, for benchmarks: made once, kept under build/."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from tqdm import tqdm

from demotools.babyai.cells import COLOURS, EGOCENTRIC_CODES, EMPTY, UNSEEN
from demotools.store.building import join_parts
from demotools.store.reading import Episodes, Store, open_store

FOLDER = Path("build/bench-stores")
MISSIONS = tuple(
    f"go to {article} {colour} {kind}"
    for article in ("a", "the")
    for colour in COLOURS
    for kind in ("ball", "box", "key")
)
_EPISODES_A_PART, _DIFFERENT_PARTS = 100_000, 10


def random_episodes(episodes: int, seed: int, longest: int = 9) -> Episodes:
    """Episodes of 1 to `longest` steps (GoToLocal: mean 5), everything in them random.

    Nine cells in ten are unseen or empty, so that compressors have about as much to do as with
    real views.
    """
    random = np.random.default_rng(seed)
    length = random.integers(1, longest + 1, episodes)
    steps = int(length.sum())
    view = random.integers(0, EGOCENTRIC_CODES, (steps, 7, 7), dtype=np.uint8)
    plain = random.integers(0, 20, view.shape, dtype=np.uint8)
    view[plain < 18] = EMPTY * 18
    view[plain < 9] = UNSEEN
    return Episodes(
        length=length,
        mission=[MISSIONS[row] for row in random.integers(0, len(MISSIONS), episodes)],
        seed=np.full(episodes, -1, dtype=np.int64),
        view=view,
        direction=random.integers(0, 4, steps, dtype=np.uint8),
        action=random.integers(0, 7, steps, dtype=np.uint8),
    )


def synthetic_store(episodes: int, longest: int = 9, folder: Path = FOLDER) -> Store:
    """The store of that many random episodes; written if it is not there yet.

    Beyond a million episodes the same ones come again: what is in them does not matter, and 70
    million take no longer than their bytes.
    """
    path = folder / f"synthetic-{episodes}-{longest}.zarr"
    if not path.exists():
        sizes = [_EPISODES_A_PART] * (episodes // _EPISODES_A_PART)
        sizes += [rest] if (rest := episodes % _EPISODES_A_PART) else []

        @cache
        def part(size: int, seed: int) -> Episodes:
            return random_episodes(size, seed=seed, longest=longest)

        def parts() -> Iterator[Episodes]:
            bar = tqdm(enumerate(sizes), total=len(sizes), desc=path.name, disable=None)
            return (part(size, number % _DIFFERENT_PARTS) for number, size in bar)

        steps = sum(len(part(size, n % _DIFFERENT_PARTS).action) for n, size in enumerate(sizes))
        about = {
            "level": "GoToLocal",
            "split": "train",
            "environment_id": "BabyAI-GoToLocal-v0",
            "licence": "none",
            "citation": "none",
            "source": {"kind": "synthetic"},
            "parent": None,
        }
        with TemporaryDirectory(dir=folder) as building:
            join_parts(parts(), episodes, steps, Path(building) / path.name, about)
            (Path(building) / path.name).rename(path)
    return open_store(path)
