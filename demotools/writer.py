"""Write demo stores: parts first, then one pass that joins them, then one rename.

Every job (convert, generate, shrink, fetch of an archive) hands over numbered parts of whole
episodes, from any process, in any order. A part is one file that appears under its name only when
whole, so a job that was killed finds its finished parts again. `StoreBuilder.finish` joins the
parts in order into the chunk files, checks what it wrote, writes the attributes last and renames
the folder. The result depends on the parts alone, never on who wrote them or when.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import filelock
import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec

from demotools.errors import StoreError, from_os_error
from demotools.grid import OBJECTS, PACKING, VIEW_SIZE
from demotools.mission_table import MissionTable
from demotools.store import (
    CRC_BYTES,
    SCHEMA,
    SCHEMA_VERSION,
    Episodes,
    array_names,
    chunk_files,
    episode_mask,
    fingerprint,
    open_store,
)
from demotools.vocabulary import VERSION, vocabulary_hash

# Chunk length (docs/log.md): about a million steps, so that plain zarr reads 50 MB at a time, but
# never more than 16 chunk files an array, so that any store stays under a hundred files.
_CHUNK_STEPS = 1 << 20
_CHUNKS_AT_MOST = 16
_MISSIONS_A_CHUNK = 1 << 17
_BLOCK_BYTES = 1 << 22
_COPY_BYTES = 1 << 18


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


def write_part(folder: Path, number: int, episodes: Episodes, notes: Mapping[str, Any]) -> None:
    """Write part `number`, whole or not at all; safe from any process.

    notes   what the job wants to remember of this part, JSON values (skipped episodes, counts)
    """
    final = part_file(folder, number)
    temporary = final.with_name(f"{final.name}.{os.getpid()}.tmp")
    text = {"mission": episodes.mission, "notes": dict(notes)}
    try:
        with temporary.open("wb") as stream:
            # one plain array after another: a zip archive would compute a second checksum
            for column in (
                episodes.length,
                np.frombuffer(json.dumps(text).encode(), dtype=np.uint8),
                episodes.seed,
                episodes.view,
                episodes.direction,
                episodes.action,
            ):
                _write_array(stream, column)
        temporary.replace(final)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise from_os_error(error, final) from error


def _write_array(stream: IO[bytes], array: NDArray[Any]) -> None:
    # as np.save does, which however tells nothing of a disk that is full
    np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(array))
    stream.write(np.ascontiguousarray(array).data)


def read_part(folder: Path, number: int) -> Episodes:
    """Part `number` as it was written."""
    with part_file(folder, number).open("rb") as stream:
        length, text, seed, view, direction, action = (np.load(stream) for _ in range(6))
    return Episodes(
        length=length,
        mission=json.loads(text.tobytes())["mission"],
        seed=seed,
        view=view,
        direction=direction,
        action=action,
    )


def read_notes(folder: Path, number: int) -> dict[str, Any]:
    """The notes of part `number`."""
    with part_file(folder, number).open("rb") as stream:
        np.load(stream)
        notes: dict[str, Any] = json.loads(np.load(stream).tobytes())["notes"]
        return notes


def read_lengths(folder: Path, number: int) -> NDArray[np.int64]:
    """The episode lengths of part `number`, without reading the rest."""
    with part_file(folder, number).open("rb") as stream:
        return np.asarray(np.load(stream))


def part_file(folder: Path, number: int) -> Path:
    """Where part `number` lies."""
    return folder / f"part-{number:06d}.npy"


def acquired_lock(path: Path) -> filelock.BaseFileLock:
    """The lock of whoever makes `path`; release it.

    StoreError  another process has it
    """
    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise StoreError(
            "another process is making this",
            path=path,
            fix="wait until it has finished, or end it",
        ) from error
    except OSError as error:
        raise from_os_error(error, path) from error
    return lock


class StoreBuilder:
    """Builds one store in a sibling folder, `.NAME.building`, under a lock.

    path        the store's final folder
    job         what determines the content, JSON values: the same job finds its finished parts
                again after it was killed; another job's parts are thrown away
    overwrite   replace an existing store, at the very end

    StoreError  the store exists and `overwrite` is False, or another process is building it
    """

    def __init__(self, path: Path, job: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.path = path
        self.overwrite = overwrite
        self.folder = path.with_name(f".{path.name}.building")
        self.parts = self.folder / "parts"
        self._job = json.dumps(job, sort_keys=True)
        self._lock: filelock.BaseFileLock | None = None

    def __enter__(self) -> Self:
        self._lock = acquired_lock(self.path)
        try:
            self._prepare()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._lock is not None:
            self._lock.release()

    def _prepare(self) -> None:
        aside = self._aside
        if aside.exists() and not self.path.exists():
            aside.rename(self.path)  # an overwrite was killed between its two renames
        if self.path.exists() and not self.overwrite:
            raise StoreError(
                "the store exists already", path=self.path, fix="add --overwrite to replace it"
            )
        job_file = self.folder / "job.json"
        try:
            if not job_file.is_file() or job_file.read_text("utf-8") != self._job:
                shutil.rmtree(self.folder, ignore_errors=True)
                self.parts.mkdir(parents=True)
                job_file.write_text(self._job, "utf-8")
        except OSError as error:
            raise from_os_error(error, self.folder) from error

    @property
    def _aside(self) -> Path:
        return self.path.with_name(f".{self.path.name}.old")

    def finished_parts(self) -> list[int]:
        """The numbers of the parts that lie there whole, sorted."""
        return sorted(int(file.stem.removeprefix("part-")) for file in self.parts.glob("*.npy"))

    def discard(self) -> None:
        """Throw the parts away: for a job that has nothing worth resuming."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def finish(
        self,
        *,
        level: str,
        split: str,
        environment_id: str | None,
        licence: str,
        citation: str,
        source: Mapping[str, Any],
        parent: Mapping[str, Any] | None = None,
    ) -> Path:
        """Join all parts into the store and give it its final name.

        StoreError     there is no episode, or what was written does not read back
        DemotoolsError the disk is full
        """
        about = {
            "level": level,
            "split": split,
            "environment_id": environment_id,
            "licence": licence,
            "citation": citation,
            "source": dict(source),
            "parent": None if parent is None else dict(parent),
        }
        building = self.folder / self.path.name
        try:
            shutil.rmtree(building, ignore_errors=True)
            _join_parts(self.parts, self.finished_parts(), building, about, self.path)
            self.publish(building)
        except OSError as error:
            raise from_os_error(error, self.path) from error
        return self.path

    def publish(self, building: Path) -> None:
        """Check every byte of a whole store that lies in `folder`, then give it its final name.

        StoreError  what was written does not read back
        """
        _check_written(building)
        if self.path.exists():
            shutil.rmtree(self._aside, ignore_errors=True)
            self.path.rename(self._aside)
        building.rename(self.path)
        shutil.rmtree(self._aside, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def _join_parts(
    parts: Path, numbers: list[int], building: Path, about: dict[str, Any], path: Path
) -> None:
    lengths = [(len(length), int(length.sum())) for length in _lengths(parts, numbers)]
    count, steps = sum(pair[0] for pair in lengths), sum(pair[1] for pair in lengths)
    if not count:
        raise StoreError("there is no episode to store", path=path, fix="check the source")
    group = zarr.create_group(building, zarr_format=3)
    missions = MissionTable(parts / "missions.json")
    with missions, _EpisodeFiles(group, building, count) as rows:
        with _StepFiles(group, building, steps) as arrays:
            done = 0
            for episodes in (read_part(parts, number) for number in numbers):
                size = len(episodes.action)
                arrays.append(episodes, episode_mask(episodes.offset, 0, size))
                rows.append(done + episodes.offset[:-1], missions.rows(episodes.mission), episodes)
                done += size
        rows.end(steps)
    words = missions.words
    _create_raw(group, "mission_tokens", missions.tokens())
    _create_text(group, "mission_text", missions)
    attributes = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        **about,
        "episodes": count,
        "steps": steps,
        "missions": len(missions),
        "packing": PACKING,
        "objects": OBJECTS,
        "vocabulary": words,
        "vocabulary_version": VERSION,
        "vocabulary_hash": vocabulary_hash(words),
        "created_by": f"demotools {version('demotools')}",
        "fingerprint": fingerprint(building),
    }
    group.attrs.put(attributes)


