"""`demotools archive` and `unarchive`: the transport twin of a store, and the way back.

The twin is one file, `X.zarr.zip`, a Zarr v3 zip store that plain zarr reads (zipstore.py).
The way back gives the store bit for bit; the fingerprint in its attributes says whether it did.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import google_crc32c
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from demotools.chunks import ChunkFiles
from demotools.errors import StoreError, from_os_error, printable_text
from demotools.output import acquired_lock
from demotools.store import CRC_BYTES, SUFFIX, chunk_files, open_store
from demotools.writer import StoreBuilder
from demotools.zipstore import (
    ArchivedArray,
    Contents,
    decoded_blocks,
    described_archive,
    described_store,
    opened_archive,
    verbatim_chunks,
    write_members,
)

ARCHIVE_SUFFIX = ".zarr.zip"


def archive_store(
    path: Path, output: Path | None = None, *, overwrite: bool = False, quiet: bool = False
) -> Path:
    """Write the archive of a store, check it against the store, then give it its name.

    output      the file; None means beside the store, `NAME.zarr.zip`
    overwrite   replace an archive that exists, at the very end

    StoreError  see `open_store`; the archive exists and `overwrite` is False; what was written
                does not read back
    """
    store = open_store(path)
    final = output or path.with_name(store.name + ARCHIVE_SUFFIX)
    if final.is_dir():
        raise StoreError(
            "this is a folder", path=final, fix=f"name a file: -o {final / store.name}.zarr.zip"
        )
    temporary = final.with_name(f".{final.name}.building")
    with acquired_lock(final):
        if final.exists() and not overwrite:
            raise StoreError(
                "the archive exists already",
                path=final,
                fix="add --overwrite to replace it, or name another with -o",
            )
        try:
            contents = described_store(path)
            with (
                ZipFile(temporary, "w") as archive,
                _bar("archive", contents, quiet=quiet) as bar,
            ):
                for size in write_members(archive, path, contents):
                    bar.update(size)
            _check_archive(temporary, store.attributes.fingerprint, quiet=quiet)
            temporary.replace(final)
        except OSError as error:
            raise from_os_error(error, final) from error
        finally:
            temporary.unlink(missing_ok=True)
    return final


def unarchive_store(
    file: Path, output: Path, *, overwrite: bool = False, quiet: bool = False
) -> Path:
    """Restore the store of an archive at `output`, bit for bit.

    StoreError  the store exists and `overwrite` is False; the archive is damaged, or is not ours
    """
    with opened_archive(file) as archive:
        contents = described_archive(archive, file)
        job = {"unarchive": contents.attributes["fingerprint"]}
        with StoreBuilder(output, job, overwrite=overwrite) as builder:
            building = builder.folder / output.name
            try:
                _check_room(contents, file, output)
                shutil.rmtree(building, ignore_errors=True)
                with _bar("unarchive", contents, quiet=quiet) as bar:
                    for array in contents.arrays:
                        _restore(archive, array, building, file, bar)
                (building / "zarr.json").write_bytes(contents.group_text.encode())
                builder.publish(building)
            except StoreError:
                builder.discard()
                raise
            except OSError as error:
                builder.discard()
                raise from_os_error(error, output) from error
    return output


def archived_attributes(file: Path) -> dict[str, Any]:
    """The attributes of the store inside an archive (level, split, counts, source).

    StoreError  damaged, or not an archive of ours
    """
    with opened_archive(file) as archive:
        return described_archive(archive, file).attributes


def archived_store_name(file: Path) -> str:
    """The name of the store in an archive, by the file's name.

    >>> archived_store_name(Path("downloads/GoToLocal-small.zarr.zip"))
    'GoToLocal-small'
    """
    return file.name.removesuffix(".zip").removesuffix(SUFFIX)


def _check_room(contents: Contents, file: Path, output: Path) -> None:
    if contents.size_bytes > shutil.disk_usage(output.parent).free:
        raise StoreError(
            f"its store takes {contents.size_bytes:,} bytes, more than the disk has free",
            path=file,
            fix="free some space, or name another folder with --data-dir",
        )


def _restore(
    archive: ZipFile, array: ArchivedArray, building: Path, file: Path, bar: tqdm[Any]
) -> None:
    (building / array.name).mkdir(parents=True)
    (building / array.name / "zarr.json").write_bytes(array.text.encode())
    targets = chunk_files(building, array.name)
    if not array.raw:
        for target, content in zip(targets, verbatim_chunks(archive, array, file), strict=True):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        return
    sink = ChunkFiles(targets, array.chunk_rows * array.row_bytes)
    try:
        for block in decoded_blocks(archive, array, file):
            sink.append(block)
            bar.update(len(block))
    except BaseException:
        sink.close(complete=False)
        raise
    sink.close(complete=True)


def _check_archive(path: Path, fingerprint: str, *, quiet: bool) -> None:
    """StoreError where the archive just written would not restore to the fingerprint."""
    digest = hashlib.sha256()
    with opened_archive(path) as archive:
        contents = described_archive(archive, path)
        with _bar("check", contents, quiet=quiet) as bar:
            for array in sorted(contents.arrays, key=lambda array: array.name):
                digest.update(array.name.encode())
                if array.raw:
                    blocks = decoded_blocks(archive, array, path)
                    trailers = _chunk_trailers(blocks, array, bar)
                else:
                    chunks = verbatim_chunks(archive, array, path)
                    trailers = (chunk[-CRC_BYTES:] for chunk in chunks)
                for trailer in trailers:
                    digest.update(trailer)
    if digest.hexdigest() != fingerprint:
        raise StoreError(
            "the archive does not hold what the store's fingerprint says",
            path=path,
            fix="run `demotools verify` on the store, and check the disk",
        )


def _chunk_trailers(
    blocks: Iterator[NDArray[np.uint8]], array: ArchivedArray, bar: tqdm[Any]
) -> Iterator[bytes]:
    """The checksum of every chunk file that the blocks would restore to."""
    size = array.chunk_rows * array.row_bytes
    padding = -array.size_bytes % size
    crc, done = 0, 0
    for block in itertools.chain(blocks, [np.zeros(padding, np.uint8)]):
        bar.update(len(block))
        content = block.tobytes()
        while content:
            piece, content = content[: size - done], content[size - done :]
            crc, done = google_crc32c.extend(crc, piece), done + len(piece)
            if done == size:
                yield crc.to_bytes(CRC_BYTES, "little")
                crc, done = 0, 0


def _bar(what: str, contents: Contents, *, quiet: bool) -> tqdm[Any]:
    disable = True if quiet else None  # None: shown on a terminal only
    return tqdm(
        total=contents.size_bytes,
        desc=printable_text(what),
        unit="B",
        unit_scale=True,
        disable=disable,
    )
