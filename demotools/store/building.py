"""Write demo stores: parts first, then one pass that joins them, then one rename.

Every job (convert, generate, shrink, fetch of an archive) submits numbered parts of whole episodes,
from any process, in any order. A part is one file that gets its name only when complete and ends
with its checksum, so a job that was killed finds its finished parts again and redoes any that have
been damaged. `StoreBuilder.finish` joins the parts in order into the chunk files, checks what it
wrote, writes the attributes last and renames the folder. The result depends only on the parts,
never on who wrote them or when.

This module writes the arrays and their zarr.json itself, exactly as zarr does: importing zarr would
cost every conversion a fifth of a second, and its output would depend on its version (docs/log.md).
tests/store/test_arrays.py compares the two byte for byte.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import filelock
import google_crc32c
import numpy as np
from numcodecs.vlen import VLenUTF8
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from demotools.babyai.cells import OBJECTS, PACKING
from demotools.babyai.vocabulary import VERSION, MissionTable, vocabulary_hash
from demotools.errors import DemotoolsError, StoreError, os_refusals, printable_text
from demotools.output import acquired_lock, counted, open_regular, read_regular, written_whole
from demotools.store.format import (
    COPY_BYTES,
    CRC_BYTES,
    LEVELS,
    NO_HASH,
    SCHEMA,
    SCHEMA_VERSION,
    TEXTS,
    ZSTD_LEVEL,
    ArrayMetadata,
    array_json,
    array_names,
    aside_folder,
    checked_chunks,
    ends_with_checksum,
    is_ours,
    metadata_hash,
    present_folder,
)
from demotools.store.reading import (
    TEXT_BYTES_AT_MOST,
    Episodes,
    episode_mask,
    fingerprint,
    open_store,
)


def write_part(folder: Path, number: int, episodes: Episodes, notes: Mapping[str, Any]) -> None:
    """Write part `number`, whole or not at all; safe from any process.

    notes   what the job wants to remember of this part, JSON values (skipped episodes, counts)
    """
    optional = dict(episodes.optional)
    text = {"mission": episodes.mission, "notes": dict(notes), "optional": list(optional)}
    final = part_file(folder, number)
    with written_whole(final, synced=False) as stream:
        content = _SummedStream(stream, _number_crc(number))
        # one plain array after another: a zip archive would compute its checksum more slowly
        columns: list[NDArray[Any]] = [
            episodes.length,
            np.frombuffer(json.dumps(text).encode(), dtype=np.uint8),
            episodes.seed,
            episodes.view,
            episodes.direction,
            episodes.action,
            *optional.values(),
        ]
        for column in columns:
            # as np.save does, which however tells nothing of a disk that is full
            header = io.BytesIO()
            about = np.lib.format.header_data_from_array_1_0(column)
            np.lib.format.write_array_header_1_0(header, about)
            content.write(header.getvalue())
            content.write(_bytes_of(column))
        content.end()


class _SummedStream:
    """A stream that ends with the checksum of what was written to it.

    crc   of what counts as standing before it
    """

    def __init__(self, stream: IO[bytes], crc: int = 0) -> None:
        self._stream, self._crc = stream, crc

    def write(self, content: bytes | memoryview) -> None:
        # the checksum takes nothing but bytes; small copies stay in the cache
        for start in range(0, len(content), COPY_BYTES):
            block = bytes(content[start : start + COPY_BYTES])
            self._stream.write(block)
            self._crc = google_crc32c.extend(self._crc, block)

    def end(self) -> None:
        self._stream.write(self._crc.to_bytes(CRC_BYTES, "little"))


def _bytes_of(array: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def read_part(folder: Path, number: int) -> Episodes:
    """Part `number` as it was written."""
    with part_file(folder, number).open("rb") as stream:
        length, content, seed, view, direction, action = (np.load(stream) for _ in range(6))
        text = json.loads(content.tobytes())
        optional = {name: np.load(stream) for name in text["optional"]}
    return Episodes(
        length=length,
        mission=text["mission"],
        seed=seed,
        view=view,
        direction=direction,
        action=action,
        optional=optional,
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


class StoreBuilder:
    """Builds one store in a sibling folder, `.NAME.building`, under a lock.

    path        the store's final folder
    job         what determines the content, JSON values: the same job finds its finished parts
                again after it was killed; another job's parts are thrown away, which is said
    overwrite   replace an existing store, at the very end
    update      the same, but for a store that holds the episodes of the old one, too: no other
                job's parts are thrown away
    costly      parts take long: where they, or those of another such job, lie here, no other job
                throws them away but with `overwrite`

    An error that is not the operating system's throws the parts away: the same parts would end in
    the same error.

    StoreError  the store exists, or parts of another job do that must stay; another process is
                building it
    """

    def __init__(
        self,
        path: Path,
        job: Mapping[str, Any],
        *,
        overwrite: bool = False,
        update: bool = False,
        costly: bool = False,
    ) -> None:
        # a store is replaced where it lies: a link to it goes on pointing to it
        self.path = path.resolve() if path.is_dir() else path
        self.overwrite, self._update, self._costly = overwrite, update, costly
        self.folder = building_folder(self.path)
        self.parts = self.folder / "parts"
        mark = {_COSTLY: True} if costly else {}
        self._job = json.dumps({**job, **mark}, sort_keys=True).encode()
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
        if isinstance(error, KeyboardInterrupt) and self.finished_parts():
            error.add_note("finished work is kept: run the same command again to resume")
        if isinstance(error, DemotoolsError):
            # the operating system's, a full disk say, may be mended; the others are the source's
            if type(error) is DemotoolsError and self.finished_parts():
                error.fix += (
                    f". Finished work is kept in {self.folder}: run the same command again to "
                    "resume, or remove that folder"
                )
            else:
                shutil.rmtree(self.folder, ignore_errors=True)
                if Path(error.path).is_relative_to(self.folder):
                    error.path = str(self.path)
        if self._lock is not None:
            self._lock.release()

    def _prepare(self) -> None:
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise StoreError(
                "this name is taken by something that is not a folder (a file or a broken link)",
                path=self.path,
                fix="move it away, or choose another name for the store",
            )
        with os_refusals(self.folder):
            recover(self.path)
            self._check_replaceable()
            self._prepare_parts()

    def _check_replaceable(self) -> None:
        if not self.path.exists():
            return
        if not self.overwrite and not self._update:
            raise StoreError(
                "the store already exists", path=self.path, fix="add --overwrite to replace it"
            )
        if not is_ours(self.path):
            raise StoreError(
                "this name is taken by a folder that is not a demo store",
                path=self.path,
                fix="move it away, or choose another name for the store",
            )

    def _prepare_parts(self) -> None:
        """Keep the whole parts of the same job, and nothing else."""
        job_file = self.folder / "job.json"
        mine = all(
            folder.is_dir() and not folder.is_symlink() for folder in (self.folder, self.parts)
        )
        before = _content(job_file, at_most=len(self._job) + _JOB_BYTES) if mine else b""
        if before != self._job:
            if mine and not self.overwrite and (parts := len([*self.parts.glob("part-*.npy")])):
                self._part_with(parts, _parsed(before))
            removed(self.folder)
            self.parts.mkdir(parents=True)
            with written_whole(job_file, synced=False) as stream:
                stream.write(self._job)
            return
        for entry in self.folder.iterdir():
            if entry not in (job_file, self.parts):
                removed(entry)
        for file in sorted(self.parts.iterdir()):
            number = file.name.removeprefix("part-").removesuffix(".npy")
            known = number.isdecimal() and file == part_file(self.parts, int(number))
            if known and _is_part(file, int(number)):
                continue
            removed(file)
            if known:
                sys.stderr.write(
                    f"part {int(number)} of an earlier run was damaged and will be redone\n"
                )

    def _part_with(self, parts: int, job: Mapping[str, Any]) -> None:
        """Say of the parts of `job`, another one, that they are thrown away, or refuse to."""
        differing = _differences(job, _parsed(self._job)) if job else ""
        how = differing or "which ones is not known"
        finished = f"its {counted(parts, 'finished part')}"
        if self._update:
            raise StoreError(
                "there is an unfinished store of this name",
                path=self.folder,
                fix=f"choose another --name, or finish it first: the command that started it "
                f"continues with {finished}",
            )
        if self._costly or _COSTLY in job:
            raise StoreError(
                f"there is an unfinished store that was started with different options: {how}",
                path=self.folder,
                fix=f"use the options as before to continue with {finished}, or add --overwrite "
                "to discard them"
                if differing
                else f"choose another --name, or add --overwrite to discard {finished}",
            )
        sys.stderr.write(f"starting over: the unfinished run had different options: {how}\n")

    def finished_parts(self) -> list[int]:
        """The numbers of the parts that lie there whole, sorted."""
        return sorted(int(file.stem.removeprefix("part-")) for file in self.parts.glob("*.npy"))

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
        subgoals: Sequence[str] = (),
        levels: Sequence[str] = (),
        episode_level: NDArray[np.uint8] | None = None,
    ) -> Path:
        """Join all parts into the store and give it its final name.

        subgoals        what the codes of the array `subgoal` stand for
        levels          what the numbers in `episode_level` stand for
        episode_level   uint8 [E], where the episodes are of several levels

        StoreError      there is no episode, or the parts do not make a store
        DemotoolsError  the disk is full, or gives back something else than was written
        """
        about = {
            "level": level,
            "split": split,
            "environment_id": environment_id,
            "licence": licence,
            "citation": citation,
            "source": dict(source),
            "parent": None if parent is None else dict(parent),
            **({"subgoals": list(subgoals)} if subgoals else {}),
            **({"levels": list(levels)} if levels else {}),
        }
        building = self.folder / self.path.name
        with os_refusals(self.path):
            removed(building)
            self._join(building, about, episode_level)
        try:
            self.publish(building)
        except StoreError as error:  # the disk's fault, not that of the parts
            raise DemotoolsError(error.what, path=error.path, fix=error.fix) from error
        return self.path

    def _join(
        self, building: Path, about: Mapping[str, Any], episode_level: NDArray[np.uint8] | None
    ) -> None:
        written = self.finished_parts()
        lengths = [read_lengths(self.parts, number) for number in written]
        count = sum(map(len, lengths))
        steps = sum(int(length.sum()) for length in lengths)
        if not count:
            raise StoreError(
                "there are no episodes to store", path=self.path, fix="check the input"
            )
        parts = (read_part(self.parts, number) for number in written)
        join_parts(parts, count, steps, building, about, episode_level)

    def publish(self, building: Path) -> None:
        """Check every byte of a whole store that lies in `folder`, then give it its final name.

        StoreError      what was written does not read back
        DemotoolsError  the operating system refuses
        """
        _check_written(building)
        with os_refusals(self.path):
            (self.folder / _PUBLISHED).touch()
            if self.path.exists():
                self.path.rename(aside_folder(self.path))
            building.rename(self.path)
            recover(self.path)


def recover(path: Path) -> None:
    """End what a killed writer or removal began; for whoever holds the lock of `path`.

    An old store that was set aside comes back where no new one has taken its place; the parts stay
    until one has.
    """
    aside, trash, parts = aside_folder(path), trash_folder(path), building_folder(path)
    removed(trash)
    if present_folder(path) == aside:
        aside.rename(path)
    elif os.path.lexists(aside):
        aside.rename(trash)
        removed(trash)
    if parts.is_symlink():
        return
    if not is_unfinished(path):
        if parts.exists():
            parts.rename(trash)
            removed(trash)
    elif (parts / path.name).exists():
        (parts / _PUBLISHED).unlink(missing_ok=True)


def is_unfinished(path: Path) -> bool:
    """Whether parts of this store wait for the command that goes on with them.

    They do until they have been joined, and the store that they became has its final name.
    """
    parts = building_folder(path)
    joined = (parts / _PUBLISHED).exists() and not (parts / path.name).exists()
    return parts.exists() and not (joined and path.exists())


def building_folder(path: Path) -> Path:
    """Where the parts of a store lie until they have become it."""
    return path.with_name(f".{path.name}.building")


def trash_folder(path: Path) -> Path:
    """Where lies what is being removed; nobody reads it."""
    return path.with_name(f".{path.name}.removing")


def removed(path: Path) -> None:
    """Remove a folder, a file or a link (not what it points to), if there is one."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def _is_part(file: Path, number: int) -> bool:
    """Whether a file is this part as it was written, all of it."""
    try:
        with open_regular(file) as stream:
            return ends_with_checksum(stream, _number_crc(number))
    except DemotoolsError:
        return False


