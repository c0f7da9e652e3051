"""What the files of a store must contain (docs/format.md): attributes, arrays and checksums.

A store is a Zarr v3 group. Anybody can edit a zarr.json, so its sizes, types and codecs
are checked against the format before anything is mapped. Every uncompressed chunk file ends with a
CRC-32C; `checked_chunks` reads them all.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, Annotated, Any

import google_crc32c
import numpy as np
from pydantic import AliasPath, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from demotools.babyai.cells import VIEW_SIZE
from demotools.babyai.levels import all_level_names
from demotools.errors import DemotoolsError, StoreError, first_problem
from demotools.output import open_regular, read_regular

SCHEMA = "babyai-demos"
SCHEMA_VERSION = 1
SUFFIX = ".zarr"
MERGED = "merge"
"""The kind of source of a store that several others were merged into."""
NO_HASH = "0" * 64
TEXTS = "mission_text"
LEVELS = "episode_level"
OUTCOMES = {"reward": "float32", "terminated": "uint8"}
"""What an action brought, and whether the level's rules ended the episode with it."""
OPTIONAL = ("taken", "subgoal", *OUTCOMES)
"""The step arrays that a store may have and may lack: the action taken, the bot's subgoal, and
these."""
CRC_BYTES = 4
COPY_BYTES = 1 << 18
JSON_BYTES_AT_MOST = 1 << 26
# A chunk of missions holds 2^17, and int32 rows name at most 2^31 of them; the others have fewer.
_CHUNKS_AT_MOST = 1 << 14
# A reader asks for exactly this codec, so another level needs another version of the schema.
ZSTD_LEVEL = 3
# Not compared: attributes say nothing of the bytes, and zarr has no storage transformers yet.
_MAY_DIFFER = ("attributes", "storage_transformers")

_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_Count = Annotated[int, Field(ge=1, strict=True)]


class StoreAttributes(BaseModel):
    """The attributes of the Zarr group, written last: without them a store is unfinished."""

    model_config = ConfigDict(frozen=True, extra="allow", populate_by_name=True, defer_build=True)

    level: str
    environment_id: str | None
    split: str
    episodes: _Count
    steps: _Count
    missions: _Count
    vocabulary: tuple[str, ...]
    vocabulary_hash: str
    source: dict[str, Any]
    """Where the episodes come from: `kind` is pickle, bot, or another store's source."""
    parent: dict[str, Any] | None = None
    """Of a shrink: the parent's name, fingerprint, episodes, and the seed."""
    subgoals: tuple[str, ...] = ()
    """What the codes of the array `subgoal` stand for; empty where there is none."""
    levels: tuple[str, ...] = ()
    """What the numbers in `episode_level` stand for; empty where all episodes are of `level`."""
    licence: str
    citation: str
    created_by: str
    fingerprint: _Sha256
    metadata_hash: _Sha256

    @property
    def merged_from(self) -> list[dict[str, Any]]:
        """What a merged store says of those that it was made of; empty of any other store."""
        stores = self.source.get("stores") if self.source.get("kind") == MERGED else None
        return [one for one in stores if isinstance(one, dict)] if isinstance(stores, list) else []


Size = Annotated[int, Field(ge=1, le=1 << 53)]


class ArrayMetadata(BaseModel):
    """What the format leaves open of an array; `as_zarr` is all that its zarr.json says.

    chunk_shape   of every chunk, the last padded
    """

    model_config = ConfigDict(strict=True, frozen=True, defer_build=True)

    shape: tuple[Size, ...]
    data_type: str
    chunk_shape: tuple[Size, ...] = Field(
        validation_alias=AliasPath("chunk_grid", "configuration", "chunk_shape")
    )

    def as_zarr(self) -> dict[str, Any]:
        """The content of the zarr.json, in zarr's own order of keys."""
        if self.data_type == "string":
            zstd = {"level": ZSTD_LEVEL, "checksum": False}
            codecs: list[dict[str, Any]] = [
                {"name": "vlen-utf8", "configuration": {}},
                {"name": "zstd", "configuration": zstd},
            ]
        elif np.dtype(self.data_type).itemsize > 1:
            codecs = [{"name": "bytes", "configuration": {"endian": "little"}}]
        else:
            codecs = [{"name": "bytes"}]
        chunk_grid = {"name": "regular", "configuration": {"chunk_shape": list(self.chunk_shape)}}
        return {
            "shape": list(self.shape),
            "data_type": self.data_type,
            "chunk_grid": chunk_grid,
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": "" if self.data_type == "string" else 0,
            "codecs": [*codecs, {"name": "crc32c"}],
            "attributes": {},
            "zarr_format": 3,
            "node_type": "array",
            "storage_transformers": [],
        }

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


