"""A demo file that is to be converted: what its name says, and what its first episodes show."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from demotools.decode import CELL_VIEW, ViewKind, part_images
from demotools.encodings import Evidence
from demotools.errors import PickleError, from_os_error
from demotools.grid import Encoding
from demotools.gzipped import Content
from demotools.manifest import level_from_environment_id
from demotools.output import open_regular
from demotools.pickles import PickleReader

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
    content_bytes: int
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
        return "a Zarr folder, already converted", f"look at it: demotools info {path}"
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
    path: Path,
    content: Content,
    *,
    encoding: Encoding | Literal["image"] | None,
    on_error: OnError,
    salvage: bool,
) -> DemoFile:
    """A file, its kind of view and object encoding told from its first episodes.

    content    where its pickle lies
    encoding   what it is, where that is known; "image" stores the views as they are

    PickleError     the file is no demo file, or its encoding cannot be told
    DemotoolsError  the operating system's
    """
    try:
        status = path.stat()
        reader = PickleReader(content.path, salvage=salvage, part_steps=_EVIDENCE_STEPS)
        seeds: list[int] = []
        kind, evidence = _view_kind(reader, encoding, on_error, seeds)
    except OSError as error:
        raise from_os_error(error, path) from error
    return DemoFile(
        path,
        kind,
        evidence,
        status.st_size,
        status.st_mtime_ns,
        content.path,
        content.path.stat().st_size,
        content.sha256,
        # whole numbers that repeat are no seeds
        seeded=len(set(seeds)) == len(seeds),
    )


def _view_kind(
    reader: PickleReader,
    encoding: Encoding | Literal["image"] | None,
    on_error: OnError,
    seeds: list[int],
) -> tuple[ViewKind, str]:
    """The kind of view and the evidence for it; `seeds` receives those of the first episodes."""
    path = reader.path
    evidence, shape, one_more = Evidence(), None, False
    skipped: list[tuple[int, str]] = []
    for part in reader:
        seeds += part.seed.values()
        for place, data, found, more in part_images(path, part, skipped):
            if shape is None:
                shape, one_more = found, more
            if shape != CELL_VIEW or encoding is not None:
                told = encoding if shape == CELL_VIEW and encoding != "image" else None
                return ViewKind(shape, told, one_more), ""
            if found == CELL_VIEW:
                images = np.frombuffer(data, np.uint8).reshape(-1, *found)
                evidence.add(images, part.mission[place], part.action[place][-1])
            if evidence.episodes % _EVIDENCE_EPISODES == 0 and evidence.encoding is not None:
                return ViewKind(shape, evidence.encoding, one_more), str(evidence)
        skipped += part.skipped
        if skipped and on_error == "stop":
            raise not_well_formed(path, skipped)
    if shape is None:
        raise not_well_formed(path, skipped)
    if evidence.encoding is None:
        raise _untold(path, evidence)
    return ViewKind(shape, evidence.encoding, one_more), str(evidence)


def _untold(path: Path, evidence: Evidence) -> PickleError:
    if evidence.with_agent:
        return PickleError(
            "these are views of the whole room: they show the agent (object 10), as no egocentric "
            f"view does, in {evidence.with_agent} of {evidence.episodes} episodes",
            path=path,
            fix="store them as the images that they are, with --encoding image",
        )
    return PickleError(
        f"the data does not tell its object encoding: {evidence}",
        path=path,
        fix=f"say it with --encoding, one of {', '.join(Encoding)}, by the day the file was "
        "made; or image, to store the views as they are",
    )


def not_well_formed(path: Path, skipped: list[tuple[int, str]]) -> PickleError:
    """The error of a file with episodes that are refused.

    skipped   (number, reason) of each
    """
    episode, reason = min(skipped)
    return PickleError(
        f"episode {episode} is not well formed: {reason}",
        path=path,
        fix="get the file again, or leave such episodes out with --on-error skip",
    )
