"""From a place to a file: resumed, hashed on the way, checked, and only then under its name.

A download lies in `.NAME.<source>.part`, beside it `.part.json` with what the server said of the
file, so that a later run asks for the rest only (transfer.py).
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

from tqdm import tqdm

from demotools.errors import FetchError, printable_text
from demotools.fetch.places import Place, RefusedError, WrongFileError, hub_file, page_problem
from demotools.fetch.plan import Expected, FetchOptions
from demotools.fetch.transfer import Transfer
from demotools.output import open_regular, progress_bar, written_whole

_BLOCK_BYTES = 1 << 20
_HEAD_BYTES = 512
_ZIP_END = b"PK\x05\x06"
_ZIP_END_BYTES = 22
# of a body whose length nobody has told, which may never end
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
    with opened_part(final, str(place), with_md5=expected.md5 is not None) as part:
        if not part.size_bytes or part.size_bytes != part.total:
            _receive(part, place, expected, options)
        return part.finish(expected, place)


def checked_file(path: Path, expected: Expected) -> Downloaded:
    """A file that the user has, checked where it lies.

    RefusedError    it is not a demo file, or not the one expected
    DemotoolsError  it cannot be read
    """
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with open_regular(path) as stream:
        while block := stream.read(_BLOCK_BYTES):
            sha256.update(block)
            md5.update(block)
        size = stream.tell()
        _check_ends(stream)
    compare(expected, size, sha256.hexdigest(), md5.hexdigest())
    return Downloaded(path, size, sha256.hexdigest(), f"file {path.name}", None)


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
                f"another file: its {what} is {found}, and {expected.known_from} says {wanted}"
            )


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
        raise WrongFileError(f"the file is cut short: its last bytes do not end {kind}s")
    return kind


def _kind_of_head(head: bytes) -> Literal["pickle", "archive"]:
    head = head[:_HEAD_BYTES]
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return "pickle"
    if head.startswith(b"PK\x03\x04"):
        return "archive"
    if head.lstrip()[:1] in (b"<", b"{"):
        raise WrongFileError(page_problem(head.decode("utf-8", "replace")))
    what = "a gzip file" if head.startswith(b"\x1f\x8b") else "no pickle" if head else "empty"
    raise WrongFileError(f"what came is not a demo file: {what} (first bytes {head[:8].hex()})")


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
    name = hashlib.sha256(source.encode(errors="replace")).hexdigest()[:8]
    return final.with_name(f".{final.name}.{name}.part")


def download_bar(name: str, options: FetchOptions, initial: int = 0) -> tqdm[Any]:
    """A bar of bytes on stderr, shown on a terminal only."""
    return progress_bar(None, name, "B", quiet=options.quiet, done=initial)


def show_waiting(bar: tqdm[Any], name: str, text: str, options: FetchOptions) -> None:
    """Say why a download waits: in its bar, or in a line on stderr where no bar is shown."""
    if not bar.disable:
        bar.set_description_str(f"{name}, {text}")
    elif not options.quiet:
        tqdm.write(printable_text(f"{name}: {text}"), file=sys.stderr)


def _receive(part: PartFile, place: Place, expected: Expected, options: FetchOptions) -> None:
    name = part.final.name
    checked = 0
    with download_bar(name, options, part.size_bytes) as bar:
        transfer = Transfer(
            place,
            options,
            offset=part.size_bytes,
            validators=part.validators,
            total=part.total,
            waiting=lambda text: show_waiting(bar, name, text, options),
        )
        for block in transfer.blocks():
            if block is None:
                part.restart()
                bar.reset()
            elif not block:
                compare(expected, transfer.total)
                rest = (transfer.total or 0) * options.room - part.size_bytes
                check_room(part.path.parent, rest)
                part.remember(transfer.validators, transfer.total)
                bar.total = transfer.total
                bar.set_description_str(name)
            else:
                # a network may hand over the first bytes one by one: then the last check decides
                if not part.size_bytes and len(block) >= _HEAD_BYTES:
                    _kind_of_head(block)
                part.append(block)
                bar.update(len(block))
                if not transfer.total and part.size_bytes - checked > _BYTES_BETWEEN_ROOM_CHECKS:
                    checked = part.size_bytes
                    check_room(part.path.parent, checked * options.room)


def _download_from_hub(
    place: Place, final: Path, expected: Expected, options: FetchOptions
) -> Downloaded:
    """By the hub's own package; what names the file afterwards is the commit, not a branch."""
    repository, path, revision = hub_file(place.name)
    hub = _hub_package(place)
    if options.quiet or not sys.stderr.isatty():
        hub.utils.disable_progress_bars()
    beside = final.with_name(f".{final.name}.hub")
    try:
        url = hub.hf_hub_url(repository, path, repo_type="dataset", revision=revision)
        about = hub.get_hf_file_metadata(url, timeout=options.timeout_seconds)
    except Exception as error:
        raise _hub_refusal(error, hub) from error
    compare(expected, about.size)
    final.parent.mkdir(parents=True, exist_ok=True)
    check_room(final.parent, (about.size or 0) * options.room)
    try:
        came = hub.hf_hub_download(
            repository,
            path,
            repo_type="dataset",
            revision=about.commit_hash,
            local_dir=beside,
            etag_timeout=options.timeout_seconds,
        )
    except Exception as error:
        raise _hub_refusal(error, hub) from error
    try:
        file = checked_file(Path(came), expected)
        file.path.replace(final)
    finally:
        shutil.rmtree(beside)
    commit = f"{repository}/{path}@{about.commit_hash}"
    return Downloaded(final, file.size_bytes, file.sha256, f"hf {commit}", f"hf:{commit}")