def _number_crc(number: int) -> int:
    # a part under another's name is not that part
    return int(google_crc32c.value(number.to_bytes(8, "little")))


_COSTLY = "costly"
_PUBLISHED = "published"  # beside the parts: the store that is no more here has its final name
_JOB_BYTES, _VALUE_LETTERS, _DIFFERENCES_LETTERS = 2**20, 40, 400


def _content(file: Path, at_most: int) -> bytes:
    """The content of a file; nothing where it cannot be read."""
    with suppress(DemotoolsError):
        return read_regular(file, at_most)
    return b""


def _parsed(content: bytes) -> dict[str, Any]:
    """The job that was written; empty where nobody can read it."""
    try:
        job = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return job if isinstance(job, dict) else {}


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """In what a job differs from an earlier one, for a person.

    >>> _differences({"episodes": 600, "seed": 1}, {"episodes": 700, "seed": 1})
    'episodes was 600, is 700'
    """
    shown = []
    for key in {**new, **old}:
        if key == _COSTLY or old.get(key) == new.get(key):
            continue
        values = [json.dumps(job[key]) if key in job else "absent" for job in (old, new)]
        short = max(map(len, values)) <= _VALUE_LETTERS
        shown.append(
            f"{json.dumps(key)[1:-1]} " + ("was {}, is {}".format(*values) if short else "differs")
        )
    return printable_text("; ".join(shown), _DIFFERENCES_LETTERS)


