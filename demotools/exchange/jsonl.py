"""A store as text, for language models: JSON lines, one episode a line, every view described.

{"mission": "go to the red ball", "seed": 7, "steps": [{"direction": "up", "view": "You see a wall
2 steps forward. You see a red ball 1 step left and 3 steps forward.", "action": "left"}, …]}

A view is described from the agent's position: what it carries, the nearest wall ahead and on each
side, then every visible object, nearest first, in the words of the missions. Steps of a recording
with noise also have `taken`, the action that was taken instead of the expert's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO

from demotools.babyai.cells import (
    ACTIONS,
    AGENT_COLUMN,
    AGENT_ROW,
    COLOURS,
    DOOR,
    EGOCENTRIC_CODES,
    KEY,
    OBJECTS,
    STATES,
    VIEW_SIZE,
    WALL,
)
from demotools.errors import StoreError
from demotools.exchange.export import Exported, store_batches
from demotools.output import check_output, progress_bar, written_whole
from demotools.store.reading import Store

SUFFIX = ".jsonl"
STDOUT = Path("-")
DIRECTIONS = ("right", "down", "left", "up")


def _things() -> dict[int, str]:
    """What the cells show that are worth telling: code -> text."""
    things = {}
    for code in range(EGOCENTRIC_CODES):
        kind, colour, state = code // 18, COLOURS[code % 18 // 3], STATES[code % 3]
        if kind == DOOR:
            things[code] = f"{'an' if state == 'open' else 'a'} {state} {colour} door"
        elif kind >= KEY:
            things[code] = f"a {colour} {OBJECTS[kind]}"
    return things


def _place(column: int, row: int) -> str:
    """Where a cell lies as the agent sees it.

    >>> _place(2, 3), _place(3, 5), _place(5, 6)
    ('1 step left and 3 steps forward', '1 step forward', '2 steps right')
    """
    side, ahead = column - AGENT_COLUMN, AGENT_ROW - row
    parts = ((abs(side), "left" if side < 0 else "right"), (ahead, "forward"))
    phrases = [f"{n} step{'s' if n > 1 else ''} {way}" for n, way in parts if n]
    return " and ".join(phrases)


_THINGS = _things()
_PLACES = {
    column * VIEW_SIZE + row: _place(column, row)
    for _distance, row, column in sorted(
        (abs(column - AGENT_COLUMN) + AGENT_ROW - row, row, column)
        for column in range(VIEW_SIZE)
        for row in range(VIEW_SIZE)
        if (column, row) != (AGENT_COLUMN, AGENT_ROW)
    )
}
_OWN = AGENT_COLUMN * VIEW_SIZE + AGENT_ROW
_LINES = (
    tuple(_OWN - step for step in range(1, AGENT_ROW + 1)),
    tuple(_OWN - VIEW_SIZE * step for step in range(1, AGENT_COLUMN + 1)),
    tuple(_OWN + VIEW_SIZE * step for step in range(1, VIEW_SIZE - AGENT_COLUMN)),
)


@lru_cache(maxsize=1 << 16)
def described_view(cells: bytes) -> str:
    """What the agent sees, in sentences.

    cells   a packed view, 49 bytes

    >>> view = bytearray(49)
    >>> view[3 * 7 + 4], view[3 * 7 + 6], view[1 * 7 + 3] = 2 * 18 + 15, 5 * 18 + 6, 4 * 18 + 1
    >>> described_view(bytes(view))[:62]
    'You carry a blue key. You see a wall 2 steps forward. You see '
    """
    phrases = [f"You carry {_THINGS[cells[_OWN]]}."] if cells[_OWN] in _THINGS else []
    for line in _LINES:
        wall = next((place for place in line if cells[place] // 18 == WALL), None)
        if wall is not None:
            phrases.append(f"You see a wall {_PLACES[wall]}.")
    for place, where in _PLACES.items():
        if thing := _THINGS.get(cells[place]):
            phrases.append(f"You see {thing} {where}.")
    return " ".join(phrases) or "You see nothing."


def export_jsonl(
    store: Store, path: Path | None = None, *, overwrite: bool = False, quiet: bool = False
) -> Exported:
    """Write a store as JSON lines of text.

    path   None means beside the store; `-` the standard output

    StoreError      the views do not pack into cells: no other is described
    DemotoolsError  the file exists and `overwrite` is False, or it cannot be written
    """
    if not store.packed:
        raise StoreError(
            "the views are not minigrid's 7 x 7 cells, so they cannot be described",
            path=store.path,
            fix="export it with --to pickle or --to minari",
        )
    path = path or store.path.with_name(store.name + SUFFIX)
    if path != STDOUT:
        check_output(path, overwrite=overwrite)
    size_bytes = 0
    with (
        progress_bar(store.episodes, path.name, "episodes", quiet=quiet) as bar,
        _stream(path) as stream,
    ):
        for batch in store_batches(store):
            for episode in batch:
                line = json.dumps(_episode(store, episode), ensure_ascii=False).encode() + b"\n"
                size_bytes += len(line)
                stream.write(line)
            bar.update(len(batch))
    return Exported(path, store.episodes, size_bytes)


@contextmanager
def _stream(path: Path) -> Iterator[IO[bytes]]:
    if path == STDOUT:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
    else:
        with written_whole(path) as stream:
            yield stream


def _episode(store: Store, number: int) -> dict[str, object]:
    episode = store[number]
    steps: list[dict[str, str]] = [
        {
            "direction": DIRECTIONS[facing],
            "view": described_view(cells.tobytes()),
            "action": ACTIONS[chosen],
        }
        for cells, facing, chosen in zip(
            episode.cells, episode.directions, episode.actions, strict=True
        )
    ]
    if "taken" in store.optional:
        for step, taken in zip(steps, episode.taken, strict=True):
            step["taken"] = ACTIONS[taken]
    return {
        "mission": episode.mission,
        "seed": episode.seed if episode.seed >= 0 else None,
        "steps": steps,
    }