def _lengths(parts: Path, numbers: list[int]) -> Iterator[NDArray[np.int64]]:
    return (read_lengths(parts, number) for number in numbers)


class _EpisodeFiles:
    """The three arrays with a value an episode, written in one pass, one chunk file each."""

    def __init__(self, group: zarr.Group, folder: Path, episodes: int) -> None:
        self._offset = _chunk_of(group, folder, "episode_offset", np.int64, episodes + 1)
        self._mission = _chunk_of(group, folder, "episode_mission", np.int32, episodes)
        self._seed = _chunk_of(group, folder, "episode_seed", np.int64, episodes)

    def append(
        self, offset: NDArray[np.int64], mission: NDArray[np.int32], episodes: Episodes
    ) -> None:
        self._offset.append(offset.astype("<i8").view(np.uint8))
        self._mission.append(mission.astype("<i4").view(np.uint8))
        self._seed.append(episodes.seed.astype("<i8").view(np.uint8))

    def end(self, steps: int) -> None:
        """Append the last offset, the number of steps."""
        self._offset.append(np.array([steps], dtype="<i8").view(np.uint8))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for files in (self._offset, self._mission, self._seed):
            files.close(complete=kind is None)


def _chunk_of(
    group: zarr.Group, folder: Path, name: str, dtype: type[np.generic], size: int
) -> ChunkFiles:
    group.create_array(
        name,
        shape=(size,),
        dtype=dtype,
        chunks=(size,),
        serializer=BytesCodec(),
        compressors=(Crc32cCodec(),),
    )
    return ChunkFiles(chunk_files(folder, name), size * np.dtype(dtype).itemsize)


