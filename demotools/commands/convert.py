"""`demotools convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from demotools.commands.options import (
    common,
    dask_address,
    is_on_cluster,
    lasting_imports,
    overwrite_store,
    return_parts_option,
    say,
)


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
@return_parts_option
@overwrite_store
@common
def command(
    files: tuple[Path, ...],
    encoding: str,
    dask: str | None,
    return_parts: bool,
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
        from demotools.convert import ConvertOptions, convert_files, known_encoding

    options = ConvertOptions(encoding=known_encoding(encoding), quiet=quiet, **choices)
    decoders = None
    if is_on_cluster(dask, return_parts, options.workers):
        from demotools.cluster import cluster_decoders

        decoders = cluster_decoders(str(dask), return_parts=return_parts)
    converted = convert_files(files, folder, options, decoders=decoders)
    if not quiet:
        say(*converted.text().split("\n"))
