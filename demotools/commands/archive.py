"""`demotools archive`."""

from __future__ import annotations

from pathlib import Path

import click

from demotools.commands.options import common, say


@click.command("archive")
@click.argument("store")
@click.option("-o", "output", type=click.Path(path_type=Path), help="The file [default: beside].")
@click.option("--overwrite", is_flag=True, help="Replace a file of the same name.")
@common
def command(store: str, output: Path | None, overwrite: bool, folder: Path, quiet: bool) -> None:
    """Pack STORE into one compressed file, NAME.zarr.zip, to carry or to publish.

    Plain zarr reads the file; `demotools unarchive` restores the store bit for bit.

    \b
    Example:
      demotools archive GoToLocal
    """
    from demotools.archive import archive_store
    from demotools.info import size_text
    from demotools.store import store_path

    file = archive_store(store_path(store, folder), output, overwrite=overwrite, quiet=quiet)
    if not quiet:
        say(f"made {file}: {size_text(file.stat().st_size)}")
