"""The `demotools` command line: one thin function per command; the work is in the job modules.

Job modules are imported inside the commands, so that `demotools --help` answers at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import click

from demotools.errors import exit_with_message
from demotools.store import data_folder, store_path

Command = TypeVar("Command", bound=Callable[..., Any])


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        with exit_with_message():
            return super().invoke(ctx)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="demotools")
def main() -> None:
    """BabyAI demonstrations as memory-mapped Zarr stores.

    \b
    Example:
      demotools generate GoToLocal --episodes 1000
      demotools shrink --episodes 100
      demotools list
    """


def _common(command: Command) -> Command:
    """The options that every command has."""
    folder = click.option(
        "--data-dir",
        "folder",
        type=click.Path(file_okay=False, path_type=Path),
        callback=lambda _ctx, _param, value: data_folder(value),
        help="Folder of the stores [default: $DEMOTOOLS_DATA, else the user's data folder].",
    )
    quiet = click.option("--quiet", "-q", is_flag=True, help="No progress bar, no summary.")
    return folder(quiet(command))


_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for a machine to read.")
_overwrite = click.option("--overwrite", is_flag=True, help="Replace a store of the same name.")


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, default=str))


@main.command()
@click.argument("stores", nargs=-1, metavar="[STORE]...")
@click.option("--episodes", type=click.IntRange(min=1), required=True, help="Episodes to keep.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@_overwrite
@_common
def shrink(
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

    paths = [store_path(name, folder) for name in stores]
    results = shrink_stores(
        paths, folder, episodes=episodes, seed=seed, overwrite=overwrite, quiet=quiet
    )
    for result in () if quiet else results:
        if result.skipped:
            click.echo(f"skipped {result.parent}: {result.skipped}")
        else:
            click.echo(f"made {result.path}: {result.episodes:,} episodes of {result.parent}")


@main.command()
@click.argument("store")
@_json
@_common
def info(store: str, as_json: bool, folder: Path, quiet: bool) -> None:
    """Show what STORE holds, where it came from, and a table of its arrays.

    \b
    Example:
      demotools info GoToLocal
    """
    from demotools.info import info_text, store_info

    found = store_info(store_path(store, folder))
    if as_json:
        _print_json(found)
    elif not quiet:
        click.echo(info_text(found))


@main.command()
@click.argument("store")
@click.option("--replay", is_flag=True, help="Also play episodes again, from their seeds.")
@click.option(
    "--episodes",
    type=click.IntRange(min=1),
    help="With --replay: at most so many, evenly spread [default: 1000].",
)
@_json
@_common
def verify(
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
    from demotools.verify import raise_if_damaged, verify_store

    if episodes and not replay:
        raise click.UsageError("--episodes goes with --replay")
    path = store_path(store, folder)
    checks = verify_store(path, replay=(episodes or 1000) if replay else 0, quiet=quiet)
    if as_json:
        _print_json([check.as_json() for check in checks])
    elif not quiet:
        for check in checks:
            click.echo(check.text())
    raise_if_damaged(path, checks)


@main.command()
@click.argument("level")
@click.option("--episodes", type=int, required=True, help="Solved episodes to record.")
@click.option("--split", type=click.Choice(["train", "valid"]), default="train", show_default=True)
@click.option(
    "--seed",
    type=int,
    help="First environment seed [default: 0 for train, 1000000000 for valid].",
)
@click.option("--workers", type=click.IntRange(min=1), help="Processes [default: all processors].")
@click.option("--name", help="The store's name [default: LEVEL or LEVEL-valid].")
@_overwrite
@_common
def generate(
    level: str,
    episodes: int,
    split: Literal["train", "valid"],
    seed: int | None,
    workers: int | None,
    name: str | None,
    overwrite: bool,
    folder: Path,
    quiet: bool,
) -> None:
    """Record the expert bot on LEVEL: the first episodes that it solves, in seed order.

    The same options give the same store, bit for bit, with any number of workers; a command that
    was ended goes on where it was.

    \b
    Example:
      demotools generate GoToLocal --episodes 1000
    """
    from demotools.generate import generate as record
    from demotools.generate import planned_recording

    recording = planned_recording(level, episodes, split=split, first_seed=seed)
    path = store_path(name or recording.store_name, folder)
    recorded = record(recording, path, workers=workers, overwrite=overwrite, quiet=quiet)
    if not quiet:
        click.echo(recorded.text())


@main.command()
@click.argument("store")
@click.option("-o", "output", type=click.Path(path_type=Path), help="The file [default: beside].")
@_common
def archive(store: str, output: Path | None, folder: Path, quiet: bool) -> None:
    """Pack STORE into one compressed file, NAME.zarr.zip, to carry or to publish.

    Plain zarr reads the file; `demotools unarchive` restores the store bit for bit.

    \b
    Example:
      demotools archive GoToLocal
    """
    from demotools.archive import archive_store
    from demotools.info import size_text

    file = archive_store(store_path(store, folder), output, quiet=quiet)
    if not quiet:
        click.echo(f"made {file}: {size_text(file.stat().st_size)}")


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--name", help="Name of the store [default: the file's].")
@_overwrite
@_common
def unarchive(file: Path, name: str | None, overwrite: bool, folder: Path, quiet: bool) -> None:
    """Restore the store of FILE, made by `demotools archive`, bit for bit.

    \b
    Example:
      demotools unarchive GoToLocal.zarr.zip --name GoToLocal-copy
    """
    from demotools.archive import archived_store_name, unarchive_store

    path = store_path(name or archived_store_name(file), folder)
    unarchive_store(file, path, overwrite=overwrite, quiet=quiet)
    if not quiet:
        click.echo(f"made {path}")