def _check_written(building: Path) -> None:
    open_store(building)
    for _size_bytes, problem in checked_chunks(building):
        if problem:
            raise StoreError(
                f"the store that was just written cannot be read back: {problem}",
                path=building,
                fix="check the disk, then run the command again",
            )


def join_parts(
    parts: Iterable[Episodes],
    count: int,
    steps: int,
    building: Path,
    about: Mapping[str, Any],
    episode_level: NDArray[np.uint8] | None = None,
) -> None:
    """Write the episodes of all parts into the new Zarr group `building`.

    count, steps   of all parts together
    about          the attributes that do not follow from the episodes

    StoreError  some episodes have another kind of view, or other optional arrays
    """
    building.mkdir()
    # what is found of it, wherever somebody carries it, is known for what it is
    (building / "zarr.json").write_bytes(group_json({"schema": SCHEMA, "unfinished": True}))
    with MissionTable(building.with_name("missions.json")) as missions:
        _write_episodes(parts, count, steps, building, missions, episode_level)
    tokens = missions.tokens()
    files = raw_array(building, "mission_tokens", tokens.dtype.name, tokens.shape, len(tokens))
    files.append(tokens)
    write_texts(building, missions.blocks(TEXTS_A_CHUNK), len(missions))
    attributes = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        **about,
        "episodes": count,
        "steps": steps,
        "missions": len(missions),
        "packing": PACKING,
        "objects": OBJECTS,
        "vocabulary": missions.words,
        "vocabulary_version": VERSION,
        "vocabulary_hash": vocabulary_hash(missions.words),
        "created_by": f"demotools {version('demotools')}",
        "fingerprint": fingerprint(building),
    }
    unsigned = group_json({**attributes, "metadata_hash": NO_HASH})
    described = {name: array_json(building, name) for name in array_names(building)}
    signed = group_json({**attributes, "metadata_hash": metadata_hash(unsigned, described)})
    (building / "zarr.json").write_bytes(signed)


