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

import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

from demotools.errors import PickleError
from demotools.inert import ARRAY_NAMES, MAX_BYTES, Array, TruncatedError, Window
from demotools.opcodes import Machine

_HEADER = struct.Struct("<4xI4xI")  # of a blosc frame: the sizes of what it holds and of itself
STEP_BYTES = 1 << 16
"""The most bytes of image that a step may have; an RGB view of 2019 has 9,408."""
_SPARE_BYTES = 1 << 12

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


EpisodeImages = tuple[bytes, ViewShape]
"""The images of one episode: T * H * W * C bytes in C order, and [H, W, C]."""


def frame_images(frame: bytes | memoryview, steps: int, path: Path | str) -> EpisodeImages:
    """The images of one episode.

    frame   a blosc frame, as `blosc.pack_array` wrote it
    steps   T, the number of actions of the episode

    PickleError        the frame is damaged, or its shape or dtype is not that of T images
    UnsafePickleError  the inner pickle names something that no array does
    """
    raw = decompressed(frame, steps * STEP_BYTES + _SPARE_BYTES, path)
    found, data, shape = _matched_images(raw) or _unpickled_images(raw, path)
    if found != steps:
        raise _damaged(f"{found} images for {steps} actions", path)
    return data, shape


def decompressed(frame: bytes | memoryview, limit: int, path: Path | str) -> bytes:
    """What a blosc frame holds; its announced sizes are checked before any memory is taken."""
    if len(frame) < blosc.MAX_OVERHEAD:
        raise _damaged("a blosc frame is shorter than its header", path)
    holds, size = _HEADER.unpack_from(frame)
    if size != len(frame):
        raise _damaged("a blosc frame has another length than its header says", path)
    if holds > min(limit, MAX_BYTES):
        raise _damaged(f"a blosc frame announces {holds} bytes for its images", path)
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


def stacked_images(arrays: list[Array], path: Path | str) -> EpisodeImages:
    """The images of an episode that has an array for every step."""
    images = [_values(array, path) for array in arrays]
    if len({image.shape for image in images}) != 1:
        raise _damaged("its images have different shapes", path)
    _steps, data, shape = _checked(np.stack(images), path)
    return data, shape


def _values(array: Array, path: Path | str) -> NDArray[np.uint8]:
    try:
        return array.values()
    except (ValueError, TypeError) as error:
        raise _damaged("an array has another size than its shape says", path) from error


def _checked(values: NDArray[np.uint8], path: Path | str) -> tuple[int, bytes, ViewShape]:
    if values.ndim != 4 or values.dtype != np.uint8 or not values.size:
        shown = ", ".join(map(str, values.shape))
        raise _damaged(f"its images are {values.dtype} [{shown}], not uint8 [T, H, W, C]", path)
    return len(values), values.tobytes(), values.shape[1:]


def _damaged(what: str, path: Path | str) -> PickleError:
    return PickleError(
        what,
        path=path,
        fix="get the file again, or convert what is whole with --on-error skip",
    )
