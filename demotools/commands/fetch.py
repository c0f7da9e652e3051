"""`demotools fetch`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from demotools.commands.options import common, overwrite_store, say


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
def command(
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
    from demotools.fetch import FetchOptions, fetch_levels, fetch_plans, place_named
    from demotools.manifest import MANIFESTS_VARIABLE, SPLITS, level_names

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
