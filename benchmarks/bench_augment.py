"""What does augmentation cost, beside the batches that it is applied to?

One core, processor time, in turns within one run: batches of the native layout alone, with their
missions listed (what a network needs in any case), and augmented. Median of several rounds.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from demotools.babyai.levels import Symmetry
from demotools.output import data_folder
from demotools.store.reading import Store, open_store, store_path
from trainer.batch import Batch
from trainer.data.augment import Augmenter
from trainer.data.iterator import ExpertTrajectoryIterator

BATCHES = 20
CHOICES: dict[str, tuple[Symmetry, ...]] = {
    "missions listed": (),
    "recolor": ("recolor",),
    "mirror": ("mirror",),
    "retype": ("retype",),
    "all three": ("recolor", "mirror", "retype"),
}


def makers(store: Store, rollouts: int, rollout_len: int) -> dict[str, Callable[[], Batch]]:
    """A function for each kind of batch, every one with a stream of its own."""

    def stream(augmenter: Augmenter | None = None) -> ExpertTrajectoryIterator:
        return ExpertTrajectoryIterator(
            store,
            rollouts=rollouts,
            rollout_len=rollout_len,
            seed=1,
            layout="native",
            augmenter=augmenter,
        )

    def augmented(symmetries: tuple[Symmetry, ...]) -> Callable[[], Batch]:
        batches = stream(Augmenter(symmetries, store.attributes.vocabulary, seed=1))
        return lambda: next(batches)

    plain = stream()
    return {"batch": lambda: next(plain)} | {
        name: augmented(symmetries) for name, symmetries in CHOICES.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", default="GoToLocal")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--rollouts", type=int, default=128)
    parser.add_argument("--rollout-len", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    packages = ", ".join(f"{name} {version(name)}" for name in ("numpy", "torch"))
    print(f"{platform.machine()}, Python {platform.python_version()}, {packages}")
    print(f"{options.store}, {options.rollouts} x {options.rollout_len} steps a batch")
    store = open_store(store_path(options.store, data_folder(options.data_dir)))
    made = makers(store, options.rollouts, options.rollout_len)
    spent: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(options.rounds + 1):
        for name, make in made.items():
            start = time.process_time()
            for _ in range(BATCHES):
                make()
            spent[name].append((time.process_time() - start) / BATCHES)
    steps = options.rollouts * options.rollout_len
    for name, seconds in spent.items():
        middle = statistics.median(seconds[1:])  # the first round meets cold pages
        spread = f"{1e6 * min(seconds[1:]):,.0f} to {1e6 * max(seconds[1:]):,.0f}"
        print(f"{name}: {1e6 * middle:,.0f} us ({spread}), {steps / middle / 1e6:.1f} M steps/s")


if __name__ == "__main__":
    main()
