"""Many chunk files as one array: mapped one behind another into one range of addresses.

One gather over one array is about six times as fast as one gather per chunk file and a scatter
(docs/log.md). Python's own `mmap` cannot choose the address, so the C library is asked. Nothing
is copied: the bytes stay in the files and in the system's page cache.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from demotools.errors import from_os_error
from demotools.output import open_regular

_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000


@dataclass(frozen=True)
class Piece:
    """The rows of one chunk file, and where they go in the joined array.

    row   the first row of the joined array that it fills
    rows  how many
    """

    file: Path
    row: int
    rows: int


def can_be_joined(pieces: Sequence[Piece], row_bytes: int) -> bool:
    """Whether every piece begins at a border of memory pages, on a system that we know."""
    starts_at_page = all(piece.row * row_bytes % mmap.PAGESIZE == 0 for piece in pieces)
    return sys.platform == "linux" and starts_at_page


def joined_map(pieces: Sequence[Piece], row_bytes: int) -> NDArray[np.uint8]:
    """The rows of all pieces as one read-only array over the files: uint8 [rows, row_bytes].

    pieces  those of which `can_be_joined` is true, sorted by row; rows between two pieces are 0

    DemotoolsError  a file cannot be opened or mapped
    """
    rows = pieces[-1].row + pieces[-1].rows
    # pages that only hold the place; they take no memory until they are written to
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    space = mmap.mmap(-1, _whole_pages(rows * row_bytes), flags=flags)
    joined = np.frombuffer(space, dtype=np.uint8)
    for piece in pieces:
        address = joined.ctypes.data + piece.row * row_bytes
        _map_file_at(address, piece.file, piece.rows * row_bytes)
    joined.flags.writeable = False
    return joined[: rows * row_bytes].reshape(rows, row_bytes)


def _whole_pages(size_bytes: int) -> int:
    return -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _map_file_at(address: int, file: Path, size_bytes: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [
        *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int),
        ctypes.c_long,
    ]
    try:
        with open_regular(file) as stream:
            flags = mmap.MAP_SHARED | _MAP_FIXED
            got = library.mmap(address, size_bytes, mmap.PROT_READ, flags, stream.fileno(), 0)
            if got != address:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(file))
    except OSError as error:
        raise from_os_error(error, file) from error
