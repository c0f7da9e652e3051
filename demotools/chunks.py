"""Chunk files: consecutive bytes cut to equal lengths, each with its CRC-32C at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from demotools.errors import DemotoolsError
from demotools.metadata import CRC_BYTES, array_names
from demotools.output import open_regular
from demotools.store import chunk_files

# Chunk length (docs/log.md): about a million steps, so that plain zarr reads 50 MB at a time, but
# never more than 16 chunk files an array, so that any store stays under a hundred files.
_CHUNK_STEPS = 1 << 20
_CHUNKS_AT_MOST = 16
COPY_BYTES = 1 << 18


def chunk_length(steps: int) -> int:
    """Steps in a chunk: the store in equal chunks, so that hardly any padding is written.

    >>> chunk_length(5511), chunk_length(5_040_000), chunk_length(84_300_000)
    (5511, 1011712, 5271552)
    """
    chunks = min(-(-steps // _CHUNK_STEPS), _CHUNKS_AT_MOST)
    if chunks == 1:
        return steps
    page = 4096  # whole pages, so that chunk files can also be mapped one behind another
    return -(-steps // (chunks * page)) * page


class ChunkFiles:
    """Consecutive bytes cut into chunk files, each followed by its CRC-32C (little-endian)."""

    def __init__(self, files: list[Path], size_bytes: int) -> None:
        self._waiting: Iterator[Path] = iter(files)
        self._size = size_bytes
        self._stream: IO[bytes] | None = None
        self._left = 0
        self._crc = 0

    def append(self, rows: NDArray[np.uint8]) -> None:
        """Write the bytes of these rows after those before."""
        view = np.ascontiguousarray(rows).reshape(-1).data
        while view:
            if self._stream is None:
                self._open()
            piece = view[: self._left]
            self._write(piece)
            view = view[len(piece) :]
            if not self._left:
                self._close()

    def _open(self) -> None:
        file = next(self._waiting)
        file.parent.mkdir(parents=True, exist_ok=True)
        self._stream = file.open("wb")
        self._left, self._crc = self._size, 0

    def _write(self, piece: memoryview) -> None:
        assert self._stream is not None
        self._left -= len(piece)
        while piece:
            # the checksum takes nothing but bytes; small copies stay in the cache
            block, piece = bytes(piece[:COPY_BYTES]), piece[COPY_BYTES:]
            self._stream.write(block)
            self._crc = google_crc32c.extend(self._crc, block)

    def _close(self) -> None:
        assert self._stream is not None
        self._stream.write(self._crc.to_bytes(CRC_BYTES, "little"))
        self._stream.close()
        self._stream = None

    def close(self, *, complete: bool) -> None:
        """Fill the last chunk with zeros where `complete`; otherwise leave it cut."""
        if self._stream is None:
            return
        if not complete:
            self._stream.close()
            return
        while self._left:
            self._write(memoryview(bytes(min(self._left, COPY_BYTES))))
        self._close()


def checked_chunks(path: Path) -> Iterator[tuple[int, str]]:
    """Read every byte: (size in bytes, what is wrong or nothing) for each chunk file."""
    for array in array_names(path):
        for file in chunk_files(path, array):
            yield _checked(file, str(file.relative_to(path)))


def _checked(file: Path, name: str) -> tuple[int, str]:
    try:
        stream = open_regular(file)
    except DemotoolsError as error:
        return 0, f"{name} is missing or unreadable: {error.what}"
    with stream:
        whole = ends_with_checksum(stream)
        return os.fstat(stream.fileno()).st_size, "" if whole else f"{name} fails its checksum"


def ends_with_checksum(stream: IO[bytes], crc: int = 0) -> bool:
    """Whether the last bytes of a file are the checksum of those before.

    crc   of what counts as standing before the file
    """
    left = os.fstat(stream.fileno()).st_size - CRC_BYTES
    while left > 0 and (block := stream.read(min(left, COPY_BYTES))):
        crc = google_crc32c.extend(crc, block)
        left -= len(block)
    return stream.read(CRC_BYTES + 1) == crc.to_bytes(CRC_BYTES, "little")
