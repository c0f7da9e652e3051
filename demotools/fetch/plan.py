"""What `demotools fetch` will do for one file: decided here from facts, done elsewhere.

Pure: the manifest, the record of earlier fetches, what lies on disk and what the user asks for go
in; a plan comes out, which `--dry-run` prints and job.py carries out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from demotools.babyai.levels import PublishedFile, Source, Split
from demotools.fetch.places import Place

RECORDS_NAME = "fetched.toml"
DOWNLOADS = "downloads"
Action = Literal["nothing", "check", "convert", "download", "refuse"]
# A store and the parts that it is made of take about twice the bytes of their pickle; said, and
# checked, before the first byte is downloaded.
_ROOM_TO_CONVERT = 3.0


class FetchedRecord(BaseModel):
    """What the first download that passed every check was, as `fetched.toml` keeps it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    level: str
    split: str
    size_bytes: int
    sha256: str
    source: str
    day: str


@dataclass(frozen=True)
class FetchOptions:
    """What the user asks for.

    origin            where to take the file from, instead of the manifest's sources
    timeout_seconds   without a byte, after which a connection is given up
    retries           attempts in a row that bring nothing new
    """

    convert: bool = True
    keep_pickle: bool = False
    check: bool = False
    overwrite: bool = False
    origin: Place | None = None
    timeout_seconds: float = 30.0
    retries: int = 5
    quiet: bool = False

    @property
    def room(self) -> float:
        """Bytes needed on disk for one byte of the file, the file itself included."""
        return _ROOM_TO_CONVERT if self.convert else 1.0


@dataclass(frozen=True)
class Expected:
    """What is known of a file beforehand; None is unknown. `known_from` says by whom."""

    size_bytes: int | None = None
    sha256: str | None = None
    md5: str | None = None
    known_from: str = "the manifest"


@dataclass(frozen=True)
class Found:
    """What lies on disk for one level and split.

    store_source    the `source` attribute of a whole store, None where there is none
    store_problem   why the store that is there cannot be opened
    pickle_bytes    of the downloaded file
    part_bytes      of unfinished downloads, the longest
    """

    store_source: Mapping[str, Any] | None = None
    store_problem: str | None = None
    pickle_bytes: int | None = None
    part_bytes: int = 0


@dataclass(frozen=True)
class Plan:
    """What will be done for one level and split, and why; `fix` only where it is refused."""

    level: str
    split: Split
    name: str
    store: str
    action: Action
    reason: str
    sources: tuple[Source, ...] = ()
    expected: Expected = field(default_factory=Expected)
    fix: str = ""

    def text(self) -> str:
        """The plan in one line for a person, and one for each source."""
        lines = [f"{self.store} ({self.name}): {self.action}, {self.reason}"]
        lines += [f"  from {source}" for source in self.sources if self.action == "download"]
        return "\n".join(lines)


def store_name(level: str, split: Split) -> str:
    """The name of the store that a split of a level becomes.

    >>> store_name("GoToLocal", "train"), store_name("GoToLocal", "valid")
    ('GoToLocal', 'GoToLocal-valid')
    """
    return level if split == "train" else f"{level}-{split}"


def decided(
    level: str,
    split: Split,
    file: PublishedFile | None,
    found: Found,
    record: FetchedRecord | None,
    options: FetchOptions,
) -> Plan:
    """The plan for one level and split.

    file     of the manifest; None where it names none
    record   of an earlier fetch of the same file
    """
    expected = _expected(file, record)
    action, reason, fix = _action(file, found, expected, options)
    store = store_name(level, split)
    return Plan(
        level=level,
        split=split,
        name=file.name if file else f"{store}.pkl",
        store=store,
        action=action,
        reason=reason,
        sources=file.sources if file and options.origin is None else (),
        expected=expected,
        fix=fix,
    )


def _expected(file: PublishedFile | None, record: FetchedRecord | None) -> Expected:
    published = file is not None and (file.size_bytes, file.sha256, file.md5) != (None, None, None)
    if file is not None and published:
        return Expected(file.size_bytes, file.sha256, file.md5, "the manifest")
    if record is not None:
        return Expected(
            record.size_bytes, record.sha256, None, f"{RECORDS_NAME} from an earlier fetch"
        )
    return Expected()


def _action(
    file: PublishedFile | None, found: Found, expected: Expected, options: FetchOptions
) -> tuple[Action, str, str]:
    if file is None and options.origin is None:
        fix = "record it with `demotools generate`, or pass --from FILE"
        return "refuse", "the manifest names no file of this split", fix
    if options.convert and not options.overwrite:
        if found.store_problem is not None:
            return "refuse", found.store_problem, "add --overwrite to replace it"
        if found.store_source is not None:
            return _action_with_store(found.store_source, expected, options)
    if options.origin is not None:
        return "download", f"from {options.origin}", ""
    if found.pickle_bytes is None:
        return "download", _size_reason(found, expected), ""
    if expected.size_bytes not in (None, found.pickle_bytes):
        what = f"the file has {found.pickle_bytes:,} bytes, not {expected.size_bytes:,}"
        return "download", what, ""
    if options.convert:
        return "convert", "it has been downloaded", ""
    return ("check" if options.check else "nothing"), "it has been downloaded", ""


def _size_reason(found: Found, expected: Expected) -> str:
    if found.part_bytes:
        return f"{found.part_bytes:,} bytes of it are here already"
    if expected.size_bytes is None:
        return "its size is not published"
    return f"{expected.size_bytes:,} bytes"


def _action_with_store(
    source: Mapping[str, Any], expected: Expected, options: FetchOptions
) -> tuple[Action, str, str]:
    fix = "add --overwrite to replace it"
    if options.origin is not None:
        return "refuse", "the store exists already", fix
    if source.get("kind") != "pickle":
        return "refuse", f"there is another store of this name, of kind {source.get('kind')}", fix
    made_from = {file.get("sha256") for file in source.get("files", [])}
    if expected.sha256 is not None and expected.sha256 not in made_from:
        what = f"the store was made from another file than {expected.known_from} names"
        return "refuse", what, fix
    return ("check" if options.check else "nothing"), "the store exists", ""
