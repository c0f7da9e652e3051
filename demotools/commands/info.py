"""`demotools info`."""

from __future__ import annotations

from pathlib import Path

import click

from demotools.commands.options import common, json_output, print_json, say


@click.command("info")
@click.argument("store")
@json_output
@common
def command(store: str, as_json: bool, folder: Path, quiet: bool) -> None:
    """Show what STORE holds, where it came from, and a table of its arrays.

    \b
    Example:
      demotools info GoToLocal
    """
    from demotools.info import info_text, store_info
    from demotools.store import store_path

    found = store_info(store_path(store, folder))
    if as_json:
        print_json(found)
    elif not quiet:
        say(*info_text(found).split("\n"))
