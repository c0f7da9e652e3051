"""Commands that change which stores there are: shrink, remove."""

from __future__ import annotations

from pathlib import Path

import click

from demotools.cli import common, confirmed, overwrite_store, say


@click.command("shrink")
@click.argument("stores", nargs=-1, metavar="[STORE]...")
@click.option("--episodes", type=click.IntRange(min=1), required=True, help="Episodes to keep.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--name", help="Name of the one twin [default: STORE-small].")
@overwrite_store
@common
def shrink_command(
    stores: tuple[str, ...],
    episodes: int,
    seed: int,
    name: str | None,
    overwrite: bool,
    folder: Path,
    quiet: bool,
) -> None:
    """Make small twins, named STORE-small, of the given stores.

    Without a name: of every full training store. The same seed chooses the same episodes, and a
    smaller twin is a part of a larger one.

    \b
    Example:
      demotools shrink --episodes 100
      demotools shrink GoToLocal --episodes 10000 --name GoToLocal-10000
    """
    from demotools.store.reading import new_store_path, store_path
    from demotools.store.shrink import shrink_store, shrink_stores

    if name is not None and len(stores) != 1:
        raise click.UsageError("--name is for one twin: name the one STORE that it is made of")
    paths = [store_path(store, folder) for store in stores]
    if name is not None:
        twin = new_store_path(name, folder)
        results = [
            shrink_store(
                paths[0], twin, episodes=episodes, seed=seed, overwrite=overwrite, quiet=quiet
            )
        ]
    else:
        results = shrink_stores(
            paths, folder, episodes=episodes, seed=seed, overwrite=overwrite, quiet=quiet
        )
    for result in () if quiet else results:
        if result.skipped:
            say(f"skipped {result.parent}: {result.skipped}")
        else:
            say(f"made {result.path}: {result.episodes:,} episodes of {result.parent}")


@click.command("remove")
@click.argument("stores", nargs=-1, required=True, metavar="STORE...")
@click.option("--yes", is_flag=True, help="Do not ask.")
@common
def remove_command(stores: tuple[str, ...], yes: bool, folder: Path, quiet: bool) -> None:
    """Remove stores, after asking. What is not a demo store is left alone.

    \b
    Example:
      demotools remove GoToLocal-small
    """
    from demotools.store.reading import store_path
    from demotools.store.remove import planned_removals, remove_store

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
