"""`demotools shrink`."""

from __future__ import annotations

from pathlib import Path

import click

from demotools.commands.options import common, overwrite_store


@click.command("shrink")
@click.argument("stores", nargs=-1, metavar="[STORE]...")
@click.option("--episodes", type=click.IntRange(min=1), required=True, help="Episodes to keep.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@overwrite_store
@common
def command(
    stores: tuple[str, ...], episodes: int, seed: int, overwrite: bool, folder: Path, quiet: bool
) -> None:
    """Make small twins, named STORE-small, of the given stores.

    Without a name: of every full training store. The same seed chooses the same episodes, and a
    smaller twin is a part of a larger one.

    \b
    Example:
      demotools shrink --episodes 100
    """
    from demotools.shrink import shrink_stores
    from demotools.store import store_path

    paths = [store_path(name, folder) for name in stores]
    results = shrink_stores(
        paths, folder, episodes=episodes, seed=seed, overwrite=overwrite, quiet=quiet
    )
    for result in () if quiet else results:
        if result.skipped:
            click.echo(f"skipped {result.parent}: {result.skipped}")
        else:
            click.echo(f"made {result.path}: {result.episodes:,} episodes of {result.parent}")
