"""`demotools card`."""

from __future__ import annotations

from pathlib import Path

import click

from demotools.commands.options import common, say


@click.command("card")
@click.argument("store")
@click.option(
    "-o", "output", type=click.Path(path_type=Path, dir_okay=False), help="Write it to this file."
)
@click.option("--overwrite", is_flag=True, help="Replace a file of the same name.")
@common
def command(store: str, output: Path | None, overwrite: bool, folder: Path, quiet: bool) -> None:
    """Print a dataset card of STORE: Markdown with the header that Hugging Face reads.

    \b
    Example:
      demotools card GoToLocal -o README.md
    """
    from demotools.card import store_card
    from demotools.output import write_output
    from demotools.store import store_path

    text = store_card(store_path(store, folder))
    if output is None:
        say(*text.removesuffix("\n").split("\n"))
        return
    write_output(output, text.encode(), overwrite=overwrite)
    if not quiet:
        say(f"made {output}")
