"""Decode a part of a legacy pickle: its blosc frames into cells of today's encoding, in columns."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

from demotools.errors import PickleError, UnsafePickleError
from demotools.frames import EpisodeImages, ViewShape, frame_images, stacked_images
from demotools.grid import EGOCENTRIC_CODES, VIEW_SIZE, Encoding, recoded_cells
from demotools.layouts import PicklePart
from demotools.store import Episodes

CELL_VIEW = (VIEW_SIZE, VIEW_SIZE, 3)
IMPOSSIBLE = 255
# Cells are packed in blocks that stay in the processor's cache.
_BLOCK_BYTES = 1 << 19
_READ_BYTES = 1 << 16

# One thread a process: parts are what runs in parallel.
blosc.use_threads = False


@dataclass(frozen=True)
class ViewKind:
    """What the views of a file are and become.

    shape      [H, W, C] of a view
    encoding   its object encoding; None where the views are stored as the images that they are
    one_more   whether each episode has one view more than actions, which is left out
    """

    shape: tuple[int, ...]
    encoding: Encoding | None
    one_more: bool = False

    def __str__(self) -> str:
        size = " x ".join(map(str, self.shape))
        return f"{size} {self.encoding or 'image'}{' and one more' if self.one_more else ''}"


def decoded_part(
    path: Path, part: PicklePart, kind: ViewKind
) -> tuple[Episodes, list[tuple[int, str]]]:
    """The well-formed episodes of a part, and (number, reason) of the others.

    UnsafePickleError  an inner pickle names something that no array does
    PickleError        the file was changed since its parts were read
    """
    skipped = list(part.skipped)
    kept: list[int] = []
    # frames announce what they hold, and those that hold something else are left out
    steps = min(part.steps, part.image_bytes // math.prod(kind.shape))
    views = _Views(steps, kind)
    for place, data, shape, one_more in part_images(path, part, skipped):
        actions = len(part.action[place])
        if shape != kind.shape:
            skipped.append((part.number[place], f"its views are {ViewKind(shape, None)}"))
            continue
        if one_more != kind.one_more:
            others = "as many" if one_more else "one more"
            reason = f"{actions + one_more} images for {actions} actions, others have {others}"
            skipped.append((part.number[place], reason))
            continue
        if len(part.direction[place]) > actions + one_more:
            reason = f"{actions + 1} directions for {actions} actions"
            skipped.append((part.number[place], reason))
            continue
        if len(data) > part.holds[place]:
            raise PickleError(
                f"episode {part.number[place]} has other images than a moment ago",
                path=path,
                fix="run the command again when nothing writes to the file",
            )
        kept.append(place)
        views.append(data)
    episodes = _in_columns(part, kept, views.end())
    if kind.encoding is not None:
        episodes = _without_impossible(episodes, part, kept, kind.encoding, skipped)
    return episodes, sorted(skipped)


def part_images(
    path: Path, part: PicklePart, skipped: list[tuple[int, str]]
) -> Iterator[tuple[int, bytes, ViewShape, bool]]:
    """(place in the part, images, [H, W, C], one more) of each episode whose images decode.

    skipped   receives (number, reason) of the others
    """
    # pieces of this size come from memory that was used before: fresh pages cost more than reading
    with path.open("rb", buffering=_READ_BYTES) as stream:
        for place, (start, size) in enumerate(zip(part.start, part.size, strict=True)):
            try:
                if start < 0:
                    found = _loose_images(path, part, place)
                else:
                    stream.seek(start)
                    found = frame_images(stream.read(size), len(part.action[place]), path)
            except UnsafePickleError:
                raise
            except PickleError as error:
                skipped.append((part.number[place], error.what))
            else:
                yield place, *found


def _loose_images(path: Path, part: PicklePart, place: int) -> EpisodeImages:
    images = part.loose[place]
    if isinstance(images, bytes):
        return frame_images(images, len(part.action[place]), path)
    return stacked_images(images, len(part.action[place]), path)


class _Views:
    """The views of up to `steps` steps, packed a block at a time."""

    def __init__(self, steps: int, kind: ViewKind) -> None:
        shape = kind.shape if kind.encoding is None else kind.shape[:2]
        self._view = np.empty((steps, *shape), dtype=np.uint8)
        self._kind = kind
        self._done = 0
        self._block: list[bytes] = []
        self._block_bytes = 0

    def append(self, data: bytes) -> None:
        """The images of the next episode."""
        self._block.append(data)
        self._block_bytes += len(data)
        if self._block_bytes >= _BLOCK_BYTES:
            self._pack()

    def end(self) -> NDArray[np.uint8]:
        """All views: uint8 [S, 7, 7], or [S, H, W, C] where they stay images."""
        self._pack()
        return self._view[: self._done]

    def _pack(self) -> None:
        images = np.frombuffer(b"".join(self._block), np.uint8).reshape(-1, *self._kind.shape)
        place = slice(self._done, self._done + len(images))
        encoding = self._kind.encoding
        self._view[place] = images if encoding is None else recoded_cells(images, encoding)
        self._done = place.stop
        self._block, self._block_bytes = [], 0


def _in_columns(part: PicklePart, kept: list[int], view: NDArray[np.uint8]) -> Episodes:
    action = [part.action[place] for place in kept]
    direction = b"".join(part.direction[place][: len(part.action[place])] for place in kept)
    seed = [part.seed.get(place, -1) for place in kept]
    return Episodes(
        length=np.array([len(actions) for actions in action], dtype=np.int64),
        mission=[part.mission[place] for place in kept],
        seed=np.array(seed, dtype=np.int64),
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
    """The episodes without those that show a cell which no egocentric view of theirs can."""
    if not episodes.view.size or episodes.view.max() < EGOCENTRIC_CODES:
        return episodes
    unknown, bad = (
        np.logical_or.reduceat((episodes.view >= code).any(axis=(1, 2)), episodes.offset[:-1])
        for code in (IMPOSSIBLE, EGOCENTRIC_CODES)
    )
    for place in np.flatnonzero(bad).tolist():
        reason = (
            f"it shows a cell that the object encoding of {encoding} does not have"
            if unknown[place]
            else "it shows the agent, as only a view of the whole room does (--encoding image "
            "stores such views)"
        )
        skipped.append((part.number[kept[place]], reason))
    good_step = np.repeat(~bad, episodes.length)
    return Episodes(
        length=episodes.length[~bad],
        mission=[text for text, left in zip(episodes.mission, bad, strict=True) if not left],
        seed=episodes.seed[~bad],
        view=episodes.view[good_step],
        direction=episodes.direction[good_step],
        action=episodes.action[good_step],
    )
