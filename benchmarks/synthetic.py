"""Demo stores of random episodes in any size, for benchmarks: made once, kept under build/."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from demotools.babyai.cells import COLOURS, EGOCENTRIC_CODES, EMPTY, UNSEEN
from demotools.store.building import StoreBuilder, write_part
from demotools.store.reading import Episodes, Store, open_store

FOLDER = Path("build/bench-stores")
MISSIONS = tuple(
    f"go to {article} {colour} {kind}"
    for article in ("a", "the")
    for colour in COLOURS
    for kind in ("ball", "box", "key")
)
_EPISODES_A_PART = 100_000


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
    """The store of that many random episodes; written if it is not there yet."""
    path = folder / f"synthetic-{episodes}-{longest}.zarr"
    if not path.exists():
        with StoreBuilder(path, {"synthetic": [episodes, longest]}) as builder:
            for number, start in enumerate(range(0, episodes, _EPISODES_A_PART)):
                count = min(_EPISODES_A_PART, episodes - start)
                part = random_episodes(count, seed=number, longest=longest)
                write_part(builder.parts, number, part, {"synthetic": True})
            builder.finish(
                level="GoToLocal",
                split="train",
                environment_id="BabyAI-GoToLocal-v0",
                licence="none",
                citation="none",
                source={"kind": "synthetic"},
            )
    return open_store(path)
