"""Views and rooms as text: two characters per cell, readable without colours, coloured on request.

The first character is the object, the second the letter of its colour, so nothing depends on the
terminal: `or` is a red ball, `kg` a green key, `xb` a blue box; an open door is `/`, a closed one
`+` and a locked one `%`.
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from demotools.babyai.cells import (
    AGENT,
    COLOURS,
    DOOR,
    EMPTY,
    OBJECTS,
    UNPACKING_TABLE,
    UNSEEN,
    WALL,
    packed_cells,
)
from demotools.errors import printable_text

LETTERS = dict(zip(COLOURS, "rgbpye", strict=True))
SYMBOLS = {
    "floor": "_",
    "door": "/+%",
    "key": "k",
    "ball": "o",
    "box": "x",
    "goal": "G",
    "lava": "~",
}
LEGEND = (
    "^ agent  o ball  k key  x box  door: / open + closed % locked; then the colour, "
    + " ".join(f"{letter} {colour}" for colour, letter in LETTERS.items())
)
# grey is a bright black; purple is nearest to magenta
_TERMINAL_COLOURS = dict(
    zip(COLOURS, ("red", "green", "blue", "magenta", "yellow", "bright_black"), strict=True)
)
_ARROWS = ">v<^"
UP = 3
_GAP = 4

# Escape sequences of a terminal in its normal and its application mode, then of Windows.
KEY = re.compile(r"\x1b[\[O](?:[A-Z]|\d+~)|[\x00\xe0].|[^\x1b]|\x1b", re.DOTALL)
QUIT_KEYS = ("q", "Q", "\x1b")

_END = 1 << 40
_MOVES = {
    **dict.fromkeys(("\x1b[D", "\x1bOD", "\x1b[A", "\x1bOA", "\xe0K", "\x00K", "h"), -1),
    **dict.fromkeys(("\x1b[C", "\x1bOC", "\x1b[B", "\x1bOB", "\xe0M", "\x00M", "l", " "), 1),
    **dict.fromkeys(("\x1b[H", "\x1bOH", "\x1b[1~", "\xe0G", "\x00G"), -_END),
    **dict.fromkeys(("\x1b[F", "\x1bOF", "\x1b[4~", "\xe0O", "\x00O"), _END),
}


@dataclass(frozen=True)
class Scene:
    """A view or a room: what stands in each cell, and the agent.

    cells       uint8 [columns, rows], packed; unseen where nothing is known
    agent       column and row
    direction   0 right, 1 down, 2 left, 3 up
    """

    cells: NDArray[np.uint8]
    agent: tuple[int, int]
    direction: int = UP


def view_scene(cells: NDArray[np.uint8]) -> Scene:
    """A view: the agent stands in the middle of its lowest row, and looks up."""
    return Scene(cells, (cells.shape[0] // 2, cells.shape[1] - 1))


def room_scene(level: Any) -> Scene:
    """The whole room of one of minigrid's environments, as it is now."""
    level = level.unwrapped
    agent = (int(level.agent_pos[0]), int(level.agent_pos[1]))
    return Scene(packed_cells(level.grid.encode()), agent, int(level.agent_dir))


def scene_lines(scene: Scene, *, coloured: bool) -> list[str]:
    """The scene as one line a row, two characters a cell.

    >>> cells = np.array([[38, 72], [18, 18]], dtype=np.uint8)
    >>> scene_lines(Scene(cells, (1, 1)), coloured=False)
    ['## .', '/r ^']
    """
    columns, rows = scene.cells.shape
    return [
        "".join(
            _cell(
                int(scene.cells[column, row]),
                _ARROWS[scene.direction] if (column, row) == scene.agent else "",
                coloured=coloured,
            )
            for column in range(columns)
        )
        for row in range(rows)
    ]


def _cell(code: int, arrow: str, *, coloured: bool) -> str:
    kind, colour, state = (int(channel) for channel in UNPACKING_TABLE[code])
    if arrow:
        # what the agent carries stands in its cell: its symbol, before the arrow
        carried = kind not in (UNSEEN, EMPTY, AGENT, DOOR) and SYMBOLS.get(OBJECTS[kind], "")
        text = f"{carried or ' '}{arrow}"
        shade = COLOURS[colour] if carried else "red"
        return click.style(text, fg=_TERMINAL_COLOURS[shade], bold=True) if coloured else text
    if kind in (UNSEEN, AGENT):
        return "  "
    if kind == EMPTY:
        return click.style(" .", dim=True) if coloured else " ."
    if kind == WALL:
        return click.style("##", fg="bright_black", bg="bright_black") if coloured else "##"
    symbols = SYMBOLS[OBJECTS[kind]]
    symbol = symbols[state] if kind == DOOR else symbols
    text = symbol + LETTERS[COLOURS[colour]]
    if not coloured:
        return text
    return click.style(text, fg=_TERMINAL_COLOURS[COLOURS[colour]], bold=True)


def page_lines(
    heading: Sequence[str],
    view: Scene,
    room: Scene | None,
    *,
    size: tuple[int, int | None],
    coloured: bool,
) -> list[str]:
    """One step as lines: heading, the view, the room beside it where it fits, the legend.

    size   columns and lines of the terminal; None lines where it may scroll
    """
    columns, rows = size
    blocks, widths = [scene_lines(view, coloured=coloured)], [2 * view.cells.shape[0]]
    lines = [line for text in heading for line in textwrap.wrap(printable_text(text), columns)]
    legend = textwrap.wrap(LEGEND, columns)
    if room is not None:
        wide = widths[0] + _GAP + 2 * room.cells.shape[0]
        high = room.cells.shape[1] + len(lines) + len(legend) + 3
        if wide <= columns and (rows is None or high <= rows):
            blocks.append(scene_lines(room, coloured=coloured))
            widths.append(2 * room.cells.shape[0])
        else:
            legend.append(f"(the room needs a terminal of {wide} columns and {high} lines)")
    return [*lines, "", *_side_by_side(blocks, widths), "", *legend]


def _side_by_side(blocks: Sequence[Sequence[str]], widths: Sequence[int]) -> list[str]:
    """Lines beside each other; `widths` are what they show, escape sequences not counted."""
    return [
        (" " * _GAP).join(
            " " * width if text is None else text for text, width in zip(row, widths, strict=True)
        )
        for row in zip_longest(*blocks)
    ]


def is_plain() -> bool:
    """Whether the user or the terminal wants no colours. Source: no-color.org."""
    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"


def is_interactive() -> bool:
    """Whether one can step through pages: keys come in, and the screen can be cleared."""
    return sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def step_through(
    pages: int, page: Callable[[int], list[str]], *, key: Callable[[], str] = click.getchar
) -> None:
    """Show one page at a time; arrow keys, Home and End move, q ends.

    page   the lines of page `number`, 0 <= number < pages
    key    gives what was typed, several keys at once if they come fast
    """
    number = 0
    while True:
        click.clear()
        click.echo("\n".join(page(number)), color=not is_plain())
        click.echo("left, right: step   Home, End: first, last   q: quit", nl=False)
        try:
            typed = KEY.findall(key())
        except EOFError:
            typed = ["q"]
        for one in typed:
            if one in QUIT_KEYS:
                click.echo()
                return
            number = min(max(number + _MOVES.get(one, 0), 0), pages - 1)
