"""`demotools show`."""

from __future__ import annotations

from pathlib import Path

import click

from demotools.commands.options import common, json_output, print_json, say


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
def command(
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
    from demotools.store import open_store, store_path
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
            say(f"made {file}: {shown.title}")
            say(*filter(None, [f"  {shown.mission}", shown.note]))
    if as_json:
        print_json(shown.as_json())
    elif not wanted and is_interactive() and not ansi:
        show_in_terminal(shown, coloured=not is_plain())
    elif ansi or not wanted:
        for text in episode_text(shown, coloured=ansi and not is_plain()):
            click.echo(text, color=ansi and not is_plain())
