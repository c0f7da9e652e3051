"""`demotools archive` and `unarchive`: packs a store into an ordinary zip file, and restores it.

The file, `X.zarr.zip`, holds the files of the folder, deflated: any unzip program restores the
store, and plain zarr reads it as a zip store. Members are sorted and have no timestamps, so the
same store gives the same archive. An archive may come from anybody: before anything is written, its
members must be exactly the files that its metadata announce, with the announced sizes.
"""

from __future__ import annotations

import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from demotools.errors import DemotoolsError, StoreError, from_os_error
from demotools.output import check_room, locked, open_regular, progress_bar, written_whole
from demotools.store.building import StoreBuilder, removed
from demotools.store.format import (
    JSON_BYTES_AT_MOST,
    SUFFIX,
    StoreAttributes,
    checked_chunks,
    damaged,
    expected_entries,
    parsed_attributes,
    parsed_metadata,
    present_folder,
)
from demotools.store.reading import TEXT_BYTES_AT_MOST, open_store, reopened

ARCHIVE_SUFFIX = ".zarr.zip"
# Measured (docs/log.md): level 9 takes twelve times as long for an eighth less.
_DEFLATE_LEVEL = 6
_BLOCK_BYTES = 1 << 20
_MEMBERS_AT_MOST = 1 << 16


def archive_store(
    path: Path, output: Path | None = None, *, overwrite: bool = False, quiet: bool = False
) -> Path:
    """Write the archive of a store, whose every byte is checked, then give it its name.

    output      the file; None means beside the store, `NAME.zarr.zip`
    overwrite   replace an archive that exists, at the very end

    StoreError  see `open_store`; the archive exists and `overwrite` is False; the store is
                damaged, or was replaced meanwhile
    """
    store = open_store(path)
    final = output or path.with_name(store.name + ARCHIVE_SUFFIX)
    if final.is_dir():
        fix = f"name a file: -o {final / store.name}{ARCHIVE_SUFFIX}"
        raise StoreError("this is a folder", path=final, fix=fix)
    with locked(final):
        if final.exists() and not overwrite:
            raise StoreError(
                "the archive already exists",
                path=final,
                fix="add --overwrite to replace it, or name another file with -o",
            )
        folder = present_folder(path)
        for _size_bytes, problem in checked_chunks(folder):
            if problem:
                raise damaged(path, problem)
        with written_whole(final) as stream:
            _write_members(stream, folder, quiet=quiet)
            store.check_unchanged()
            reopened(path, store.attributes.fingerprint)
    return final


def _write_members(stream: Any, folder: Path, *, quiet: bool) -> None:
    names = sorted(expected_entries(folder)[1])
    total = sum((folder / name).stat().st_size for name in names)
    with (
        zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=_DEFLATE_LEVEL) as archive,
        progress_bar(total, "archive", "B", quiet=quiet) as bar,
    ):
        for name in names:
            about = zipfile.ZipInfo(name)
            about.compress_type = zipfile.ZIP_DEFLATED
            about.external_attr = (stat.S_IFREG | 0o644) << 16
            about.create_system = 3
            about.file_size = (folder / name).stat().st_size
            with open_regular(folder / name) as source, archive.open(about, "w") as member:
                while block := source.read(_BLOCK_BYTES):
                    member.write(block)
                    bar.update(len(block))


def unarchive_store(
    file: Path, output: Path, *, overwrite: bool = False, quiet: bool = False
) -> Path:
    """Restore the store of an archive at `output`, bit for bit.

    StoreError  the store exists and `overwrite` is False; the archive is damaged, or is not ours
    """
    with _opened_archive(file) as archive:
        attributes, members = _described(archive, file)
        job = {"unarchive": attributes.fingerprint}
        with StoreBuilder(output, job, overwrite=overwrite) as builder:
            building = builder.folder / builder.path.name
            try:
                check_room(output.parent, sum(info.file_size for info in members.values()))
                _extract(archive, members, file, building, quiet=quiet)
                builder.publish(building)
            except StoreError as error:
                # what was restored is gone: the archive is what the user has
                known = error.path == str(file)
                raise (error if known else _unusable(file, error.what)) from error
            except OSError as error:
                raise from_os_error(error, output) from error
    return output


def archived_attributes(file: Path) -> dict[str, Any]:
    """The attributes of the store inside an archive (level, split, counts, source).

    StoreError  damaged, or not an archive of ours
    """
    with _opened_archive(file) as archive:
        return _described(archive, file)[0].model_dump()


