"""Commands that make new stores from existing ones, pack and remove them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from demotools.cli import (
    Shell,
    common,
    confirmed,
    ended_option,
    episodes_option,
    listed,
    name_option,
    output_option,
    overwrite_file,
    overwrite_store,
    say,
    split_option,
    stores_argument,
)

_random_seed = click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Seed of the random choice.",
)


@click.command("shrink")
@click.argument("stores", nargs=-1, metavar="[STORE]...")
@episodes_option("Keep N episodes of each store.", required=True)
@_random_seed
@name_option("STORE-small", "Name of the copy of a single STORE.")
@overwrite_store
@common
def shrink_command(
    shell: Shell,
    stores: tuple[str, ...],
    name: str | None,
    **choices: Any,
) -> None:
    """Make small copies of stores, named STORE-small.

    Without STORE, copies every full training store. The same seed chooses the same episodes, and a
    larger copy contains every smaller one.

    \b
    Example:
      demotools shrink --episodes 100
      demotools shrink GoToLocal --episodes 10000 --name GoToLocal-10000
    """
    from demotools.output import counted
    from demotools.store.shrink import shrink_stores

    if name is not None and len(stores) != 1:
        raise click.UsageError("--name names one copy: give exactly one STORE")
    paths = [shell.store(store) for store in stores]
    twin = None if name is None else shell.new_store(name)
    results = shrink_stores(paths, shell.folder, twin, **choices, quiet=shell.quiet)
    lines = [
        f"skipped {result.parent}: {result.skipped}"
        if result.skipped
        else f"made {result.path}: {counted(result.episodes, 'episode')} of {result.parent}"
        for result in results
    ]
    shell.print(results, *lines)


def _actions(
    _context: click.Context, _option: click.Parameter, value: str | None
) -> tuple[str, ...] | None:
    from demotools.babyai.cells import ACTIONS

    names = None if value is None else tuple(listed(value))
    for name in names or ():
        if name not in ACTIONS:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(ACTIONS)}")
    return names


@click.command("select")
@click.argument("store")
@click.option("--mission", metavar="REGEX", help="Keep episodes whose mission contains REGEX.")
@click.option("--min-len", metavar="N", type=int, help="Keep episodes of at least N steps.")
@click.option("--max-len", metavar="N", type=int, help="Keep episodes of at most N steps.")
@click.option(
    "--actions",
    metavar="NAME,...",
    callback=_actions,
    help="Keep episodes in which the expert takes each of these actions (left, right, forward, "
    "pickup, drop, toggle, done).",
)
@click.option(
    "--seeds",
    metavar="LIST|FILE",
    help="Keep episodes with these environment seeds: a list such as 0-999,5000 or a file of them.",
)
@click.option("--level", metavar="LEVEL", help="Keep episodes of this level, in a merged store.")
@ended_option(
    "Keep episodes that ended this way (success, failure, truncation), in a recording with "
    "--keep-failures."
)
@click.option("--solved", is_flag=True, help="The same as --ended success.")
@click.option(
    "--first", metavar="N", type=click.IntRange(min=1), help="Keep the first N matching episodes."
)
@click.option(
    "--sample",
    metavar="N",
    type=click.IntRange(min=1),
    help="Keep N matching episodes at random.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    show_default="0",
    help="With --sample: seed of the random choice.",
)
@name_option("STORE-selected", "Name of the new store.")
@overwrite_store
@common
def select_command(
    shell: Shell, store: str, name: str | None, overwrite: bool, solved: bool, **wanted: Any
) -> None:
    """Copy the episodes that match conditions into a new store.

    Episodes that match all conditions are copied bit for bit, in their original order.

    \b
    Example:
      demotools select GoToLocal --mission "red (ball|box)" --max-len 10 -o GoToRed
      demotools select BossLevel --actions pickup,toggle --sample 1000
    """
    from demotools.store.reshape import Conditions, select_store

    if wanted["first"] and wanted["sample"]:
        raise click.UsageError("--first cannot be combined with --sample")
    if wanted["seed"] is not None and not wanted["sample"]:
        raise click.UsageError("--seed needs --sample")
    if solved and wanted["ended"]:
        raise click.UsageError("--solved cannot be combined with --ended")
    if solved:
        wanted["ended"] = ("success",)
    path = shell.store(store)
    new = shell.new_store(name or f"{path.stem}-selected")
    conditions = Conditions(**wanted)
    made = select_store(path, new, conditions, overwrite=overwrite, quiet=shell.quiet)
    shell.print_result(made)


@click.command("merge")
@stores_argument
@split_option("that of the stores")
@click.option(
    "--dedupe", is_flag=True, help="Drop episodes that repeat an earlier one step by step."
)
@name_option(True, default="merged")
@overwrite_store
@common
def merge_command(
    shell: Shell,
    stores: tuple[str, ...],
    name: str,
    **choices: Any,
) -> None:
    """Merge several stores into a new one.

    The new store has one vocabulary, and records the level of each episode and the origin of each
    store. Duplicates, and seeds that occur more than once, are counted.

    \b
    Example:
      demotools merge GoToLocal PutNextLocal PickupLoc -o Local
    """
    from demotools.store.reshape import merge_stores

    paths = [shell.store(store) for store in stores]
    made = merge_stores(paths, shell.new_store(name), **choices, quiet=shell.quiet)
    shell.print_result(made)


@click.command("split")
@click.argument("store")
@click.option(
    "--valid",
    "share",
    metavar="SHARE",
    type=click.FloatRange(min=0, min_open=True),
    default=0.05,
    show_default=True,
    help="Hold out this share of the episodes or, if it is 1 or more, this number of them.",
)
@_random_seed
@name_option("STORE", "Name the new stores NAME-train and NAME-valid.")
@overwrite_store
@common
def split_command(
    shell: Shell, store: str, share: float, seed: int, name: str | None, overwrite: bool
) -> None:
    """Split a store into a training and a validation store.

    Duplicates, and episodes with the same environment seed, stay on one side, so nothing leaks.

    \b
    Example:
      demotools split Local --valid 0.05
    """
    from demotools.store.reshape import split_store

    path = shell.store(store)
    train, valid = (shell.new_store(f"{name or path.stem}-{part}") for part in ("train", "valid"))
    made = split_store(
        path, train, valid, share=share, seed=seed, overwrite=overwrite, quiet=shell.quiet
    )
    shell.print(made, *(one.text() for one in made))


@click.command("archive")
@click.argument("store")
@output_option("Write the archive to this file.", "STORE.zarr.zip next to the store")
@overwrite_file
@common
def archive_command(shell: Shell, store: str, output: Path | None, overwrite: bool) -> None:
    """Pack a store into one zip file, STORE.zarr.zip.

    Any unzip program unpacks it, and plain zarr reads it directly. `demotools unarchive` restores
    the store bit for bit.

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
@name_option("from the file name")
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
@stores_argument
@click.option("-y", "--yes", is_flag=True, help="Remove without asking.")
@common
def remove_command(shell: Shell, stores: tuple[str, ...], yes: bool) -> None:
    """Remove stores, after asking.

    Anything that is not a demo store is left alone.

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
