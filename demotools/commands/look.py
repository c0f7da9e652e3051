"""Commands that show and check stores: list, info, show, report, verify."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from demotools.cli import (
    Shell,
    common,
    ended_option,
    episodes_option,
    output_option,
    overwrite_file,
    print_json,
    say,
    stores_argument,
)


@click.command("list")
@common
def list_command(shell: Shell) -> None:
    """List the levels with their stores, downloads and sources.

    \b
    Example:
      demotools list
    """
    from demotools.fetch.list import listing, listing_text

    found = listing(shell.folder)
    shell.print(found, *listing_text(found).split("\n"))


@click.command("info")
@click.argument("store")
@common
def info_command(shell: Shell, store: str) -> None:
    """Show what a store holds and where it came from.

    \b
    Example:
      demotools info GoToLocal
    """
    from demotools.look.info import info_text, store_info

    found = store_info(shell.store(store))
    shell.print(found, *info_text(found).split("\n"))


@click.command("show")
@click.argument("store")
@click.option(
    "--episode", metavar="N", type=int, show_default="the first", help="Number of the episode."
)
@click.option(
    "--mission", metavar="TEXT", help="Choose among episodes whose mission contains TEXT."
)
@ended_option("Choose among episodes that ended this way (success, failure, truncation).")
@click.option("--longest", is_flag=True, help="Choose the longest episode.")
@click.option("--random", is_flag=True, help="Choose an episode at random.")
@click.option("--gif", type=click.Path(path_type=Path), help="Write an animation to this file.")
@click.option(
    "--png", type=click.Path(path_type=Path), help="Write a picture of all steps to this file."
)
@click.option("--ansi", is_flag=True, help="Print all steps in colour.")
@overwrite_file
@common
def show_command(
    shell: Shell,
    store: str,
    episode: int | None,
    gif: Path | None,
    png: Path | None,
    ansi: bool,
    overwrite: bool,
    **choice: Any,
) -> None:
    """Show an episode: what the agent saw, and the whole room.

    The room comes from replaying the episode from its seed; it is shown only if every step matches
    the store. In a terminal, step with the arrow keys; otherwise all steps are printed.

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
    from demotools.store.reading import open_store

    if episode is not None and any(value not in (None, False) for value in choice.values()):
        raise click.UsageError(
            "--episode cannot be combined with --mission, --ended, --longest or --random"
        )
    if choice["longest"] and choice["random"]:
        raise click.UsageError("--longest cannot be combined with --random")
    wanted = [(file, draw) for file, draw in ((gif, episode_gif), (png, episode_png)) if file]
    for file, _draw in wanted:
        check_output(file, overwrite=overwrite)
    opened = open_store(shell.store(store))
    shown = shown_episode(opened, chosen_episode(opened, episode=episode, **choice))
    for file, draw in wanted:
        write_output(file, draw(shown, quiet=shell.quiet), overwrite=overwrite)
        if not shell.quiet and not shell.as_json:
            say(f"made {file}: {shown.title}")
            say(*filter(None, [f"  {shown.mission}", shown.note]))
    if shell.as_json:
        print_json(shown.as_json())
    elif not wanted and is_interactive() and not ansi:
        show_in_terminal(shown, coloured=not is_plain())
    elif ansi or not wanted:
        for text in episode_text(shown, coloured=ansi and not is_plain()):
            click.echo(text, color=ansi and not is_plain())


@click.command("report")
@stores_argument
@output_option("Write the report to this file.", "report.html", dir_okay=False)
@click.option(
    "--instruction-len",
    metavar="N",
    type=click.IntRange(min=1),
    help="Count the missions that a network reading N tokens would truncate.",
)
@overwrite_file
@common
def report_command(
    shell: Shell,
    stores: tuple[str, ...],
    output: Path | None,
    instruction_len: int | None,
    overwrite: bool,
) -> None:
    """Write an HTML report about one or more stores.

    It shows figures, pictures and findings: duplicate episodes and seeds within a store or between
    stores (such as train and valid), missions outside the grammar or truncated, unbalanced actions,
    and the attributes, missions and episodes that stores have in common. With --json, figures and
    findings are printed and no report is written.

    \b
    Example:
      demotools report GoToLocal GoToLocal-valid -o report.html
    """
    from demotools.look.report import store_report
    from demotools.output import check_output, size_text, write_output

    output = output or Path("report.html")
    if not shell.as_json:
        check_output(output, overwrite=overwrite)
    paths = [shell.store(store) for store in stores]
    found = store_report(paths, instruction_len=instruction_len, quiet=shell.quiet)
    if shell.as_json:
        print_json(found.as_json())
        return
    content = found.html.encode()
    write_output(output, content, overwrite=overwrite)
    for finding in () if shell.quiet else found.findings:
        mark = "LOOK" if finding.alarm else "fine"
        say(f"{mark}  {', '.join(finding.stores)}: {finding.name}: {finding.text}")
    if not shell.quiet:
        say(f"made {output}: {size_text(len(content))}")


@click.command("verify")
@click.argument("store")
@click.option("--replay", is_flag=True, help="Also replay episodes in the environment.")
@episodes_option("With --replay: replay at most N episodes, evenly spaced.", show_default="1000")
@common
def verify_command(shell: Shell, store: str, replay: bool, episodes: int | None) -> None:
    """Check a store for damage: every byte and every array.

    --replay replays the stored actions in the environment and compares every view, direction and
    mission, and the reward. Episodes without a known seed, or recorded with another version of the
    environment, are reported as such.

    \b
    Example:
      demotools verify GoToLocal --replay --episodes 200
    """
    from demotools.recording.replay import replay_check
    from demotools.store.verify import raise_if_damaged, verify_store

    if episodes and not replay:
        raise click.UsageError("--episodes needs --replay")
    path = shell.store(store)
    played = partial(replay_check, episodes=episodes or 1000, quiet=shell.quiet) if replay else None
    checks = verify_store(path, replay=played, quiet=shell.quiet)
    lines = [line for check in checks for line in check.text().split("\n")]
    shell.print([check.as_json() for check in checks], *lines)
    raise_if_damaged(path, checks)