_BYTE = ("uint8",)
_BYTES = (_BYTE, (None,))
_LAYOUTS: dict[str, tuple[tuple[str, ...], tuple[int | None, ...]]] = {
    "cells": (_BYTE, (None, VIEW_SIZE, VIEW_SIZE)),
    "image": (_BYTE, (None, None, None, None)),
    **dict.fromkeys(("direction", "action", "mask", "taken", "subgoal", LEVELS), _BYTES),
    "episode_offset": (("int64",), (None,)),
    "episode_mission": (("int32",), (None,)),
    "episode_seed": (("int64",), (None,)),
    TEXTS: (("string",), (None,)),
    "mission_tokens": (("uint8", "uint16"), (None, None)),
    **{name: ((dtype,), (None,)) for name, dtype in OUTCOMES.items()},
}
"""Of each array the types that it may have, and its shape; a size of None may be any."""


def damaged(path: Path, what: str) -> StoreError:
    """The error of a store whose files are not those that were written."""
    return StoreError(
        f"the store is damaged: {what}",
        path=path,
        fix="rerun the command that made it, with --overwrite",
    )


def _not_ours(path: Path, detail: str = "") -> StoreError:
    return StoreError(
        f"this is not a demo store{detail}", path=path, fix="name a folder that demotools wrote"
    )


def missing_store(path: Path) -> StoreError:
    """The error where no store is, with the names of those nearby that are nearly the same."""
    name = path.name.removesuffix(SUFFIX)
    level = name.removesuffix("-small").removesuffix("-valid")
    if not (level in all_level_names() or level.startswith("MiniGrid-")):
        level = "LEVEL"
    here = {file.stem.lower(): file.stem for file in stores_in(path.parent)}
    near = difflib.get_close_matches(name.lower(), here, n=3, cutoff=0.75)
    hint = f"did you mean {' or '.join(here[match] for match in near)}? Or " if near else ""
    return StoreError(
        "there is no such demo store"
        if path.suffix == SUFFIX
        else "there is no such file or folder, and so no demo store",
        path=path,
        fix=f"{hint}make it: `demotools fetch {level}` downloads it, `demotools convert FILE.pkl` "
        f"reads a pickle that you have, `demotools generate {level} --episodes 100000` "
        "records the bot",
    )


def aside_folder(path: Path) -> Path:
    """Where the old store lies while a new one takes its place."""
    return path.with_name(f".{path.name}.old")


def present_folder(path: Path) -> Path:
    """The folder of a store: where a writer was killed between two renames, the old one."""
    if path.name and not os.path.lexists(path) and (aside_folder(path) / "zarr.json").exists():
        return aside_folder(path)
    return path


def store_exists(path: Path) -> bool:
    """Whether anything lies where a store is looked for; an old store set aside counts."""
    return present_folder(path).exists()


def stores_in(folder: Path) -> list[Path]:
    """The paths of the stores of a folder, sorted; of one that lies aside, where it belongs."""
    aside = [path.with_name(path.name[1:].removesuffix(".old")) for path in folder.glob(".*.old")]
    there = {path for path in aside if path.suffix == SUFFIX and present_folder(path) != path}
    return sorted(there.union(folder.glob(f"*{SUFFIX}")))


def is_ours(path: Path) -> bool:
    """Whether a folder says that it is a demo store, finished or not, damaged or not."""
    try:
        attributes = from_json(read_regular(path / "zarr.json", JSON_BYTES_AT_MOST))["attributes"]
        return bool(attributes["schema"] == SCHEMA)
    except (DemotoolsError, ValueError, LookupError, TypeError):
        return False


