"""`demotools diff`."""

from __future__ import annotations

from pathlib import Path

import click

from demotools.commands.options import common, json_output, print_json, say


@click.command("diff")
@click.argument("first", metavar="STORE")
@click.argument("second", metavar="STORE")
@json_output
@common
def command(first: str, second: str, as_json: bool, folder: Path, quiet: bool) -> None:
    """Compare two stores: attributes, missions, and episodes wherever they stand.

    Episodes are the same where the agent saw, did and was told the same.

    \b
    Example:
      demotools diff GoToLocal GoToLocal-small
    """
    from demotools.diff import store_difference
    from demotools.store import store_path

    paths = [store_path(store, folder) for store in (first, second)]
    found = store_difference(*paths, quiet=quiet)
    if as_json:
        print_json(found.as_json())
    else:
        say(*found.text().split("\n"))
