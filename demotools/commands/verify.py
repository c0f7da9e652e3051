"""`demotools verify`."""

from __future__ import annotations

from pathlib import Path

import click

from demotools.commands.options import common, json_output, print_json, say


@click.command("verify")
@click.argument("store")
@click.option("--replay", is_flag=True, help="Also play episodes again, from their seeds.")
@click.option(
    "--episodes",
    type=click.IntRange(min=1),
    help="With --replay: at most so many, evenly spread [default: 1000].",
)
@json_output
@common
def command(
    store: str, replay: bool, episodes: int | None, as_json: bool, folder: Path, quiet: bool
) -> None:
    """Check every byte of STORE, and every array against the format and the others.

    With --replay the stored actions are played again in the environment, and every view,
    direction, mission and the reward compared. Episodes whose seed is not known, or which another
    version of the environment recorded, are named as such.

    \b
    Example:
      demotools verify GoToLocal --replay --episodes 200
    """
    from demotools.store import store_path
    from demotools.verify import raise_if_damaged, verify_store

    if episodes and not replay:
        raise click.UsageError("--episodes goes with --replay")
    path = store_path(store, folder)
    checks = verify_store(path, replay=(episodes or 1000) if replay else 0, quiet=quiet)
    if as_json:
        print_json([check.as_json() for check in checks])
    elif not quiet:
        for check in checks:
            say(*check.text().split("\n"))
    raise_if_damaged(path, checks)
