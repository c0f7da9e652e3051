"""How fast is the rollout iterator, against memcpy and three other ways to feed demonstrations?

    python benchmarks/bench_rollouts.py [--rounds 7] [--large]

All contestants run in this one process on one core, in turn, round after round, and their
processor time counts, so that a busy machine does not. Printed are the median, the smallest and
the largest rate over the rounds, and ratios of medians. The first batch is timed in fresh
processes. `--large` adds a store of 5 million episodes (1.3 GB), read after its pages were
dropped from the page cache. `--scale` does something else: stores of 1, 35 and 350 million steps
(19 GB, kept under build/), each in fresh processes, `full` and `windowed`, TorchRL's sampler beside
it; run that in a control group of 6 GB, which the largest store does not fit into. Needs the extra
`bench` (TorchRL and Minari).
"""

from __future__ import annotations

import argparse
import os
import pickle
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import median

import numpy as np
import torch
from peers.minari_episodes import minari_dataset
from peers.torchrl_slices import slice_buffer
from peers.tutorial_iterator import TutorialIterator
from synthetic import FOLDER, random_episodes, synthetic_store
from tqdm import tqdm

from demotools.babyai.cells import unpacked_cells
from demotools.pickles.writer import write_pickle
from trainer.batch import Layout
from trainer.data.iterator import ExpertTrajectoryIterator

B = T = 128
LAYOUTS: tuple[Layout, ...] = ("native", "tutorial")
STEPS = B * T
SECONDS_A_TURN = 0.3
NATIVE_BYTES, TUTORIAL_BYTES = 49 + 4 + 3, 147 + 5 * 8 + 8 + 4
# (name, play one batch, steps in it)
Contestant = tuple[str, Callable[[], object], int]

FIRST_BATCH = """
import sys, time, torch
torch.set_num_threads(1)
from demotools.store.reading import open_store
from trainer.data.iterator import ExpertTrajectoryIterator
def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("RssAnon"))
before, start = anonymous(), time.perf_counter()
batches = ExpertTrajectoryIterator(open_store(sys.argv[1]), rollouts=128, rollout_len=128)
next(batches)
first = time.perf_counter() - start
for _ in range(300):
    next(batches)
state = batches.state()
start = time.perf_counter()
batches.load_state(state)
next(batches)
print(first, time.perf_counter() - start, anonymous() - before)
"""

FIRST_BATCH_OF_PICKLE = """
import pickle, sys, time, torch
torch.set_num_threads(1)
sys.path.insert(0, "benchmarks")
from peers.tutorial_iterator import TutorialIterator
start = time.perf_counter()
batches = TutorialIterator(pickle.load(open(sys.argv[1], "rb")), 128, 128)
next(batches)
print(time.perf_counter() - start)
"""

COLD = """
import os, sys, time, torch
from pathlib import Path
torch.set_num_threads(1)
from demotools.store.reading import open_store
from trainer.data.iterator import ExpertTrajectoryIterator
for file in Path(sys.argv[1]).glob("*/c/**/*"):
    if file.is_file():
        number = os.open(file, os.O_RDONLY)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(number)
def read_bytes():
    lines = open("/proc/self/io").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))
before, start = read_bytes(), time.perf_counter()
batches = ExpertTrajectoryIterator(
    open_store(sys.argv[1]), rollouts=128, rollout_len=128, layout="native", shuffle=sys.argv[2]
)
while batches.batches < int(sys.argv[3]):
    next(batches)
print((read_bytes() - before) / 1e6, time.perf_counter() - start)
"""

# what an idle machine would show of the clock: the time in which no processor was free is left out
SCALED = """
import sys, time, torch
torch.set_num_threads(1)
from demotools.store.reading import open_store
from trainer.data.iterator import ExpertTrajectoryIterator
def clock():
    return time.perf_counter() - int(open("/proc/self/schedstat").read().split()[1]) / 1e9
path, shuffle, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
start = clock()
store, rest = open_store(path), {"layout": "native", "shuffle": shuffle, "prefetch": False}
batches = ExpertTrajectoryIterator(store, rollouts=128, rollout_len=128, **rest)
next(batches)
print(clock() - start)
for _ in range(2):  # the first one warms up
    before, worked, start = batches.batches, time.process_time(), clock()
    while time.process_time() - worked < seconds:
        next(batches)
    played = batches.batches - before
    rates = played / (time.process_time() - worked), played / (clock() - start)
print(*rates)
"""

