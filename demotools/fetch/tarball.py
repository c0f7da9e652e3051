"""Files out of a published archive, taken as its stream passes: the archive is never on disk."""

from __future__ import annotations

import fnmatch
import hashlib
import io
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tqdm import tqdm

from demotools.fetch.part_file import (
    Downloaded,
    check_room,
    download_bar,
    opened_part,
    show_waiting,
)
from demotools.fetch.places import Place, RefusedError
from demotools.fetch.plan import Expected, FetchOptions
from demotools.fetch.transfer import Transfer

if TYPE_CHECKING:
    from typing_extensions import Buffer

_BLOCK_BYTES = 1 << 20
# tarfile reads the long names and the attributes of a member whole
_HEADER_BYTES_AT_MOST = 1 << 20
_MEMBER_BYTES_AT_MOST = 1 << 60
# reads beyond the end: on some broken headers tarfile asks for ever
_ENDS_AT_MOST = 100


def extract_members(
    place: Place,
    wanted: Mapping[str, Path],
    expected: Expected,
    options: FetchOptions,
) -> Iterator[tuple[str, Downloaded]]:
    """Read an archive as it streams by; yields (pattern, file) for each wanted member, checked.

    With `--check` it is read to its end, and compared, before the first member is given out.

    wanted     shell-style pattern of the base name -> final path
    expected   of the archive

    RefusedError  the place does not give the archive, or it is damaged
    """
    missing = dict(wanted)
    held: list[tuple[str, Downloaded]] = []
    with (
        download_bar(str(place), options) as bar,
        _TransferStream(place, options, bar) as stream,
    ):
        with stream.boundary():
            tar = tarfile.open(  # noqa: SIM115  closed by the `with` below
                fileobj=io.BufferedReader(stream, _BLOCK_BYTES), mode="r|*", tarinfo=_Member
            )
        with tar:
            while missing or options.check:
                with stream.boundary():
                    member = tar.next()
                if member is None:
                    break
                tar.members.clear()  # type: ignore[attr-defined]  # an archive may never end
                pattern = _wanted_pattern(member, missing)
                if pattern is None:
                    continue
                final = missing.pop(pattern)
                held.append((pattern, _taken(tar, member, final, stream, options)))
                if not options.check:
                    yield held.pop()
        if options.check and expected.md5 not in (None, stream.rest_md5()):
            for _, file in held:
                file.path.unlink()
            raise RefusedError(f"the archive's md5 is not {expected.md5}, which is published")
    yield from held


def _wanted_pattern(member: tarfile.TarInfo, missing: Mapping[str, Path]) -> str | None:
    if not member.isfile():
        return None
    name = member.name.rpartition("/")[2]
    return next((p for p in missing if fnmatch.fnmatchcase(name, p)), None)


def _taken(
    tar: tarfile.TarFile,
    member: tarfile.TarInfo,
    final: Path,
    stream: _TransferStream,
    options: FetchOptions,
) -> Downloaded:
    if not 0 <= member.size < _MEMBER_BYTES_AT_MOST:
        raise RefusedError("the archive is damaged: no member has such a size")
    with opened_part(final, str(stream.place), with_md5=False) as part:
        part.restart()
        check_room(final.parent, member.size * options.room)
        for block in _content(tar, member, stream):
            part.append(block)
        expected = Expected(size_bytes=member.size, known_from="the archive")
        return part.finish(expected, stream.place)


def _content(
    tar: tarfile.TarFile, member: tarfile.TarInfo, stream: _TransferStream
) -> Iterator[bytes]:
    with stream.boundary():
        content = tar.extractfile(member)
    assert content is not None, "of a regular file"
    while True:
        with stream.boundary():
            block = content.read(_BLOCK_BYTES)
        if not block:
            return
        yield block


class _Member(tarfile.TarInfo):
    """A member whose header asks for no more memory than a header may."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        member = super().frombuf(buf, encoding, errors)
        if member.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError("a file with holes is not supported")
        if member.type not in tarfile.REGULAR_TYPES and member.size > _HEADER_BYTES_AT_MOST:
            raise tarfile.ReadError(f"a header of {member.size:,} bytes")
        return member


class _TransferStream(io.RawIOBase):
    """A transfer as a stream that reads forward only, with the md5 of what was read."""

    def __init__(self, place: Place, options: FetchOptions, bar: tqdm[Any]) -> None:
        self.place = place
        self._transfer = Transfer(
            place,
            options,
            waiting=lambda text: show_waiting(bar, str(place), text, options),
        )
        self._blocks = self._transfer.blocks()
        self._bar = bar
        self._left = memoryview(b"")
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._ends = 0
        self._failed = False

    @contextmanager
    def boundary(self) -> Iterator[None]:
        """Around calls into tarfile alone: whatever it raises, the archive is damaged.

        What the stream itself raises meanwhile stays what it is.
        """
        try:
            yield
        except Exception as error:
            if self._failed:
                raise
            raise RefusedError(f"the archive is damaged: {str(error)[:200]}") from error

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Buffer) -> int:
        """Fill from the current block, asking for the next where it is used up."""
        try:
            self._next_block()
        except BaseException:
            self._failed = True
            raise
        target = memoryview(buffer).cast("B")
        size = min(len(target), len(self._left))
        target[:size], self._left = self._left[:size], self._left[size:]
        return size

    def _next_block(self) -> None:
        while not self._left:
            try:
                block = next(self._blocks)
            except StopIteration:
                self._ends += 1
                if self._ends > _ENDS_AT_MOST:
                    raise RefusedError("the archive is damaged: it ends too early") from None
                return
            if block is None:
                raise RefusedError("the server cannot continue where the connection was cut")
            if not block:
                self._bar.total = self._transfer.total
                self._bar.set_description_str(str(self.place))
            self._md5.update(block)
            self._bar.update(len(block))
            self._left = memoryview(block)

    def rest_md5(self) -> str:
        """The md5 of the whole, read to its end."""
        for block in self._blocks:
            self._md5.update(block or b"")
        return self._md5.hexdigest()

    def close(self) -> None:
        """Close the connection."""
        self._blocks.close()
        super().close()
