"""Demo files packed with gzip: unpacked beside the store for as long as it is made.

The frames of a demo file are read in any order by several processes, which gzip cannot give.
"""

from __future__ import annotations

import hashlib
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from demotools.errors import DemotoolsError, PickleError, from_os_error
from demotools.output import acquired_lock, open_regular

_BLOCK_BYTES = 1 << 20
_MOST_BYTES, _MOST_TIMES = 1 << 30, 100
_WITH_GZIP_HEADER = 31


class Content(NamedTuple):
    """Where the content of a file lies, and the sha256 of the file; None: in the file itself."""

    path: Path
    sha256: str | None


@contextmanager
def unpacked(files: Sequence[Path], store: Path, *, salvage: bool) -> Iterator[list[Content]]:
    """The contents of the files, packed or not, until the block ends.

    store     what is made of them: the contents lie beside it
    salvage   what a damaged file gives before its damage is taken

    PickleError  a packed file is cut short, damaged, or unpacks to too much
    """
    folder = store.with_name(f".{store.name}.unpacked")
    packed = [path for path in files if _is_packed(path)]
    if not packed:
        yield [Content(path, None) for path in files]
        return
    lock = acquired_lock(folder)
    names: dict[str, Path] = {}
    try:
        shutil.rmtree(folder, ignore_errors=True)  # of a command that was killed
        folder.mkdir()
        contents = []
        for number, path in enumerate(files):
            if path in packed:
                content = folder / f"{number}.pkl"
                names[str(content)] = path
                contents.append(Content(content, _unpack(path, content, salvage=salvage)))
            else:
                contents.append(Content(path, None))
        yield contents
    except DemotoolsError as error:
        error.path = str(names.get(error.path, error.path))
        raise
    except OSError as error:
        raise from_os_error(error, folder) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def _is_packed(path: Path) -> bool:
    with open_regular(path) as stream:
        return stream.read(2) == b"\x1f\x8b"


def _unpack(path: Path, content: Path, *, salvage: bool) -> str:
    """The sha256 of the file, whose members are unpacked one after another."""
    most = max(_MOST_BYTES, _MOST_TIMES * path.stat().st_size)
    with open_regular(path) as stream, content.open("wb") as target:
        problem = ""
        try:
            for block in _unpacked_blocks(stream):
                target.write(block)
                if target.tell() > most:
                    raise PickleError(
                        f"this gzip file unpacks to more than {most:,} bytes, the limit for its "
                        f"size ({_MOST_TIMES} times, 1 GiB at least)",
                        path=path,
                        fix="check where it is from; if it is real, unpack it: gunzip FILE",
                    )
        except EOFError:
            problem = "is cut short"
        except zlib.error as error:
            problem = f"is damaged: {error}"
        if problem and not (salvage and target.tell()):
            raise PickleError(
                f"this gzip file {problem}",
                path=path,
                fix="get the whole file again, or add --salvage to convert what is whole",
            )
    with path.open("rb") as packed:
        return hashlib.file_digest(packed, "sha256").hexdigest()


def _unpacked_blocks(stream: IO[bytes]) -> Iterator[bytes]:
    """What the members of a gzip file hold; EOFError where one is cut, zlib.error where damaged."""
    member = zlib.decompressobj(_WITH_GZIP_HEADER)
    begun = False
    while packed := stream.read(_BLOCK_BYTES):
        while packed:
            if not begun:
                packed = packed.lstrip(b"\0")  # padding, as of tapes
                begun = bool(packed)
            yield member.decompress(packed, _BLOCK_BYTES)
            packed = member.unconsumed_tail
            if member.eof:
                packed = member.unused_data
                member, begun = zlib.decompressobj(_WITH_GZIP_HEADER), False
    if begun:
        yield member.flush()
        raise EOFError
