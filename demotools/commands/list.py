"""`demotools list`."""

from __future__ import annotations

from pathlib import Path

import click

from demotools.commands.options import common, json_output, print_json, say


@click.command("list")
@json_output
@common
def command(as_json: bool, folder: Path, quiet: bool) -> None:
    """Show every level: its stores, what was fetched of it, and where it can be fetched from.

    \b
    Example:
      demotools list
    """
    from demotools.listing import listing, listing_text

    found = listing(folder)
    if as_json:
        print_json(found)
    elif not quiet:
        say(*listing_text(found).split("\n"))
