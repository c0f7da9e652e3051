"""The images of the episodes in a legacy pickle, unpacked and recoded to today's encoding.

The inner pickle is read by the same machine, under the same rules, as the outer one. First, the
opcodes that numpy has written since 2018 are matched as a whole, which is fifty times faster.
"""

from __future__ import annotations

import io
import math
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

from demotools.babyai.cells import EGOCENTRIC_CODES, VIEW_SIZE, Encoding, recoded_cells
from demotools.errors import PickleError, UnsafePickleError
from demotools.pickles.episodes import PicklePart
from demotools.pickles.machine import ARRAY_NAMES, MAX_BYTES, Array, Machine, TruncatedError, Window
from demotools.store.reading import Episodes

_HEADER = struct.Struct("<4xI4xI")  # of a blosc frame: the sizes of what it holds and of itself

# Written by numpy under protocols 4 and 5; `.{8}` is the length of a protocol frame, and `h\x03`
# fetches the text "numpy", stored a little before.
_SIZES = rb"\(((?:K.|M..|J.{4}){4})t\x94"
_DTYPE = (
    rb"\x8c\x05dtype\x94\x93\x94\x8c\x02u1\x94(?:K\x00|\x89)(?:K\x01|\x88)\x87\x94R\x94"
    rb"\(K\x03\x8c\x01\|\x94NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t\x94b"
)
_BY_STATE = re.compile(
    rb"\x80[\x04\x05]\x95.{8}(?:\x8c\x15numpy\.core|\x8c\x16numpy\._core)\.multiarray\x94"
    rb"\x8c\x0c_reconstruct\x94\x93\x94\x8c\x05numpy\x94\x8c\x07ndarray\x94\x93\x94K\x00\x85\x94"
    rb"C\x01b\x94\x87\x94R\x94\(K\x01"
    + _SIZES
    + rb"h\x03"
    + _DTYPE
    + rb"\x89(?:B.{4}|C.|\x8e.{8})",
    re.DOTALL,
)
_STATE_END = b"\x94t\x94b."
_BY_BUFFER = re.compile(
    rb"\x80\x05\x95.{8}(?:\x8c\x12numpy\.core|\x8c\x13numpy\._core)\.numeric\x94"
    rb"\x8c\x0b_frombuffer\x94\x93\x94\(\x96(.{8})",
    re.DOTALL,
)
_BUFFER_END = re.compile(
    rb"\x94\x8c\x05numpy\x94" + _DTYPE + _SIZES + rb"\x8c\x01C\x94t\x94R\x94\.", re.DOTALL
)

ViewShape = tuple[int, ...]

EpisodeImages = tuple[bytes, ViewShape, bool]
"""The images of one episode: T * H * W * C bytes in C order, [H, W, C], and whether there was one
more, which is left out: the observation after the last action."""

# One thread a process: parts are what runs in parallel.
blosc.use_threads = False


def frame_images(frame: bytes | memoryview, steps: int, path: Path | str) -> EpisodeImages:
    """The images of one episode.

    frame   a blosc frame, as `blosc.pack_array` wrote it
    steps   T, the number of actions of the episode

    PickleError        the frame is damaged, or its shape or dtype is not that of T images
    UnsafePickleError  the inner pickle names something that no array does
    """
    raw = decompressed(frame, path)
    found, data, shape = _matched_images(raw) or _unpickled_images(raw, path)
    return _of_steps(found, data, shape, steps, path)


def _of_steps(
    found: int, data: bytes, shape: ViewShape, steps: int, path: Path | str
) -> EpisodeImages:
    if found not in (steps, steps + 1):
        raise _damaged(f"{found} images for {steps} actions", path)
    if shape[0] <= 4 < shape[2]:
        raise _damaged(
            f"its views are {' x '.join(map(str, shape))}: channels before height and width are "
            "not supported",
            path,
        )
    return data[: steps * math.prod(shape)], shape, found > steps


def decompressed(frame: bytes | memoryview, path: Path | str) -> bytes:
    """What a blosc frame holds; its announced sizes are checked before any memory is taken."""
    if len(frame) < blosc.MAX_OVERHEAD:
        raise _damaged("a blosc frame is shorter than its header", path)
    holds, size = _HEADER.unpack_from(frame)
    if size != len(frame):
        raise _damaged("a blosc frame has another length than its header says", path)
    if holds > MAX_BYTES:
        raise PickleError(
            f"a blosc frame announces {holds:,} bytes for its images, more than the limit of "
            f"{MAX_BYTES:,} for an episode, which bounds the memory",
            path=path,
            fix="make the views smaller, or skip such episodes with --on-error skip",
        )
    try:
        raw: bytes = blosc.decompress(frame)
    except (RuntimeError, SystemError, ValueError, TypeError) as error:
        raise _damaged("a blosc frame does not decompress", path) from error
    if len(raw) != holds:
        raise _damaged("a blosc frame decompresses to another length", path)
    return raw