def read_attributes(path: Path) -> StoreAttributes:
    """The attributes of a finished store; StoreError otherwise (see `open_store`)."""
    return parsed_attributes(root_json(present_folder(path), path), path)


def root_json(folder: Path, path: Path) -> bytes:
    """The zarr.json of a store's group; StoreError where there is none that can be read.

    folder   where the store lies now (see `present_folder`)
    path     the store's own, for the message
    """
    if not folder.exists():
        raise missing_store(path)
    if folder.is_file():
        raise StoreError(
            "this is a file, and a demo store is a folder",
            path=path,
            fix="make a store of it first: `demotools convert` reads pickles, `import` parquet "
            "files, `unarchive` archives; `trainer info` shows a checkpoint",
        )
    try:
        return read_regular(folder / "zarr.json", JSON_BYTES_AT_MOST)
    except DemotoolsError as error:
        raise _not_ours(path, f": its zarr.json cannot be read ({error.what})") from error


def parsed_attributes(content: bytes, path: Path) -> StoreAttributes:
    """The attributes that the zarr.json of a finished store holds.

    path        of the store or the archive, for the message

    StoreError  it is not that of a finished store that this version reads
    """
    try:
        # unlike json.loads it refuses deep nesting, and text that no terminal can print
        metadata = from_json(content)
    except ValueError as error:
        raise _not_ours(path, ", or its zarr.json is damaged") from error
    attributes = metadata.get("attributes", {}) if isinstance(metadata, dict) else {}
    if not isinstance(attributes, dict) or attributes.get("schema") != SCHEMA:
        raise _not_ours(path)
    if metadata.get("node_type") != "group":
        raise damaged(path, "its zarr.json does not describe a group")
    if attributes.get("unfinished"):
        raise StoreError(
            "this store was left unfinished",
            path=path,
            fix="remove the folder and rerun the command that made it",
        )
    version = attributes.get("schema_version")
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise StoreError(
            f"this store has schema version {version}; this demotools reads up to {SCHEMA_VERSION}",
            path=path,
            fix="install a newer demotools",
        )
    try:
        return StoreAttributes.model_validate(attributes)
    except ValidationError as error:
        place, what = first_problem(error, "json")
        raise damaged(path, f"its attributes are invalid at {place}: {what}") from error


def check_lengths(
    path: Path, attributes: StoreAttributes, arrays: Mapping[str, ArrayMetadata]
) -> None:
    """StoreError where the arrays are not those, or not as long, as the attributes say."""
    steps, episodes, missions = attributes.steps, attributes.episodes, attributes.missions
    lengths = {
        "cells" if "cells" in arrays else "image": steps,
        **dict.fromkeys(("direction", "action", "mask"), steps),
        "episode_offset": episodes + 1,
        **dict.fromkeys(("episode_mission", "episode_seed"), episodes),
        **dict.fromkeys((TEXTS, "mission_tokens"), missions),
        **{name: steps for name in OPTIONAL if name in arrays},
        **({LEVELS: episodes} if attributes.levels else {}),
    }
    if strange := set(arrays) ^ set(lengths):
        raise damaged(path, f"array {min(strange)} is missing or unexpected")
    for name, length in lengths.items():
        if arrays[name].shape[0] != length:
            raise damaged(
                path, f"{name} has {arrays[name].shape[0]} rows, but the attributes say {length}"
            )


def metadata_hash(root: bytes, arrays: Mapping[str, bytes], stated: str = NO_HASH) -> str:
    """The sha256 of all metadata files: the group's, then those of the arrays by their names.

    root     the group's zarr.json
    arrays   array -> its zarr.json
    stated   the hash that stands in `root`, which counts as 64 zeros
    """
    digest = hashlib.sha256(root.replace(stated.encode(), NO_HASH.encode()))
    for array in sorted(arrays):
        digest.update(arrays[array])
    return digest.hexdigest()


def array_names(path: Path) -> list[str]:
    """The names of the arrays of a store, sorted."""
    return sorted(file.parent.name for file in path.glob("*/zarr.json"))


