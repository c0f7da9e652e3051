"""`demotools export`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from demotools.commands.options import common, overwrite_store, say


@click.command("export")
@click.argument("store")
@click.option(
    "--to",
    "kind",
    type=click.Choice(["pickle", "minari"]),
    required=True,
    help="The other program's layout.",
)
@click.option(
    "-o",
    "output",
    type=click.Path(path_type=Path),
    help="pickle: the file [default: beside the store, named as babyai does]; minari: the folder "
    "of datasets [default: Minari's own].",
)
@click.option("--id", "dataset_id", help="minari: the dataset's id [default: babyai/NAME-v0].")
@overwrite_store
@common
def command(
    store: str,
    kind: Literal["pickle", "minari"],
    output: Path | None,
    dataset_id: str | None,
    overwrite: bool,
    folder: Path,
    quiet: bool,
) -> None:
    """Write STORE for other programs: a legacy pickle for babyai's own loader, or a Minari dataset.

    \b
    Example:
      demotools export GoToLocal --to pickle -o demos/BabyAI-GoToLocal-v0_agent.pkl
      demotools export GoToLocal --to minari
    """
    from demotools.exchange import export_minari, export_pickle, pickle_name
    from demotools.store import open_store, store_path

    opened = open_store(store_path(store, folder))
    if kind == "minari":
        exported = export_minari(
            opened, root=output, dataset_id=dataset_id, overwrite=overwrite, quiet=quiet
        )
        lines = exported.text().split("\n")
    else:
        if dataset_id:
            raise click.UsageError("--id goes with --to minari")
        file = output or opened.path.with_name(pickle_name(opened))
        export_pickle(opened, file, overwrite=overwrite, quiet=quiet)
        lines = [f"exported {file}: {opened.episodes:,} episodes; this layout has no seeds"]
    if not quiet:
        say(*lines)
