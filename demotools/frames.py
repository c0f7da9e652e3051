"""The images of one episode out of a legacy pickle: a blosc frame that holds a second pickle.

The inner pickle runs on the same machine, under the same rule, as the outer one. The spellings
that numpy has written since 2018 are matched as a whole first, which is fifty times faster.
"""

from __future__ import annotations

import math
import re
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

from demotools.errors import PickleError
from demotools.inert import ARRAY_NAMES, MAX_BYTES, Array, TruncatedError, Window
from demotools.opcodes import Machine

_HEADER = struct.Struct("<4xI4xI")  # of a blosc frame: the sizes of what it holds and of itself

# Spelled by numpy under protocols 4 and 5; `.{8}` is the length of a protocol frame, and `h\x03`
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
            fix="make the views smaller, or leave such episodes out with --on-error skip",
        )
    try:
        raw: bytes = blosc.decompress(frame)
    except (RuntimeError, SystemError, ValueError, TypeError) as error:
        raise _damaged("a blosc frame does not decompress", path) from error
    if len(raw) != holds:
        raise _damaged("a blosc frame decompresses to another length", path)
    return raw


def _matched_images(raw: bytes) -> tuple[int, bytes, ViewShape] | None:
    """The images where the inner pickle is spelled as numpy spells it; None otherwise."""
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
    """The images by way of the machine: any spelling."""
    machine = Machine(Window(None, buffer=raw), path, ARRAY_NAMES)
    try:
        while not machine.stopped:
            machine.step()
    except TruncatedError as error:
        raise _damaged("the pickle of its images ends too early", path) from error
    array = machine.stack.pop()
    if not isinstance(array, Array):
        raise _damaged(f"its images are a {type(array).__name__.lower()}, not an array", path)
    return _checked(_values(array, path), path)


def stacked_images(arrays: list[Array], steps: int, path: Path | str) -> EpisodeImages:
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
        fix="get the file again, or convert what is whole with --on-error skip",
    )
