"""Commands that show and check stores: list, info, show, report, verify."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from demotools.cli import common, json_output, print_json, say


@click.command("list")
@json_output
@common
def list_command(as_json: bool, folder: Path, quiet: bool) -> None:
    """Show every level: its stores, what was fetched of it, and where it can be fetched from.

    \b
    Example:
      demotools list
    """
    from demotools.fetch.list import listing, listing_text

    found = listing(folder)
    if as_json:
        print_json(found)
    elif not quiet:
        say(*listing_text(found).split("\n"))


@click.command("info")
@click.argument("store")
@json_output
@common
def info_command(store: str, as_json: bool, folder: Path, quiet: bool) -> None:
    """Show what STORE holds, where it came from, and a table of its arrays.

    \b
    Example:
      demotools info GoToLocal
    """
    from demotools.look.info import info_text, store_info
    from demotools.store.reading import store_path

    found = store_info(store_path(store, folder))
    if as_json:
        print_json(found)
    elif not quiet:
        say(*info_text(found).split("\n"))


@click.command("show")
@click.argument("store")
@click.option("--episode", type=int, help="Number of the episode [default: the first].")
@click.option("--mission", help="Among the episodes whose mission contains this text.")
@click.option("--longest", is_flag=True, help="The longest of them.")
@click.option("--random", is_flag=True, help="Any of them.")
@click.option("--gif", type=click.Path(path_type=Path), help="Write an animation to this file.")
@click.option("--png", type=click.Path(path_type=Path), help="Write all steps to this picture.")
@click.option("--ansi", is_flag=True, help="Print all steps, coloured.")
@click.option("--overwrite", is_flag=True, help="Replace a file of the same name.")
@json_output
@common
def show_command(
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
    from demotools.look.show import (
        chosen_episode,
        episode_gif,
        episode_png,
        episode_text,
        show_in_terminal,
        shown_episode,
    )
    from demotools.look.terminal import is_interactive, is_plain
    from demotools.output import check_output, write_output
    from demotools.store.reading import open_store, store_path

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
            say(f"made {file}: {shown.title}")
            say(*filter(None, [f"  {shown.mission}", shown.note]))
    if as_json:
        print_json(shown.as_json())
    elif not wanted and is_interactive() and not ansi:
        show_in_terminal(shown, coloured=not is_plain())
    elif ansi or not wanted:
        for text in episode_text(shown, coloured=ansi and not is_plain()):
            click.echo(text, color=ansi and not is_plain())


@click.command("report")
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
@json_output
@common
def report_command(
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
    valid, say), missions out of grammar or cut, unbalanced actions; and of every two stores what
    they have in common: attributes, missions, episodes. With --json, they are printed and no file
    is written.

    \b
    Example:
      demotools report GoToLocal GoToLocal-valid -o report.html
    """
    from demotools.look.report import store_report
    from demotools.output import check_output, size_text, write_output
    from demotools.store.reading import store_path

    if not as_json:
        check_output(output, overwrite=overwrite)
    paths = [store_path(store, folder) for store in stores]
    found = store_report(paths, instruction_len=instruction_len, quiet=quiet)
    if as_json:
        print_json(found.as_json())
        return
    content = found.html.encode()
    write_output(output, content, overwrite=overwrite)
    for finding in () if quiet else found.findings:
        mark = "LOOK" if finding.alarm else "fine"
        say(f"{mark}  {', '.join(finding.stores)}: {finding.name}: {finding.text}")
    if not quiet:
        say(f"made {output}: {size_text(len(content))}")


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
def verify_command(
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
    from demotools.recording.replay import replay_check
    from demotools.store.reading import store_path
    from demotools.store.verify import raise_if_damaged, verify_store

    if episodes and not replay:
        raise click.UsageError("--episodes goes with --replay")
    path = store_path(store, folder)
    played = partial(replay_check, episodes=episodes or 1000, quiet=quiet) if replay else None
    checks = verify_store(path, replay=played, quiet=quiet)
    if as_json:
        print_json([check.as_json() for check in checks])
    elif not quiet:
        for check in checks:
            say(*check.text().split("\n"))
    raise_if_damaged(path, checks)
