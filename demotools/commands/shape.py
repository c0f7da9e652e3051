"""Commands that make stores smaller, larger or fewer: shrink, archive, unarchive, remove."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from demotools.cli import (
    common,
    confirmed,
    json_output,
    output_option,
    overwrite_file,
    overwrite_store,
    print_json,
    say,
)


@click.command("shrink")
@click.argument("stores", nargs=-1, metavar="[STORE]...")
@click.option(
    "-n",
    "--episodes",
    metavar="N",
    type=click.IntRange(min=1),
    required=True,
    help="Keep N episodes of each store.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Seed of the random choice.",
)
@click.option(
    "-o", "--name", metavar="NAME", show_default="STORE-small", help="Name of the one small copy."
)
@overwrite_store
@json_output
@common
def shrink_command(
    stores: tuple[str, ...],
    episodes: int,
    seed: int,
    name: str | None,
    overwrite: bool,
    as_json: bool,
    folder: Path,
    quiet: bool,
) -> None:
    """Make small copies of stores, named STORE-small.

    Without STORE, of every full training store. The same seed chooses the same episodes, and a
    smaller copy is part of a larger one.

    \b
    Example:
      demotools shrink --episodes 100
      demotools shrink GoToLocal --episodes 10000 --name GoToLocal-10000
    """
    from demotools.store.reading import new_store_path, store_path
    from demotools.store.shrink import shrink_store, shrink_stores

    if name is not None and len(stores) != 1:
        raise click.UsageError("--name names one copy: give exactly one STORE")
    paths = [store_path(store, folder) for store in stores]
    if name is not None:
        copy = new_store_path(name, folder)
        results = [
            shrink_store(
                paths[0], copy, episodes=episodes, seed=seed, overwrite=overwrite, quiet=quiet
            )
        ]
    else:
        results = shrink_stores(
            paths, folder, episodes=episodes, seed=seed, overwrite=overwrite, quiet=quiet
        )
    if as_json:
        print_json([asdict(result) for result in results])
        return
    for result in () if quiet else results:
        if result.skipped:
            say(f"skipped {result.parent}: {result.skipped}")
        else:
            say(f"made {result.path}: {result.episodes:,} episodes of {result.parent}")


@click.command("archive")
@click.argument("store")
@output_option("Write the archive to this file.", "STORE.zarr.zip beside the store")
@overwrite_file
@json_output
@common
def archive_command(
    store: str, output: Path | None, overwrite: bool, as_json: bool, folder: Path, quiet: bool
) -> None:
    """Pack a store into one zip file, STORE.zarr.zip.

    Any unzip unpacks it, and plain zarr reads it as it is. `demotools unarchive` restores the store
    bit for bit.

    \b
    Example:
      demotools archive GoToLocal
    """
    from demotools.exchange.archive import archive_store
    from demotools.output import size_text
    from demotools.store.reading import store_path

    file = archive_store(store_path(store, folder), output, overwrite=overwrite, quiet=quiet)
    size_bytes = file.stat().st_size
    if as_json:
        print_json({"path": file, "size_bytes": size_bytes})
    elif not quiet:
        say(f"made {file}: {size_text(size_bytes)}")


@click.command("unarchive")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "-o", "--name", metavar="NAME", show_default="from the file name", help="Name of the store."
)
@overwrite_store
@common
def unarchive_command(
    file: Path, name: str | None, overwrite: bool, folder: Path, quiet: bool
) -> None:
    """Restore a store from its archive, bit for bit.

    \b
    Example:
      demotools unarchive GoToLocal.zarr.zip --name GoToLocal-copy
    """
    from demotools.exchange.archive import archived_store_name, unarchive_store
    from demotools.store.reading import new_store_path

    path = new_store_path(name or archived_store_name(file), folder)
    unarchive_store(file, path, overwrite=overwrite, quiet=quiet)
    if not quiet:
        say(f"made {path}")


@click.command("remove")
@click.argument("stores", nargs=-1, required=True, metavar="STORE...")
@click.option("-y", "--yes", is_flag=True, help="Remove without asking.")
@common
def remove_command(stores: tuple[str, ...], yes: bool, folder: Path, quiet: bool) -> None:
    """Remove stores, after asking.

    What is not a demo store is left alone.

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
