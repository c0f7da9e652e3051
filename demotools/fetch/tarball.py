"""Extracts files from a published archive while it streams: the archive is never on disk."""

from __future__ import annotations

import fnmatch
import hashlib
import io
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from demotools.fetch.part_file import Downloaded, opened_part
from demotools.fetch.places import Place, RefusedError
from demotools.fetch.plan import Expected, FetchOptions
from demotools.fetch.transfer import Transfer
from demotools.output import check_room

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
    with _TransferStream(place, options) as stream:
        reader = io.BufferedReader(stream, _BLOCK_BYTES)
        with stream.guarded(tarfile.open, fileobj=reader, mode="r|*", tarinfo=_Member) as tar:
            while (missing or options.check) and (member := stream.guarded(tar.next)):
                tar.members.clear()
                if (pattern := _wanted_pattern(member, missing)) is None:
                    continue
                held.append((pattern, _taken(tar, member, missing.pop(pattern), stream, options)))
                if not options.check:
                    yield held.pop()
        if options.check and expected.md5 not in (None, stream.rest_md5()):
            for _, file in held:
                file.path.unlink()
            raise RefusedError(f"the archive's md5 is not the published {expected.md5}")
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
    with opened_part(final, str(stream.place)) as part:
        part.restart()
        check_room(final.parent, member.size * options.room)
        content = stream.guarded(tar.extractfile, member)
        while block := stream.guarded(content.read, _BLOCK_BYTES):
            part.append(block)
        expected = Expected(size_bytes=member.size, known_from="the archive")
        return part.finish(expected, stream.place)


class _Member(tarfile.TarInfo):
    """A member whose header asks for no more memory than a header may."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        member = super().frombuf(buf, encoding, errors)
        if member.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError("sparse files are not supported")
        if member.type not in tarfile.REGULAR_TYPES and member.size > _HEADER_BYTES_AT_MOST:
            raise tarfile.ReadError(f"a header of {member.size:,} bytes")
        return member


class _TransferStream(io.RawIOBase):
    """A transfer as a stream that reads forward only, with the md5 of what was read."""

    def __init__(self, place: Place, options: FetchOptions) -> None:
        self.place = place
        self._blocks = Transfer(str(place), place, options).blocks()
        self._left = memoryview(b"")
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._ends = 0
        self._failed = False

    def guarded(self, function: Callable[..., Any], *args: Any, **settings: Any) -> Any:
        """Call a function of tarfile: whatever it raises, the archive is damaged.

        What the stream itself raises meanwhile stays what it is.
        """
        try:
            return function(*args, **settings)
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
                raise RefusedError("the connection was lost, and the server cannot resume")
            self._md5.update(block)
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
