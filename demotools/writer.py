"""Write demo stores: parts first, then one pass that joins them, then one rename.

Every job (convert, generate, shrink, fetch of an archive) hands over numbered parts of whole
episodes, from any process, in any order. A part is one file that appears under its name only when
whole and ends with its checksum, so a job that was killed finds its finished parts again, and
makes those again that were damaged since. `StoreBuilder.finish` joins the
parts in order into the chunk files, checks what it wrote, writes the attributes last and renames
the folder. The result depends on the parts alone, never on who wrote them or when.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self

import filelock
import google_crc32c
import numpy as np
from numpy.typing import NDArray

from demotools.chunks import COPY_BYTES, checked_chunks, ends_with_checksum
from demotools.errors import DemotoolsError, StoreError, from_os_error
from demotools.joining import join_parts
from demotools.metadata import CRC_BYTES
from demotools.output import acquired_lock, open_regular, written_whole
from demotools.store import Episodes, aside_folder, is_ours, open_store, present_folder


def write_part(folder: Path, number: int, episodes: Episodes, notes: Mapping[str, Any]) -> None:
    """Write part `number`, whole or not at all; safe from any process.

    notes   what the job wants to remember of this part, JSON values (skipped episodes, counts)
    """
    text = {"mission": episodes.mission, "notes": dict(notes)}
    final = part_file(folder, number)
    with written_whole(final, synced=False) as stream:
        content = _SummedStream(stream, number)
        # one plain array after another: a zip archive would compute its checksum more slowly
        for column in (
            episodes.length,
            np.frombuffer(json.dumps(text).encode(), dtype=np.uint8),
            episodes.seed,
            episodes.view,
            episodes.direction,
            episodes.action,
        ):
            _write_array(content, column)
        stream.write(content.trailer())


class _SummedStream:
    """A stream with the checksum of what was written to it; the part's number counts as well."""

    def __init__(self, stream: IO[bytes], number: int) -> None:
        self._stream = stream
        self._crc = _number_crc(number)

    def write(self, content: bytes) -> int:
        self._crc = google_crc32c.extend(self._crc, content)
        return self._stream.write(content)

    def trailer(self) -> bytes:
        return self._crc.to_bytes(CRC_BYTES, "little")


def _write_array(stream: _SummedStream, array: NDArray[Any]) -> None:
    # as np.save does, which however tells nothing of a disk that is full
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    stream.write(header.getvalue())
    # the checksum takes nothing but bytes; small copies stay in the cache
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    for start in range(0, len(content), COPY_BYTES):
        stream.write(bytes(content[start : start + COPY_BYTES]))


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


class LateParts(Protocol):
    """Parts that are not written down: they come when the store is written, in order."""

    @property
    def lengths(self) -> Mapping[int, NDArray[np.int64]]:
        """Number of the part -> steps of each of its episodes."""

    def take(self, number: int) -> Episodes:
        """A part, once."""


class StoreBuilder:
    """Builds one store in a sibling folder, `.NAME.building`, under a lock.

    path        the store's final folder
    job         what determines the content, JSON values: the same job finds its finished parts
                again after it was killed; another job's parts are thrown away
    overwrite   replace an existing store, at the very end

    StoreError  the store exists and `overwrite` is False, or another process is building it
    """

    def __init__(self, path: Path, job: Mapping[str, Any], *, overwrite: bool = False) -> None:
        # a store is replaced where it lies: a link to it goes on pointing to it
        self.path = path.resolve() if path.is_dir() else path
        self.overwrite = overwrite
        self.folder = self.path.with_name(f".{self.path.name}.building")
        self.parts = self.folder / "parts"
        self._job = json.dumps(job, sort_keys=True).encode()
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
            error.add_note("what is done is kept: the same command goes on where it was")
        if type(error) is DemotoolsError:  # the operating system's: a full disk, say
            self._keep_or_discard(error)
        if self._lock is not None:
            self._lock.release()

    def _keep_or_discard(self, error: DemotoolsError) -> None:
        if not self.finished_parts():
            self.discard()
            return
        error.fix += (
            f". What is done is kept in {self.folder}: the same command goes on from it, "
            "or remove that folder"
        )

    def _prepare(self) -> None:
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise StoreError(
                "something that is no folder has this name (a file, or a link that leads nowhere)",
                path=self.path,
                fix="move it away, or choose another name for the store",
            )
        try:
            recover(self.path)
            self._check_replaceable()
            self._prepare_parts()
        except OSError as error:
            raise from_os_error(error, self.folder) from error

    def _check_replaceable(self) -> None:
        if not self.path.exists():
            return
        if not self.overwrite:
            raise StoreError(
                "the store exists already", path=self.path, fix="add --overwrite to replace it"
            )
        if not is_ours(self.path):
            raise StoreError(
                "a folder that is not a demo store has this name",
                path=self.path,
                fix="move it away, or choose another name for the store",
            )

    def _prepare_parts(self) -> None:
        """Keep the whole parts of the same job, and nothing else."""
        job_file = self.folder / "job.json"
        mine = all(
            folder.is_dir() and not folder.is_symlink() for folder in (self.folder, self.parts)
        )
        if not mine or not _holds(job_file, self._job):
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
                    f"part {int(number)} of an earlier call was damaged and is made again\n"
                )

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
        late: LateParts | None = None,
    ) -> Path:
        """Join all parts into the store and give it its final name.

        late   the parts that were not written down

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
            removed(building)
            self._join(building, about, late)
            self.publish(building)
        except OSError as error:
            raise from_os_error(error, self.path) from error
        return self.path

    def _join(self, building: Path, about: Mapping[str, Any], late: LateParts | None) -> None:
        lengths = dict(late.lengths) if late else {}
        written = [number for number in self.finished_parts() if number not in lengths]
        lengths |= {number: read_lengths(self.parts, number) for number in written}
        count = sum(map(len, lengths.values()))
        steps = sum(int(length.sum()) for length in lengths.values())
        if not count:
            raise StoreError("there is no episode to store", path=self.path, fix="check the source")

        def parts() -> Iterator[Episodes]:
            known = set(written)
            for number in sorted(lengths):
                if late and number not in known:
                    yield late.take(number)
                else:
                    yield read_part(self.parts, number)

        join_parts(parts(), count, steps, building, about)

    def publish(self, building: Path) -> None:
        """Check every byte of a whole store that lies in `folder`, then give it its final name.

        StoreError  what was written does not read back
        """
        _check_written(building)
        if self.path.exists():
            self.path.rename(aside_folder(self.path))
        building.rename(self.path)
        recover(self.path)
        shutil.rmtree(self.folder, ignore_errors=True)


def recover(path: Path) -> None:
    """End what a killed writer or removal began; for whoever holds the lock of `path`.

    An old store that was set aside comes back where no new one has taken its place.
    """
    aside, trash = aside_folder(path), trash_folder(path)
    removed(trash)
    if present_folder(path) == aside:
        aside.rename(path)
    elif os.path.lexists(aside):
        aside.rename(trash)
        removed(trash)


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


def _holds(file: Path, content: bytes) -> bool:
    try:
        with open_regular(file) as stream:
            return stream.read(len(content) + 1) == content
    except DemotoolsError:
        return False


def _check_written(building: Path) -> None:
    open_store(building)
    for _size_bytes, problem in checked_chunks(building):
        if problem:
            raise StoreError(
                f"what was written does not read back: {problem}",
                path=building,
                fix="check the disk, then run the command again",
            )
