"""How fast are environments stepped, against gymnasium.vector.AsyncVectorEnv over the same ones?

Random actions, the same levels made by the same function, in turns within one run; and ours with
stock minigrid views on both sides, so that what the processes do and what the views do can be
told apart. Median of several rounds and their spread.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
from gymnasium.vector import AsyncVectorEnv

from demotools.output import counted
from demotools.recording.environment import Environment, make_environment
from trainer.acting.vector import EnvironmentKind, VectorEnvironment, seed_streams

STEPS = 200
ROUNDS = 5


def make_stock(level: str) -> Environment:
    """The level with minigrid's own views."""
    return make_environment(level, stock=True)


def steps_per_second(step: Callable[[Any], object], count: int, seed: int) -> float:
    actions = np.random.default_rng(seed).integers(0, 7, (STEPS, count))
    start = time.perf_counter()
    for row in actions:
        step(row)
    return STEPS * count / (time.perf_counter() - start)


def compare(level: str, count: int, processes: int, *, stock: bool) -> None:
    make = "benchmarks.bench_collection:make_stock" if stock else EnvironmentKind.make
    makers = [partial(make_stock if stock else make_environment, level)] * count
    peer = AsyncVectorEnv(makers, shared_memory=False)
    peer.reset(seed=1)
    rates: dict[str, list[float]] = {"ours": [], "AsyncVectorEnv": []}
    with VectorEnvironment(EnvironmentKind(level, make=make), count, processes=processes) as ours:
        ours.reset(seed_streams(range(10**8), count))
        for number in range(ROUNDS):
            rates["ours"].append(steps_per_second(ours.step, count, number))
            rates["AsyncVectorEnv"].append(steps_per_second(peer.step, count, number))
    peer.close()
    views = "stock views" if stock else "our views"
    middle = {name: statistics.median(values) for name, values in rates.items()}
    for name, values in rates.items():
        spread = f"{min(values):,.0f} to {max(values):,.0f}"
        print(f"{level}, {count} environments, {views}, {name}: {middle[name]:,.0f} ({spread})")
    print(f"  ratio {middle['ours'] / middle['AsyncVectorEnv']:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--level", default="GoToLocal")
    parser.add_argument("--environments", type=int, nargs="+", default=[8, 32])
    parser.add_argument("-m", "--processes", type=int, default=2)
    options = parser.parse_args()
    packages = ", ".join(f"{name} {version(name)}" for name in ("gymnasium", "minigrid", "numpy"))
    print(f"{platform.machine()}, Python {platform.python_version()}, {packages}")
    print(f"steps/s, {counted(options.processes, 'process')} of ours, median of {ROUNDS} rounds")
    for count in options.environments:
        for stock in (False, True):
            compare(options.level, count, options.processes, stock=stock)


if __name__ == "__main__":
    main()