SAMPLED = """
import resource, sys, time, torch
torch.set_num_threads(1)
resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))
sys.path.insert(0, "benchmarks")
from peers.torchrl_slices import slice_buffer
steps, cached, seconds = int(sys.argv[1]), sys.argv[2] == "cached", float(sys.argv[3])
size = 5_000_000
pieces = (torch.arange(first, min(first + size, steps)) for first in range(0, steps, size))
columns = (
    {"episode": piece // int(sys.argv[5]), "action": torch.zeros(len(piece), dtype=torch.uint8)}
    for piece in pieces
)
buffer = slice_buffer(sys.argv[4], steps, columns, 16384, cached)
start = time.process_time()
buffer.sample()
print(time.process_time() - start)
worked, played = time.process_time(), 0
while played == 0 or time.process_time() - worked < seconds:
    buffer.sample()
    played += 1
print(played / (time.process_time() - worked))
"""
PATIENCE_SECONDS = 120


def memcpy(step_bytes: int) -> Contestant:
    """Copies as many bytes as a batch has, from memory that is not in the processor's cache."""
    source = np.zeros((1 << 28) // (step_bytes * STEPS) * step_bytes * STEPS, dtype=np.uint8)
    source[:] = 1
    blocks = source.reshape(-1, step_bytes * STEPS)
    target = np.empty(step_bytes * STEPS, dtype=np.uint8)
    turn = iter(range(1 << 62))
    return (
        f"memcpy of {step_bytes} bytes a step",
        lambda: np.copyto(target, blocks[next(turn) % len(blocks)]),
        STEPS,
    )


def ours() -> list[Contestant]:
    store = synthetic_store(1_000_000)
    contestants: list[Contestant] = []
    for layout in LAYOUTS:
        batches = ExpertTrajectoryIterator(store, rollouts=B, rollout_len=T, layout=layout)
        contestants.append((f"ours, {layout}", batches.__next__, STEPS))
    return contestants


def peers(folder: Path) -> list[Contestant]:
    demos = folder / "demos.pkl"
    write_pickle(demos, [random_episodes(20_000, seed=0)], enum_actions=False)
    tutorial = TutorialIterator(pickle.loads(demos.read_bytes()), B, T)
    episodes = random_episodes(200_000, seed=1)
    numbers = np.repeat(np.arange(len(episodes.length)), episodes.length)
    columns = {
        "image": torch.from_numpy(unpacked_cells(episodes.view)),
        "action": torch.from_numpy(episodes.action),
        "episode": torch.from_numpy(numbers),
    }
    slices = {
        cached: slice_buffer(folder / f"{cached}", len(numbers), [columns], STEPS, cached)
        for cached in (False, True)
    }
    few = random_episodes(2_000, seed=2)
    dataset = minari_dataset(folder, unpacked_cells(few.view), few.action, few.length)
    return [
        ("tutorial-style iterator", tutorial.__next__, STEPS),
        ("TorchRL SliceSampler", slices[False].sample, STEPS),
        ("TorchRL SliceSampler, cached", slices[True].sample, STEPS),
        # mean length of its episodes, so that a draw of 100 has that many steps on average
        (
            "Minari sample_episodes",
            lambda: dataset.sample_episodes(100),
            int(few.length.mean() * 100),
        ),
    ]


def rates(contestants: list[Contestant], rounds: int) -> dict[str, list[float]]:
    """Million steps a second of each contestant in each round."""
    result: dict[str, list[float]] = {name: [] for name, _, _ in contestants}
    for number in range(rounds + 1):
        for name, play, steps in contestants:
            played, start = 0, time.process_time()
            while played == 0 or time.process_time() - start < SECONDS_A_TURN:
                play()
                played += steps
            if number:  # the first round warms up
                result[name].append(played / (time.process_time() - start) / 1e6)
    return result


def run(program: str, *arguments: str) -> list[float]:
    output = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
    )
    return [float(word) for word in output.stdout.split()]


def print_rates(rounds: int, folder: Path) -> None:
    contestants = [memcpy(NATIVE_BYTES), memcpy(TUTORIAL_BYTES), *ours(), *peers(folder)]
    result = rates(contestants, rounds)
    medians = {name: median(values) for name, values in result.items()}
    slow, cached = medians["tutorial-style iterator"], medians["TorchRL SliceSampler, cached"]
    print(f"{'million steps a second, one core':34} median     min     max  x tutorial  x TorchRL")
    for name, values in result.items():
        middle = medians[name]
        print(
            f"{name:34} {middle:7.3f} {min(values):7.3f} {max(values):7.3f}"
            f" {middle / slow:11.1f} {middle / cached:10.2f}"
        )
    for layout, step_bytes in (("native", NATIVE_BYTES), ("tutorial", TUTORIAL_BYTES)):
        distance = medians[f"memcpy of {step_bytes} bytes a step"] / medians[f"ours, {layout}"]
        print(f"memcpy is {distance:.1f} times as fast as ours, {layout}")


