"""What a demo file's name says about it, and which object encoding the file uses.

There are two kinds of evidence. Cells that an encoding cannot have rule it out: grey walls are
object 1 only in the first encoding and object 2 only in the others, a state of 2 exists only in
today's, and object 8 is a box only in the second (no BabyAI level has a goal cell). And a
demonstration succeeds with its last action, so the object of that action must be one that the
mission names.

Position tells apart two cases: object 5 is a locked door in the second encoding and a key in
today's, and doors are in walls; object 10, the agent, never appears in an egocentric view.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from demotools.babyai.cells import (
    ACTIONS,
    AGENT,
    AGENT_COLUMN,
    AGENT_ROW,
    COLOURS,
    DOOR,
    KEY,
    OBJECTS,
    TYPES,
    UNSEEN,
    WALL,
    Encoding,
    recoding_table,
)
from demotools.babyai.levels import level_from_environment_id
from demotools.errors import PickleError, os_refusals
from demotools.output import open_regular
from demotools.pickles.images import CELL_VIEW, ViewKind, part_images
from demotools.pickles.reader import Content, PickleReader

_GREY = COLOURS.index("grey")
_OBJECT_8 = 8
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
    impossible: Counter[Encoding] = field(default_factory=Counter)
    agreeing: Counter[Encoding] = field(default_factory=Counter)
    differing: Counter[Encoding] = field(default_factory=Counter)

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
        fitting = [encoding for encoding in Encoding if self.fits(encoding)]
        return fitting[0] if len(fitting) == 1 else None

    def fits(self, encoding: Encoding) -> bool:
        """Whether nothing seen so far speaks against an encoding."""
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
        named.update((colour, each) for each in (TYPES if kind == "object" else (kind,)))
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


OnError = Literal["stop", "skip"]
# make_agent_demos, make_human_demos, and jobs of theirs: `_agent.pkl.shard3.pkl`, `_shard3.pkl`
_STEM = re.compile(
    r"(?P<level>.+?)(?P<tags>(?:[._-](?:valid|train|agent|human|pkl|gz|"
    r"(?:shard|part)[._-]?\d+(?:[._-]?of[._-]?\d+)?)|[._]\d+)*)",
    re.IGNORECASE,
)
_EVIDENCE_EPISODES = 256
_EVIDENCE_STEPS = 1 << 12


@dataclass(frozen=True)
class DemoFile:
    """A file to convert and what its first episodes say.

    sha256    where it is known before the file is read
    content   where the pickle lies: `path`, or what that was unpacked to
    seeded    whether its seeds are seeds: no two are the same
    """

    path: Path
    kind: ViewKind
    evidence: str
    size_bytes: int
    modified_ns: int
    content: Path
    sha256: str | None = None
    seeded: bool = False


def guessed_level_and_split(name: str) -> tuple[str, str]:
    """What a file name of BabyAI's scripts says; a name without a tag is a training file.

    >>> guessed_level_and_split("BabyAI-GoToLocal-v0_agent_valid_shard3.pkl")
    ('GoToLocal', 'valid')
    """
    level, tags = _level_and_tags(name)
    return level_from_environment_id(level), "valid" if "valid" in tags else "train"


def _level_and_tags(name: str) -> tuple[str, str]:
    found = _STEM.fullmatch(name)
    return (found["level"], found["tags"].lower()) if found else (name, "")


def in_shard_order(files: Sequence[Path]) -> list[Path]:
    """The files, sorted by the numbers in their names, so that shard 10 follows shard 9.

    PickleError  one is no file
    """
    for path in files:
        if path.is_dir():  # before its name is asked for a level
            what, fix = _described_folder(path)
            raise PickleError(f"this is {what}", path=path, fix=fix)
        if not path.exists():
            raise PickleError(
                "there is no such file",
                path=path,
                fix="name a demo file, or `demotools fetch LEVEL` to download one",
            )
        open_regular(path).close()
    return sorted(files, key=_shard_numbers)


def _described_folder(path: Path) -> tuple[str, str]:
    """What a folder is, and what to do with it."""
    if (path / "zarr.json").exists():
        return "a Zarr folder, already converted", f"show it with: demotools info {path}"
    if (path / "metadata.json").exists() or (path / "data" / "metadata.json").exists():
        return "a folder of a Minari dataset", f"use: demotools import {path}"
    demos = sorted(file.name for file in path.glob("*.pkl*"))
    if demos:
        return (
            f"a folder, with {len(demos)} demo files in it ({demos[0]}, ...)",
            "name the files of one level and split, not the folder",
        )
    return "a folder without demo files", "name a demo file"


def _shard_numbers(path: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", _level_and_tags(path.name)[1])]


def described_file(
    path: Path, content: Content, *, encoding: str, on_error: OnError, salvage: bool
) -> DemoFile:
    """A file, with the kind of view and the object encoding of its first episodes.

    content    where its pickle lies
    encoding   one of `Encoding`, where it is known; "auto"; "image" keeps the views as they are

    PickleError     the file is no demo file, or its data fits no encoding, or several
    DemotoolsError  the operating system's
    """
    with os_refusals(path):
        status = path.stat()
        reader = PickleReader(content.path, salvage=salvage, part_steps=_EVIDENCE_STEPS)
        kind, evidence, seeds = _view_kind(reader, encoding, on_error)
    return DemoFile(
        path,
        kind,
        evidence,
        status.st_size,
        status.st_mtime_ns,
        content.path,
        content.sha256,
        # whole numbers that repeat are no seeds
        seeded=len(set(seeds)) == len(seeds),
    )


def _view_kind(
    reader: PickleReader, encoding: str, on_error: OnError
) -> tuple[ViewKind, str, list[int]]:
    """The kind of view, the evidence for it, and the seeds of the first episodes."""
    evidence, shape, one_more = Evidence(), None, False
    skipped: list[tuple[int, str]] = []
    seeds: list[int] = []
    for part in reader:
        seeds += part.seed.values()
        for place, data, found, more in part_images(reader.path, part, skipped):
            if shape is None:
                shape, one_more = found, more
            if shape != CELL_VIEW or encoding != "auto":
                as_images = shape != CELL_VIEW or encoding == "image"
                known = None if as_images else Encoding(encoding)
                return ViewKind(shape, known, one_more), "", seeds
            if found == CELL_VIEW:
                images = np.frombuffer(data, np.uint8).reshape(-1, *found)
                evidence.add(images, part.mission[place], part.action[place][-1])
            if evidence.episodes % _EVIDENCE_EPISODES == 0 and evidence.encoding is not None:
                return ViewKind(shape, evidence.encoding, one_more), str(evidence), seeds
        skipped += part.skipped
        if skipped and on_error == "stop":
            raise not_well_formed(reader.path, skipped)
    if shape is None:
        raise not_well_formed(reader.path, skipped)
    if evidence.encoding is None:
        raise _no_encoding(reader.path, evidence)
    return ViewKind(shape, evidence.encoding, one_more), str(evidence), seeds


def _no_encoding(path: Path, evidence: Evidence) -> PickleError:
    if evidence.with_agent:
        return PickleError(
            "the views show the whole room, not what the agent sees: the agent itself (object 10) "
            f"is visible in {evidence.with_agent} of {evidence.episodes} episodes",
            path=path,
            fix="store the views unchanged, with --encoding image",
        )
    return PickleError(
        f"the object encoding cannot be inferred from the data: {evidence}",
        path=path,
        fix=f"set --encoding to one of {', '.join(Encoding)}, according to the day the file was "
        "made, or to image to store the views unchanged",
    )


def not_well_formed(path: Path, skipped: list[tuple[int, str]]) -> PickleError:
    """The error of a file with episodes that are refused.

    skipped   (number, reason) of each
    """
    episode, reason = min(skipped)
    return PickleError(
        f"episode {episode} is malformed: {reason}",
        path=path,
        fix="get the file again, or skip such episodes with --on-error skip",
    )
