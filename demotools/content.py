"""Whether bytes are a demo file: by their ends, length and hashes, before anything reads them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from demotools.sources import RefusedError, page_problem

HEAD_BYTES = 512
_ZIP_END = b"PK\x05\x06"
_ZIP_END_BYTES = 22

Kind = Literal["pickle", "archive"]


@dataclass(frozen=True)
class Expected:
    """What is known of a file beforehand; None is unknown. `known_from` says by whom."""

    size_bytes: int | None = None
    sha256: str | None = None
    md5: str | None = None
    known_from: str = "the manifest"


class WrongFileError(RefusedError):
    """What came is not the file: its bytes are of no use to a later run."""


def content_kind(path: Path) -> Kind:
    """What a file is by its first and last bytes.

    WrongFileError  neither a whole pickle nor a whole archive of ours
    """
    with path.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
        stream.seek(max(path.stat().st_size - _ZIP_END_BYTES, 0))
        tail = stream.read()
    kind = kind_of_head(head)
    whole = tail.endswith(b".") if kind == "pickle" else tail.startswith(_ZIP_END)
    if not whole:
        raise WrongFileError(f"the file is cut short: its last bytes do not end {kind}s")
    return kind


def kind_of_head(head: bytes) -> Kind:
    """What a file is by its first bytes.

    WrongFileError  neither a pickle nor an archive of ours
    """
    head = head[:HEAD_BYTES]
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return "pickle"
    if head.startswith(b"PK\x03\x04"):
        return "archive"
    if head.lstrip()[:1] in (b"<", b"{"):
        raise WrongFileError(page_problem(head.decode("utf-8", "replace")))
    what = "a gzip file" if head.startswith(b"\x1f\x8b") else "no pickle" if head else "empty"
    raise WrongFileError(f"what came is not a demo file: {what} (first bytes {head[:8].hex()})")


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
