"""Which of the three object encodings a file is in, told from its episodes.

Two kinds of evidence. Cells that an encoding cannot have exclude it at once: grey walls are
object 1 only in the first encoding and object 2 only in the others, a state of 2 exists only
today, object 8 is a box only in the second (no BabyAI level has a goal cell). And a demonstration
succeeds with its last action, so the object that this acts on is one that the mission names.

Two things are told apart by where they stand: object 5 is a locked door in the second encoding and
a key today, and a door stands in a wall; object 10, the agent, never stands in an egocentric view.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from demotools.grid import (
    ACTIONS,
    AGENT,
    AGENT_COLUMN,
    AGENT_ROW,
    COLOURS,
    DOOR,
    KEY,
    OBJECTS,
    UNSEEN,
    WALL,
    Encoding,
    recoding_table,
)

_GREY = COLOURS.index("grey")
_OBJECT_8 = 8
_CARRIED = ("key", "ball", "box")
# How many rows ahead of the agent the object of the last action stands. The last observation is
# the one before that action; a `drop` acts on what the agent's own cell shows, the carried object.
_ROWS_AHEAD = {"forward": 2, "pickup": 1, "toggle": 1, "drop": 0}
_DESCRIPTION = re.compile(rf"\b(?:({'|'.join(COLOURS)}) )?(key|ball|box|door|object)\b")
_TOLERATED = 0.1


def _possible_cells(encoding: Encoding) -> NDArray[np.bool_]:
    """bool [11, 6, 3]: the (object, colour, state) that a BabyAI level can show in `encoding`."""
    possible: NDArray[np.bool_] = recoding_table(encoding) != 255
    if encoding is Encoding.TODAY:
        possible[AGENT] = False
        possible[:DOOR, :, 1:] = possible[DOOR + 1 :, :, 1:] = False
    wall, not_wall = (1, 2) if encoding is Encoding.FIRST else (2, 1)
    possible[wall, :_GREY] = False
    possible[not_wall, _GREY] = False
    if encoding is not Encoding.SECOND:
        possible[_OBJECT_8] = False
    return possible


_POSSIBLE = {encoding: _possible_cells(encoding) for encoding in Encoding}
_CODES = {encoding: recoding_table(encoding) for encoding in Encoding}


@dataclass
class Evidence:
    """What the episodes seen so far say of each encoding, in numbers of episodes.

    with_agent   that show today's agent
    impossible   with a cell that the encoding cannot have
    agreeing     whose last action acts on an object that the mission names
    differing    whose last action acts on something else
    """

    episodes: int = 0
    with_agent: int = 0
    impossible: dict[Encoding, int] = field(default_factory=lambda: dict.fromkeys(Encoding, 0))
    agreeing: dict[Encoding, int] = field(default_factory=lambda: dict.fromkeys(Encoding, 0))
    differing: dict[Encoding, int] = field(default_factory=lambda: dict.fromkeys(Encoding, 0))

    def add(self, images: NDArray[np.uint8], mission: str, action: int) -> None:
        """Take an episode into account.

        images   uint8 [T, 7, 7, 3]
        action   the last one
        """
        self.episodes += 1
        flat = images.reshape(-1)
        # channel by channel: numpy is slow on a last axis of three
        kind, colour, state = (
            np.minimum(flat[channel::3], last, dtype=np.uint8).astype(np.intp)
            for channel, last in enumerate((11, 6, 3))
        )
        present = np.bincount((kind * 7 + colour) * 4 + state, minlength=12 * 7 * 4) > 0
        present = present.reshape(12, 7, 4)
        outside = present.copy()
        outside[:11, :6, :3] = False
        self.with_agent += bool(present[AGENT].any())
        loose_key = bool(present[KEY].any()) and _stands_free(images[..., 0], KEY)
        target = _target(images[-1], action)
        named = _named_objects(mission)
        for encoding in Encoding:
            strange = (present[:11, :6, :3] & ~_POSSIBLE[encoding]).any() or outside.any()
            no_door = encoding is Encoding.SECOND and loose_key
            self.impossible[encoding] += bool(strange) or no_door
            if target is not None and named:
                agrees = _described(target, encoding) & named
                (self.agreeing if agrees else self.differing)[encoding] += 1

    @property
    def encoding(self) -> Encoding | None:
        """The only encoding that fits; None where none or several do."""
        fitting = [encoding for encoding in Encoding if self._fits(encoding)]
        return fitting[0] if len(fitting) == 1 else None

    def _fits(self, encoding: Encoding) -> bool:
        agreeing, differing = self.agreeing[encoding], self.differing[encoding]
        rarely = differing <= _TOLERATED * (agreeing + differing)
        return self.impossible[encoding] == 0 and rarely

    def __str__(self) -> str:
        lines = [
            f"{encoding} ({self.impossible[encoding]} with impossible cells, last action on the "
            f"mission's object in {self.agreeing[encoding]} of "
            f"{self.agreeing[encoding] + self.differing[encoding]})"
            for encoding in Encoding
        ]
        return f"{self.episodes} episodes read as " + ", ".join(lines)


def _stands_free(kind: NDArray[np.uint8], number: int) -> bool:
    """Whether an object of this number stands where no door can: not between walls.

    kind   uint8 [T, 7, 7], the objects of the views of the second or today's encoding
    """
    outer = np.pad(kind, ((0, 0), (1, 1), (1, 1)), constant_values=UNSEEN)
    walled = (outer == WALL) | (outer == UNSEEN)
    across = walled[:, :-2, 1:-1] & walled[:, 2:, 1:-1]
    along = walled[:, 1:-1, :-2] & walled[:, 1:-1, 2:]
    # the agent's own cell shows what it carries
    free = (kind == number) & ~across & ~along
    return bool(free.any())


def _target(image: NDArray[np.uint8], action: int) -> tuple[int, int, int] | None:
    """The (object, colour, state) that the last action acts on; None for turns and `done`."""
    ahead = _ROWS_AHEAD.get(ACTIONS[action])
    if ahead is None:
        return None
    kind, colour, state = image[AGENT_COLUMN, AGENT_ROW - ahead].tolist()
    return kind, colour, state


def _named_objects(mission: str) -> set[tuple[str, str]]:
    """The (colour, object) that a mission names; an empty text stands for any colour.

    >>> sorted(_named_objects("go to a red ball or the door"))
    [('', 'door'), ('red', 'ball')]
    """
    named: set[tuple[str, str]] = set()
    for colour, kind in _DESCRIPTION.findall(mission.lower()):
        named.update((colour, each) for each in (_CARRIED if kind == "object" else (kind,)))
    return named


def _described(cell: tuple[int, int, int], encoding: Encoding) -> set[tuple[str, str]]:
    """How a mission may name the object of a cell: with its colour, or without."""
    kind, colour, state = cell
    if kind >= len(OBJECTS) or colour >= len(COLOURS) or state >= 3:
        return set()
    code = int(_CODES[encoding][kind, colour, state])
    if code == 255:
        return set()
    name = OBJECTS[code // 18]
    return {("", name), (COLOURS[code % 18 // 3], name)}