def _write_episodes(
    parts: Iterable[Episodes],
    count: int,
    steps: int,
    building: Path,
    missions: MissionTable,
    episode_level: NDArray[np.uint8] | None,
) -> None:
    """Write the arrays of episodes and steps; the missions go into the table."""
    with ExitStack() as stack:  # which closes what an error leaves open

        def array(name: str, dtype: str, shape: Sequence[int], rows: int) -> ChunkFiles:
            return stack.enter_context(closing(raw_array(building, name, dtype, shape, rows)))

        offset = array("episode_offset", "int64", [count + 1], count + 1)
        mission = array("episode_mission", "int32", [count], count)
        seed = array("episode_seed", "int64", [count], count)
        if episode_level is not None:
            array(LEVELS, "uint8", [count], count).append(episode_level)
        arrays: dict[str, ChunkFiles] = {}
        done, chunk = 0, chunk_length(steps)
        for episodes in parts:
            size = len(episodes.action)
            if not size:
                continue
            columns = {
                "cells" if episodes.packed else "image": episodes.view,
                "direction": episodes.direction,
                "action": episodes.action,
                "mask": episode_mask(episodes.offset, 0, size),
                **episodes.optional,
            }
            arrays = arrays or {
                name: array(name, rows.dtype.name, [steps, *rows.shape[1:]], chunk)
                for name, rows in columns.items()
            }
            if strange := arrays.keys() ^ columns.keys():
                raise StoreError(
                    "some views pack into cells and others do not"
                    if "image" in strange
                    else f"some episodes have the array {min(strange)!r} and others do not",
                    path=building,
                    fix="make a separate store for each kind",
                )
            for name, rows in columns.items():
                arrays[name].append(rows)
            offset.append(done + episodes.offset[:-1])
            mission.append(missions.rows(episodes.mission))
            seed.append(episodes.seed)
            done += size
        offset.append(np.array([steps]))
        for files in arrays.values():
            files.fill()


