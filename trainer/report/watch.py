"""Shows a policy playing: its view, the room, and the probability of each action."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import click

from demotools.babyai.levels import EVALUATION_SEED
from demotools.errors import printable_text
from demotools.look.show import scenes
from demotools.look.terminal import Scene, page_lines, step_through
from trainer.acting.evaluate import check_episodes
from trainer.acting.policy import NetworkPolicy, Sample
from trainer.acting.vector import check_named, check_playable
from trainer.acting.watched import Watched, played_episodes
from trainer.run.checkpoint import Checkpoint, named_checkpoint
from trainer.run.success import trains_critic
from trainer.settings.models import LEVELS

CANDIDATES = 100
"""So many episodes are played to find the worst."""
_BAR_CHARACTERS = 20
_SHOWN_LEVELS = 4


def watched_episodes(
    checkpoint: Path | Checkpoint,
    *,
    level: str | None = None,
    episodes: int = 4,
    first_seed: int = EVALUATION_SEED,
    worst: bool = False,
    sample: Sample = False,
    trust: bool = False,
    quiet: bool = True,
) -> list[Watched]:
    """Episodes that the policy of a checkpoint plays.

    checkpoint   its file, or the folder of its run, or itself
    level        None: the one that it was trained on, of several the first
    first_seed   of the environments: episode e has the seed `first_seed + e`
    sample       draw actions, as `trainer evaluate --sample` does, or only in "loops", as
                 `--sample-loops`; else the most probable ones
    worst        of at least a hundred episodes, those that went worst, the worst first
    trust        whether code that its settings name is run; see `named_checkpoint`

    CheckpointError   the checkpoint cannot be read, or has not learned a word of a mission
    LevelError        the level has no environment, or its views do not pack
    """
    check_episodes(episodes)
    saved = named_checkpoint(checkpoint, trust=trust)
    settings = saved.parsed()
    level, make = level or settings.run.level, settings.environment
    if make == LEVELS:
        check_playable(level)
    check_named(settings.model.actions, level)
    played = played_episodes(
        NetworkPolicy(saved.network(), saved.words, sample=sample),
        level,
        range(first_seed, first_seed + (max(episodes, CANDIDATES) if worst else episodes)),
        make=make,
        view=settings.model.view,
        critic=trains_critic(settings),
        quiet=quiet,
    )
    if worst:
        played.sort(key=lambda one: (one.success, -len(one.shown.action)))
    return played[:episodes]


def levels_note(checkpoint: Checkpoint) -> str:
    """Which of the levels of its training a policy plays if none is named; empty if it has one."""
    first, *others = checkpoint.parsed().run.level_names
    names = ", ".join(others[:_SHOWN_LEVELS]) + ", …" * (len(others) > _SHOWN_LEVELS)
    text = f"playing {first}; --level plays another of its levels: {names}"
    return printable_text(text) if others else ""


def _page(
    episode: Watched,
    scene: tuple[Scene, Scene | None],
    step: int,
    *,
    size: tuple[int, int | None],
    coloured: bool,
    note: str = "",
) -> list[str]:
    """The lines of one step: heading, view and room, then the actions."""
    shown = episode.shown
    notes = filter(None, [shown.note, note])
    heading = [shown.mission, episode.title, episode.step_text(step), *notes]
    bars = bar_lines(episode.bars(step), int(shown.action[step]), coloured=coloured)
    columns, rows = size
    left = (columns, None if rows is None else rows - len(bars) - 1)
    return [*page_lines(heading, *scene, size=left, coloured=coloured), "", *bars]


def bar_lines(bars: list[tuple[str, float]], marked: int, *, coloured: bool) -> list[str]:
    """Shares as lines of text; one of them is marked.

    >>> bar_lines([("left", 0.25), ("forward", 0.75)], 1, coloured=False)
    ['left    ===== 25.0%', 'forward =============== 75.0% <']
    """
    width = max(len(name) for name, _share in bars)
    lines = []
    for number, (name, share) in enumerate(bars):
        bar = "=" * round(_BAR_CHARACTERS * share)
        text = " ".join(filter(None, [f"{name:{width}}", bar, f"{share:.1%}"]))
        if number == marked:
            text = click.style(f"{text} <", fg="blue", bold=True) if coloured else f"{text} <"
        lines.append(text)
    return lines


def watch_in_terminal(episodes: list[Watched], *, coloured: bool, note: str = "") -> None:
    """Step through the episodes with the arrow keys, one after another.

    note   a line for every page
    """
    steps = list(_steps(episodes))

    def page(number: int) -> list[str]:
        columns, lines = shutil.get_terminal_size()
        # one line is for the keys
        episode, step, scene = steps[number]
        return _page(episode, scene, step, size=(columns, lines - 1), coloured=coloured, note=note)

    step_through(len(steps), page)


def watched_text(episodes: list[Watched], *, coloured: bool) -> Iterator[str]:
    """Every step of the episodes, one after another."""
    size = (shutil.get_terminal_size().columns, None)
    for episode, step, scene in _steps(episodes):
        yield "\n".join([*_page(episode, scene, step, size=size, coloured=coloured), ""])


def _steps(
    episodes: list[Watched],
) -> Iterator[tuple[Watched, int, tuple[Scene, Scene | None]]]:
    for episode in episodes:
        for step, scene in enumerate(scenes(episode.shown)):
            yield episode, step, scene