class _StepFiles:
    """The four step arrays, written as raw chunk files in one pass."""

    def __init__(self, group: zarr.Group, folder: Path, steps: int) -> None:
        self._group = group
        self._folder = folder
        self._steps = steps
        self._files: dict[str, ChunkFiles] = {}

    def append(self, episodes: Episodes, mask: NDArray[np.uint8]) -> None:
        packed = episodes.view.shape[1:] == (VIEW_SIZE, VIEW_SIZE)
        columns = {
            "cells" if packed else "image": episodes.view,
            "direction": episodes.direction,
            "action": episodes.action,
            "mask": mask,
        }
        if not self._files:
            self._files = {name: self._create(name, rows) for name, rows in columns.items()}
        if set(self._files) != set(columns):
            raise StoreError(
                "some views pack into cells and others do not",
                path=self._folder,
                fix="convert the files with different kinds of view one by one",
            )
        for name, rows in columns.items():
            self._files[name].append(rows)

    def _create(self, name: str, rows: NDArray[np.uint8]) -> ChunkFiles:
        chunk = (chunk_length(self._steps), *rows.shape[1:])
        self._group.create_array(
            name,
            shape=(self._steps, *rows.shape[1:]),
            dtype=np.uint8,
            chunks=chunk,
            serializer=BytesCodec(),
            compressors=(Crc32cCodec(),),
        )
        return ChunkFiles(chunk_files(self._folder, name), int(np.prod(chunk)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for files in self._files.values():
            files.close(complete=kind is None)


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
            block, piece = bytes(piece[:_COPY_BYTES]), piece[_COPY_BYTES:]
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
            self._write(memoryview(bytes(min(self._left, _BLOCK_BYTES))))
        self._close()


def _create_raw(group: zarr.Group, name: str, values: NDArray[Any]) -> None:
    array = group.create_array(
        name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=values.shape,
        serializer=BytesCodec(),
        compressors=(Crc32cCodec(),),
        config={"write_empty_chunks": True},
    )
    array[:] = values


def _create_text(group: zarr.Group, name: str, missions: MissionTable) -> None:
    array = group.create_array(
        name,
        shape=(len(missions),),
        dtype=str,
        chunks=(min(len(missions), _MISSIONS_A_CHUNK),),
        compressors=(ZstdCodec(level=3), Crc32cCodec()),
        config={"write_empty_chunks": True},
    )
    done = 0
    for texts in missions.blocks(_MISSIONS_A_CHUNK):
        array[done : done + len(texts)] = np.array(texts, dtype=np.dtypes.StringDType())
        done += len(texts)


def checked_chunks(path: Path) -> Iterator[tuple[int, str]]:
    """Read every byte: (size in bytes, what is wrong or nothing) for each chunk file."""
    for array in array_names(path):
        for file in chunk_files(path, array):
            size_bytes = file.stat().st_size if file.is_file() else -1
            if size_bytes < CRC_BYTES:
                yield 0, f"{file.relative_to(path)} is missing or short"
            elif _passes_checksum(file, size_bytes):
                yield size_bytes, ""
            else:
                yield size_bytes, f"{file.relative_to(path)} fails its checksum"


def _passes_checksum(file: Path, size_bytes: int) -> bool:
    crc, left = 0, size_bytes - CRC_BYTES
    with file.open("rb") as stream:
        while left > 0 and (block := stream.read(min(left, _BLOCK_BYTES))):
            crc = google_crc32c.extend(crc, block)
            left -= len(block)
        return stream.read(CRC_BYTES) == crc.to_bytes(CRC_BYTES, "little")


def _check_written(building: Path) -> None:
    open_store(building)
    for _size_bytes, problem in checked_chunks(building):
        if problem:
            raise StoreError(
                f"what was written does not read back: {problem}",
                path=building,
                fix="check the disk, then run the command again",
            )
