"""Decode a part of a legacy pickle: its blosc frames into cells of today's encoding, in columns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

from demotools.errors import PickleError, UnsafePickleError
from demotools.frames import EpisodeImages, ViewShape, frame_images, stacked_images
from demotools.grid import VIEW_SIZE, Encoding, recoded_cells
from demotools.inert import MAX_BYTES
from demotools.layouts import PicklePart
from demotools.store import Episodes

CELL_VIEW = (VIEW_SIZE, VIEW_SIZE, 3)
IMPOSSIBLE = 255
# Cells are packed in blocks that stay in the processor's cache.
_BLOCK_BYTES = 1 << 19

# One thread a process: parts are what runs in parallel.
blosc.use_threads = False


@dataclass(frozen=True)
class ViewKind:
    """What the views of a file are and become.

    shape      [H, W, C] of a view
    encoding   its object encoding; None where the views are stored as the images that they are
    """

    shape: tuple[int, ...]
    encoding: Encoding | None

    def __str__(self) -> str:
        size = " x ".join(map(str, self.shape))
        return f"{size} {self.encoding or 'image'}"


def decoded_part(
    path: Path, part: PicklePart, kind: ViewKind
) -> tuple[Episodes, list[tuple[int, str]]]:
    """The well-formed episodes of a part, and (number, reason) of the others.

    UnsafePickleError  an inner pickle names something that no array does
    """
    skipped = list(part.skipped)
    kept: list[int] = []
    blocks: list[NDArray[np.uint8]] = []
    block: list[bytes] = []
    size = 0
    for place, data, shape in part_images(path, part, skipped):
        if shape != kind.shape:
            skipped.append((part.number[place], f"its views are {ViewKind(shape, None)}"))
            continue
        kept.append(place)
        block.append(data)
        size += len(data)
        if size >= _BLOCK_BYTES:
            blocks.append(_packed(block, kind))
            block, size = [], 0
    blocks.append(_packed(block, kind))
    episodes = _in_columns(part, kept, np.concatenate(blocks))
    if kind.encoding is not None:
        episodes = _without_impossible(episodes, part, kept, kind.encoding, skipped)
    return episodes, sorted(skipped)


def part_images(
    path: Path, part: PicklePart, skipped: list[tuple[int, str]]
) -> Iterator[tuple[int, bytes, ViewShape]]:
    """(place in the part, images, [H, W, C]) of each episode whose images decode.

    skipped   receives (number, reason) of the others
    """
    with path.open("rb") as stream:
        region, low = _region(stream, part)
        for place, (start, size) in enumerate(zip(part.start, part.size, strict=True)):
            try:
                if start < 0:
                    data, shape = _loose_images(path, part, place)
                else:
                    frame = region[start - low : start - low + size] or _read(stream, start, size)
                    data, shape = frame_images(frame, len(part.action[place]), path)
            except UnsafePickleError:
                raise
            except PickleError as error:
                skipped.append((part.number[place], error.what))
            else:
                yield place, data, shape


def _region(stream: IO[bytes], part: PicklePart) -> tuple[memoryview, int]:
    """The stretch of the file that holds the part's frames, and where it starts.

    Empty where it would be too long: then the frames are read one by one.
    """
    low = min((start for start in part.start if start >= 0), default=0)
    high = max(map(sum, zip(part.start, part.size, strict=True)), default=0)
    size = high - low if 0 < high - low <= MAX_BYTES else 0
    return memoryview(_read(stream, low, size)), low


def _read(stream: IO[bytes], start: int, size: int) -> bytes:
    stream.seek(start)
    return stream.read(size)


def _loose_images(path: Path, part: PicklePart, place: int) -> EpisodeImages:
    images = part.loose[place]
    if isinstance(images, bytes):
        return frame_images(images, len(part.action[place]), path)
    return stacked_images(images, path)


def _packed(block: list[bytes], kind: ViewKind) -> NDArray[np.uint8]:
    images = np.frombuffer(b"".join(block), np.uint8).reshape(-1, *kind.shape)
    return images if kind.encoding is None else recoded_cells(images, kind.encoding)


def _in_columns(part: PicklePart, kept: list[int], view: NDArray[np.uint8]) -> Episodes:
    action = [part.action[place] for place in kept]
    direction = b"".join(part.direction[place] for place in kept)
    return Episodes(
        length=np.array([len(actions) for actions in action], dtype=np.int64),
        mission=[part.mission[place] for place in kept],
        seed=np.full(len(kept), -1, dtype=np.int64),
        view=view,
        direction=np.frombuffer(direction, np.uint8),
        action=np.frombuffer(b"".join(action), np.uint8),
    )


def _without_impossible(
    episodes: Episodes,
    part: PicklePart,
    kept: list[int],
    encoding: Encoding,
    skipped: list[tuple[int, str]],
) -> Episodes:
    """The episodes without those that show a cell which their encoding does not have."""
    if not episodes.view.size or episodes.view.max() < IMPOSSIBLE:
        return episodes
    bad_step = (episodes.view == IMPOSSIBLE).any(axis=(1, 2))
    bad = np.logical_or.reduceat(bad_step, episodes.offset[:-1])
    for place in np.flatnonzero(bad).tolist():
        reason = f"it shows a cell that the object encoding of {encoding} does not have"
        skipped.append((part.number[kept[place]], reason))
    good_step = np.repeat(~bad, episodes.length)
    return Episodes(
        length=episodes.length[~bad],
        mission=[text for text, wrong in zip(episodes.mission, bad, strict=True) if not wrong],
        seed=episodes.seed[~bad],
        view=episodes.view[good_step],
        direction=episodes.direction[good_step],
        action=episodes.action[good_step],
    )
