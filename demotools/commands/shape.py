"""Commands that make stores smaller, larger or fewer: shrink, archive, unarchive, remove."""

from __future__ import annotations

from pathlib import Path

import click

from demotools.cli import (
    Shell,
    common,
    confirmed,
    output_option,
    overwrite_file,
    overwrite_store,
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
@common
def shrink_command(
    shell: Shell,
    stores: tuple[str, ...],
    episodes: int,
    seed: int,
    name: str | None,
    overwrite: bool,
) -> None:
    """Make small copies of stores, named STORE-small.

    Without STORE, of every full training store. The same seed chooses the same episodes, and a
    smaller copy is part of a larger one.

    \b
    Example:
      demotools shrink --episodes 100
      demotools shrink GoToLocal --episodes 10000 --name GoToLocal-10000
    """
    from demotools.store.shrink import shrink_store, shrink_stores

    if name is not None and len(stores) != 1:
        raise click.UsageError("--name names one copy: give exactly one STORE")
    paths = [shell.store(store) for store in stores]
    if name is not None:
        copy = shell.new_store(name)
        results = [
            shrink_store(
                paths[0], copy, episodes=episodes, seed=seed, overwrite=overwrite, quiet=shell.quiet
            )
        ]
    else:
        results = shrink_stores(
            paths,
            shell.folder,
            episodes=episodes,
            seed=seed,
            overwrite=overwrite,
            quiet=shell.quiet,
        )
    lines = [
        f"skipped {result.parent}: {result.skipped}"
        if result.skipped
        else f"made {result.path}: {result.episodes:,} episodes of {result.parent}"
        for result in results
    ]
    shell.print(results, *lines)


@click.command("archive")
@click.argument("store")
@output_option("Write the archive to this file.", "STORE.zarr.zip beside the store")
@overwrite_file
@common
def archive_command(shell: Shell, store: str, output: Path | None, overwrite: bool) -> None:
    """Pack a store into one zip file, STORE.zarr.zip.

    Any unzip unpacks it, and plain zarr reads it as it is. `demotools unarchive` restores the store
    bit for bit.

    \b
    Example:
      demotools archive GoToLocal
    """
    from demotools.exchange.archive import archive_store
    from demotools.output import size_text

    file = archive_store(shell.store(store), output, overwrite=overwrite, quiet=shell.quiet)
    size_bytes = file.stat().st_size
    shell.print({"path": file, "size_bytes": size_bytes}, f"made {file}: {size_text(size_bytes)}")


@click.command("unarchive")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "-o", "--name", metavar="NAME", show_default="from the file name", help="Name of the store."
)
@overwrite_store
@common
def unarchive_command(shell: Shell, file: Path, name: str | None, overwrite: bool) -> None:
    """Restore a store from its archive, bit for bit.

    \b
    Example:
      demotools unarchive GoToLocal.zarr.zip --name GoToLocal-copy
    """
    from demotools.exchange.archive import archived_store_name, unarchive_store

    path = shell.new_store(name or archived_store_name(file))
    unarchive_store(file, path, overwrite=overwrite, quiet=shell.quiet)
    shell.print({"path": path}, f"made {path}")


@click.command("remove")
@click.argument("stores", nargs=-1, required=True, metavar="STORE...")
@click.option("-y", "--yes", is_flag=True, help="Remove without asking.")
@common
def remove_command(shell: Shell, stores: tuple[str, ...], yes: bool) -> None:
    """Remove stores, after asking.

    What is not a demo store is left alone.

    \b
    Example:
      demotools remove GoToLocal-small
    """
    from demotools.store.remove import planned_removals, remove_store

    removals = planned_removals([shell.store(store) for store in stores])
    if not yes:
        for removal in removals:
            say(removal.text())
        if not confirmed("Remove?", removals[0].path):
            return
    for removal in removals:
        remove_store(removal)
        if not shell.as_json:
            shell.print(removal, f"removed {removal.text()}")
    if shell.as_json:
        shell.print(removals)
