"""`demotools generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from demotools.commands.options import (
    common,
    dask_address,
    is_on_cluster,
    overwrite_store,
    return_parts_option,
    say,
)


@click.command("generate")
@click.argument("level")
@click.option("--episodes", type=int, required=True, help="Solved episodes to record.")
@click.option("--split", type=click.Choice(["train", "valid"]), default="train", show_default=True)
@click.option(
    "--seed",
    type=int,
    help="First environment seed [default: 0 for train, 1000000000 for valid].",
)
@click.option("--workers", type=click.IntRange(min=1), help="Processes [default: all processors].")
@dask_address
@return_parts_option
@click.option("--name", help="The store's name [default: LEVEL or LEVEL-valid].")
@overwrite_store
@common
def command(
    level: str,
    episodes: int,
    split: Literal["train", "valid"],
    seed: int | None,
    workers: int | None,
    dask: str | None,
    return_parts: bool,
    name: str | None,
    overwrite: bool,
    folder: Path,
    quiet: bool,
) -> None:
    """Record the expert bot on LEVEL: the first episodes that it solves, in seed order.

    The same options give the same store, bit for bit, with any number of workers; a command that
    was ended goes on where it was. With --dask the workers of a cluster play.

    \b
    Example:
      demotools generate GoToLocal --episodes 1000
    """
    from demotools.generate import generate as record
    from demotools.generate import planned_recording
    from demotools.store import new_store_path

    recording = planned_recording(level, episodes, split=split, first_seed=seed)
    path = new_store_path(name or recording.store_name, folder)
    players = None
    if is_on_cluster(dask, return_parts, workers):
        from demotools.cluster import cluster_players

        players = cluster_players(str(dask), return_parts=return_parts)
    recorded = record(
        recording, path, workers=workers, players=players, overwrite=overwrite, quiet=quiet
    )
    if not quiet:
        say(*recorded.text().split("\n"))
