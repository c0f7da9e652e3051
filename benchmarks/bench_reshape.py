"""How much time and memory it takes to merge, select from and split a million episodes.

    python benchmarks/bench_reshape.py FOLDER [--missions 1000000]

Four stores of 250,000 random episodes (mean length 4) are merged; of the merged store the short
episodes are selected, and a twentieth is held out. Memory is the largest PSS of the command less
that of a process which has only imported what the command does.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, product
from pathlib import Path

import click
from bench_convert import peak_memory
from synthetic import MISSIONS, random_episodes

from demotools.store.building import StoreBuilder, write_part

STORES, EPISODES, A_PART = 4, 250_000, 50_000
IMPORTS = (
    "import demotools.cli, demotools.store.reshape, tqdm, numcodecs.zstd, time; time.sleep(0.3)"
)


def distinct_missions(number: int) -> Iterator[str]:
    """So many missions, over and over."""
    while True:
        yield from islice(map(" then ".join, product(MISSIONS, repeat=4)), number)


def write_store(path: Path, seed: int, missions: Iterator[str]) -> None:
    """One of the stores that are merged."""
    with StoreBuilder(path, {"seed": seed}) as builder:
        for number in range(EPISODES // A_PART):
            part = random_episodes(A_PART, seed=seed * 1000 + number, longest=7)
            part = replace(part, mission=list(islice(missions, A_PART)))
            write_part(builder.parts, number, part, {})
        builder.finish(
            level=f"Level{seed}",
            split="train",
            environment_id=None,
            licence="none",
            citation="none",
            source={"kind": "synthetic"},
        )


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--missions", type=int, default=36, show_default=True, help="Distinct missions.")
def main(folder: Path, missions: int) -> None:
    """Make the stores, then time and measure the three commands."""
    texts = distinct_missions(missions)
    names = [f"part{number}" for number in range(STORES)]
    for seed, name in enumerate(names):
        if not (folder / f"{name}.zarr").exists():
            write_store(folder / f"{name}.zarr", seed, texts)
    imports = peak_memory([sys.executable, "-c", IMPORTS])
    for arguments in (
        ["merge", *names, "-o", "merged"],
        ["select", "merged", "--max-len", "5", "-o", "short"],
        ["split", "merged", "--valid", "0.05"],
    ):
        started = time.perf_counter()
        command = [sys.executable, "-m", "demotools", *arguments, "--data-dir", str(folder)]
        peak = peak_memory([*command, "--overwrite", "--quiet"])
        seconds = time.perf_counter() - started
        size = (peak - imports) / 1e6
        click.echo(f"{arguments[0]:7} {seconds:6.1f} s, over the imports {size:.0f} MB")


if __name__ == "__main__":
    main()
