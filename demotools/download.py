"""From a server to a file: resumed, hashed on the way, checked, and only then under its name.

A download lies in `.NAME.<source>.part`, beside it `.part.json` with what the server said of the
file, so that a later run asks for the rest only (transfer.py).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from tqdm import tqdm

from demotools.content import (
    HEAD_BYTES,
    Expected,
    WrongFileError,
    compare,
    content_kind,
    kind_of_head,
)
from demotools.errors import FetchError
from demotools.sources import Place
from demotools.transfer import Known, Terms, Transfer

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Downloaded:
    """A file that passed every check."""

    path: Path
    size_bytes: int
    sha256: str
    source: str
    url: str | None


def download_file(place: Place, final: Path, expected: Expected, terms: Terms) -> Downloaded:
    """Download to `final`, from where an earlier run stopped.

    RefusedError    the place does not give the file, or another one
    FetchError      the disk has no room for it
    """
    with PartFile(final, place.source, with_md5=expected.md5 is not None) as part:
        try:
            known = part.known()
            if not known.offset or known.offset != known.total:
                _receive(part, place, known, expected, terms)
            part.check(expected)
        except WrongFileError:
            part.remove()
            raise
        part.path.replace(final)
        part.remove()
    return Downloaded(final, part.size_bytes, part.sha256, place.source, place.url)


def taken_copy(path: Path, expected: Expected) -> Downloaded:
    """A file that the user has, checked where it lies.

    RefusedError  it is not a demo file, or not the one expected
    """
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        stream.seek(0)
        md5 = hashlib.file_digest(stream, "md5").hexdigest() if expected.md5 else None
    size = path.stat().st_size
    content_kind(path)
    compare(expected, size, digest, md5)
    return Downloaded(path, size, digest, f"file {path.name}", None)


def check_room(folder: Path, size_bytes: float) -> None:
    """FetchError where the disk has less free than `size_bytes`."""
    free = shutil.disk_usage(folder).free
    if size_bytes > free:
        raise FetchError(
            f"the disk has {free:,} bytes free, and {int(size_bytes):,} are needed",
            path=folder,
            fix="free some space, or name another folder with --data-dir",
        )


def part_bytes(final: Path, source: str) -> int:
    """Bytes of a file that an earlier run has left of a source."""
    part = _part_path(final, source)
    return part.stat().st_size if part.is_file() else 0


def _part_path(final: Path, source: str) -> Path:
    name = hashlib.sha256(source.encode()).hexdigest()[:8]
    return final.with_name(f".{final.name}.{name}.part")


def download_bar(name: str, terms: Terms, initial: int = 0) -> tqdm[Any]:
    """A bar of bytes on stderr, shown on a terminal only."""
    return tqdm(desc=name, initial=initial, unit="B", unit_scale=True, disable=terms.hidden)


def show_waiting(bar: tqdm[Any], name: str, text: str, terms: Terms) -> None:
    """Say why a download waits: in its bar, or in a line on stderr where no bar is shown."""
    if not bar.disable:
        bar.set_description_str(f"{name}, {text}")
    elif not terms.quiet:
        tqdm.write(f"{name}: {text}", file=sys.stderr)


def _receive(part: PartFile, place: Place, known: Known, expected: Expected, terms: Terms) -> None:
    name = part.final.name
    with download_bar(name, terms, part.size_bytes) as bar:
        transfer = Transfer(place, terms, known, lambda text: show_waiting(bar, name, text, terms))
        for block in transfer.blocks():
            if block is None:
                part.restart()
                bar.reset()
            elif not block:
                compare(expected, transfer.total)
                rest = (transfer.total or 0) * terms.room - part.size_bytes
                check_room(part.path.parent, rest)
                part.remember(transfer.validator, transfer.total)
                bar.total = transfer.total
                bar.set_description_str(name)
            else:
                # a network may hand over the first bytes one by one: then the last check decides
                if not part.size_bytes and len(block) >= HEAD_BYTES:
                    kind_of_head(block)
                part.append(block)
                bar.update(len(block))


class PartFile:
    """A download on disk: bytes appended and hashed, with what the server said of them."""

    def __init__(self, final: Path, source: str, *, with_md5: bool) -> None:
        self.final = final
        self.path = _part_path(final, source)
        self._about = self.path.with_name(self.path.name + ".json")
        self._stream: IO[bytes] | None = None
        self._with_md5 = with_md5
        self._forget()

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self.path.open("ab", buffering=0)
        with self.path.open("rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                self._count(block)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._stream is not None:
            self._stream.close()
        if not self.size_bytes:
            self.remove()
        elif isinstance(error, KeyboardInterrupt):
            error.add_note("what has come is kept: the same command goes on from there")

    @property
    def sha256(self) -> str:
        """Of what lies there."""
        return self._sha256.hexdigest()

    @property
    def md5(self) -> str | None:
        """Of what lies there; None where nobody will compare it."""
        return self._md5.hexdigest() if self._with_md5 else None

    def known(self) -> Known:
        """What lies there, and what the server said of it."""
        try:
            about = json.loads(self._about.read_text("utf-8"))
            return Known(self.size_bytes, about["validator"], about["total"])
        except (OSError, ValueError, LookupError, TypeError):
            return Known(self.size_bytes)

    def remember(self, validator: str | None, total: int | None) -> None:
        """Keep what the server said, before the first byte that it goes with."""
        temporary = self._about.with_name(self._about.name + ".tmp")
        temporary.write_text(json.dumps({"validator": validator, "total": total}), "utf-8")
        temporary.replace(self._about)

    def append(self, block: bytes) -> None:
        """Write and hash."""
        assert self._stream is not None
        left = memoryview(block)
        while left:
            left = left[self._stream.write(left) :]
        self._count(block)

    def restart(self) -> None:
        """Throw the bytes away."""
        assert self._stream is not None
        self._about.unlink(missing_ok=True)
        self._stream.truncate(0)
        self._forget()

    def check(self, expected: Expected) -> None:
        """WrongFileError where what lies there is no whole demo file, or not the one expected."""
        content_kind(self.path)
        compare(expected, self.size_bytes, self.sha256, self.md5)

    def remove(self) -> None:
        """Remove the bytes and what was said of them."""
        self.path.unlink(missing_ok=True)
        self._about.unlink(missing_ok=True)

    def _forget(self) -> None:
        self._sha256 = hashlib.sha256()
        self._md5 = hashlib.md5(usedforsecurity=False)
        self.size_bytes = 0

    def _count(self, block: bytes) -> None:
        self._sha256.update(block)
        if self._with_md5:
            self._md5.update(block)
        self.size_bytes += len(block)
