"""Open a demo store, map its step arrays, cut episodes out of it.

A store is a Zarr v3 group (docs/format.md). The step arrays are uncompressed chunk files whose
last four bytes are a CRC-32C, so they are memory-mapped as they lie. Opening costs milliseconds
whatever the size: the checksums at the ends of the chunk files must give the fingerprint that the
attributes hold, which finds a store that was cut, mixed or rewritten; every byte is checked by
`demotools verify`. This module imports neither torch, click nor minigrid.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import platformdirs
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from demotools.errors import SettingsError, StoreError
from demotools.grid import unpacked_cells
from demotools.metadata import TEXTS, ArrayMetadata, array_metadata, array_names, damaged
from demotools.vocabulary import vocabulary_hash

SCHEMA = "babyai-demos"
SCHEMA_VERSION = 1
SUFFIX = ".zarr"
CRC_BYTES = 4
DATA_VARIABLE = "DEMOTOOLS_DATA"

Image = NDArray[np.uint8]


@dataclass(frozen=True)
class Episodes:
    """Whole episodes in columns: E episodes, S steps.

    length      int64 [E], steps of each episode, at least 1
    mission     E texts
    seed        int64 [E], environment seed, -1 where unknown
    view        uint8 [S, 7, 7] packed cells, or [S, H, W, C] images that do not pack
    direction   uint8 [S], 0 right, 1 down, 2 left, 3 up
    action      uint8 [S], expert action 0..6
    """

    length: NDArray[np.int64]
    mission: list[str]
    seed: NDArray[np.int64]
    view: NDArray[np.uint8]
    direction: NDArray[np.uint8]
    action: NDArray[np.uint8]

    @property
    def offset(self) -> NDArray[np.int64]:
        """First step of each episode, then S: int64 [E + 1]."""
        return np.concatenate([[0], np.cumsum(self.length)]).astype(np.int64)


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
    licence: str
    citation: str
    created_by: str
    fingerprint: str


@dataclass(frozen=True)
class StepArray:
    """One step array of a store, mapped chunk file by chunk file, read-only.

    chunks         uint8 [chunk_length, ...] each, the last cut to what is left
    chunk_length   steps in every chunk but the last
    """

    chunks: tuple[NDArray[np.uint8], ...]
    chunk_length: int

    @property
    def shape(self) -> tuple[int, ...]:
        """[S, ...] over all chunks."""
        return (sum(map(len, self.chunks)), *self.chunks[0].shape[1:])

    def span(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Steps [start, stop), a view of the map where one chunk holds them all.

        start, stop   0 <= start <= stop <= S
        """
        first, last = start // self.chunk_length, max(stop - 1, start) // self.chunk_length
        pieces = [
            self.chunks[number][
                max(start - number * self.chunk_length, 0) : stop - number * self.chunk_length
            ]
            for number in range(first, min(last + 1, len(self.chunks)))
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def take(self, index: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The steps of `index`, copied.

        index     int64 [...], 0 <= index < S
        returns   uint8 [..., *step shape]
        """
        if len(self.chunks) == 1:
            return np.asarray(np.take(self.chunks[0], index, axis=0))
        result = np.empty((*index.shape, *self.chunks[0].shape[1:]), dtype=np.uint8)
        number, row = np.divmod(index, self.chunk_length)
        for chunk in np.unique(number):
            chosen = number == chunk
            result[chosen] = self.chunks[chunk][row[chosen]]
        return result


@dataclass(frozen=True)
class Store:
    """An open demo store. All arrays are read-only maps of its chunk files.

    path              the folder
    attributes        see StoreAttributes
    view              packed cells [S, 7, 7], or images [S, H, W, C] where `packed` is False
    direction         [S]
    action            [S]
    mask              [S], memory mask: 0 on the first step of an episode, else 1
    episode_offset    int64 [E + 1]
    episode_mission   int32 [E]
    episode_seed      int64 [E]
    mission_tokens    uint8 or uint16 [M, L]
    """

    path: Path
    attributes: StoreAttributes
    packed: bool
    view: StepArray
    direction: StepArray
    action: StepArray
    mask: StepArray
    episode_offset: NDArray[np.int64]
    episode_mission: NDArray[np.int32]
    episode_seed: NDArray[np.int64]
    mission_tokens: NDArray[np.uint8] | NDArray[np.uint16]

    @property
    def episodes(self) -> int:
        """E, the number of episodes."""
        return len(self.episode_mission)

    @property
    def steps(self) -> int:
        """S, the number of steps."""
        return int(self.episode_offset[-1])

    @property
    def name(self) -> str:
        """The folder's name without its suffix."""
        return self.path.name.removesuffix(SUFFIX)

    @cached_property
    def mission_text(self) -> list[str]:
        """The M distinct missions; read on first use."""
        return [text for texts in text_chunks(self.path) for text in texts.tolist()]

    def images(self, start: int, stop: int) -> Image:
        """The views of steps [start, stop) as images uint8 [stop - start, H, W, C]."""
        view = self.view.span(start, stop)
        return unpacked_cells(view) if self.packed else view

    def __reduce__(self) -> tuple[object, ...]:
        # to another process a store travels by its path, not by its gigabytes
        return _reopened, (self.path, self.attributes.fingerprint)

    def select(self, episodes: NDArray[np.int64]) -> Episodes:
        """Copies of the given episodes, in the order given.

        episodes   int64 [E'], 0 <= episode < E
        """
        length = np.diff(self.episode_offset)[episodes]
        index = spans(self.episode_offset[episodes], length)
        return Episodes(
            length=length,
            mission=[self.mission_text[row] for row in self.episode_mission[episodes]],
            seed=np.array(self.episode_seed[episodes]),
            view=self.view.take(index),
            direction=self.direction.take(index),
            action=self.action.take(index),
        )


def spans(start: NDArray[np.int64], length: NDArray[np.int64]) -> NDArray[np.int64]:
    """The integers of several half-open ranges, one after another.

    start, length   int64 [N]
    returns         int64 [sum of length]

    >>> spans(np.array([7, 0]), np.array([2, 3]))
    array([7, 8, 0, 1, 2])
    """
    before = np.cumsum(length) - length
    return np.repeat(start - before, length) + np.arange(length.sum())


def episode_mask(offset: NDArray[np.int64], start: int, stop: int) -> NDArray[np.uint8]:
    """Memory mask of steps [start, stop): 0 where an episode begins, else 1.

    offset   int64 [E + 1], first step of each episode, then the number of steps
    returns  uint8 [stop - start]
    source   the tutorial's `masks`: not is_first_observation

    >>> episode_mask(np.array([0, 3, 5]), 2, 5)
    array([1, 0, 1], dtype=uint8)
    """
    mask = np.ones(stop - start, dtype=np.uint8)
    first = offset[np.searchsorted(offset, start) : np.searchsorted(offset, stop)]
    mask[first - start] = 0
    return mask


def data_folder(explicit: Path | None = None) -> Path:
    """Where stores lie: `--data-dir`, else `$DEMOTOOLS_DATA`, else the user's data folder."""
    if explicit is not None:
        return explicit
    if variable := os.environ.get(DATA_VARIABLE):
        return Path(variable)
    return platformdirs.user_data_path("demotools", appauthor=False)


def store_path(name: str, folder: Path) -> Path:
    """The folder of a store, given its name or its path.

    >>> store_path("GoToLocal-small", Path("data")).as_posix()
    'data/GoToLocal-small.zarr'
    >>> store_path("elsewhere/GoTo.zarr", Path("data")).as_posix()
    'elsewhere/GoTo.zarr'
    """
    is_path = "/" in name or os.sep in name or name.endswith(SUFFIX)
    return Path(name) if is_path else folder / (name + SUFFIX)


def new_store_path(name: str, folder: Path) -> Path:
    """The folder of a store that is to be made: a name, not a path, inside the data folder.

    SettingsError  the name would lie elsewhere or hide itself
    """
    plain = name.removesuffix(SUFFIX)
    if not re.fullmatch(r"\w[\w .+-]*", plain):
        raise SettingsError(
            "this cannot be the name of a store",
            path=f"--name {name!r}",
            fix="use letters, digits, '-', '_' and '.'; --data-dir chooses the folder",
        )
    return folder / (plain + SUFFIX)


def open_store(path: Path | str) -> Store:
    """Map a demo store.

    StoreError  missing, unfinished, of another schema or a newer version, a chunk file missing,
                short, or not the one that was written
    """
    path = Path(path)
    attributes = read_attributes(path)
    arrays = {name: array_metadata(path, name) for name in array_names(path)}
    _check_lengths(path, attributes, arrays)
    packed = "cells" in arrays
    maps = {
        name: _mapped(path, name, metadata) for name, metadata in arrays.items() if name != TEXTS
    }
    store = Store(
        path=path,
        attributes=attributes,
        packed=packed,
        view=maps["cells" if packed else "image"],
        direction=maps["direction"],
        action=maps["action"],
        mask=maps["mask"],
        episode_offset=_whole(maps["episode_offset"]),
        episode_mission=_whole(maps["episode_mission"]),
        episode_seed=_whole(maps["episode_seed"]),
        mission_tokens=_whole(maps["mission_tokens"]),
    )
    if _fingerprint(path, arrays) != attributes.fingerprint:
        raise damaged(path, "its checksums are not the ones that it was written with")
    if vocabulary_hash(attributes.vocabulary) != attributes.vocabulary_hash:
        raise damaged(path, "its vocabulary is not the one that its hash names")
    if store.steps != attributes.steps:
        raise damaged(path, f"its episodes end at step {store.steps} of {attributes.steps}")
    return store


def _check_lengths(
    path: Path, attributes: StoreAttributes, arrays: Mapping[str, ArrayMetadata]
) -> None:
    steps, episodes, missions = attributes.steps, attributes.episodes, attributes.missions
    lengths = {
        "cells" if "cells" in arrays else "image": steps,
        "direction": steps,
        "action": steps,
        "mask": steps,
        "episode_offset": episodes + 1,
        "episode_mission": episodes,
        "episode_seed": episodes,
        TEXTS: missions,
        "mission_tokens": missions,
    }
    if strange := set(arrays) ^ set(lengths):
        raise damaged(path, f"array {min(strange)} is missing, or does not belong there")
    for name, length in lengths.items():
        if arrays[name].shape[0] != length:
            raise damaged(
                path, f"{name} has {arrays[name].shape[0]} rows where the attributes say {length}"
            )


def _reopened(path: Path, expected: str) -> Store:
    store = open_store(path)
    if store.attributes.fingerprint != expected:
        raise StoreError(
            "the store was replaced by another while it was in use",
            path=path,
            fix="begin anew with the new store, or put the old one back",
        )
    return store


def read_attributes(path: Path) -> StoreAttributes:
    """The attributes of a finished store; StoreError otherwise (see `open_store`)."""
    if not path.exists():
        raise _missing(path)
    metadata = _read_json(path / "zarr.json", path)
    attributes = metadata.get("attributes", {})
    if not isinstance(attributes, dict):
        raise damaged(path, "its attributes are no table")
    if metadata.get("node_type") != "group" or attributes.get("schema", SCHEMA) != SCHEMA:
        raise StoreError(
            "this is not a demo store", path=path, fix="name a folder that demotools wrote"
        )
    if "schema" not in attributes:
        raise StoreError(
            "this store was left unfinished",
            path=path,
            fix="remove the folder and run the command that makes it again",
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
        keys = ", ".join(".".join(map(str, problem["loc"])) for problem in error.errors())
        raise damaged(path, f"its attributes are wrong at {keys}") from error


def text_chunks(path: Path) -> Iterator[NDArray[Any]]:
    """The distinct missions of a store in order, a chunk file of them at a time: string [N].

    StoreError  a chunk file does not unpack to what the metadata announce
    """
    import zarr  # half a second, and only the texts need it

    try:
        texts = zarr.open_array(path / TEXTS, mode="r")
        for start in range(0, texts.shape[0], texts.chunks[0]):
            yield np.asarray(texts[start : start + texts.chunks[0]])
    # zarr's words for a checksum that fails, a chunk that does not unpack, metadata it cannot use
    except (ValueError, RuntimeError, TypeError, LookupError) as error:
        raise damaged(path, f"{TEXTS} cannot be read: {error}") from error


def chunk_files(path: Path, array: str) -> list[Path]:
    """The chunk files of one array, in order; as many as its metadata announce.

    StoreError  its metadata are not those of the format
    """
    return array_metadata(path, array).chunk_files(path / array)


def fingerprint(path: Path) -> str:
    """The sha256 of the checksums at the ends of all chunk files, in the order of their names.

    StoreError  a chunk file is missing
    """
    return _fingerprint(path, {name: array_metadata(path, name) for name in array_names(path)})


def _fingerprint(path: Path, arrays: Mapping[str, ArrayMetadata]) -> str:
    digest = hashlib.sha256()
    for array in sorted(arrays):
        digest.update(array.encode())
        for file in arrays[array].chunk_files(path / array):
            digest.update(_trailer(file, path))
    return digest.hexdigest()


def _trailer(file: Path, path: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            stream.seek(-CRC_BYTES, os.SEEK_END)
            return stream.read(CRC_BYTES)
    except OSError as error:
        raise damaged(path, f"chunk file {file.relative_to(path)} is missing or short") from error


def _read_json(file: Path, path: Path) -> dict[str, Any]:
    try:
        # unlike json.loads it refuses deep nesting, and text that no terminal can print
        content = from_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise StoreError(
            f"this is not a demo store, or an unfinished one: {file.name} cannot be read",
            path=path,
            fix="name a folder that demotools wrote, or run the command that makes it again",
        ) from error
    return content if isinstance(content, dict) else {}


def _mapped(path: Path, array: str, metadata: ArrayMetadata) -> StepArray:
    shape, chunk = metadata.shape, metadata.chunk_shape
    dtype = np.dtype(metadata.data_type).newbyteorder("<")
    expected = math.prod(chunk) * dtype.itemsize + CRC_BYTES
    chunks = []
    for number, file in enumerate(metadata.chunk_files(path / array)):
        size = file.stat().st_size if file.is_file() else -1
        if size != expected:
            found = "missing" if size < 0 else f"{size} bytes long instead of {expected}"
            raise damaged(path, f"chunk file {file.relative_to(path)} is {found}")
        rows = min(chunk[0], shape[0] - number * chunk[0])
        # a plain array over the map: np.memmap's own subclass slows every slice
        chunks.append(np.asarray(np.memmap(file, dtype, mode="r", shape=(rows, *shape[1:]))))
    return StepArray(chunks=tuple(chunks), chunk_length=chunk[0])


def _whole(mapped: StepArray) -> NDArray[Any]:
    return mapped.chunks[0] if len(mapped.chunks) == 1 else np.concatenate(mapped.chunks)


def _missing(path: Path) -> StoreError:
    name = path.name.removesuffix(SUFFIX)
    level = name.removesuffix("-small").removesuffix("-valid")
    here = {file.stem.lower(): file.stem for file in path.parent.glob(f"*{SUFFIX}")}
    near = difflib.get_close_matches(name.lower(), here, n=3, cutoff=0.75)
    hint = f"did you mean {' or '.join(here[match] for match in near)}? Or " if near else ""
    return StoreError(
        "there is no such demo store",
        path=path,
        fix=f"{hint}make it: `demotools fetch {level}` downloads it, `demotools convert FILE.pkl` "
        f"reads a pickle that you have, `demotools generate {level} --episodes 100000` "
        "records the bot",
    )
