"""`demotools import`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from demotools.commands.options import common, overwrite_store, say


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
def command(
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
    from demotools.minari_import import import_minari, opened_dataset
    from demotools.store import new_store_path

    opened = opened_dataset(dataset, level=level, split=split)
    path = new_store_path(name or opened.store_name, folder)
    imported = import_minari(opened, path, overwrite=overwrite, quiet=quiet)
    if not quiet:
        say(*imported.text().split("\n"))