def print_first_batches(folder: Path) -> None:
    print("seconds after imports              first batch   resume   RssAnon over imports, MB")
    for episodes in (1_000, 1_000_000):
        path = str(synthetic_store(episodes).path)
        first, resume, memory = (
            median(v) for v in zip(*(run(FIRST_BATCH, path) for _ in range(5)), strict=True)
        )
        print(f"ours, {episodes:9,} episodes           {first:11.3f} {resume:8.4f} {memory:8.1f}")
    for episodes in (1_000, 100_000):
        demos = folder / f"{episodes}.pkl"
        write_pickle(demos, [random_episodes(episodes, seed=0)], enum_actions=False)
        first = median(run(FIRST_BATCH_OF_PICKLE, str(demos))[0] for _ in range(3))
        print(f"pickle, {episodes:9,} episodes         {first:11.3f}")


def print_cold() -> None:
    store = synthetic_store(5_000_000)
    print(f"page cache dropped before; the store has {store.steps * 51 / 1e6:.0f} MB of steps")
    print("shuffle    MB played   MB read   seconds")
    for batches in (100, 400, 1500):
        for shuffle in ("full", "windowed"):
            read, seconds = run(COLD, str(store.path), shuffle, str(batches))
            print(f"{shuffle:8} {batches * STEPS * 51 / 1e6:11.0f} {read:9.0f} {seconds:9.1f}")


def scaled(program: str, *arguments: str) -> list[float] | str:
    """The figures that a program prints, or why there are none."""
    command = [sys.executable, "-c", program, *arguments]
    # TorchRL writes its log to where the figures are
    quiet = {**os.environ, "RL_LOGGING_LEVEL": "WARNING"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=quiet, timeout=PATIENCE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"over {PATIENCE_SECONDS} s"
    if done.returncode:
        return [f"it ended with {done.returncode}", *done.stderr.strip().splitlines()][-1]
    return [float(word) for word in done.stdout.split()]


def print_scale(millions: list[int], longest: int, rounds: int) -> None:
    mean = (1 + longest) / 2
    stores = {size: synthetic_store(int(size * 1e6 / mean), longest) for size in millions}
    ways: dict[tuple[int, str], list[list[float] | str]] = {}
    with tqdm(total=4 * len(stores) * rounds, unit="process", disable=None) as bar:
        for _, (size, store) in product(range(rounds), stores.items()):
            for shuffle in ("full", "windowed"):
                figures = scaled(SCALED, str(store.path), shuffle, "2")
                ways.setdefault((size, shuffle), []).append(figures)
                bar.update()
            for kept in ("plain", "cached"):
                # made here, so that nothing is left of a process that was ended
                with tempfile.TemporaryDirectory(dir=FOLDER.resolve()) as folder:
                    figures = scaled(SAMPLED, str(store.steps), kept, "2", folder, str(int(mean)))
                ways.setdefault((size, f"TorchRL, {kept}"), []).append(figures)
                bar.update()
    print(f"episodes of 1 to {longest} steps, batches of {STEPS:,} steps, one core")
    print("M steps  order             first batch, s   batches/s   by the clock, processor free")
    for (size, way), found in ways.items():
        rows = [figures for figures in found if not isinstance(figures, str)]
        reasons = [reason for reason in found if isinstance(reason, str)]
        gave_up = f"  gave up {len(reasons)} of {rounds} times: {reasons[-1]}" if reasons else ""
        shown = ""
        if rows:
            first, *others = (median(column) for column in zip(*rows, strict=True))
            shown = f" {first:15.3f} " + "".join(f"{value:12,.1f}" for value in others)
        print(f"{size:7}  {way:16}{shown}{gave_up}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--scale", type=int, nargs="*", metavar="MILLION")
    parser.add_argument("--longest", type=int, default=9, help="episode of --scale")
    options = parser.parse_args()
    torch.set_num_threads(1)
    packages = ("torch", "numpy", "torchrl", "minari")
    print(", ".join(f"{name} {version(name)}" for name in packages), end="; ")
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, {platform.machine()}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    if options.scale is not None:
        print_scale(options.scale or [1, 35, 350], options.longest, options.rounds)
        return
    with tempfile.TemporaryDirectory(dir=FOLDER.resolve()) as folder:
        print_rates(options.rounds, Path(folder))
        print_first_batches(Path(folder))
    if options.large:
        print_cold()


if __name__ == "__main__":
    main()
