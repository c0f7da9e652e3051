"""Inside a `.zarr.zip`: what its members are called, and their bytes in and out, never trusted.

Raw arrays of a store (codecs `[bytes, crc32c]`) are cut into chunks of a few megabytes with codecs
`[bytes, zstd, crc32c]`; arrays that are compressed already go in as they are. The group's
attributes gain `archived`, the store's own metadata files word for word. Members have no
timestamps, so the same store gives the same archive.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from demotools.errors import StoreError, from_os_error
from demotools.metadata import array_names
from demotools.store import CRC_BYTES, chunk_files

# Measured (docs/log.md): larger chunks compress no better and cost memory.
_CHUNK_BYTES = 1 << 20
_ZSTD_LEVEL = 9
_MEMBER_BYTES_AT_MOST = 1 << 28
_ARRAY_NAME = re.compile("[a-z_]+")


@dataclass(frozen=True)
class ArchivedArray:
    """One array of a store, as its own zarr.json describes it."""

    name: str
    text: str

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """The zarr.json, parsed."""
        content: dict[str, Any] = json.loads(self.text)
        return content

    @property
    def raw(self) -> bool:
        """Whether the chunk files are plain bytes with a checksum."""
        return [codec["name"] for codec in self.metadata["codecs"]] == ["bytes", "crc32c"]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row (one step, one episode) of a raw array."""
        row = math.prod(int(size) for size in self.metadata["shape"][1:])
        return row * int(np.dtype(self.metadata["data_type"]).itemsize)

    @property
    def size_bytes(self) -> int:
        """Bytes of all rows of a raw array; 0 for another, which is not unpacked."""
        return int(self.metadata["shape"][0]) * self.row_bytes if self.raw else 0

    @property
    def chunk_rows(self) -> int:
        """Rows in a chunk of the store."""
        return int(self.metadata["chunk_grid"]["configuration"]["chunk_shape"][0])

    @property
    def block_rows(self) -> int:
        """Rows in a chunk of the archive."""
        if not self.raw:
            return self.chunk_rows
        return max(1, min(int(self.metadata["shape"][0]), _CHUNK_BYTES // self.row_bytes))

    @property
    def member_count(self) -> int:
        """The number of chunks in the archive."""
        return -(-int(self.metadata["shape"][0]) // self.block_rows)

    def members(self) -> list[str]:
        """The names of the chunks in the archive."""
        others = "/0" * (len(self.metadata["shape"]) - 1)
        return [f"{self.name}/c/{number}{others}" for number in range(self.member_count)]

    def archived_text(self) -> str:
        """The zarr.json in the archive: smaller chunks, compressed."""
        if not self.raw:
            return self.text
        shape = [self.block_rows, *self.metadata["shape"][1:]]
        first, last = self.metadata["codecs"]
        zstd = {"name": "zstd", "configuration": {"level": _ZSTD_LEVEL, "checksum": False}}
        changed = {
            **self.metadata,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shape}},
            "codecs": [first, zstd, last],
        }
        return json.dumps(changed, indent=2)

    def is_plausible(self) -> bool:
        """Whether a store of ours can have such an array; raises what parsing raises."""
        grid = self.metadata["chunk_grid"]["configuration"]["chunk_shape"]
        sizes = [*self.metadata["shape"], *grid]
        whole = all(isinstance(size, int) and size >= 0 for size in sizes)
        # at most one chunk of padding: it is written too, and must not be a bomb either
        fits = not self.raw or (0 < self.row_bytes <= _CHUNK_BYTES and grid[0] <= sizes[0])
        return bool(_ARRAY_NAME.fullmatch(self.name)) and whole and self.chunk_rows > 0 and fits


@dataclass(frozen=True)
class Contents:
    """What an archive holds: the arrays, and the store's own zarr.json, word for word."""

    arrays: list[ArchivedArray]
    group_text: str

    @property
    def attributes(self) -> dict[str, Any]:
        """The attributes of the store."""
        attributes: dict[str, Any] = json.loads(self.group_text)["attributes"]
        return attributes

    @property
    def size_bytes(self) -> int:
        """Bytes that the store will take."""
        return sum(array.size_bytes for array in self.arrays)


def described_store(path: Path) -> Contents:
    """The contents of a store's archive-to-be."""
    arrays = [
        ArchivedArray(name, (path / name / "zarr.json").read_bytes().decode())
        for name in array_names(path)
    ]
    return Contents(arrays, (path / "zarr.json").read_bytes().decode())


def write_members(archive: zipfile.ZipFile, path: Path, contents: Contents) -> Iterator[int]:
    """Write all members; yields the bytes of the store that each chunk stands for."""
    group = json.loads(contents.group_text)
    group["attributes"]["archived"] = {
        "zarr.json": contents.group_text,
        **{f"{array.name}/zarr.json": array.text for array in contents.arrays},
    }
    _add(archive, "zarr.json", json.dumps(group, indent=2).encode())
    codec = Zstd(level=_ZSTD_LEVEL, checksum=False)
    for array in contents.arrays:
        _add(archive, f"{array.name}/zarr.json", array.archived_text().encode())
        files = chunk_files(path, array.name)
        blocks = _raw_blocks(files, array) if array.raw else map(Path.read_bytes, files)
        for member, block in zip(array.members(), blocks, strict=True):
            _add(archive, member, _with_crc(bytes(codec.encode(block))) if array.raw else block)
            yield len(block)


def opened_archive(file: Path) -> zipfile.ZipFile:
    """The zip file, open.

    StoreError  it is no zip file, or one cut short
    """
    try:
        return zipfile.ZipFile(file)
    except zipfile.BadZipFile as error:
        raise damaged(file, "it is no zip file, or a part of one") from error
    except OSError as error:
        raise from_os_error(error, file) from error


def described_archive(archive: zipfile.ZipFile, file: Path) -> Contents:
    """The contents of an archive.

    StoreError  the members are not exactly those that its metadata announce
    """
    names = archive.namelist()
    try:
        group = json.loads(_member(archive, "zarr.json", file))
        archived = dict(group["attributes"]["archived"])
        contents = Contents(
            group_text=archived.pop("zarr.json"),
            arrays=[ArchivedArray(n.removesuffix("/zarr.json"), archived[n]) for n in archived],
        )
        plausible = all(array.is_plausible() for array in contents.arrays)
        count = sum(array.member_count for array in contents.arrays)
        described = plausible and bool(contents.attributes["fingerprint"])
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise damaged(file, "its metadata are not those of an archived store") from error
    if not described or len(names) != 1 + len(archived) + count:
        raise damaged(file, "it has more or fewer members than its metadata announce")
    chunks = (name for array in contents.arrays for name in array.members())
    if strange := set(names) ^ {"zarr.json", *archived, *chunks}:
        raise damaged(file, f"member {min(strange)!r} should not be there, or is missing")
    return contents


def decoded_blocks(
    archive: zipfile.ZipFile, array: ArchivedArray, file: Path
) -> Iterator[NDArray[np.uint8]]:
    """The bytes of a raw array, in order, a few megabytes at a time.

    StoreError  a member is damaged, or larger than what it stands for
    """
    codec = Zstd()
    size = array.block_rows * array.row_bytes
    left = array.size_bytes
    for name in array.members():
        packed = _member(archive, name, file, size + (size >> 7) + 1024)
        content = packed[:-CRC_BYTES]
        if packed != _with_crc(content):
            raise damaged(file, f"member {name} fails its checksum")
        block = np.zeros(size, dtype=np.uint8)
        try:
            codec.decode(content, out=block)
        except (RuntimeError, ValueError) as error:
            raise damaged(file, f"member {name} does not unpack: {error}") from error
        yield block[:left]
        left -= size


def verbatim_chunks(archive: zipfile.ZipFile, array: ArchivedArray, file: Path) -> Iterator[bytes]:
    """The chunk files of an array that is stored as it is.

    StoreError  a member is damaged
    """
    return (_member(archive, name, file) for name in array.members())


def damaged(file: Path, what: str) -> StoreError:
    """The error of an archive that cannot be used."""
    return StoreError(
        f"the archive cannot be used: {what}", path=file, fix="fetch or make the archive again"
    )


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    info.create_system = 3
    info.external_attr = 0o644 << 16
    archive.writestr(info, content)


def _with_crc(content: bytes) -> bytes:
    return content + int(google_crc32c.value(content)).to_bytes(CRC_BYTES, "little")


def _raw_blocks(files: list[Path], array: ArchivedArray) -> Iterator[bytes]:
    """The bytes of an array in blocks of `block_rows` rows, the last padded with zeros."""
    size = array.block_rows * array.row_bytes
    left = array.size_bytes
    pending = bytearray()
    for file in files:
        in_file = min(left, array.chunk_rows * array.row_bytes)
        left -= in_file
        with file.open("rb") as stream:
            while in_file:
                piece = stream.read(min(in_file, size - len(pending)))
                in_file -= len(piece)
                pending += piece
                if len(pending) == size:
                    yield bytes(pending)
                    pending.clear()
    if pending:
        yield bytes(pending.ljust(size, b"\0"))


def _member(
    archive: zipfile.ZipFile, name: str, file: Path, size_at_most: int = _MEMBER_BYTES_AT_MOST
) -> bytes:
    """The content of a member, refused before it is read where it announces too much."""
    try:
        info = archive.getinfo(name)
        if info.file_size > size_at_most or info.compress_type != zipfile.ZIP_STORED:
            raise damaged(file, f"member {name} is larger than what it stands for, or packed")
        return archive.read(info)
    except KeyError as error:
        raise damaged(file, f"member {name} is missing") from error
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise damaged(file, f"member {name} cannot be read: {error}") from error
