"""What the zarr.json of each array of a store may say, checked once, before anything is mapped.

A zarr.json is a text that anybody can edit: sizes, types and codecs are trusted only after they
were found to be those of the format (docs/format.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from demotools.errors import DemotoolsError, StoreError
from demotools.grid import VIEW_SIZE
from demotools.output import open_regular

TEXTS = "mission_text"
CRC_BYTES = 4
JSON_BYTES_AT_MOST = 1 << 26
# A chunk of missions, packed or not: they are texts of some 30 bytes, 2^17 of them a chunk.
TEXT_BYTES_AT_MOST = 1 << 28
# A chunk of missions holds 2^17, and int32 rows name at most 2^31 of them; the others have fewer.
_CHUNKS_AT_MOST = 1 << 14

Size = Annotated[int, Field(ge=1, le=1 << 53)]


class _Checked(BaseModel):
    # the parts are built with the whole, not once more each
    model_config = ConfigDict(strict=True, frozen=True, defer_build=True)


class _Codec(_Checked):
    name: str
    configuration: dict[str, JsonValue] = Field(default_factory=dict)


class _ChunkShape(_Checked):
    chunk_shape: tuple[Size, ...]


class _ChunkGrid(_Checked):
    name: Literal["regular"]
    configuration: _ChunkShape


class _Separator(_Checked):
    separator: Literal["/"]


class _ChunkKeys(_Checked):
    name: Literal["default"]
    configuration: _Separator


class ArrayMetadata(_Checked):
    """The zarr.json of an array."""

    zarr_format: Literal[3]
    node_type: Literal["array"]
    shape: tuple[Size, ...]
    data_type: str
    chunk_grid: _ChunkGrid
    chunk_key_encoding: _ChunkKeys
    codecs: tuple[_Codec, ...]
    fill_value: int | str

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """Shape of every chunk, the last padded."""
        return self.chunk_grid.configuration.chunk_shape

    @property
    def chunk_count(self) -> int:
        """Number of chunk files; only the first axis is cut."""
        return -(-self.shape[0] // self.chunk_shape[0])

    @cached_property
    def raw_chunk_bytes(self) -> int | None:
        """Size of every chunk file, checksum included; None where chunks are compressed."""
        if self.data_type == "string":
            return None
        return math.prod(self.chunk_shape) * np.dtype(self.data_type).itemsize + CRC_BYTES

    def chunk_files(self, folder: Path) -> list[Path]:
        """The chunk files in order.

        folder   of the array
        """
        others = "/0" * (len(self.shape) - 1)
        return [folder / f"c/{number}{others}" for number in range(self.chunk_count)]


@dataclass(frozen=True)
class _Layout:
    """What the format says of one array; a size of None may be any."""

    data_types: tuple[str, ...]
    sizes: tuple[int | None, ...] = (None,)
    codecs: tuple[str, ...] = ("bytes", "crc32c")
    fill_value: int | str = 0


_STEP = _Layout(("uint8",))
_LAYOUTS = {
    "cells": _Layout(("uint8",), (None, VIEW_SIZE, VIEW_SIZE)),
    "image": _Layout(("uint8",), (None, None, None, None)),
    "direction": _STEP,
    "action": _STEP,
    "mask": _STEP,
    "episode_offset": _Layout(("int64",)),
    "episode_mission": _Layout(("int32",)),
    "episode_seed": _Layout(("int64",)),
    TEXTS: _Layout(("string",), codecs=("vlen-utf8", "zstd", "crc32c"), fill_value=""),
    "mission_tokens": _Layout(("uint8", "uint16"), (None, None)),
}


def array_names(path: Path) -> list[str]:
    """The names of the arrays of a store, sorted."""
    return sorted(file.parent.name for file in path.glob("*/zarr.json"))


def read_json_bytes(file: Path) -> bytes:
    """The content of a zarr.json.

    DemotoolsError  it is missing, no regular file, or far too long
    """
    with open_regular(file) as stream:
        content = stream.read(JSON_BYTES_AT_MOST + 1)
    if len(content) > JSON_BYTES_AT_MOST:
        raise DemotoolsError("the file is far too long", path=file, fix="name another store")
    return content


def array_metadata(path: Path, array: str) -> ArrayMetadata:
    """What the zarr.json of an array says.

    StoreError  it cannot be read, or says what the format does not
    """
    return parsed_metadata(array_json(path, array), path, array)


def array_json(path: Path, array: str) -> bytes:
    """The zarr.json of an array; StoreError where it cannot be read."""
    try:
        return read_json_bytes(path / array / "zarr.json")
    except DemotoolsError as error:
        raise damaged(path, f"{array}/zarr.json cannot be read: {error.what}") from error


def parsed_metadata(content: bytes, path: Path, array: str) -> ArrayMetadata:
    """What these bytes say of an array.

    path        of the store or the archive, for the message

    StoreError  they say what the format does not
    """
    try:
        metadata = ArrayMetadata.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "its top level"
        raise damaged(
            path, f"{array}/zarr.json is wrong at {place}: {first['msg'].lower()}"
        ) from error
    if wrong := _difference(array, metadata):
        raise damaged(path, f"{array}/zarr.json describes no array of a demo store: {wrong}")
    return metadata


def _difference(array: str, metadata: ArrayMetadata) -> str:
    """What the format does not say of this array; nothing where all is well."""
    layout = _LAYOUTS.get(array)
    if layout is None:
        return "the format has none of this name"
    shape, chunk = metadata.shape, metadata.chunk_shape
    if metadata.data_type not in layout.data_types:
        return f"its type is {metadata.data_type!r} instead of {' or '.join(layout.data_types)}"
    if len(shape) != len(layout.sizes) or any(
        wanted not in (None, size) for wanted, size in zip(layout.sizes, shape, strict=True)
    ):
        return f"its shape is {list(shape)}"
    # only the first axis is cut, and a chunk is never longer than the array
    if chunk[1:] != shape[1:] or not chunk or chunk[0] > shape[0]:
        return f"its chunks have the shape {list(chunk)}"
    if metadata.chunk_count > _CHUNKS_AT_MOST:
        return f"it has {metadata.chunk_count:,} chunks"
    names = tuple(codec.name for codec in metadata.codecs)
    order = metadata.codecs[0].configuration.get("endian", "little") if names else None
    if names != layout.codecs or order != "little":
        return f"its codecs are {list(names)}, or not little-endian"
    if metadata.fill_value != layout.fill_value:
        return f"it is filled with {metadata.fill_value!r}"
    return ""


def damaged(path: Path, what: str) -> StoreError:
    """The error of a store whose files are not those that were written."""
    return StoreError(
        f"the store is damaged: {what}",
        path=path,
        fix="run the command that makes it again with --overwrite",
    )
