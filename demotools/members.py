"""Files out of a published archive, taken as its stream passes: the archive is never on disk."""

from __future__ import annotations

import fnmatch
import hashlib
import io
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tqdm import tqdm

from demotools.content import Expected, WrongFileError
from demotools.download import (
    Downloaded,
    PartFile,
    check_room,
    download_bar,
    show_waiting,
)
from demotools.sources import Place, RefusedError
from demotools.transfer import Terms, Transfer

if TYPE_CHECKING:
    from typing_extensions import Buffer

_BLOCK_BYTES = 1 << 20


def extract_members(
    place: Place, wanted: Mapping[str, Path], expected: Expected, terms: Terms, *, whole: bool
) -> Iterator[tuple[str, Downloaded]]:
    """Read an archive as it streams by; yields (pattern, file) for each wanted member, checked.

    wanted     shell-style pattern of the base name -> final path
    expected   of the archive; its md5 is compared only where it is read to its end
    whole      read to the end, and compare, before the last member is given out

    RefusedError  the place does not give the archive, or it is damaged
    """
    missing = dict(wanted)
    held: list[tuple[str, Downloaded]] = []
    with (
        download_bar(place.source, terms) as bar,
        _TransferStream(place, terms, bar) as stream,
    ):
        try:
            with tarfile.open(fileobj=io.BufferedReader(stream, _BLOCK_BYTES), mode="r|*") as tar:
                for member in tar:
                    pattern = _wanted_pattern(member, missing)
                    content = tar.extractfile(member) if pattern else None
                    if pattern and content:
                        final = missing.pop(pattern)
                        held.append((pattern, _taken(content, member.size, final, place, terms)))
                        if not whole:
                            yield held.pop()
                    if not missing and not whole:
                        return
        except (tarfile.TarError, EOFError, zlib.error) as error:
            raise RefusedError(f"the archive is damaged: {error}") from error
        if whole and expected.md5 not in (None, stream.rest_md5()):
            for _, file in held:
                file.path.unlink()
            raise RefusedError(f"the archive's md5 is not {expected.md5}, which is published")
    yield from held


def _wanted_pattern(member: tarfile.TarInfo, missing: Mapping[str, Path]) -> str | None:
    if not member.isfile():
        return None
    name = member.name.rpartition("/")[2]
    return next((p for p in missing if fnmatch.fnmatchcase(name, p)), None)


def _taken(content: IO[bytes], size: int, final: Path, place: Place, terms: Terms) -> Downloaded:
    with PartFile(final, place.source, with_md5=False) as part:
        part.restart()
        check_room(final.parent, size * terms.room)
        try:
            while block := content.read(_BLOCK_BYTES):
                part.append(block)
            part.check(Expected(size_bytes=size, known_from="the archive"))
        except WrongFileError:
            part.remove()
            raise
        part.path.replace(final)
        part.remove()
    return Downloaded(final, part.size_bytes, part.sha256, place.source, place.url)


class _TransferStream(io.RawIOBase):
    """A transfer as a stream that reads forward only, with the md5 of what was read."""

    def __init__(self, place: Place, terms: Terms, bar: tqdm[Any]) -> None:
        self._transfer = Transfer(
            place, terms, waiting=lambda text: show_waiting(bar, place.source, text, terms)
        )
        self._blocks = self._transfer.blocks()
        self._name = place.source
        self._bar = bar
        self._left = memoryview(b"")
        self._md5 = hashlib.md5(usedforsecurity=False)

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Buffer) -> int:
        """Fill from the current block, asking for the next where it is used up."""
        while not self._left:
            try:
                block = next(self._blocks)
            except StopIteration:
                return 0
            if block is None:
                raise RefusedError("the server cannot continue where the connection was cut")
            if not block:
                self._bar.total = self._transfer.total
                self._bar.set_description_str(self._name)
            self._md5.update(block)
            self._bar.update(len(block))
            self._left = memoryview(block)
        target = memoryview(buffer).cast("B")
        size = min(len(target), len(self._left))
        target[:size], self._left = self._left[:size], self._left[size:]
        return size

    def rest_md5(self) -> str:
        """The md5 of the whole, read to its end."""
        for block in self._blocks:
            self._md5.update(block or b"")
        return self._md5.hexdigest()

    def close(self) -> None:
        """Close the connection."""
        self._blocks.close()
        super().close()