def _hub_package(place: Place) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.utils
    except ImportError as error:
        raise FetchError(
            "files of the Hugging Face hub need the package huggingface_hub",
            path=str(place),
            fix="install it: pip install 'demotools[hf]'",
        ) from error
    return huggingface_hub


def _hub_refusal(error: Exception, hub: Any) -> Exception:
    """What the package raises for whatever the hub sends; a failure of our disk stays itself."""
    if type(error) in (OSError, PermissionError, NotADirectoryError):
        return error
    reason = " ".join(str(error).split()) or type(error).__name__
    # the token goes before the text is cut: half a token is still a secret
    reason = reason.replace(hub.get_token() or "\0", "(token)")
    return RefusedError(f"the Hugging Face hub did not give it: {reason[:300]}")


@contextmanager
def opened_part(final: Path, source: str, *, with_md5: bool) -> Iterator[PartFile]:
    """What an earlier run has of a file, open to be continued; what is the wrong file goes."""
    path = _part_path(final, source)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        open_regular(path).close()  # a pipe would never open for writing
    with path.open("ab", buffering=0) as stream:
        part = PartFile(final, path, stream, with_md5=with_md5)
        try:
            yield part
        except WrongFileError:
            part.remove()
            raise
        except KeyboardInterrupt as error:
            if part.size_bytes:
                error.add_note("what has come is kept: the same command goes on from there")
            raise
        finally:
            if not part.size_bytes:
                part.remove()


class PartFile:
    """A download on disk: bytes appended and hashed, with what the server said of them.

    validators, total   as the server said when the first bytes came
    """

    def __init__(self, final: Path, path: Path, stream: IO[bytes], *, with_md5: bool) -> None:
        self.final = final
        self.path = path
        self.validators: dict[str, str] = {}
        self.total: int | None = None
        self._about = path.with_name(path.name + ".json")
        self._stream = stream
        self._with_md5 = with_md5
        self._forget()
        with open_regular(path) as there:
            while block := there.read(_BLOCK_BYTES):
                self._count(block)
        if self._about.exists():
            with (
                open_regular(self._about) as there,
                suppress(ValueError, LookupError, TypeError, ArithmeticError, RecursionError),
            ):
                about = json.load(there)
                total = None if about["total"] is None else int(about["total"])
                self.validators, self.total = dict(about["validators"]), total

    def remember(self, validators: dict[str, str], total: int | None) -> None:
        """Keep what the server said, before the first byte that it goes with."""
        with written_whole(self._about) as stream:
            stream.write(json.dumps({"validators": validators, "total": total}).encode())

    def append(self, block: bytes) -> None:
        """Write and hash."""
        left = memoryview(block)
        while left:
            written = self._stream.write(left)
            self._count(left[:written])  # piece by piece: the disk may be full before the end
            left = left[written:]

    def restart(self) -> None:
        """Throw the bytes away."""
        self._about.unlink(missing_ok=True)
        self._stream.truncate(0)
        self._forget()

    def finish(self, expected: Expected, place: Place) -> Downloaded:
        """Give the file its name.

        WrongFileError  what lies there is no whole demo file, or not the one expected
        """
        content_kind(self.path)
        sha256 = self._sha256.hexdigest()
        md5 = self._md5.hexdigest() if self._with_md5 else None
        compare(expected, self.size_bytes, sha256, md5)
        os.fsync(self._stream.fileno())
        self.path.replace(self.final)
        self.remove()
        return Downloaded(self.final, self.size_bytes, sha256, str(place), place.url)

    def remove(self) -> None:
        """Remove the bytes and what was said of them."""
        self.path.unlink(missing_ok=True)
        self._about.unlink(missing_ok=True)

    def _forget(self) -> None:
        self._sha256 = hashlib.sha256()
        self._md5 = hashlib.md5(usedforsecurity=False)
        self.size_bytes = 0

    def _count(self, block: bytes | memoryview) -> None:
        self._sha256.update(block)
        if self._with_md5:
            self._md5.update(block)
        self.size_bytes += len(block)
