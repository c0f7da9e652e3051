"""Commands that make stores: fetch, generate, convert, import."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import click

from demotools.cli import (
    check_dask,
    common,
    dask_address,
    lasting_imports,
    overwrite_store,
    say,
)


@click.command("fetch")
@click.argument("levels", nargs=-1, required=True, metavar="LEVEL...")
@click.option(
    "--split", type=click.Choice(["train", "valid", "all"]), help="[default: all; of --from: train]"
)
@click.option(
    "--keep-pickle/--no-keep-pickle", help="Keep the download [default: until converted]."
)
@click.option("--no-convert", is_flag=True, help="Download only.")
@click.option(
    "--from", "origin", metavar="FILE|URL", help="Take this, or hf:OWNER/NAME/PATH@REVISION."
)
@click.option("--check", is_flag=True, help="Check every byte of what is there already.")
@click.option("--dry-run", is_flag=True, help="Print what would be done.")
@click.option(
    "--timeout",
    metavar="SECONDS",
    type=click.FloatRange(0.1, 3600),
    default=30.0,
    help="Give up a connection after SECONDS without data.",
)
@click.option(
    "--retries",
    type=click.IntRange(min=0),
    default=5,
    help="Give up after so many attempts that bring nothing new.",
)
@click.option("--manifests", type=click.Path(exists=True, file_okay=False), help="More manifests.")
@overwrite_store
@common
def fetch_command(
    levels: tuple[str, ...],
    split: str | None,
    keep_pickle: bool,
    no_convert: bool,
    origin: str | None,
    check: bool,
    dry_run: bool,
    timeout: float,
    retries: int,
    manifests: str | None,
    overwrite: bool,
    folder: Path,
    quiet: bool,
) -> None:
    """Download the published demonstrations of each LEVEL (or `all`), check and convert them.

    What is there already is kept; a download that was cut resumes where it stopped.

    \b
    Example:
      demotools fetch GoToLocal --dry-run
      demotools fetch GoToLocal --from ~/Downloads/BabyAI-GoToLocal-v0.pkl
    """
    from demotools.babyai.levels import MANIFESTS_VARIABLE, SPLITS, level_names
    from demotools.fetch.job import fetch_levels, fetch_plans
    from demotools.fetch.places import place_named
    from demotools.fetch.plan import FetchOptions

    if manifests:
        before = os.environ.get(MANIFESTS_VARIABLE)
        os.environ[MANIFESTS_VARIABLE] = manifests  # so that helper processes see them too
        click.get_current_context().call_on_close(
            lambda: os.environ.update({MANIFESTS_VARIABLE: before or ""})
        )
    names = level_names() if levels == ("all",) else levels
    chosen = split or ("train" if origin else "all")
    splits = tuple(each for each in SPLITS if chosen in (each, "all"))
    if origin is not None:
        if (len(names), len(splits)) != (1, 1):
            raise click.UsageError("--from goes with one level and one split")
        place_named(origin)  # refuses what is no address before anything else is done
    options = FetchOptions(
        not no_convert, keep_pickle, check, overwrite, origin, timeout, retries, quiet
    )
    if dry_run or not quiet:
        for plan in fetch_plans(names, splits, folder, options):
            say(*plan.text().split("\n"))
    if dry_run:
        return
    for text in fetch_levels(names, splits, folder, options):
        if not quiet:
            say(*text.split("\n"))


@click.command("generate")
@click.argument("level")
@click.option("--episodes", type=int, required=True, help="Solved episodes to record.")
@click.option("--split", type=click.Choice(["train", "valid"]), default="train", show_default=True)
@click.option(
    "--seed",
    type=int,
    help="First environment seed [default: 0 for train, 1000000000 for valid].",
)
@click.option("--workers", type=click.IntRange(min=1), help="Processes [default: all processors].")
@dask_address
@click.option("--name", help="The store's name [default: LEVEL or LEVEL-valid].")
@overwrite_store
@common
def generate_command(
    level: str,
    episodes: int,
    split: Literal["train", "valid"],
    seed: int | None,
    workers: int | None,
    dask: str | None,
    name: str | None,
    overwrite: bool,
    folder: Path,
    quiet: bool,
) -> None:
    """Record the expert bot on LEVEL: the first episodes that it solves, in seed order.

    The same options give the same store, bit for bit, with any number of workers; a command that
    was ended goes on where it was. With --dask the workers of a cluster play.

    \b
    Example:
      demotools generate GoToLocal --episodes 1000
    """
    from demotools.recording.record import generate as record
    from demotools.recording.record import planned_recording
    from demotools.store.reading import new_store_path

    recording = planned_recording(level, episodes, split=split, first_seed=seed)
    path = new_store_path(name or recording.store_name, folder)
    check_dask(dask, workers)
    recorded = record(recording, path, workers=workers, dask=dask, overwrite=overwrite, quiet=quiet)
    if not quiet:
        say(*recorded.text().split("\n"))


@click.command("convert")
@click.argument(
    "files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE..."
)
@click.option("--level", help="The level [default: from the file name].")
@click.option("--split", type=click.Choice(["train", "valid"]), help="[default: from the name].")
@click.option(
    "--encoding",
    type=click.Choice(["auto", "2018-08-28", "2018-11-16", "2019-01-08", "image"]),
    default="auto",
    show_default=True,
    help="Object encoding of the views, by its first day; image: store them as they are.",
)
@click.option("--name", help="The store's name [default: LEVEL or LEVEL-valid].")
@click.option("--workers", type=click.IntRange(min=1), help="Processes [default: all processors].")
@click.option("--on-error", type=click.Choice(["stop", "skip"]), default="stop", show_default=True)
@click.option("--salvage", is_flag=True, help="Take what is whole of a file that was cut short.")
@dask_address
@overwrite_store
@common
def convert_command(
    files: tuple[Path, ...],
    folder: Path,
    quiet: bool,
    **choices: Any,
) -> None:
    """Convert legacy demo pickles into a store; several shard files make one.

    Nothing in the files is executed. The object encoding is told from the data, and recoded to
    today's. A conversion that was ended goes on where it was.

    \b
    Example:
      demotools convert BabyAI-GoToLocal-v0.pkl
    """
    with lasting_imports():
        from demotools.pickles.convert import ConvertOptions, convert_files

    options = ConvertOptions(quiet=quiet, **choices)
    check_dask(options.dask, options.workers)
    converted = convert_files(files, folder, options)
    if not quiet:
        say(*converted.text().split("\n"))


@click.command("import")
@click.argument("dataset")
@click.option(
    "--from",
    type=click.Choice(["minari"]),
    required=True,
    expose_value=False,
    help="The program that DATASET belongs to.",
)
@click.option("--level", help="The level, where the dataset does not say it.")
@click.option("--split", type=click.Choice(["train", "valid"]), help="[default: as exported]")
@click.option("--name", help="The store's name [default: LEVEL or LEVEL-valid].")
@overwrite_store
@common
def import_command(
    dataset: str,
    level: str | None,
    split: Literal["train", "valid"] | None,
    name: str | None,
    overwrite: bool,
    folder: Path,
    quiet: bool,
) -> None:
    """Make a store of DATASET, the id of a Minari dataset on this machine, or its folder.

    Successes are kept; what is left out is counted. What `demotools export` wrote comes back bit
    for bit. Legacy pickles are read by `demotools convert`.

    \b
    Example:
      demotools import babyai/GoToLocal-v0 --from minari --name GoToLocal-copy
    """
    from demotools.exchange.minari_import import import_minari, opened_dataset
    from demotools.store.reading import new_store_path

    opened = opened_dataset(dataset, level=level, split=split)
    path = new_store_path(name or opened.store_name, folder)
    imported = import_minari(opened, path, overwrite=overwrite, quiet=quiet)
    if not quiet:
        say(*imported.text().split("\n"))
