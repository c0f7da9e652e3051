"""Does converting a legacy pickle cost more than loading it once, and how much memory?

One run, alternating, each a fresh process with the file in the page cache: `pickle.load`; the same
and `blosc.unpack_array` of every frame, keeping the arrays; our whole command on one core and on
two, interpreter start included. The files are made once, from episodes of the bot, and kept under
build/bench. Where fewer episodes were recorded than the file needs, they are repeated (the output
says so); the archive's size counts on distinct episodes only.

    python benchmarks/bench_convert.py --distinct 200000 --distinct-boss 20000
    python benchmarks/bench_convert.py --memory        # instead, BossLevel files of 1 GB and 4 GB
    python benchmarks/bench_convert.py --million       # instead, the store of a million episodes
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import click
import numpy as np
import psutil

from demotools.exchange.archive import archive_store
from demotools.pickles.writer import write_pickle
from demotools.store.reading import Episodes, Store, open_store

FOLDER = Path(__file__).parents[1] / "build" / "bench"
COMMAND = str(Path(sys.executable).with_name("demotools"))
LOAD = """
import enum, pickle, sys, types
class MiniGridEnv:
    class Actions(enum.IntEnum):
        left, right, forward, pickup, drop, toggle, done = range(7)
MiniGridEnv.Actions.__module__ = MiniGridEnv.__module__ = "gym_minigrid.minigrid"
module = types.ModuleType("gym_minigrid.minigrid")
module.MiniGridEnv = MiniGridEnv
sys.modules.update({"gym_minigrid": types.ModuleType("gym_minigrid"), module.__name__: module})
with open(sys.argv[1], "rb") as stream:
    demos = pickle.load(stream)
"""
UNPACK = (
    "import blosc\n"
    + LOAD
    + "arrays = [blosc.unpack_array(frame) for _m, frame, _d, _a in demos]\n"
)
LEVELS = {"GoToLocal": 200_000, "BossLevel": 20_000}


@dataclass(frozen=True)
class Run:
    """One fresh process: wall and processor seconds."""

    wall: float
    cpu: float


def recorded(level: str, episodes: int) -> Store:
    """A store of bot episodes, recorded once."""
    path = FOLDER / "bot" / f"{level}.zarr"
    if not path.exists():
        arguments = ["--episodes", str(episodes), "--data-dir", str(path.parent)]
        subprocess.run([COMMAND, "generate", level, *arguments], check=True)
    return open_store(path)


def tiled(store: Store, episodes: int) -> Iterator[Episodes]:
    """So many episodes, the store's over and over."""
    block = 2000
    for start in range(0, episodes, block):
        number = np.arange(start, min(start + block, episodes)) % store.episodes
        yield store.take(number)


def demo_file(level: str, store: Store, episodes: int) -> Path:
    """The legacy file, written once."""
    path = FOLDER / "pickles" / str(episodes) / f"BabyAI-{level}-v0.pkl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_pickle(path, tiled(store, episodes))
    return path


def repeated_file(level: str, store: Store, size_bytes: int) -> tuple[Path, int]:
    """A file of about this size, and its episodes: after the first 1,000 the same 20,000 again.

    The batches are copied byte by byte, their memo slots with them, which costs no time; nothing
    fetches these slots, so a reader cannot tell.
    """
    first = demo_file(level, store, 1000).read_bytes()[:-1]
    more = demo_file(level, store, 21_000).read_bytes()[len(first) : -1]
    copies = size_bytes // len(more)
    episodes = 1000 + 20_000 * copies
    path = FOLDER / "pickles" / str(episodes) / f"BabyAI-{level}-v0.pkl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            stream.write(first)
            for _ in range(copies):
                stream.write(more)
            stream.write(b".")
    return path, episodes


def run(command: list[str], cores: int) -> Run:
    # removing the store of the run before is not what is asked
    shutil.rmtree(FOLDER / "out", ignore_errors=True)
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    chosen = sorted(os.sched_getaffinity(0))[:cores]
    subprocess.run(command, check=True, preexec_fn=lambda: os.sched_setaffinity(0, chosen))
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(wall, cpu)


def convert_command(path: Path, workers: int) -> list[str]:
    out = ["--data-dir", str(FOLDER / "out"), "--quiet"]
    return [COMMAND, "convert", str(path), *out, "--workers", str(workers)]


