"""What is learnt from how many demonstrations, in how many minutes: benchmarks/results.md.

python benchmarks/study list                        # every run, and whether it is done
python benchmarks/study run --only 'levels/*' -j 2  # make what is not done yet
python benchmarks/study report                      # the page and its pictures
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

import click
from experiments import Experiment, experiments
from report import write_report
from running import missing, prepare, run


@click.group()
def main() -> None:
    """What is learnt from how many demonstrations, in how many minutes."""


@main.command("list")
def list_() -> None:
    """Every run, and whether it is done."""
    undone = {experiment.name for experiment in missing(experiments())}
    for experiment in experiments():
        click.echo(f"{'    ' if experiment.name in undone else 'done'} {experiment.name}")


@main.command("run")
@click.option("--only", default="*", help="Pattern of names, as `list` shows them.")
@click.option("-j", "--jobs", default=1, help="Runs beside each other.")
@click.option("--threads", default=2, help="Threads of each.")
def run_(only: str, jobs: int, threads: int) -> None:
    """Make the runs that are not done yet."""
    todo = [one for one in missing(experiments()) if fnmatch(one.name, only)]
    for experiment in todo:
        prepare(experiment)

    # each in a process of its own: torch's threads are set once a process
    def start(experiment: Experiment) -> None:
        command = ["one", experiment.name, "--jobs", str(jobs), "--threads", str(threads)]
        subprocess.run([sys.executable, Path(__file__).parent, *command], check=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(start, todo))


@main.command()
@click.argument("name")
@click.option("--jobs", default=1)
@click.option("--threads", default=2)
def one(name: str, jobs: int, threads: int) -> None:
    """Make the run NAME, done before or not."""
    run(next(one for one in experiments() if one.name == name), threads, jobs)


@main.command()
def report() -> None:
    """Write benchmarks/results.md and its pictures."""
    write_report()


if __name__ == "__main__":
    main()
