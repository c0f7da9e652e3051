"""Downloads a file: resumes it, hashes it on the way, checks it, and only then gives it its name.

An unfinished download is in `.NAME.<source>.part`; next to it, `.part.json` keeps what the server
said about the file, so that a later run requests only the rest (transfer.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from demotools.exchange.hub import hub_package, hub_reason
from demotools.fetch.places import (
    Place,
    RefusedError,
    UnreachableError,
    WrongFileError,
    hub_file,
    page_problem,
)
from demotools.fetch.plan import Expected, FetchOptions
from demotools.fetch.transfer import Transfer
from demotools.output import check_room, open_regular, written_whole

_BLOCK_BYTES = 1 << 20
_HEAD_BYTES = 512
_ZIP_END = b"PK\x05\x06"
_ZIP_END_BYTES = 22
# as the HTTP libraries of the hub's package, which changed twice, name it
_NO_CONNECTION = ("ConnectError", "ConnectionError", "ConnectTimeout")
# of a body whose length is not announced, which may never end
_BYTES_BETWEEN_ROOM_CHECKS = 16 << 20


@dataclass(frozen=True)
class Downloaded:
    """A file that passed every check.

    source   as the record and the store name it
    """

    path: Path
    size_bytes: int
    sha256: str
    source: str
    url: str | None


def download(place: Place, final: Path, expected: Expected, options: FetchOptions) -> Downloaded:
    """Get a file to `final`, from where an earlier run stopped; a user's file stays where it is.

    RefusedError    the place does not give the file, or gives another one
    DemotoolsError  the disk has no room for it, a file that cannot be read
    """
    if place.kind == "file":
        return checked_file(Path(place.name), expected)
    if place.kind == "hf":
        return _download_from_hub(place, final, expected, options)
    with opened_part(final, str(place)) as part:
        if not part.size_bytes or part.size_bytes != part.total:
            _receive(part, place, expected, options)
        return part.finish(expected, place)


def checked_file(path: Path, expected: Expected) -> Downloaded:
    """A file that the user has, checked where it lies.

    RefusedError    it is not a demo file, or not the one expected
    DemotoolsError  it cannot be read
    """
    hashes = _Hashes()
    with open_regular(path) as stream:
        hashes.read(stream)
        _check_ends(stream)
    sha256 = hashes.compare(expected)
    return Downloaded(path, hashes.size_bytes, sha256, f"file {path.name}", None)


def compare(
    expected: Expected, size: int | None, sha256: str | None = None, md5: str | None = None
) -> None:
    """WrongFileError where what is known on both sides differs."""
    pairs = {
        "size": (size, expected.size_bytes),
        "sha256": (sha256, expected.sha256),
        "md5": (md5, expected.md5),
    }
    for what, (found, wanted) in pairs.items():
        if None not in (found, wanted) and found != wanted:
            raise WrongFileError(
                f"a different file: its {what} is {found}, but {expected.known_from} says {wanted}"
            )


class _Hashes:
    """What tells files apart: their size, sha256 and md5."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self._sha256, self._md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)

    def update(self, block: bytes | memoryview) -> None:
        """Take the next bytes of the file."""
        self._sha256.update(block)
        self._md5.update(block)
        self.size_bytes += len(block)

    def read(self, stream: IO[bytes]) -> None:
        """Take a stream to its end."""
        while block := stream.read(_BLOCK_BYTES):
            self.update(block)

    def compare(self, expected: Expected) -> str:
        """The sha256; WrongFileError where another file is expected."""
        sha256 = self._sha256.hexdigest()
        compare(expected, self.size_bytes, sha256, self._md5.hexdigest())
        return sha256


def content_kind(path: Path) -> Literal["pickle", "archive"]:
    """What a file is by its first and last bytes.

    WrongFileError  neither a whole pickle nor a whole archive of ours
    """
    with open_regular(path) as stream:
        return _check_ends(stream)


def _check_ends(stream: IO[bytes]) -> Literal["pickle", "archive"]:
    stream.seek(0)
    kind = _kind_of_head(stream.read(_HEAD_BYTES))
    stream.seek(max(stream.seek(0, os.SEEK_END) - _ZIP_END_BYTES, 0))
    tail = stream.read()
    whole = tail.endswith(b".") if kind == "pickle" else tail.startswith(_ZIP_END)
    if not whole:
        raise WrongFileError(f"the file is cut short: it does not end like a {kind}")
    return kind


def _kind_of_head(head: bytes) -> Literal["pickle", "archive"]:
    head = head[:_HEAD_BYTES]
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return "pickle"
    if head.startswith(b"PK\x03\x04"):
        return "archive"
    if head.startswith(b"PAR1"):
        raise WrongFileError("this is a parquet file", fix="use `demotools import FILE.parquet`")
    if head.lstrip()[:1] in (b"<", b"{"):
        raise WrongFileError(page_problem(head.decode("utf-8", "replace")))
    what = "a gzip file" if head.startswith(b"\x1f\x8b") else "not a pickle" if head else "empty"
    raise WrongFileError(f"this is not a demo file: {what} (first bytes {head[:8].hex()})")


def part_bytes(final: Path, source: str) -> int:
    """Bytes of a file that an earlier run has left of a source."""
    part = _part_path(final, source)
    return part.stat().st_size if part.is_file() else 0


def _part_path(final: Path, source: str) -> Path:
    name = hashlib.sha256(source.encode(errors="replace")).hexdigest()[:8]
    return final.with_name(f".{final.name}.{name}.part")