TEXTS_A_CHUNK = 1 << 17


def group_json(attributes: Mapping[str, Any]) -> bytes:
    """The zarr.json of a group."""
    return _json({"attributes": dict(attributes), "zarr_format": 3, "node_type": "group"})


def raw_array(
    folder: Path, name: str, dtype: str, shape: Sequence[int], chunk_rows: int
) -> ChunkFiles:
    """A new array of the group `folder`, codecs `[bytes, crc32c]`, whose rows are to be appended.

    dtype        uint8, or a longer number: then little-endian
    chunk_rows   rows in a chunk; only the first axis is cut
    """
    metadata = _new_array(folder, name, dtype, shape, chunk_rows)
    size_bytes = int(np.prod(metadata.chunk_shape)) * np.dtype(dtype).itemsize
    return ChunkFiles(metadata.chunk_files(folder / name), size_bytes)


def write_texts(folder: Path, blocks: Iterable[list[str]], count: int) -> None:
    """Write `mission_text` of the group `folder`.

    blocks   the texts, TEXTS_A_CHUNK at a time
    count    of texts
    """
    length = min(count, TEXTS_A_CHUNK)
    files = _new_array(folder, TEXTS, "string", [count], length).chunk_files(folder / TEXTS)
    texts, packed = VLenUTF8(), Zstd(level=ZSTD_LEVEL, checksum=False)
    for file, block in zip(files, blocks, strict=True):
        # the last chunk is as long as the others
        whole = block + [""] * (length - len(block))
        unpacked = texts.encode(np.array(whole, dtype=object))
        if len(unpacked) > TEXT_BYTES_AT_MOST:
            raise StoreError(
                "the missions are too long for a store",
                path=folder,
                fix="shorten them: "
                f"{TEXTS_A_CHUNK:,} of them may take at most {TEXT_BYTES_AT_MOST:,} bytes",
            )
        content = bytes(packed.encode(unpacked))
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content + google_crc32c.value(content).to_bytes(CRC_BYTES, "little"))


def _new_array(
    folder: Path, name: str, data_type: str, shape: Sequence[int], chunk_rows: int
) -> ArrayMetadata:
    metadata = ArrayMetadata.model_construct(
        shape=tuple(shape), data_type=data_type, chunk_shape=(chunk_rows, *shape[1:])
    )
    (folder / name).mkdir()
    (folder / name / "zarr.json").write_bytes(_json(metadata.as_zarr()))
    return metadata


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=2).encode()


# Chunk length (docs/log.md): about a million steps, so that plain zarr reads 50 MB at a time, but
# never more than 16 chunk files an array, so that any store stays under a hundred files.
_CHUNK_STEPS = 1 << 20
_CHUNKS_AT_MOST = 16


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
        self._file: IO[bytes] | None = None
        self._left = 0

    def append(self, rows: NDArray[Any]) -> None:
        """Write these rows after those before, their numbers little-endian."""
        content = _bytes_of(rows.astype(rows.dtype.newbyteorder("<"), copy=False))
        while content:
            if self._file is None:
                path = next(self._waiting)
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file, self._left = path.open("wb"), self._size
                self._stream = _SummedStream(self._file)
            piece, content = content[: self._left], content[self._left :]
            self._stream.write(piece)
            self._left -= len(piece)
            if not self._left:
                self._stream.end()
                self.close()

    def fill(self) -> None:
        """Fill the last chunk with zeros."""
        while self._file is not None:
            self.append(np.zeros(min(self._left, COPY_BYTES), np.uint8))

    def close(self) -> None:
        """Leave what is not whole as it is."""
        if self._file is not None:
            self._file.close()
            self._file = None