def archived_store_name(file: Path) -> str:
    """The name of the store in an archive, by the file's name.

    >>> archived_store_name(Path("downloads/GoToLocal-small.zarr.zip"))
    'GoToLocal-small'
    """
    return file.name.removesuffix(".zip").removesuffix(SUFFIX)


@contextmanager
def _opened_archive(file: Path) -> Iterator[zipfile.ZipFile]:
    with open_regular(file) as stream:
        with _refusing(file):
            archive = zipfile.ZipFile(stream)
        with archive:
            yield archive


@contextmanager
def _refusing(file: Path, member: str = "") -> Iterator[None]:
    """Whatever zipfile and its decompressors raise is the archive's fault."""
    try:
        yield
    except DemotoolsError:
        raise
    except Exception as error:
        what = (
            f"member {member!r} cannot be read"
            if member
            else "it is not a zip file, or only part of one"
        )
        raise _unusable(file, f"{what} ({error})") from error


def _unusable(file: Path, what: str) -> StoreError:
    return StoreError(
        f"this archive cannot be used: {what}",
        path=file,
        fix="get it again, or recreate it with `demotools archive`",
    )


def _described(
    archive: zipfile.ZipFile, file: Path
) -> tuple[StoreAttributes, dict[str, zipfile.ZipInfo]]:
    """The attributes of the store in an archive, and its members by name.

    StoreError  the members are not exactly those that its metadata announce
    """
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        faults = {
            "is encrypted": info.flag_bits & 0x1,
            "is a link or a device": stat.S_IFMT(info.external_attr >> 16)
            not in (0, stat.S_IFREG, stat.S_IFDIR),
            "is compressed in an unknown way": info.compress_type
            not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED),
            "occurs twice": info.filename in members,
            "is unexpected": len(members) > _MEMBERS_AT_MOST,
        }
        for what in filter(faults.get, faults):
            raise _unusable(file, f"member {info.filename!r} {what}")
        members[info.filename] = info
    files = {name: info for name, info in members.items() if not info.is_dir()}

    def content(name: str) -> bytes:
        if name not in files or files[name].file_size > JSON_BYTES_AT_MOST:
            raise _unusable(file, f"member {name!r} is missing or far too large")
        return b"".join(_blocks(archive, files[name], file))

    attributes = parsed_attributes(content("zarr.json"), file)
    sizes: dict[str, int | None] = {"zarr.json": None}
    for name in files:
        array, _, rest = name.partition("/")
        if rest == "zarr.json":
            metadata = parsed_metadata(content(name), file, array)
            chunks = metadata.chunk_files(Path(array))
            sizes |= {chunk.as_posix(): metadata.raw_chunk_bytes for chunk in chunks}
            sizes[name] = None
    # other programs also list the folders that the files lie in
    if strange := (set(files) ^ set(sizes)) | (set(members) - set(files) - _parents(sizes)):
        raise _unusable(file, f"member {min(strange)!r} is missing or unexpected")
    for name, size in sizes.items():
        found = files[name].file_size
        if found > TEXT_BYTES_AT_MOST if size is None else found != size:
            raise _unusable(file, f"member {name!r} announces {found:,} bytes")
    return attributes, files


def _parents(names: Mapping[str, object]) -> set[str]:
    return {name[: place + 1] for name in names for place, sign in enumerate(name) if sign == "/"}


def _blocks(archive: zipfile.ZipFile, info: zipfile.ZipInfo, file: Path) -> Iterator[bytes]:
    """The content of a member, never more than it announces."""
    left = info.file_size
    with _refusing(file, info.filename):
        member = archive.open(info)
    with member:
        while True:
            with _refusing(file, info.filename):
                block = member.read(_BLOCK_BYTES)
            left -= len(block)
            if left < 0 or (left and not block):
                raise _unusable(file, f"member {info.filename!r} does not have its announced size")
            if not block:
                return
            yield block


def _extract(
    archive: zipfile.ZipFile,
    members: Mapping[str, zipfile.ZipInfo],
    file: Path,
    building: Path,
    *,
    quiet: bool,
) -> None:
    removed(building)
    total = sum(info.file_size for info in members.values())
    with progress_bar(total, "unarchive", "B", quiet=quiet) as bar:
        # the file that makes the folder a store comes last
        for name in sorted(members, key=lambda name: (name == "zarr.json", name)):
            target = building / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as stream:
                for block in _blocks(archive, members[name], file):
                    stream.write(block)
                    bar.update(len(block))