def compare(path: Path, repeats: int) -> None:
    path.read_bytes()  # into the page cache
    contenders = {
        "pickle.load": ([sys.executable, "-c", LOAD, str(path)], 1),
        "load + unpack": ([sys.executable, "-c", UNPACK, str(path)], 1),
        "load + unpack, two cores": ([sys.executable, "-c", UNPACK, str(path)], 2),
        "convert, one core": (convert_command(path, 1), 1),
        "convert, two cores": (convert_command(path, 2), 2),
    }
    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, (command, cores) in contenders.items():
            runs[name].append(run(command, cores))
    base = statistics.median(found.wall for found in runs["load + unpack"])
    for name, found in runs.items():
        walls = sorted(each.wall for each in found)
        wall = statistics.median(walls)
        cpu = statistics.median(each.cpu for each in found)
        click.echo(
            f"  {name:26} {wall:6.2f} s ({walls[0]:.2f} to {walls[-1]:.2f}), "
            f"{wall / base:4.2f}x load + unpack; processor {cpu:.2f} s"
        )


def memory_bytes(process: psutil.Process) -> int:
    """Sum of the PSS of a process and its children."""
    total = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            total += each.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def peak_memory(command: list[str]) -> int:
    """The largest PSS seen of a command and its children, every 20 ms."""
    process = psutil.Popen(command)
    peak, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.02):
            with suppress(psutil.NoSuchProcess):
                peak = max(peak, memory_bytes(process))

    watcher = threading.Thread(target=watch)
    watcher.start()
    process.wait()
    ended.set()
    watcher.join()
    if process.returncode:
        sys.exit(f"{command} failed")
    return peak


def show_memory(path: Path) -> None:
    imports = "import demotools.cli, demotools.pickles.convert, time; time.sleep(1)"
    idle = peak_memory([sys.executable, "-c", imports])
    shutil.rmtree(FOLDER / "out", ignore_errors=True)
    start = time.perf_counter()
    peak = peak_memory(convert_command(path, 2)) - idle
    click.echo(
        f"  peak memory, two workers: {peak / 1e6:.0f} MB above the imports "
        f"({time.perf_counter() - start:.0f} s)"
    )


def show_sizes(path: Path, distinct: bool) -> None:
    store = FOLDER / "out" / f"{path.name.split('-')[1]}.zarr"
    archive = archive_store(store, FOLDER / "out" / "bench.zarr.zip", quiet=True)
    files = [file for file in store.rglob("*") if file.is_file()]
    stored = sum(file.stat().st_size for file in files)
    pickled, packed = path.stat().st_size, archive.stat().st_size
    archive.unlink()
    click.echo(
        f"  bytes: pickle {pickled:,}; store {stored:,} ({stored / pickled:.2f}x) in {len(files)} "
        f"files; archive {packed:,} ({packed / pickled:.3f}x)"
        + ("" if distinct else "; the archive is flattered, the episodes repeat")
    )


def announce(level: str, path: Path, episodes: int, store: Store) -> None:
    click.echo(
        f"{level}: {episodes:,} episodes, {min(episodes, store.episodes):,} of them distinct, "
        f"{path.stat().st_size / 1e6:,.0f} MB"
    )


def show_million(store: Store) -> None:
    path = demo_file("GoToLocal", store, 1_000_000)
    announce("GoToLocal", path, 1_000_000, store)
    run(convert_command(path, 2), 2)
    show_sizes(path, distinct=False)
    shutil.rmtree(FOLDER / "out", ignore_errors=True)


@click.command()
@click.option("--distinct", default=2000, show_default=True, help="GoToLocal episodes to record.")
@click.option("--distinct-boss", default=300, show_default=True, help="The same for BossLevel.")
@click.option("--repeats", default=5, show_default=True)
@click.option("--memory", is_flag=True, help="Only the peak memory, on files of 1 GB and 4 GB.")
@click.option("--million", is_flag=True, help="Only the size of 1,000,000 GoToLocal episodes.")
def main(distinct: int, distinct_boss: int, repeats: int, memory: bool, million: bool) -> None:
    packages = ", ".join(f"{name} {version(name)}" for name in ("numpy", "numcodecs", "zarr"))
    click.echo(
        f"Python {platform.python_version()}, {packages}; {platform.machine()}, "
        f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}"
    )
    if million:
        show_million(recorded("GoToLocal", distinct))
        return
    for level, episodes in LEVELS.items():
        if memory and level != "BossLevel":
            continue
        store = recorded(level, distinct if level == "GoToLocal" else distinct_boss)
        if memory:
            for size in (10**9, 4 * 10**9):
                path, count = repeated_file(level, store, size)
                announce(level, path, count, store)
                show_memory(path)
            continue
        path = demo_file(level, store, episodes)
        announce(level, path, episodes, store)
        compare(path, repeats)
        show_memory(path)
        show_sizes(path, episodes <= store.episodes)
    shutil.rmtree(FOLDER / "out", ignore_errors=True)


if __name__ == "__main__":
    main()
