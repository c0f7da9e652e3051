"""The `demotools` command line: one thin function per command; the work is in the job modules.

Job modules are imported inside the commands, so that `demotools --help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import click

from demotools.errors import StoreError, exit_with_message
from demotools.manifest import Split
from demotools.store import data_folder, new_store_path, store_path

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
_dask = click.option(
    "--dask", metavar="ADDRESS", help="Use the Dask cluster at tcp://HOST:PORT (docs/cluster.md)."
)
_return_parts = click.option(
    "--return-parts", is_flag=True, help="With --dask: workers do not share the folder."
)
_overwrite = click.option("--overwrite", is_flag=True, help="Replace a store of the same name.")


def _is_on_cluster(dask: str | None, return_parts: bool, workers: int | None) -> bool:
    """Whether a cluster does the work; click's own error for options that do not go together."""
    if dask and workers:
        raise click.UsageError("--workers goes without --dask")
    if return_parts and not dask:
        raise click.UsageError("--return-parts goes with --dask")
    return dask is not None


def _confirmed(question: str, path: Path) -> bool:
    """What the user answers; StoreError where nobody can be asked."""
    try:
        return click.confirm(question)
    except click.Abort:
        if sys.stdin.isatty():
            raise
        click.echo()
        raise StoreError(
            "nobody answered the question, so nothing was removed",
            path=path,
            fix="say --yes to remove without being asked",
        ) from None


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
@_dask
@_return_parts
@click.option("--name", help="The store's name [default: LEVEL or LEVEL-valid].")
@_overwrite
@_common
def generate(
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

    recording = planned_recording(level, episodes, split=split, first_seed=seed)
    path = new_store_path(name or recording.store_name, folder)
    players = None
    if _is_on_cluster(dask, return_parts, workers):
        from demotools.cluster import cluster_players

        players = cluster_players(str(dask), return_parts=return_parts)
    recorded = record(
        recording, path, workers=workers, players=players, overwrite=overwrite, quiet=quiet
    )
    if not quiet:
        click.echo(recorded.text())


@main.command()
@click.argument("store")
@click.option("-o", "output", type=click.Path(path_type=Path), help="The file [default: beside].")
@click.option("--overwrite", is_flag=True, help="Replace a file of the same name.")
@_common
def archive(store: str, output: Path | None, overwrite: bool, folder: Path, quiet: bool) -> None:
    """Pack STORE into one compressed file, NAME.zarr.zip, to carry or to publish.

    Plain zarr reads the file; `demotools unarchive` restores the store bit for bit.

    \b
    Example:
      demotools archive GoToLocal
    """
    from demotools.archive import archive_store
    from demotools.info import size_text

    file = archive_store(store_path(store, folder), output, overwrite=overwrite, quiet=quiet)
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

    path = new_store_path(name or archived_store_name(file), folder)
    unarchive_store(file, path, overwrite=overwrite, quiet=quiet)
    if not quiet:
        click.echo(f"made {path}")


@main.command()
@click.argument(
    "files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE..."
)
@click.option("--level", help="The level [default: from the file name].")
@click.option("--split", type=click.Choice(["train", "valid"]), help="[default: from the name].")
@click.option(
    "--encoding",
    type=click.Choice(["auto", "2018-08-28", "2018-11-16", "2019-01-08", "image"]),
    default="auto",
    show_default=True,
    help="Object encoding of the views, by its first day; image: store them as they are.",
)
@click.option("--name", help="The store's name [default: LEVEL or LEVEL-valid].")
@click.option("--workers", type=click.IntRange(min=1), help="Processes [default: all processors].")
@click.option("--on-error", type=click.Choice(["stop", "skip"]), default="stop", show_default=True)
@click.option("--salvage", is_flag=True, help="Take what is whole of a file that was cut short.")
@_dask
@_return_parts
@_overwrite
@_common
def convert(
    files: tuple[Path, ...],
    encoding: str,
    dask: str | None,
    return_parts: bool,
    folder: Path,
    quiet: bool,
    **choices: Any,
) -> None:
    """Convert legacy demo pickles into a store; several shard files make one.

    Nothing in the files is executed. The object encoding is told from the data, and recoded to
    today's. A conversion that was ended goes on where it was.

    \b
    Example:
      demotools convert BabyAI-GoToLocal-v0.pkl
    """
    from demotools.convert import ConvertOptions, convert_files, known_encoding

    options = ConvertOptions(encoding=known_encoding(encoding), quiet=quiet, **choices)
    decoders = None
    if _is_on_cluster(dask, return_parts, options.workers):
        from demotools.cluster import cluster_decoders

        decoders = cluster_decoders(str(dask), return_parts=return_parts)
    converted = convert_files(files, folder, options, decoders=decoders)
    if not quiet:
        click.echo(converted.text())


@main.command()
@click.argument("store")
@click.option("--episode", type=int, help="Number of the episode [default: the first].")
@click.option("--mission", help="Among the episodes whose mission contains this text.")
@click.option("--longest", is_flag=True, help="The longest of them.")
@click.option("--random", is_flag=True, help="Any of them.")
@click.option("--gif", type=click.Path(path_type=Path), help="Write an animation to this file.")
@click.option("--png", type=click.Path(path_type=Path), help="Write all steps to this picture.")
@click.option("--ansi", is_flag=True, help="Print all steps, coloured.")
@click.option("--overwrite", is_flag=True, help="Replace a file of the same name.")
@_json
@_common
def show(
    store: str,
    episode: int | None,
    mission: str | None,
    longest: bool,
    random: bool,
    gif: Path | None,
    png: Path | None,
    ansi: bool,
    overwrite: bool,
    as_json: bool,
    folder: Path,
    quiet: bool,
) -> None:
    """Look at one episode of STORE as the agent saw it, and the room beside it.

    The room is played again from the episode's seed, and shown where every step agrees with the
    store. In a terminal one steps with the arrow keys; elsewhere all steps are printed.

    \b
    Example:
      demotools show GoToLocal --mission "red ball" --longest
      demotools show BossLevel --episode 7 --gif episode.gif
    """
    from demotools.output import check_output, write_output
    from demotools.show import (
        chosen_episode,
        episode_gif,
        episode_png,
        episode_text,
        show_in_terminal,
        shown_episode,
    )
    from demotools.store import open_store
    from demotools.terminal import is_interactive, is_plain

    if episode is not None and (mission is not None or longest or random):
        raise click.UsageError("--episode goes without --mission, --longest and --random")
    if longest and random:
        raise click.UsageError("--longest goes without --random")
    wanted = [(file, draw) for file, draw in ((gif, episode_gif), (png, episode_png)) if file]
    for file, _draw in wanted:
        check_output(file, overwrite=overwrite)
    opened = open_store(store_path(store, folder))
    number = chosen_episode(
        opened, episode=episode, mission=mission, longest=longest, random=random
    )
    shown = shown_episode(opened, number)
    for file, draw in wanted:
        write_output(file, draw(shown, quiet=quiet), overwrite=overwrite)
        if not quiet and not as_json:
            click.echo(f"made {file}: {shown.title}")
            click.echo("\n".join(filter(None, [f"  {shown.mission}", shown.note])))
    if as_json:
        _print_json(shown.as_json())
    elif not wanted and is_interactive() and not ansi:
        show_in_terminal(shown, coloured=not is_plain())
    elif ansi or not wanted:
        for text in episode_text(shown, coloured=ansi and not is_plain()):
            click.echo(text, color=ansi and not is_plain())


@main.command()
@click.argument("store")
@click.option(
    "--to",
    "kind",
    type=click.Choice(["pickle", "minari"]),
    required=True,
    help="The other program's layout.",
)
@click.option(
    "-o",
    "output",
    type=click.Path(path_type=Path),
    help="pickle: the file [default: beside the store, named as babyai does]; minari: the folder "
    "of datasets [default: Minari's own].",
)
@click.option("--id", "dataset_id", help="minari: the dataset's id [default: babyai/NAME-v0].")
@_overwrite
@_common
def export(
    store: str,
    kind: Literal["pickle", "minari"],
    output: Path | None,
    dataset_id: str | None,
    overwrite: bool,
    folder: Path,
    quiet: bool,
) -> None:
    """Write STORE for other programs: a legacy pickle for babyai's own loader, or a Minari dataset.

    \b
    Example:
      demotools export GoToLocal --to pickle -o demos/BabyAI-GoToLocal-v0_agent.pkl
      demotools export GoToLocal --to minari
    """
    from demotools.exchange import export_minari, export_pickle, pickle_name
    from demotools.store import open_store

    opened = open_store(store_path(store, folder))
    if kind == "minari":
        exported = export_minari(
            opened, root=output, dataset_id=dataset_id, overwrite=overwrite, quiet=quiet
        )
        text = exported.text()
    else:
        if dataset_id:
            raise click.UsageError("--id goes with --to minari")
        file = output or opened.path.with_name(pickle_name(opened))
        export_pickle(opened, file, overwrite=overwrite, quiet=quiet)
        text = f"exported {file}: {opened.episodes:,} episodes; this layout has no seeds"
    if not quiet:
        click.echo(text)


@main.command("import")
@click.argument("dataset")
@click.option(
    "--from",
    type=click.Choice(["minari"]),
    required=True,
    expose_value=False,
    help="The program that DATASET belongs to.",
)
@click.option("--level", help="The level, where the dataset does not say it.")
@click.option("--split", type=click.Choice(["train", "valid"]), help="[default: as exported]")
@click.option("--name", help="The store's name [default: LEVEL or LEVEL-valid].")
@_overwrite
@_common
def import_(
    dataset: str,
    level: str | None,
    split: Literal["train", "valid"] | None,
    name: str | None,
    overwrite: bool,
    folder: Path,
    quiet: bool,
) -> None:
    """Make a store of DATASET, the id of a Minari dataset on this machine, or its folder.

    Successes are kept; what is left out is counted. What `demotools export` wrote comes back bit
    for bit. Legacy pickles are read by `demotools convert`.

    \b
    Example:
      demotools import babyai/GoToLocal-v0 --from minari --name GoToLocal-copy
    """
    from demotools.minari_import import import_minari, opened_dataset

    opened = opened_dataset(dataset, level=level, split=split)
    path = new_store_path(name or opened.store_name, folder)
    imported = import_minari(opened, path, overwrite=overwrite, quiet=quiet)
    if not quiet:
        click.echo(imported.text())


@main.command("list")
@_json
@_common
def list_(as_json: bool, folder: Path, quiet: bool) -> None:
    """Show every level: its stores, what was fetched of it, and where it can be fetched from.

    \b
    Example:
      demotools list
    """
    from demotools.listing import listing, listing_text

    found = listing(folder)
    if as_json:
        _print_json(found)
    elif not quiet:
        click.echo(listing_text(found))


_SPLITS: dict[str, tuple[Split, ...]] = {
    "train": ("train",),
    "valid": ("valid",),
    "all": ("train", "valid"),
}


@main.command()
@click.argument("levels", nargs=-1, required=True, metavar="LEVEL...")
@click.option("--split", type=click.Choice(list(_SPLITS)), help="[default: all; of --from: train]")
@click.option(
    "--keep-pickle/--no-keep-pickle", help="Keep the download [default: until converted]."
)
@click.option("--no-convert", is_flag=True, help="Download only.")
@click.option("--from", "origin", metavar="FILE|URL", help="Take this, or hf:OWNER/NAME:FILE.")
@click.option("--mirror", metavar="URL", help="Ask for the files under this address first.")
@click.option("--check", is_flag=True, help="Check every byte of what is there already.")
@click.option("--dry-run", is_flag=True, help="Print what would be done.")
@click.option("--jobs", type=click.IntRange(1, 16), default=1, help="Downloads at once.")
@click.option(
    "--timeout",
    metavar="SECONDS",
    type=click.FloatRange(0.1, 3600),
    default=30.0,
    help="Of silence.",
)
@click.option("--retries", type=click.IntRange(min=0), default=5, help="That bring nothing new.")
@click.option("--manifests", type=click.Path(exists=True, file_okay=False), help="More manifests.")
@_overwrite
@_common
def fetch(
    levels: tuple[str, ...],
    split: str | None,
    keep_pickle: bool,
    no_convert: bool,
    origin: str | None,
    mirror: str | None,
    check: bool,
    dry_run: bool,
    jobs: int,
    timeout: float,
    retries: int,
    manifests: str | None,
    overwrite: bool,
    folder: Path,
    quiet: bool,
) -> None:
    """Download the published demonstrations of each LEVEL (or `all`), check and convert them.

    What is there already is kept; a download that was cut goes on where it was.

    \b
    Example:
      demotools fetch GoToLocal --dry-run
      demotools fetch GoToLocal --from ~/Downloads/BabyAI-GoToLocal-v0.pkl
    """
    from demotools.fetch import fetch_levels, fetch_plans
    from demotools.fetch_plan import Wishes
    from demotools.manifest import MANIFESTS_VARIABLE, level_names
    from demotools.sources import check_address
    from demotools.transfer import Patience

    if manifests:
        os.environ[MANIFESTS_VARIABLE] = manifests
    names = level_names() if levels == ("all",) else levels
    splits = _SPLITS[split or ("train" if origin else "all")]
    if origin and (len(names), len(splits)) != (1, 1):
        raise click.UsageError("--from goes with one level and one split")
    for address in (mirror, origin if "://" in (origin or "") else None):
        if address is not None:
            check_address(address)
    wishes = Wishes(not no_convert, keep_pickle, check, overwrite, origin, mirror)
    if dry_run or not quiet:
        for plan in fetch_plans(names, splits, folder, wishes):
            click.echo(plan.text())
    if dry_run:
        return
    patience = Patience(timeout, retries)
    for done in fetch_levels(names, splits, folder, wishes, patience, jobs=jobs, quiet=quiet):
        if not quiet:
            click.echo(done.text)


@main.command()
@click.argument("stores", nargs=-1, required=True, metavar="STORE...")
@click.option(
    "-o",
    "output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("report.html"),
    show_default=True,
    help="The file.",
)
@click.option(
    "--instruction-len",
    type=click.IntRange(min=1),
    help="Tokens that a network reads of a mission: how many episodes are cut?",
)
@click.option("--overwrite", is_flag=True, help="Replace a file of the same name.")
@_json
@_common
def report(
    stores: tuple[str, ...],
    output: Path,
    instruction_len: int | None,
    overwrite: bool,
    as_json: bool,
    folder: Path,
    quiet: bool,
) -> None:
    """Write one HTML file about the given stores: figures, pictures, findings.

    The findings are duplicate episodes and seeds within the stores and between them (train and
    valid, say), missions out of grammar or cut, unbalanced actions. With --json, they are printed
    and no file is written.

    \b
    Example:
      demotools report GoToLocal GoToLocal-valid -o report.html
    """
    from demotools.info import size_text
    from demotools.output import check_output, write_output
    from demotools.report import store_report

    if not as_json:
        check_output(output, overwrite=overwrite)
    paths = [store_path(store, folder) for store in stores]
    found = store_report(paths, instruction_len=instruction_len, quiet=quiet)
    if as_json:
        _print_json(found.as_json())
        return
    content = found.html.encode()
    write_output(output, content, overwrite=overwrite)
    for finding in () if quiet else found.findings:
        mark = "LOOK" if finding.alarm else "fine"
        click.echo(f"{mark}  {', '.join(finding.stores)}: {finding.name}: {finding.text}")
    if not quiet:
        click.echo(f"made {output}: {size_text(len(content))}")


@main.command()
@click.argument("store")
@click.option(
    "-o", "output", type=click.Path(path_type=Path, dir_okay=False), help="Write it to this file."
)
@click.option("--overwrite", is_flag=True, help="Replace a file of the same name.")
@_common
def card(store: str, output: Path | None, overwrite: bool, folder: Path, quiet: bool) -> None:
    """Print a dataset card of STORE: Markdown with the header that Hugging Face reads.

    \b
    Example:
      demotools card GoToLocal -o README.md
    """
    from demotools.card import store_card
    from demotools.output import write_output

    text = store_card(store_path(store, folder))
    if output is None:
        click.echo(text, nl=False)
        return
    write_output(output, text.encode(), overwrite=overwrite)
    if not quiet:
        click.echo(f"made {output}")


@main.command()
@click.argument("first", metavar="STORE")
@click.argument("second", metavar="STORE")
@_json
@_common
def diff(first: str, second: str, as_json: bool, folder: Path, quiet: bool) -> None:
    """Compare two stores: attributes, missions, and episodes wherever they stand.

    Episodes are the same where the agent saw, did and was told the same.

    \b
    Example:
      demotools diff GoToLocal GoToLocal-small
    """
    from demotools.diff import store_difference

    paths = [store_path(store, folder) for store in (first, second)]
    found = store_difference(*paths, quiet=quiet)
    if as_json:
        _print_json(found.as_json())
    else:
        click.echo(found.text())


@main.command()
@click.argument("stores", nargs=-1, required=True, metavar="STORE...")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_common
def remove(stores: tuple[str, ...], yes: bool, folder: Path, quiet: bool) -> None:
    """Remove stores, after asking. What is not a demo store is left alone.

    \b
    Example:
      demotools remove GoToLocal-small
    """
    from demotools.remove import planned_removals, remove_store

    removals = planned_removals([store_path(store, folder) for store in stores])
    if not yes:
        for removal in removals:
            click.echo(removal.text())
        if not _confirmed("Remove?", removals[0].path):
            return
    for removal in removals:
        remove_store(removal)
        if not quiet:
            click.echo(f"removed {removal.text()}")


@main.command()
@click.argument("store")
@click.argument("place", metavar="hf:OWNER/NAME")
@click.option("--private", is_flag=True, help="If the dataset must be made, make it private.")
@_common
def push(store: str, place: str, private: bool, folder: Path, quiet: bool) -> None:
    """Publish STORE as a dataset on the Hugging Face hub: its archive and its card.

    Needs the extra `hf`, and a token from `hf auth login` or $HF_TOKEN. `demotools fetch LEVEL
    --from hf:OWNER/NAME:STORE.zarr.zip` gets it back.

    \b
    Example:
      demotools push GoToLocal hf:me/babyai-demos
    """
    from demotools.push import push_store

    pushed = push_store(store_path(store, folder), place, private=private, quiet=quiet)
    if not quiet:
        click.echo(f"published {', '.join(pushed.files)} in {pushed.repository}: {pushed.url}")
