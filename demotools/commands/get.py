"""Commands that make stores: fetch, generate, play, convert, import."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from demotools.cli import (
    Shell,
    check_dask,
    common,
    episodes_option,
    lasting_imports,
    name_option,
    on_workers,
    overwrite_store,
    say,
    split_option,
)

if TYPE_CHECKING:
    from demotools.fetch.places import Place


def _place(_context: click.Context, _option: click.Parameter, value: str | None) -> Place | None:
    from demotools.fetch.places import place_named

    return None if value is None else place_named(value)


@click.command("fetch")
@click.argument("levels", nargs=-1, required=True, metavar="LEVEL...")
@click.option(
    "--split",
    type=click.Choice(["train", "valid", "all"]),
    show_default="all; train with --from",
    help="Split to fetch.",
)
@click.option(
    "--from",
    "origin",
    metavar="FILE|URL",
    callback=_place,
    help="Use this file instead: a path, a URL, or hf:OWNER/NAME/PATH@REVISION.",
)
@click.option(
    "--source",
    metavar="drive|archive|jat|...",
    show_default="all, in the manifest's order",
    help="Use only this source of the manifest.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan, and stop.")
@click.option("--check", is_flag=True, help="Check every byte of existing stores and downloads.")
@click.option(
    "--convert/--no-convert",
    default=True,
    show_default=True,
    help="Convert the download into a store.",
)
@click.option("--keep-pickle", is_flag=True, help="Keep the download after conversion.")
@click.option(
    "--timeout",
    "timeout_seconds",
    metavar="SECONDS",
    type=click.FloatRange(0.1, 3600),
    default=30.0,
    show_default=True,
    help="Abandon an attempt after SECONDS without data.",
)
@click.option(
    "--retries",
    metavar="N",
    type=click.IntRange(min=0),
    default=5,
    show_default=True,
    help="Give up after N retries in a row without new data.",
)
@click.option(
    "--manifests",
    type=click.Path(exists=True, file_okay=False),
    show_default="$DEMOTOOLS_MANIFESTS",
    help="Folder of additional manifests (docs/fetch.md).",
)
@overwrite_store
@common
def fetch_command(
    shell: Shell,
    levels: tuple[str, ...],
    split: str | None,
    dry_run: bool,
    manifests: str | None,
    **choices: Any,
) -> None:
    """Download published demonstrations, check and convert them.

    LEVEL is the name of a level, or `all`. Its sources are tried in the order of its manifest.
    Existing stores and downloads are kept; an interrupted download resumes where it stopped.
    --json prints the plan.

    \b
    Example:
      demotools fetch GoToLocal --dry-run
      demotools fetch GoToLocal --source jat
      demotools fetch GoToLocal --from ~/Downloads/BabyAI-GoToLocal-v0.pkl
    """
    from demotools.babyai.levels import MANIFESTS_VARIABLE, SPLITS, level_names
    from demotools.fetch.job import fetch_levels, fetch_plans
    from demotools.fetch.plan import FetchOptions
    from demotools.output import variable_set

    origin = choices["origin"]
    named = origin is not None and origin.kind == "file" and re.fullmatch(r"\w+", origin.name)
    if named and not Path(origin.name).exists():  # `--from jat`, as people guess
        choices |= {"origin": None, "source": choices["source"] or origin.name}
    if manifests:
        click.get_current_context().with_resource(variable_set(MANIFESTS_VARIABLE, manifests))
    options = FetchOptions(**choices, quiet=shell.quiet or shell.as_json)
    names = level_names() if levels == ("all",) else levels
    chosen = split or ("train" if options.origin else "all")
    splits = tuple(each for each in SPLITS if chosen in (each, "all"))
    if options.origin is not None and options.source is not None:
        raise click.UsageError(
            "--source picks one of the manifest's sources, --from replaces them: give only one"
        )
    if options.origin is not None and (len(names), len(splits)) != (1, 1):
        raise click.UsageError("--from takes one level and one split")
    if dry_run or shell.as_json or not shell.quiet:
        plans = fetch_plans(names, splits, shell.folder, options)
        lines = [line for plan in plans for line in plan.text().split("\n")]
        replace(shell, quiet=False).print([plan.as_json() for plan in plans], *lines)
    if dry_run:
        return
    for text in fetch_levels(names, splits, shell.folder, options):
        if not options.quiet:
            say(*text.split("\n"))


@click.command("generate")
@click.argument("level")
@episodes_option("Record N solved episodes.", show_default="all, with --seeds")
@split_option(True, default="train")
@click.option(
    "--seed",
    type=int,
    show_default="0 for train, 1000000000 for valid",
    help="First environment seed.",
)
@click.option(
    "--seeds",
    metavar="LIST|FILE",
    help="Play only these environment seeds: a list such as 0-999,5000 or a file of such lists.",
)
@click.option(
    "--noise",
    metavar="P",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Start random actions with probability P at each step; `taken` stores the actions taken, "
    "`action` the bot's advice.",
)
@click.option(
    "--burst",
    metavar="N",
    type=click.IntRange(min=1),
    show_default="5",
    help="With --noise: take 1 to N random actions in a row.",
)
@click.option(
    "--subgoals", is_flag=True, help="Store the bot's subgoal at each step, as `subgoal`."
)
@click.option(
    "--keep-failures",
    is_flag=True,
    help="Store unsolved episodes too, with `reward` and `terminated` at each step.",
)
@on_workers
@name_option("LEVEL or LEVEL-valid")
@overwrite_store
@common
def generate_command(
    shell: Shell,
    level: str,
    episodes: int | None,
    split: Literal["train", "valid"],
    seed: int | None,
    seeds: str | None,
    noise: float,
    burst: int | None,
    subgoals: bool,
    keep_failures: bool,
    name: str | None,
    **how: Any,
) -> None:
    """Record the expert bot playing a level.

    The store holds the first episodes that the bot solves, in seed order. The same options give the
    same store, bit for bit, with any number of workers. An interrupted recording resumes where it
    stopped.

    \b
    Example:
      demotools generate GoToLocal --episodes 1000
      demotools generate BossLevel --episodes 1000 --noise 0.01 --subgoals
      demotools generate castle:Castle-Red-v0 --episodes 1000
    """
    from demotools.babyai.levels import seeds_of, store_name
    from demotools.recording.bot import Style
    from demotools.recording.record import generate as record
    from demotools.recording.record import planned_recording
    from demotools.recording.registration import own_level

    if burst and not noise:
        raise click.UsageError("--burst needs --noise")
    style = Style(noise, burst or 5, subgoals, keep_failures)
    if seed is not None and seeds is not None:
        raise click.UsageError("--seed cannot be combined with --seeds")
    if episodes is None and seeds is None:
        raise click.UsageError("say how many episodes with --episodes, or which with --seeds")
    recording = planned_recording(
        own_level(level),
        episodes,
        split=split,
        first_seed=seed,
        style=style,
        seeds=None if seeds is None else seeds_of(seeds),
    )
    path = shell.new_store(name or store_name(recording.level, split))
    check_dask(how["dask"], how["workers"])
    shell.print_result(record(recording, path, **how, quiet=shell.quiet))


@click.command("play")
@click.argument("level")
@episodes_option("Stop after N solved episodes.")
@click.option(
    "--seed", type=int, show_default="after those in the store", help="First environment seed."
)
@click.option("--room", is_flag=True, help="Show the whole room, not only what the agent sees.")
@click.option("--window", is_flag=True, help="Play in a window instead of the terminal.")
@name_option("LEVEL-human", "Name of your store.")
@common
def play_command(
    shell: Shell,
    level: str,
    episodes: int | None,
    seed: int | None,
    room: bool,
    window: bool,
    name: str | None,
) -> None:
    """Play a level yourself, and store the episodes that you solve.

    The arrow keys turn and move; p picks up, d drops, the space bar opens doors; n skips the
    episode, q quits. Each solved episode is saved immediately.

    \b
    Example:
      demotools play GoToLocal
      demotools play BossLevel --window -o my-demos
    """
    from demotools.look.play import TerminalPlayer, WindowPlayer, check_terminal
    from demotools.recording.human import play
    from demotools.recording.registration import own_level

    if not window:
        check_terminal()
    level = own_level(level)
    player = WindowPlayer(room=room) if window else TerminalPlayer(room=room)
    path = shell.new_store(name or f"{level}-human")
    played = play(level, path, player, first_seed=seed, episodes=episodes)
    shell.print_result(played)


@click.command("convert")
@click.argument(
    "files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE..."
)
@click.option("--level", show_default="from the file name", help="Level of the demonstrations.")
@split_option("from the file name")
@click.option(
    "--encoding",
    type=click.Choice(["auto", "2018-08-28", "2018-11-16", "2019-01-08", "image"]),
    default="auto",
    show_default=True,
    help="Object encoding of the views, named after its first day; `image` keeps them unchanged.",
)
@click.option(
    "--on-error",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    help="Refuse a file that has a malformed episode, or skip such episodes.",
)
@click.option("--salvage", is_flag=True, help="Convert the intact part of a truncated file.")
@on_workers
@name_option("LEVEL or LEVEL-valid")
@overwrite_store
@common
def convert_command(
    shell: Shell,
    files: tuple[Path, ...],
    **choices: Any,
) -> None:
    """Convert legacy demo pickles into a store.

    Several files become one store, in the order of the shard numbers in their names. Nothing in
    the files is executed. The object encoding is inferred from the data and translated to today's.
    An interrupted conversion resumes where it stopped.

    \b
    Example:
      demotools convert BabyAI-GoToLocal-v0.pkl
    """
    with lasting_imports():
        from demotools.pickles.convert import ConvertOptions, convert_files

    options = ConvertOptions(quiet=shell.quiet, **choices)
    check_dask(options.dask, options.workers)
    shell.print_result(convert_files(files, shell.folder, options))


@click.command("import")
@click.argument("dataset")
@click.option(
    "--from",
    "kind",
    type=click.Choice(["minari", "parquet"]),
    show_default="detected",
    help="Format of DATASET.",
)
@click.option("--level", show_default="from the dataset", help="Level of the demonstrations.")
@split_option("from the dataset, or train")
@name_option("LEVEL or LEVEL-valid")
@overwrite_store
@common
def import_command(
    shell: Shell,
    dataset: str,
    kind: str | None,
    level: str | None,
    split: Literal["train", "valid"] | None,
    name: str | None,
    overwrite: bool,
) -> None:
    """Import a Minari dataset, or parquet files, as a store.

    DATASET is the id or folder of a Minari dataset on this machine, or a parquet file in the schema
    of the JAT data set, or a folder of such files. What `demotools export` wrote comes back bit for
    bit, with the exceptions listed in docs/exchange.md. Of other datasets, only the successful
    episodes are imported. For legacy pickles, use `demotools convert`.

    \b
    Example:
      demotools import babyai/GoToLocal-v0 --name GoToLocal-copy
      demotools import GoToLocal.parquet
    """
    from demotools.babyai.levels import store_name
    from demotools.exchange.minari_import import import_minari, opened_dataset
    from demotools.exchange.parquet import SUFFIX, import_parquet, opened_parquet

    place = Path(dataset)
    named_so = dataset.endswith(SUFFIX) and not place.is_dir()
    is_parquet = named_so or any(place.glob(f"*{SUFFIX}"))
    if (kind or ("parquet" if is_parquet else "minari")) == "parquet":
        opened: Any = opened_parquet(place, level=level, split=split)
        make: Any = import_parquet
    else:
        opened, make = opened_dataset(dataset, level=level, split=split), import_minari
    path = shell.new_store(name or store_name(opened.level, opened.split))
    shell.print_result(make(opened, path, overwrite=overwrite, quiet=shell.quiet))
