"""Open a store: map its step arrays and read episodes from it.

The step arrays are uncompressed chunk files, which are memory-mapped as they are. Opening takes
milliseconds whatever the size: the metadata files (`demotools.store.format`) and the checksums at
the ends of the chunk files must match the fingerprint in the attributes, which detects a store that
was truncated, mixed or rewritten; `demotools verify` checks every byte. All files are opened at
once, so later changes to the folder do not affect an open store. This module imports neither torch,
click nor minigrid.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from demotools.babyai.cells import ACTIONS, CELL_CODES, VIEW_SIZE, unpacked_cells
from demotools.babyai.vocabulary import vocabulary_hash
from demotools.errors import DemotoolsError, SettingsError, StoreError, printable_text
from demotools.output import counted, data_folder, open_regular
from demotools.store.episodes import EpisodeDataset, spans
from demotools.store.format import (
    CRC_BYTES,
    LEVELS,
    OPTIONAL,
    SUFFIX,
    TEXTS,
    ArrayMetadata,
    StoreAttributes,
    array_json,
    array_metadata,
    array_names,
    check_lengths,
    damaged,
    is_ours,
    metadata_hash,
    missing_store,
    parsed_attributes,
    parsed_metadata,
    present_folder,
    root_json,
    store_exists,
    stores_in,
)

Image = NDArray[np.uint8]
# array -> its chunk files, mapped whole: uint8 [size] each
_ChunkFiles = Mapping[str, list[NDArray[np.uint8]]]
# A chunk of missions, packed or not: they are texts of some 30 bytes, 2^17 of them a chunk.
TEXT_BYTES_AT_MOST = 1 << 28


@dataclass(frozen=True, repr=False)
class Episodes:
    """Whole episodes in columns: E episodes, S steps.

    length      int64 [E], steps of each episode, at least 1
    mission     E texts
    seed        int64 [E], environment seed, -1 where unknown
    view        uint8 [S, 7, 7] packed cells, or [S, H, W, C] images that do not pack
    direction   uint8 [S], 0 right, 1 down, 2 left, 3 up
    action      uint8 [S], expert action 0..6
    optional    [S] each, those of the arrays `OPTIONAL` that all of these episodes have
    """

    length: NDArray[np.int64]
    mission: list[str]
    seed: NDArray[np.int64]
    view: NDArray[np.uint8]
    direction: NDArray[np.uint8]
    action: NDArray[np.uint8]
    optional: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def __repr__(self) -> str:
        steps = counted(len(self.action), "step")
        return f"<{counted(len(self.length), 'episode')} in columns: {steps}>"

    @property
    def packed(self) -> bool:
        """Whether the views are packed cells."""
        return self.view.shape[1:] == (VIEW_SIZE, VIEW_SIZE)

    @property
    def offset(self) -> NDArray[np.int64]:
        """First step of each episode, then S: int64 [E + 1]."""
        return np.concatenate([[0], np.cumsum(self.length)]).astype(np.int64)

    @classmethod
    def one(
        cls,
        mission: str,
        seed: int,
        view: NDArray[np.uint8],
        direction: NDArray[np.uint8],
        action: NDArray[np.uint8],
        optional: Mapping[str, NDArray[Any]],
    ) -> Episodes:
        """A single episode."""
        length, seeds = np.array([len(action)]), np.array([seed])
        return cls(length, [mission], seeds, view, direction, action, optional)

    @classmethod
    def none(cls, view_shape: Sequence[int]) -> Episodes:
        """No episode, of views of this shape."""
        whole, byte = np.zeros(0, np.int64), np.zeros(0, np.uint8)
        return cls(whole, [], whole, np.zeros((0, *view_shape), np.uint8), byte, byte)

    @classmethod
    def concatenated(cls, parts: Sequence[Episodes]) -> Episodes:
        """The episodes of several parts, one part after another; at least one part."""
        some = [part for part in parts if len(part.length)] or parts[:1]
        return cls(
            mission=[text for part in some for text in part.mission],
            **{name: np.concatenate([getattr(part, name) for part in some]) for name in _COLUMNS},
            optional={
                name: np.concatenate([part.optional[name] for part in some])
                for name in some[0].optional
            },
        )

    def take(self, episodes: NDArray[np.int64]) -> Episodes:
        """Copies of the given episodes, in the order given."""
        index = spans(self.offset[episodes], self.length[episodes])
        return Episodes(
            length=self.length[episodes],
            mission=[self.mission[episode] for episode in episodes],
            seed=self.seed[episodes],
            view=self.view[index],
            direction=self.direction[index],
            action=self.action[index],
            optional={name: column[index] for name, column in self.optional.items()},
        )


_COLUMNS = ("length", "seed", "view", "direction", "action")


@dataclass(frozen=True, repr=False)
class StepArray:
    """One step array of a store, mapped chunk file by chunk file, read-only.

    chunks         [chunk_length, ...] each, the last cut to what is left; uint8, rewards float32
    chunk_length   steps in every chunk but the last
    """

    chunks: tuple[NDArray[Any], ...]
    chunk_length: int

    def __repr__(self) -> str:
        shape = ", ".join(map(str, self.shape))
        return f"<step array: {self.chunks[0].dtype} [{shape}]>"

    @property
    def shape(self) -> tuple[int, ...]:
        """[S, ...] over all chunks."""
        return (sum(map(len, self.chunks)), *self.chunks[0].shape[1:])

    def span(self, start: int, stop: int) -> NDArray[Any]:
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

    def take(self, index: NDArray[np.int64]) -> NDArray[Any]:
        """The steps of `index`, copied.

        index     int64 [...], 0 <= index < S
        returns   [..., *step shape]
        """
        if len(self.chunks) == 1:
            return np.asarray(np.take(self.chunks[0], index, axis=0))
        result = np.empty((*index.shape, *self.chunks[0].shape[1:]), self.chunks[0].dtype)
        number, row = np.divmod(index, self.chunk_length)
        for chunk in np.unique(number):
            chosen = number == chunk
            result[chosen] = self.chunks[chunk][row[chosen]]
        return result


@dataclass(frozen=True, eq=False, repr=False)
class Store(EpisodeDataset):
    """An open demo store, the dataset of all its episodes. All arrays are read-only memory maps.

    `store[i]` is an episode; `store[:100]`, `store[[3, 5]]`, `store.select()` and `store.filter()`
    are subsets of its episodes; `len(store)` is their number (`demotools.store.episodes`).

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
    episode_level     uint8 [E], place of each episode's level in `levels`
    optional          [S] each, those of the arrays `OPTIONAL` that this store has
    arrays            metadata of all arrays
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
    episode_level: NDArray[np.uint8]
    optional: Mapping[str, StepArray]
    arrays: Mapping[str, ArrayMetadata]
    _chunk_files: _ChunkFiles

    def __repr__(self) -> str:
        of = f"{counted(self.episodes, 'episode')}, {counted(self.steps, 'step')}"
        return printable_text(f"<store {self.name}: {of} of {', '.join(self.levels)}>", 200)

    @property
    def store(self) -> Store:
        """Itself: its episodes are its own."""
        return self

    @cached_property
    def numbers(self) -> NDArray[np.int64]:
        """Those of all episodes."""
        return np.arange(self.episodes)

    @property
    def episodes(self) -> int:
        """E, the number of episodes."""
        return len(self.episode_mission)

    @property
    def steps(self) -> int:
        """S, the number of steps."""
        return int(self.episode_offset[-1])

    num_episodes, num_steps = episodes, steps

    @property
    def name(self) -> str:
        """The folder's name without its suffix."""
        return self.path.name.removesuffix(SUFFIX)

    @property
    def level(self) -> str:
        """The level of the demonstrations."""
        return self.attributes.level

    @property
    def levels(self) -> tuple[str, ...]:
        """The levels of the demonstrations: one, or several in a merged store."""
        return self.attributes.levels or (self.attributes.level,)

    def level_seeds(self) -> dict[str, NDArray[np.int64]]:
        """The known environment seeds of the episodes of each level."""
        known = self.episode_seed != -1
        return {
            level: self.episode_seed[known & (self.episode_level == number)]
            for number, level in enumerate(self.levels)
        }

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The words; word k has the token id k + 1."""
        return self.attributes.vocabulary

    @property
    def metadata(self) -> dict[str, Any]:
        """The attributes of the store as a dict."""
        return self.attributes.model_dump()

    def step_array(self, name: str) -> StepArray:
        """One of view, direction, action, mask."""
        array: StepArray = getattr(self, name)
        return array

    @property
    def taken(self) -> StepArray:
        """The action that was taken at each step [S]: the expert's, except in noisy recordings."""
        return self.optional.get("taken", self.action)

    @cached_property
    def mission_text(self) -> list[str]:
        """The M distinct missions; unpacked on first use."""
        return [text for texts in self.text_chunks() for text in texts]

    def text_chunks(self) -> Iterator[list[str]]:
        """The distinct missions in order, a chunk file of them at a time.

        StoreError  a chunk file does not unpack to what the metadata announce
        """
        texts = self.arrays[TEXTS]
        for number, file in enumerate(self._chunk_files[TEXTS]):
            found = _unpacked_texts(file, texts.chunk_shape[0], self.path, number)
            yield found[: texts.shape[0] - number * texts.chunk_shape[0]]

    def texts(self, rows: Iterable[int]) -> list[str]:
        """The texts of a few missions, without keeping all of them."""
        wanted = [int(row) for row in rows]
        length = self.arrays[TEXTS].chunk_shape[0]
        files = self._chunk_files[TEXTS]
        found: dict[int, str] = {}
        for number in sorted({row // length for row in wanted}):
            texts = _unpacked_texts(files[number], length, self.path, number)
            found |= {row: texts[row % length] for row in wanted if row // length == number}
        return [found[row] for row in wanted]

    def bounds(self, episode: int) -> tuple[int, int]:
        """First step of an episode, and of the next."""
        return int(self.episode_offset[episode]), int(self.episode_offset[episode + 1])

    def array_bytes(self, array: str) -> int:
        """What the chunk files of an array take."""
        return sum(map(len, self._chunk_files[array]))

    def check_unchanged(self) -> None:
        """StoreError where the files that are open were written to since: after long reading."""
        if _fingerprint(self._chunk_files) != self.attributes.fingerprint:
            raise _replaced(self.path)

    def images(self, start: int, stop: int) -> Image:
        """The views of steps [start, stop) as images uint8 [stop - start, H, W, C]."""
        view = self.view.span(start, stop)
        self.check_values(view=view)
        return unpacked_cells(view) if self.packed else view

    def check_values(self, **columns: NDArray[np.uint8]) -> None:
        """StoreError where values of these step arrays are not in their range."""
        for name, values in columns.items():
            limit = self.value_limit(name)
            if values.max(initial=0) >= limit:
                raise damaged(self.path, f"a value of {name} is {values.max()}, not below {limit}")

    def value_limit(self, name: str) -> int:
        """What every value of a step array is below."""
        limits = {
            "view": CELL_CODES if self.packed else 256,
            "direction": 4,
            "action": len(ACTIONS),
            "taken": len(ACTIONS),
            "subgoal": len(self.attributes.subgoals),
            "terminated": 2,
        }
        return limits.get(name, 256)

    def __reduce__(self) -> tuple[object, ...]:
        # to another process a store travels by its path, not by its gigabytes
        return reopened, (self.path, self.attributes.fingerprint)

    def take(
        self, episodes: NDArray[np.int64], mission_text: Sequence[str] | None = None
    ) -> Episodes:
        """Copies of the given episodes, in the order given.

        episodes       int64 [E'], 0 <= episode < E
        mission_text   this store's, where somebody has unpacked it already
        """
        texts = self.mission_text if mission_text is None else mission_text
        length = np.diff(self.episode_offset)[episodes]
        index = spans(self.episode_offset[episodes], length)
        steps = {name: getattr(self, name).take(index) for name in ("view", "direction", "action")}
        optional = {name: array.take(index) for name, array in self.optional.items()}
        self.check_values(**steps, **optional)
        return Episodes(
            length=length,
            mission=[texts[row] for row in self.episode_mission[episodes]],
            seed=np.array(self.episode_seed[episodes]),
            optional=optional,
            **steps,
        )


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


_OTHER_FILES = (".pkl", ".gz", ".parquet", ".zip", ".hdf5", ".jsonl", ".pt")
"""How the name of a file ends that people take for a store; asked only where nothing lies."""


def store_path(name: str, folder: Path) -> Path:
    """The folder of a store, given its name or its path.

    What lies on the disk decides. Only where no store has this name can it be that of a file, if it
    has a suffix; whoever opens it says so.

    >>> store_path("GoToLocal-small", Path("data")).as_posix()
    'data/GoToLocal-small.zarr'
    >>> store_path("elsewhere/GoTo.zarr", Path("data")).as_posix()
    'elsewhere/GoTo.zarr'
    """
    is_path = "/" in name or os.sep in name or name.endswith(SUFFIX) or name in (".", "..")
    path = Path(name) if is_path else folder / (name + SUFFIX)
    if not is_path and not store_exists(path):
        file = Path(name)
        if file.suffix in _OTHER_FILES or (file.suffix and file.is_file()):
            return file
    # what lies beside a store takes its name, which `.` and `..` do not say
    return path.resolve() if path.name in ("", "..") else _with_suffix(path)


def _with_suffix(path: Path) -> Path:
    """The path with the suffix of a store if a store lies only there."""
    suffixed = path.with_name(path.name + SUFFIX) if path.name else path
    return suffixed if not store_exists(path) and store_exists(suffixed) else path


def new_store_path(name: str, folder: Path) -> Path:
    """The folder of a store that is to be made: a name, not a path, inside the data folder.

    SettingsError  the name would lie elsewhere or hide itself
    """
    plain = name.removesuffix(SUFFIX)
    if not re.fullmatch(r"\w[\w .+-]*", plain):
        raise SettingsError(
            "this is not a valid store name",
            path=f"--name {name!r}",
            fix="use letters, digits, '_', '-', '.', '+' and spaces; begin with a letter, digit or "
            "'_'; choose the folder with --data-dir",
        )
    return folder / (plain + SUFFIX)


def open_store(path: Path | str) -> Store:
    """Open a demo store for reading; nothing is copied.

    path   its folder, with or without the suffix; a string may also be its name in the data folder,
           as in the commands

    StoreError  it is missing, unfinished, of another schema or a newer version; a chunk file is
                missing, short, or not the one that was written
    """
    path = store_path(path, data_folder()) if isinstance(path, str) else _with_suffix(path)
    while True:
        before = _folder_state(path)
        try:
            return _opened(path)
        except StoreError:
            if _folder_state(path) == before:
                raise
            # replaced just now, and opened half from the old store: the new one is there


def list_stores(folder: Path | str | None = None) -> list[str]:
    """The names of the stores in a folder; None: in the data folder."""
    place = data_folder() if folder is None else Path(folder)
    return sorted(path.stem for path in stores_in(place) if is_ours(present_folder(path)))


def _folder_state(path: Path) -> tuple[int, int] | None:
    try:
        about = present_folder(path).stat()
    except OSError:
        return None
    # numbers of folders are used again; the time is that of the last rename
    return about.st_ino, about.st_ctime_ns


def _opened(path: Path) -> Store:
    folder = present_folder(path)
    root = root_json(folder, path)
    attributes = parsed_attributes(root, path)
    try:
        names = array_names(folder)
    except FileNotFoundError as error:  # replaced or removed since its attributes were read
        raise missing_store(path) from error
    content = {name: array_json(folder, name) for name in names}
    arrays = {name: parsed_metadata(content[name], path, name) for name in content}
    check_lengths(path, attributes, arrays)
    chunks = {name: _chunk_maps(folder, path, name, arrays[name]) for name in sorted(arrays)}
    if _fingerprint(chunks) != attributes.fingerprint:
        raise damaged(path, "its checksums differ from those it was written with")
    if metadata_hash(root, content, attributes.metadata_hash) != attributes.metadata_hash:
        raise damaged(path, "its metadata differ from those it was written with")
    packed = "cells" in arrays
    maps = {name: _array(arrays[name], chunks[name]) for name in arrays if name != TEXTS}
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
        episode_level=(
            _whole(maps[LEVELS]) if LEVELS in maps else np.zeros(attributes.episodes, np.uint8)
        ),
        optional={name: maps[name] for name in OPTIONAL if name in maps},
        arrays=arrays,
        _chunk_files=chunks,
    )
    if vocabulary_hash(attributes.vocabulary) != attributes.vocabulary_hash:
        raise damaged(path, "its vocabulary does not match its hash")
    _check_rows(store)
    return store


def _check_rows(store: Store) -> None:
    """StoreError where episodes do not follow each other, or name missions that are not there."""
    offset, mission = store.episode_offset, store.episode_mission
    if offset[0] != 0 or offset[-1] != store.attributes.steps:
        raise damaged(
            store.path,
            f"its episodes cover steps {offset[0]} to {offset[-1]} of {store.attributes.steps}",
        )
    length = np.diff(offset)
    episode = int(length.argmin())
    if length[episode] < 1:
        raise damaged(store.path, f"episode {episode} has {length[episode]} steps")
    wrong = mission.view(np.uint32).argmax()
    if not 0 <= mission[wrong] < store.attributes.missions:
        raise damaged(
            store.path,
            f"episode {wrong} has mission {mission[wrong]}, not below {store.attributes.missions}",
        )
    if (last := int(store.episode_level.max())) >= len(store.levels):
        raise damaged(store.path, f"an episode has level {last}, not below {len(store.levels)}")


def reopened(path: Path, expected: str) -> Store:
    """The store at `path` with new maps; StoreError where its fingerprint is not the expected."""
    store = open_store(path)
    if store.attributes.fingerprint != expected:
        raise _replaced(path)
    return store


def remapped(store: Store) -> Store:
    """The store with new maps: what was read stays in memory for as long as its map lives.

    Where another has taken its place since, it is `store`, which still gives what it gave.
    """
    present = open_store(store.path)
    same = present.attributes.fingerprint == store.attributes.fingerprint
    return present if same else store


def _replaced(path: Path) -> StoreError:
    return StoreError(
        "the store was replaced while it was in use",
        path=path,
        fix="start over with the new store, or restore the old one",
    )


def fingerprint(path: Path) -> str:
    """The fingerprint of a store in the making; StoreError where a chunk file is missing."""
    names = array_names(path)
    return _fingerprint(
        {name: _chunk_maps(path, path, name, array_metadata(path, name)) for name in names}
    )


def _fingerprint(chunk_files: _ChunkFiles) -> str:
    """The sha256 of the names of the arrays, each with the checksums of its chunk files."""
    digest = hashlib.sha256()
    for array in sorted(chunk_files):
        digest.update(array.encode())
        for file in chunk_files[array]:
            digest.update(file[-CRC_BYTES:].tobytes())
    return digest.hexdigest()


def _chunk_maps(
    folder: Path, path: Path, array: str, metadata: ArrayMetadata
) -> list[NDArray[np.uint8]]:
    """All chunk files of an array, mapped whole, of the right size."""
    maps, expected = [], metadata.raw_chunk_bytes
    for file in metadata.chunk_files(folder / array):
        name = file.relative_to(folder)
        try:
            stream = open_regular(file)
        except DemotoolsError as error:
            raise damaged(
                path, f"chunk file {name} is missing or unreadable: {error.what}"
            ) from error
        with stream:
            size = os.fstat(stream.fileno()).st_size
            if size <= CRC_BYTES or (expected and size != expected):
                wanted = f" instead of {expected}" if expected else ""
                raise damaged(path, f"chunk file {name} is {size} bytes long{wanted}")
            # a plain array over the map: np.memmap's own subclass slows every slice
            maps.append(np.asarray(np.memmap(stream, np.uint8, mode="r", shape=(size,))))
    return maps


def _array(metadata: ArrayMetadata, files: list[NDArray[np.uint8]]) -> StepArray:
    shape, chunk = metadata.shape, metadata.chunk_shape
    dtype = np.dtype(metadata.data_type).newbyteorder("<")
    chunks = []
    for number, file in enumerate(files):
        rows = min(chunk[0], shape[0] - number * chunk[0])
        chunks.append(file[:-CRC_BYTES].view(dtype).reshape(chunk)[:rows])
    return StepArray(chunks=tuple(chunks), chunk_length=chunk[0])


def _unpacked_texts(file: NDArray[np.uint8], count: int, path: Path, number: int) -> list[str]:
    """The texts of one chunk file of missions; nothing in it is believed before it is checked."""
    from numcodecs.zstd import Zstd

    content = file.tobytes()
    packed, crc = content[:-CRC_BYTES], content[-CRC_BYTES:]
    wrong = damaged(path, f"{TEXTS} cannot be read: chunk {number} does not follow the format")
    if google_crc32c.value(packed).to_bytes(CRC_BYTES, "little") != crc:
        raise damaged(path, f"{TEXTS} cannot be read: chunk {number} fails its checksum")
    if not 4 + 4 * count <= _unpacked_size(packed) <= TEXT_BYTES_AT_MOST:
        raise wrong
    try:
        unpacked = bytes(Zstd().decode(packed))
        if int.from_bytes(unpacked[:4], "little") != count:
            raise wrong
        texts, place = [], 4
        for _ in range(count):
            start = place + 4
            place = start + int.from_bytes(unpacked[place:start], "little")
            texts.append(unpacked[start:place].decode())
    except (ValueError, RuntimeError, MemoryError) as error:
        raise wrong from error
    if place != len(unpacked):
        raise wrong
    return texts


def _unpacked_size(frame: bytes) -> int:
    """What a Zstandard frame says that it unpacks to, -1 where it does not (RFC 8878, 3.1.1.1)."""
    if frame[:4] != b"\x28\xb5\x2f\xfd" or len(frame) < 5:
        return -1
    flags = frame[4]
    single, kind = flags >> 5 & 1, flags >> 6
    size = (single, 2, 4, 8)[kind]
    start = 5 + (not single) + (0, 1, 2, 4)[flags & 3]
    field = frame[start : start + size]
    return int.from_bytes(field, "little") + (256 if kind == 1 else 0) if field else -1


def _whole(mapped: StepArray) -> NDArray[Any]:
    return mapped.chunks[0] if len(mapped.chunks) == 1 else np.concatenate(mapped.chunks)
