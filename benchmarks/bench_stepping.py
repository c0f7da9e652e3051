"""How fast are 64 environments stepped on one core, against EnvPool and stock minigrid?

    python benchmarks/bench_stepping.py [LEVEL ...]

Random actions, resets included; views, direction and mission are delivered by each. EnvPool is
C++: its levels are drawn like minigrid's, but a seed gives another one. Only steps in which an
action was taken count (EnvPool takes one more to begin an episode). All in this one process, held
to one core, in turn; the processor time of all its threads counts, so that a busy machine does not.
Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from statistics import median

import envpool
import numpy as np
from numpy.typing import NDArray

from demotools.babyai.cells import ACTIONS
from demotools.babyai.levels import read_manifest
from demotools.recording.environment import make_environment
from trainer.acting.vector import EnvironmentKind, VectorEnvironment, seed_streams

ENVIRONMENTS = 64
SECONDS_A_TURN = 1.0
# takes an action for each environment; how many of them were taken
Step = Callable[[NDArray[np.int64]], int]


def ours(level: str) -> Step:
    vector = VectorEnvironment(EnvironmentKind(level), ENVIRONMENTS)
    vector.reset(seed_streams(range(10**8), ENVIRONMENTS))

    def step(actions: NDArray[np.int64]) -> int:
        vector.step(actions)
        return ENVIRONMENTS

    return step


def of_envpool(level: str) -> Step:
    pool = envpool.make(
        read_manifest(level).environment_id,
        env_type="gymnasium",
        num_envs=ENVIRONMENTS,
        num_threads=1,
        seed=1,
    )
    pool.reset()
    begins = np.zeros(ENVIRONMENTS, dtype=np.bool_)

    def step(actions: NDArray[np.int64]) -> int:
        taken = ENVIRONMENTS - int(begins.sum())
        _, _, terminated, truncated, _ = pool.step(actions.astype(np.int32))
        np.logical_or(terminated, truncated, out=begins)
        return taken

    return step


def stock(level: str) -> Step:
    environments = [make_environment(level, stock=True) for _ in range(ENVIRONMENTS)]
    seeds = iter(range(10**8))
    for environment in environments:
        environment.reset(seed=next(seeds))

    def step(actions: NDArray[np.int64]) -> int:
        for environment, action in zip(environments, actions.tolist(), strict=True):
            _, _, terminated, truncated, _ = environment.step(action)
            if terminated or truncated:
                environment.reset(seed=next(seeds))
        return ENVIRONMENTS

    return step


def rate(step: Step, seed: int) -> tuple[float, float]:
    """Steps a second, of the clock and of processor time."""
    random, taken = np.random.default_rng(seed), 0
    start, worked = time.perf_counter(), time.process_time()
    while time.process_time() - worked < SECONDS_A_TURN:
        for actions in random.integers(0, len(ACTIONS), (16, ENVIRONMENTS)):
            taken += step(actions)
    return taken / (time.perf_counter() - start), taken / (time.process_time() - worked)


def compare(level: str, rounds: int) -> None:
    steps = {"ours": ours(level), "EnvPool": of_envpool(level), "stock minigrid": stock(level)}
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            measured = rate(step, number)
            if number:  # the first one warms up
                rates[name].append(measured)
    print(f"{level}, {ENVIRONMENTS} environments, one core, steps/s")
    middle = {}
    for name, pairs in rates.items():
        clock, worked = zip(*pairs, strict=True)
        middle[name] = median(worked)
        spread = f"{min(worked):,.0f} to {max(worked):,.0f}"
        print(f"  {name:15}{middle[name]:9,.0f} ({spread}); by the clock {median(clock):,.0f}")
    for name in ("EnvPool", "stock minigrid"):
        print(f"  ours is {middle['ours'] / middle[name]:.2f} times {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("levels", nargs="*", default=["GoToLocal", "BossLevel"], metavar="LEVEL")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])
    packages = ", ".join(f"{name} {version(name)}" for name in ("envpool", "minigrid", "numpy"))
    print(f"{packages}; Python {platform.python_version()}, {platform.machine()}")
    for level in options.levels:
        compare(level, options.rounds)


if __name__ == "__main__":
    main()
