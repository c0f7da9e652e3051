"""`demotools remove`."""

from __future__ import annotations

from pathlib import Path

import click

from demotools.commands.options import common, confirmed, say


@click.command("remove")
@click.argument("stores", nargs=-1, required=True, metavar="STORE...")
@click.option("--yes", is_flag=True, help="Do not ask.")
@common
def command(stores: tuple[str, ...], yes: bool, folder: Path, quiet: bool) -> None:
    """Remove stores, after asking. What is not a demo store is left alone.

    \b
    Example:
      demotools remove GoToLocal-small
    """
    from demotools.remove import planned_removals, remove_store
    from demotools.store import store_path

    removals = planned_removals([store_path(store, folder) for store in stores])
    if not yes:
        for removal in removals:
            say(removal.text())
        if not confirmed("Remove?", removals[0].path):
            return
    for removal in removals:
        remove_store(removal)
        if not quiet:
            say(f"removed {removal.text()}")
