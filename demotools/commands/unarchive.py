"""`demotools unarchive`."""

from __future__ import annotations

from pathlib import Path

import click

from demotools.commands.options import common, overwrite_store, say


@click.command("unarchive")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--name", help="Name of the store [default: the file's].")
@overwrite_store
@common
def command(file: Path, name: str | None, overwrite: bool, folder: Path, quiet: bool) -> None:
    """Restore the store of FILE, made by `demotools archive`, bit for bit.

    \b
    Example:
      demotools unarchive GoToLocal.zarr.zip --name GoToLocal-copy
    """
    from demotools.archive import archived_store_name, unarchive_store
    from demotools.store import new_store_path

    path = new_store_path(name or archived_store_name(file), folder)
    unarchive_store(file, path, overwrite=overwrite, quiet=quiet)
    if not quiet:
        say(f"made {path}")
