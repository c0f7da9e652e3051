"""Play a level by keyboard: what the agent sees, as text in the terminal or in a window."""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Callable
from typing import Any

import click

from demotools.babyai.cells import ACTIONS
from demotools.errors import DemotoolsError
from demotools.look.terminal import KEY, QUIT_KEYS, is_plain, page_lines, room_scene, view_scene
from demotools.recording.environment import Environment, Observation, observed_cells
from demotools.recording.human import QUIT, SKIP

_LEFT, _RIGHT, _FORWARD, _PICKUP, _DROP, _TOGGLE, _DONE = range(len(ACTIONS))
# Arrow keys in a terminal's normal and application mode, then of Windows; the others as minigrid's.
_KEYS = {
    **dict.fromkeys(("\x1b[D", "\x1bOD", "\xe0K", "\x00K", "h"), _LEFT),
    **dict.fromkeys(("\x1b[C", "\x1bOC", "\xe0M", "\x00M", "l"), _RIGHT),
    **dict.fromkeys(("\x1b[A", "\x1bOA", "\xe0H", "\x00H", "k"), _FORWARD),
    **dict.fromkeys(("p", "\t", "\x1b[5~"), _PICKUP),
    **dict.fromkeys(("d", "\x1b[6~"), _DROP),
    **dict.fromkeys((" ", "t"), _TOGGLE),
    **dict.fromkeys(("\r", "\n"), _DONE),
    "n": SKIP,
    **dict.fromkeys(QUIT_KEYS, QUIT),
}
HELP = (
    "left, right: turn   up: forward   p: pick up   d: drop   space: open, toggle   "
    "enter: done   n: next episode   q: quit"
)


class TerminalPlayer:
    """Somebody at a terminal.

    room   show the whole room beside the agent's view
    key    gives what was typed, several keys at once if they come fast
    """

    def __init__(self, *, room: bool, key: Callable[[], str] = click.getchar) -> None:
        self._room = room
        self._key = key
        self._typed: list[str] = []

    def action(self, environment: Environment, observation: Observation, note: str) -> int:
        """Show the present state, and wait for a key that means something."""
        click.clear()
        click.echo("\n".join(self._page(environment, observation, note)), color=not is_plain())
        click.echo(HELP, nl=False)
        while True:
            while self._typed:
                if (typed := self._typed.pop(0)) in _KEYS:
                    if _KEYS[typed] in (SKIP, QUIT):
                        self._typed.clear()
                        click.echo()
                    return _KEYS[typed]
            try:
                self._typed = KEY.findall(self._key())
            except EOFError:
                self._typed = ["q"]

    def _page(self, environment: Environment, observation: Observation, note: str) -> list[str]:
        level: Any = environment.unwrapped
        room = room_scene(level) if self._room else None
        columns, lines = shutil.get_terminal_size()
        step = f"step {level.step_count} of at most {level.max_steps}"
        heading = [str(observation["mission"]), step, *filter(None, [note])]
        view = view_scene(observed_cells(observation["image"]))
        return page_lines(heading, view, room, size=(columns, lines - 2), coloured=not is_plain())


class WindowPlayer:
    """Somebody at a window, which minigrid draws.

    room   show the whole room, not only what the agent sees
    """

    def __init__(self, *, room: bool) -> None:
        self._room = room

    def action(self, environment: Environment, observation: Observation, note: str) -> int:
        """Draw the present state, and wait for a key that means something."""
        os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
        import pygame

        level: Any = environment.unwrapped
        level.render_mode, level.agent_pov = "human", not self._room
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of a font that is replaced
                level.render()
        except pygame.error as error:
            raise DemotoolsError(
                f"no window can be opened: {error}",
                path="--window",
                fix="play in the terminal instead, without --window",
            ) from error
        pygame.display.set_caption(f"{observation['mission']}   {note}   {HELP}")
        keys = {
            pygame.K_LEFT: _LEFT,
            pygame.K_RIGHT: _RIGHT,
            pygame.K_UP: _FORWARD,
            **dict.fromkeys((pygame.K_p, pygame.K_TAB, pygame.K_PAGEUP), _PICKUP),
            **dict.fromkeys((pygame.K_d, pygame.K_LSHIFT, pygame.K_PAGEDOWN), _DROP),
            **dict.fromkeys((pygame.K_SPACE, pygame.K_t), _TOGGLE),
            pygame.K_RETURN: _DONE,
            pygame.K_n: SKIP,
            **dict.fromkeys((pygame.K_q, pygame.K_ESCAPE), QUIT),
        }
        while True:
            event = pygame.event.wait()
            if event.type == pygame.QUIT:
                return QUIT
            if event.type == pygame.KEYDOWN and event.key in keys:
                return keys[event.key]


def check_terminal() -> None:
    """DemotoolsError where nobody can type."""
    if not sys.stdin.isatty() or not sys.stdout.isatty():
        raise DemotoolsError(
            "playing needs a terminal, and this is not one",
            path="standard input",
            fix="run this in a terminal, or use --window if there is a display",
        )