def _receive(part: PartFile, place: Place, expected: Expected, options: FetchOptions) -> None:
    checked = 0
    transfer = Transfer(
        part.final.name,
        place,
        options,
        offset=part.size_bytes,
        validators=part.validators,
        total=part.total,
    )
    for block in transfer.blocks():
        if block is None:
            part.restart()
        elif not block:
            compare(expected, transfer.total)
            check_room(part.path.parent, (transfer.total or 0) * options.room - part.size_bytes)
            part.remember(transfer.validators, transfer.total)
        else:
            # a network may hand over the first bytes one by one: then the last check decides
            if not part.size_bytes and len(block) >= _HEAD_BYTES:
                _kind_of_head(block)
            part.append(block)
            if not transfer.total and part.size_bytes - checked > _BYTES_BETWEEN_ROOM_CHECKS:
                checked = part.size_bytes
                check_room(part.path.parent, checked * options.room)


def _download_from_hub(
    place: Place, final: Path, expected: Expected, options: FetchOptions
) -> Downloaded:
    """By the hub's own package; what names the file afterwards is the commit, not a branch."""
    repository, path, revision = hub_file(place.name)
    hub = opened_hub(options)
    beside = final.with_name(f".{final.name}.hub")  # stays after a failure: the package resumes
    wait = options.timeout_seconds
    with hub_refusals(hub):
        url = hub.hf_hub_url(repository, path, repo_type="dataset", revision=revision)
        about = hub.get_hf_file_metadata(url, timeout=wait)
    compare(expected, about.size)
    final.parent.mkdir(parents=True, exist_ok=True)
    check_room(final.parent, (about.size or 0) * options.room)
    at = {"repo_type": "dataset", "revision": about.commit_hash, "local_dir": beside}
    with hub_refusals(hub):
        came = hub.hf_hub_download(repository, path, **at, etag_timeout=wait)
    try:
        file = checked_file(Path(came), expected)
        file.path.replace(final)
    finally:
        shutil.rmtree(beside)
    name = f"{repository}/{path}@{about.commit_hash}"
    return Downloaded(final, file.size_bytes, file.sha256, f"hf {name}", f"hf:{name}")


def opened_hub(options: FetchOptions) -> Any:
    """The hub's own package, showing its progress where ours would be shown.

    DemotoolsError  it is not installed
    """
    hub = hub_package()
    if options.quiet or not sys.stderr.isatty():
        hub.utils.disable_progress_bars()
    return hub


@contextmanager
def hub_refusals(hub: Any) -> Iterator[None]:
    """Whatever the package raises about what the hub sends; a failure of our disk stays itself."""
    try:
        yield
    except Exception as error:
        if type(error) in (OSError, PermissionError, NotADirectoryError):
            raise
        reason = hub_reason(error, hub)
        if any(kind.__name__ in _NO_CONNECTION for kind in type(error).__mro__):
            what = f"no connection to the Hugging Face hub: {reason}"
            raise UnreachableError(what) from error
        raise RefusedError(f"the Hugging Face hub refused: {reason}") from error


@contextmanager
def opened_part(final: Path, source: str) -> Iterator[PartFile]:
    """What an earlier run has of a file, open to be continued; a wrong file is removed."""
    path = _part_path(final, source)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        open_regular(path).close()  # a pipe would never open for writing
    with path.open("ab", buffering=0) as stream:
        part = PartFile(final, path, stream)
        try:
            yield part
        except WrongFileError:
            part.remove()
            raise
        except KeyboardInterrupt as error:
            if part.size_bytes:
                error.add_note("the partial download is kept: run the same command again to resume")
            raise
        finally:
            if not part.size_bytes:
                part.remove()


class PartFile:
    """A download on disk: bytes appended and hashed, with what the server said of them.

    validators, total   as the server said when the first bytes came
    """

    def __init__(self, final: Path, path: Path, stream: IO[bytes]) -> None:
        self.final = final
        self.path = path
        self.validators: dict[str, str] = {}
        self.total: int | None = None
        self._about = path.with_name(path.name + ".json")
        self._stream = stream
        self._hashes = _Hashes()
        with open_regular(path) as there:
            self._hashes.read(there)
        if self._about.exists():
            with (
                open_regular(self._about) as there,
                suppress(ValueError, LookupError, TypeError, ArithmeticError, RecursionError),
            ):
                about = json.load(there)
                total = None if about["total"] is None else int(about["total"])
                self.validators, self.total = dict(about["validators"]), total

    @property
    def size_bytes(self) -> int:
        """Bytes that are there."""
        return self._hashes.size_bytes

    def remember(self, validators: dict[str, str], total: int | None) -> None:
        """Keep what the server said, before the first byte that it goes with."""
        with written_whole(self._about) as stream:
            stream.write(json.dumps({"validators": validators, "total": total}).encode())

    def append(self, block: bytes) -> None:
        """Write and hash."""
        left = memoryview(block)
        while left:
            written = self._stream.write(left)
            # piece by piece: the disk may be full before the end
            self._hashes.update(left[:written])
            left = left[written:]

    def restart(self) -> None:
        """Throw the bytes away."""
        self._about.unlink(missing_ok=True)
        self._stream.truncate(0)
        self._hashes = _Hashes()

    def finish(self, expected: Expected, place: Place) -> Downloaded:
        """Give the file its name.

        WrongFileError  what lies there is no whole demo file, or not the one expected
        """
        content_kind(self.path)
        sha256 = self._hashes.compare(expected)
        os.fsync(self._stream.fileno())
        self.path.replace(self.final)
        self.remove()
        return Downloaded(self.final, self.size_bytes, sha256, str(place), place.url)

    def remove(self) -> None:
        """Remove the bytes and what was said of them."""
        self.path.unlink(missing_ok=True)
        self._about.unlink(missing_ok=True)
