"""How much faster than stock minigrid are stepping and recording, on one core, in one run?

Stock is minigrid as it comes, without gymnasium's checking wrappers: its environment, its
BabyAIBot, a plain loop. Ours is `make_environment` and `record_episode`, packing included.

    python benchmarks/bench_recording.py
    python benchmarks/bench_recording.py --identity 2000    # every bit of 2,000 episodes a level
    python benchmarks/bench_recording.py --store 50000      # how long a million BossLevel ones take

Rates are of processor time, so that other work on the machine counts little.
"""

from __future__ import annotations

import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
from minigrid.utils.baby_ai_bot import BabyAIBot

from demotools.babyai.levels import level_names, read_manifest
from demotools.recording.bot import Episode, record_episode
from demotools.recording.environment import Environment, make_environment
from demotools.recording.record import generate, planned_recording

LEVELS = {"GoToLocal": (20_000, 400), "BossLevel": (10_000, 20)}
"""Random steps and bot episodes of one run."""


def random_steps(environment: Environment, steps: int) -> None:
    actions = np.random.default_rng(0).integers(0, 7, steps).tolist()
    environment.reset(seed=0)
    for number, action in enumerate(actions):
        _, _, terminated, truncated, _ = environment.step(action)
        if terminated or truncated:
            environment.reset(seed=number)


def stock_episode(environment: Environment, seed: int) -> list[tuple[Any, int, int]]:
    observation, _ = environment.reset(seed=seed)
    bot: Any = BabyAIBot(environment)  # type: ignore[no-untyped-call]
    steps, over = [], False
    while not over:
        action = int(bot.replan())
        steps.append((observation["image"], observation["direction"], action))
        observation, _, terminated, truncated, _ = environment.step(action)
        over = terminated or truncated
    return steps


def record(
    play: Callable[[Environment, int], Any], environment: Environment, episodes: int
) -> None:
    for seed in range(episodes):
        play(environment, seed)


def seconds(work: Callable[[], None]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def compared(
    name: str, amount: int, stock: Callable[[], None], ours: Callable[[], None], runs: int
) -> None:
    pairs = [(seconds(stock), seconds(ours)) for _ in range(runs)]
    ratios = sorted(theirs / mine for theirs, mine in pairs)
    theirs, mine = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(
        f"{name:<22} stock {amount / theirs:9,.1f}/s   ours {amount / mine:9,.1f}/s   ratio median "
        f"{statistics.median(ratios):5.2f}, {ratios[0]:.2f} to {ratios[-1]:.2f} in {runs} runs"
    )


def identical_episodes(level: str, episodes: int) -> None:
    fast, stock = make_environment(level), make_environment(level, stock=True)
    steps = failures = 0
    for seed in range(episodes):
        mine, theirs = record_episode(fast, seed), record_episode(stock, seed)
        for name, value in vars(theirs).items():
            assert np.array_equal(value, getattr(mine, name)), (level, seed, name)
        if isinstance(mine, Episode):
            steps += len(mine.action)
        else:
            failures += 1
    print(
        f"{level:<16} {episodes:,} episodes the same, {failures} of them failures, {steps:,} steps",
        flush=True,
    )


def processor_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def record_store(level: str, episodes: int) -> None:
    """Record a store with two processes; what a million episodes would take at that rate."""
    with tempfile.TemporaryDirectory() as folder:
        start, began = processor_seconds(), time.perf_counter()
        generate(planned_recording(level, episodes), Path(folder) / f"{level}.zarr", workers=2)
        wall, processor = time.perf_counter() - began, processor_seconds() - start
    print(
        f"{level} store of {episodes:,}: {episodes / processor:,.1f} episodes/s a core "
        f"({processor:,.0f} s of processor time, {wall:,.0f} s by the clock, start and writing "
        f"included); a million on two cores: {1e6 / episodes * processor / 2 / 3600:.2f} hours"
    )


@click.command()
@click.option("--runs", default=5, show_default=True)
@click.option("--identity", default=0, help="Compare this many bot episodes of every level.")
@click.option("--level", "levels", multiple=True, help="For --identity: these levels only.")
@click.option("--store", default=0, help="Record a store of this many BossLevel episodes.")
def main(runs: int, identity: int, levels: tuple[str, ...], store: int) -> None:
    print(
        f"minigrid {version('minigrid')}, numpy {version('numpy')}, Python "
        f"{platform.python_version()}, {platform.machine()}, processor time"
    )
    if store:
        record_store("BossLevel", store)
        sys.exit()
    if identity:
        for level in levels or level_names():
            if read_manifest(level).environment_id:
                identical_episodes(level, identity)
        sys.exit()
    for level, (steps, episodes) in LEVELS.items():
        fast, stock = make_environment(level), make_environment(level, stock=True)
        compared(
            f"{level} steps",
            steps,
            partial(random_steps, stock, steps),
            partial(random_steps, fast, steps),
            runs,
        )
        compared(
            f"{level} episodes",
            episodes,
            partial(record, stock_episode, stock, episodes),
            partial(record, record_episode, fast, episodes),
            runs,
        )


if __name__ == "__main__":
    main()