def chunk_files(path: Path, array: str) -> list[Path]:
    """The chunk files of one array, in order; as many as its metadata announce.

    StoreError  its metadata are not those of the format
    """
    return array_metadata(path, array).chunk_files(path / array)


def expected_entries(path: Path) -> tuple[set[str], set[str]]:
    """The folders and the files of a store, by their paths inside it.

    StoreError  the metadata of an array are not those of the format
    """
    files = {"zarr.json"}
    for array in array_names(path):
        files.add(f"{array}/zarr.json")
        files |= {file.relative_to(path).as_posix() for file in chunk_files(path, array)}
    folders = {parent.as_posix() for file in files for parent in PurePosixPath(file).parents}
    return folders - {"."}, files


def array_json(path: Path, array: str) -> bytes:
    """The zarr.json of an array; StoreError where it cannot be read."""
    try:
        return read_regular(path / array / "zarr.json", JSON_BYTES_AT_MOST)
    except DemotoolsError as error:
        raise damaged(path, f"{array}/zarr.json cannot be read: {error.what}") from error


def array_metadata(path: Path, array: str) -> ArrayMetadata:
    """What the zarr.json of an array says.

    StoreError  it cannot be read, or says what the format does not
    """
    return parsed_metadata(array_json(path, array), path, array)


def parsed_metadata(content: bytes, path: Path, array: str) -> ArrayMetadata:
    """What these bytes say of an array.

    path        of the store or the archive, for the message

    StoreError  they say what the format does not
    """
    try:
        metadata = ArrayMetadata.model_validate_json(content)
    except ValidationError as error:
        place, what = first_problem(error, "json")
        raise damaged(path, f"{array}/zarr.json is invalid at {place}: {what}") from error
    if wrong := _difference(array, metadata):
        raise damaged(path, f"{array}/zarr.json does not describe an array of a store: {wrong}")
    found = from_json(content)
    for key, value in metadata.as_zarr().items():
        if key not in _MAY_DIFFER and found.get(key) != value:
            what = f"{array}/zarr.json is invalid at {key}: it must be {json.dumps(value)}"
            raise damaged(path, what)
    return metadata


def _difference(array: str, metadata: ArrayMetadata) -> str:
    """Why the format has no such array; nothing where it has."""
    data_types, sizes = _LAYOUTS.get(array, ((), ()))
    shape, chunk = metadata.shape, metadata.chunk_shape
    if not data_types:
        return "the format has no array of this name"
    if metadata.data_type not in data_types:
        return f"its type is {metadata.data_type!r} instead of {' or '.join(data_types)}"
    if len(shape) != len(sizes) or any(
        wanted not in (None, size) for wanted, size in zip(sizes, shape, strict=True)
    ):
        return f"its shape is {list(shape)}"
    # only the first axis is cut, and a chunk is never longer than the array
    if chunk[1:] != shape[1:] or not chunk or chunk[0] > shape[0]:
        return f"its chunks have the shape {list(chunk)}"
    if metadata.chunk_count > _CHUNKS_AT_MOST:
        return f"it has {metadata.chunk_count:,} chunks"
    return ""


def checked_chunks(path: Path) -> Iterator[tuple[int, str]]:
    """Read every byte: (size in bytes, what is wrong or nothing) for each chunk file."""
    for array in array_names(path):
        for file in chunk_files(path, array):
            name = file.relative_to(path)
            try:
                with open_regular(file) as stream:
                    size_bytes = os.fstat(stream.fileno()).st_size
                    whole = ends_with_checksum(stream)
                yield size_bytes, "" if whole else f"{name} fails its checksum"
            except DemotoolsError as error:
                yield 0, f"{name} is missing or unreadable: {error.what}"


def ends_with_checksum(stream: IO[bytes], crc: int = 0) -> bool:
    """Whether the last bytes of a file are the checksum of those before.

    crc   of what counts as standing before the file
    """
    left = os.fstat(stream.fileno()).st_size - CRC_BYTES
    while left > 0 and (block := stream.read(min(left, COPY_BYTES))):
        crc = google_crc32c.extend(crc, block)
        left -= len(block)
    return stream.read(CRC_BYTES + 1) == crc.to_bytes(CRC_BYTES, "little")
