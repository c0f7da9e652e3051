"""Does a level of the JAT data set cost more to import than to read twice, and how much memory?

    python benchmarks/bench_parquet.py FOLDER                       # GoToLocal, 95,000 episodes
    python benchmarks/bench_parquet.py FOLDER --level BossLevel --recorded 200 --episodes 95000

The bot's episodes are recorded once, and their rows repeated in random order, in shards and row
groups as JAT has them. Each run is a fresh process, alternating: the import of a folder, and
pyarrow reading each of its files twice. Seconds and memory are of the work alone, without what
importing the packages takes.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import click
import numpy as np
import pyarrow.parquet as pq
from bench_convert import peak_memory

from demotools.exchange.parquet import export_parquet
from demotools.recording.record import generate, planned_recording
from demotools.store.reading import open_store

ROWS_A_GROUP = 1000
IMPORTS = """
import sys, time
from pathlib import Path
import numcodecs.zstd, pyarrow.compute, pyarrow.parquet, tqdm
from demotools.exchange.parquet import import_parquet, opened_parquet
folder, started, used = Path(sys.argv[1]), time.perf_counter(), time.process_time()
"""
IMPORT = """
files = opened_parquet(folder / "rows", level=sys.argv[2])
import_parquet(files, folder / "Imported.zarr", overwrite=True, quiet=True)
"""
READ = """
for file in sorted((folder / "rows").glob("*.parquet")) * 2:
    pyarrow.parquet.read_table(file)
"""
END = "print(time.perf_counter() - started, time.process_time() - used)"
IDLE = "time.sleep(0.5)"


def write_shards(folder: Path, level: str, recorded: int, episodes: int, shards: int) -> None:
    """The files of one split, as the data set has them."""
    store = folder / f"{level}.zarr"
    if not store.exists():
        plan = planned_recording(level, recorded, split="train", first_seed=None)
        generate(plan, store, workers=None, overwrite=False, quiet=False)
    single = folder / "recorded.parquet"
    export_parquet(open_store(store), single, overwrite=True, quiet=True)
    table = pq.read_table(single).replace_schema_metadata(None)
    random = np.random.default_rng(0)
    (folder / "rows").mkdir(exist_ok=True)
    for shard in range(shards):
        name = f"train-{shard:05d}-of-{shards:05d}-0a1b2c3d.parquet"
        with pq.ParquetWriter(folder / "rows" / name, table.schema) as writer:
            left = episodes // shards
            while left:
                count = min(ROWS_A_GROUP, left)
                writer.write_table(table.take(random.integers(0, len(table), count)))
                left -= count


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--level", default="GoToLocal", show_default=True)
@click.option("--recorded", default=4000, show_default=True, help="Distinct episodes.")
@click.option("--episodes", default=95_000, show_default=True)
@click.option("--shards", default=2, show_default=True)
@click.option("--runs", default=3, show_default=True)
def main(folder: Path, level: str, recorded: int, episodes: int, shards: int, runs: int) -> None:
    """Make the files where they are not there yet, then measure."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "rows").exists():
        write_shards(folder, level, recorded, episodes, shards)
    size = sum(file.stat().st_size for file in (folder / "rows").iterdir())
    click.echo(f"{level}, {episodes:,} episodes, {size / 1e6:.1f} MB; pyarrow {version('pyarrow')}")
    idle = peak_memory([sys.executable, "-c", IMPORTS + IDLE, str(folder), level])
    seconds: dict[str, list[float]] = {"import": [], "read twice": []}
    processor: dict[str, list[float]] = {"import": [], "read twice": []}
    for _ in range(runs):
        for name, code in (("import", IMPORT), ("read twice", READ)):
            command = [sys.executable, "-c", IMPORTS + code + END, str(folder), level]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            wall, used = map(float, done.stdout.split())
            seconds[name].append(wall)
            processor[name].append(used)
    for name, code in (("import", IMPORT), ("read twice", READ)):
        peak = peak_memory([sys.executable, "-c", IMPORTS + code, str(folder), level]) - idle
        median = statistics.median(seconds[name])
        spread = f"{min(seconds[name]):.2f} to {max(seconds[name]):.2f}"
        busy = statistics.median(processor[name])
        text = f"{name:10} {median:.2f} s ({spread}), {busy:.2f} s of processors"
        click.echo(f"{text}, over the imports {peak / 1e6:.0f} MB")
    ratios = [
        statistics.median(each["import"]) / statistics.median(each["read twice"])
        for each in (seconds, processor)
    ]
    click.echo(f"the import takes {ratios[0]:.2f} of reading twice; {ratios[1]:.2f} of processors")


if __name__ == "__main__":
    main()
