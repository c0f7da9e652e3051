"""Do the workers of PyTorch's DataLoader pay, for padded episodes and for rollouts?

    python benchmarks/bench_loaders.py [--rounds 5]

A store of 50,000 episodes as long as the bot's on GoToLocal; batches of 64 padded episodes, and of
128 rollouts of 20 steps in the native layout. Wall time counts, because workers are other
processes. Printed are the median, the smallest and the largest rate over the rounds.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from itertools import islice
from statistics import median
from typing import Any

import torch
from synthetic import synthetic_store
from torch.utils.data import DataLoader

from demotools.output import counted
from demotools.store.episodes import pad_episodes
from trainer.data.dataset import RolloutDataset

EPISODES, BATCHES, WARM_UP = 50_000, 150, 20
B, T = 128, 20


def rate(loader: DataLoader[Any]) -> float:
    """Batches a second, after the workers have started."""
    batches = islice(loader, WARM_UP + BATCHES)
    for _ in range(WARM_UP):
        next(batches)
    start = time.perf_counter()
    count = sum(1 for _ in batches)
    return count / (time.perf_counter() - start)


def main() -> None:
    """Print the rates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    store: Any = synthetic_store(EPISODES)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores")
    for name, dataset, settings in (
        ("64 padded episodes", store, {"batch_size": 64, "collate_fn": pad_episodes}),
        (
            f"{B} rollouts of {T} steps",
            RolloutDataset(store, rollouts=B, rollout_len=T, layout="native"),
            {"batch_size": None},
        ),
    ):
        for workers in (0, 1, 2):
            rates = [
                rate(DataLoader(dataset, num_workers=workers, **settings)) for _ in range(rounds)
            ]
            spread = f"{median(rates):8,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"
            print(f"{name}, {counted(workers, 'worker')}: {spread} batches/s")


if __name__ == "__main__":
    main()
