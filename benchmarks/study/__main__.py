"""Success by number of demonstrations and by training time: benchmarks/results.md.

python benchmarks/study list                        # every run, and whether it is done
python benchmarks/study run --only 'levels/*' -j 2  # make what is not done yet
python benchmarks/study settings NAME               # the command that makes a run elsewhere
python benchmarks/study measure NAME FOLDER         # note what such a run has reached
python benchmarks/study report                      # the page and its pictures
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

import click
from experiments import Experiment, experiments
from report import write_report
from running import check_same, missing, note, prepare, prepare_valid, run

from demotools.errors import SettingsError


@click.group()
def main() -> None:
    """Measure success by number of demonstrations and by training time."""


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
    run(_named(name), threads, jobs)


@main.command()
@click.argument("name")
def settings(name: str) -> None:
    """Print the command that makes the run NAME, for another machine."""
    experiment = _named(name)
    words = [word for setting in experiment.settings for word in ("--set", setting)]
    click.echo(shlex.join(["trainer", "run", experiment.recipe, "-o", "FOLDER", *words]))


@main.command()
@click.argument("name")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--jobs", default=1, help="Runs that went on beside it, itself included.")
@click.option("--threads", default=1, help="Threads that it had.")
@click.option("--processor-minutes", type=float, help="What it took; not noted where unknown.")
def measure(
    name: str, folder: Path, jobs: int, threads: int, processor_minutes: float | None
) -> None:
    """Note what the finished run in FOLDER reached, which has the settings of the run NAME."""
    experiment = _named(name)
    try:
        check_same(experiment, folder)
    except SettingsError as error:
        raise click.ClickException(str(error)) from error
    prepare_valid(experiment)
    seconds = None if processor_minutes is None else 60 * processor_minutes
    note(experiment, folder, {"processor_seconds": seconds, "threads": threads, "jobs": jobs})


def _named(name: str) -> Experiment:
    for one in experiments():
        if one.name == name:
            return one
    raise click.ClickException(f"there is no run {name}: `python benchmarks/study list` shows all")


@main.command()
def report() -> None:
    """Write benchmarks/results.md and its pictures."""
    write_report()


if __name__ == "__main__":
    main()
