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
from demotools.manifest import level_from_environment_id
from demotools.pickles import PickleReader

OnError = Literal["stop", "skip"]
_STEM = re.compile(
    r"(?P<level>.+?)(?P<tags>(?:_(?:valid|train|agent|shard\d+))*)\.pkl", re.IGNORECASE
)
_EVIDENCE_EPISODES = 256
_EVIDENCE_STEPS = 1 << 12


@dataclass(frozen=True)
class DemoFile:
    """A file to convert and what its first episodes say."""

    path: Path
    kind: ViewKind
    evidence: str
    size_bytes: int
    modified_ns: int


def guessed_level_and_split(name: str) -> tuple[str, str]:
    """What a file name of BabyAI's scripts says; a name without a tag is a training file.

    >>> guessed_level_and_split("BabyAI-GoToLocal-v0_agent_valid_shard3.pkl")
    ('GoToLocal', 'valid')
    """
    found = _STEM.fullmatch(name)
    if found is None:
        return level_from_environment_id(name.removesuffix(".pkl")), "train"
    split = "valid" if "_valid" in found["tags"].lower() else "train"
    return level_from_environment_id(found["level"]), split


def in_shard_order(files: Sequence[Path]) -> list[Path]:
    """The files, sorted by the numbers of their shards; StoreError where one is not there.

    PickleError  one is no file
    """
    for path in files:
        if not path.is_file():  # before its name is asked for a level
            raise PickleError(
                "this is a folder" if path.is_dir() else "there is no such file",
                path=path,
                fix="name a demo file, or `demotools fetch LEVEL` to download one",
            )
    return sorted(files, key=_shard_number)


def _shard_number(path: Path) -> int:
    found = re.search(r"_shard(\d+)", path.name)
    return int(found[1]) if found else 0


def described_file(
    path: Path,
    *,
    encoding: Encoding | Literal["image"] | None,
    on_error: OnError,
    salvage: bool,
) -> DemoFile:
    """A file, its kind of view and object encoding told from its first episodes.

    encoding   what it is, where that is known; "image" stores the views as they are

    PickleError     the file is no demo file, or its encoding cannot be told
    DemotoolsError  the operating system's
    """
    try:
        status = path.stat()
        reader = PickleReader(path, salvage=salvage, part_steps=_EVIDENCE_STEPS)
        kind, evidence = _view_kind(reader, encoding, on_error)
    except OSError as error:
        raise from_os_error(error, path) from error
    return DemoFile(path, kind, evidence, status.st_size, status.st_mtime_ns)


def _view_kind(
    reader: PickleReader, encoding: Encoding | Literal["image"] | None, on_error: OnError
) -> tuple[ViewKind, str]:
    path = reader.path
    evidence, shape = Evidence(), None
    skipped: list[tuple[int, str]] = []
    for part in reader:
        for place, data, found in part_images(path, part, skipped):
            shape = shape or found
            if shape != CELL_VIEW or encoding == "image":
                return ViewKind(shape, None), ""
            if encoding is not None:
                return ViewKind(shape, encoding), ""
            if found == CELL_VIEW:
                images = np.frombuffer(data, np.uint8).reshape(-1, *found)
                evidence.add(images, part.mission[place], part.action[place][-1])
            if evidence.episodes % _EVIDENCE_EPISODES == 0 and evidence.encoding is not None:
                return ViewKind(shape, evidence.encoding), str(evidence)
        skipped += part.skipped
        if skipped and on_error == "stop":
            raise not_well_formed(path, skipped)
    if shape is None:
        raise not_well_formed(path, skipped)
    if evidence.encoding is None:
        raise PickleError(
            f"the data does not tell its object encoding: {evidence}",
            path=path,
            fix=f"say it with --encoding, one of {', '.join(Encoding)}, by the day the file was "
            "made; or image, to store the views as they are",
        )
    return ViewKind(shape, evidence.encoding), str(evidence)


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