def _matched_images(raw: bytes) -> tuple[int, bytes, ViewShape] | None:
    """The images where the inner pickle is as numpy writes it; None otherwise."""
    if head := _BY_STATE.match(raw):
        start = head.end()
        steps, shape, size = _sizes(head[1])
        if len(raw) != start + size + len(_STATE_END) or not raw.endswith(_STATE_END):
            return None
    elif head := _BY_BUFFER.match(raw):
        start = head.end()
        announced = int.from_bytes(head[1], "little")
        tail = _BUFFER_END.fullmatch(raw, start + announced) if announced < len(raw) else None
        if tail is None:
            return None
        steps, shape, size = _sizes(tail[1])
        if tail.start() != start + size:
            return None
    else:
        return None
    return (steps, raw[start : start + size], shape) if size else None


@lru_cache(maxsize=1024)
def _sizes(opcodes: bytes) -> tuple[int, ViewShape, int]:
    """T, [H, W, C] and their product, from four opcodes that push small integers."""
    found = re.findall(rb"K.|M..|J.{4}", opcodes, re.DOTALL)
    first, *rest = (int.from_bytes(opcode[1:], "little") for opcode in found)
    return first, tuple(rest), math.prod((first, *rest))


def _unpickled_images(raw: bytes, path: Path | str) -> tuple[int, bytes, ViewShape]:
    """The images by way of the machine, however they are pickled."""
    machine = Machine(Window(io.BytesIO(raw)), path, ARRAY_NAMES)
    try:
        while not machine.stopped:
            machine.step()
    except TruncatedError as error:
        raise _damaged("the pickle of its images ends too early", path) from error
    array = machine.stack.pop()
    if not isinstance(array, Array):
        raise _damaged(f"its images are a {type(array).__name__.lower()}, not an array", path)
    return _checked(_values(array, path), path)


def stacked_images(arrays: Sequence[Array], steps: int, path: Path | str) -> EpisodeImages:
    """The images of an episode that has an array for every step, or one for all."""
    images = [_values(array, path) for array in arrays]
    if len({image.shape for image in images}) != 1:
        raise _damaged("its images have different shapes", path)
    whole = images[0] if len(images) == 1 and images[0].ndim == 4 else np.stack(images)
    return _of_steps(*_checked(whole, path), steps, path)


def _values(array: Array, path: Path | str) -> NDArray[Any]:
    try:
        return array.values()
    except (ValueError, TypeError) as error:
        raise _damaged("an array has another size than its shape says", path) from error


def _checked(values: NDArray[Any], path: Path | str) -> tuple[int, bytes, ViewShape]:
    if values.ndim != 4 or not values.size:
        shown = ", ".join(map(str, values.shape))
        raise _damaged(f"its images are {values.dtype} [{shown}], not uint8 [T, H, W, C]", path)
    if values.dtype != np.uint8:
        with np.errstate(invalid="ignore"):  # what is no number becomes one, and so differs
            bytes_only = values.astype(np.uint8)
        if not (bytes_only == values).all():
            raise PickleError(
                f"its images are {values.dtype} and not all whole numbers from 0 to 255, "
                "which is not supported",
                path=path,
                fix="write them again as uint8",
            )
        values = bytes_only
    return len(values), values.tobytes(), values.shape[1:]


def _damaged(what: str, path: Path | str) -> PickleError:
    return PickleError(
        what,
        path=path,
        fix="get the file again, or skip such episodes with --on-error skip",
    )


CELL_VIEW = (VIEW_SIZE, VIEW_SIZE, 3)
IMPOSSIBLE = 255
# Cells are packed in blocks that stay in the processor's cache.
_BLOCK_BYTES = 1 << 19
_READ_BYTES = 1 << 16


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
        if reason := _misfit(part, place, shape, one_more, kind):
            skipped.append((part.number[place], reason))
            continue
        if len(data) > part.holds[place]:
            raise PickleError(
                f"episode {part.number[place]} changed while it was read",
                path=path,
                fix="run the command again once nothing writes to the file",
            )
        kept.append(place)
        views.append(data)
    action = [part.action[place] for place in kept]
    direction = [part.direction[place][: len(part.action[place])] for place in kept]
    episodes = Episodes(
        length=np.array([len(actions) for actions in action], dtype=np.int64),
        mission=[part.mission[place] for place in kept],
        seed=np.array([part.seed.get(place, -1) for place in kept], dtype=np.int64),
        view=views.end(),
        direction=np.frombuffer(b"".join(direction), np.uint8),
        action=np.frombuffer(b"".join(action), np.uint8),
    )
    if kind.encoding is not None:
        episodes = _without_impossible(episodes, part, kept, kind.encoding, skipped)
    return episodes, sorted(skipped)


def _misfit(part: PicklePart, place: int, shape: ViewShape, one_more: bool, kind: ViewKind) -> str:
    """Why an episode does not belong into a store of this kind of view; empty where it does."""
    actions = len(part.action[place])
    if shape != kind.shape:
        return f"its views are {ViewKind(shape, None)}"
    if one_more != kind.one_more:
        others = "as many" if one_more else "one more"
        return f"{actions + one_more} images for {actions} actions, others have {others}"
    if len(part.direction[place]) > actions + one_more:
        return f"{actions + 1} directions for {actions} actions"
    return ""


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
    return episodes.take(np.flatnonzero(~bad))
