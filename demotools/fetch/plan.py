"""Decides what `demotools fetch` will do for one file, without doing it.

Pure functions: from the manifest, the record of earlier fetches, the files on disk and the user's
options to a plan, which `--dry-run` prints and job.py carries out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from demotools.babyai.levels import PublishedFile, Source, Split, store_name
from demotools.exchange.archive import ARCHIVE_SUFFIX
from demotools.fetch.places import Place

RECORDS_NAME = "fetched.toml"
DOWNLOADS = "downloads"
Action = Literal["nothing", "check", "convert", "download", "refuse"]
# A store and the parts that it is made of take about twice the bytes of their pickle; said, and
# checked, before the first byte is downloaded.
_ROOM_TO_CONVERT = 3.0


class FetchedRecord(BaseModel):
    """What the first download that passed every check was, as `fetched.toml` keeps it.

    sha256   of several files that of their own, one a line
    commit   of a data set on the hub
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    level: str
    split: str
    size_bytes: int
    sha256: str
    source: str
    day: str
    commit: str | None = None


@dataclass(frozen=True)
class FetchOptions:
    """What the user asks for.

    origin            where to take the file from, instead of the manifest's sources
    source            the name of the only one of the manifest's sources that is asked
    timeout_seconds   without a byte, after which a connection is given up
    retries           attempts in a row that bring nothing new
    """

    convert: bool = True
    keep_pickle: bool = False
    check: bool = False
    overwrite: bool = False
    origin: Place | None = None
    source: str | None = None
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

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON values; each source as in its text."""
        return {**asdict(self), "sources": list(map(str, self.sources))}

    def text(self) -> str:
        """The plan in one line for a person, and one for each source."""
        lines = [f"{self.store} ({self.name}): {self.action}, {self.reason}"]
        lines += [f"  from {source}" for source in self.sources if self.action == "download"]
        return "\n".join(lines)


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
    store = store_name(level, split)
    expected = _expected(file, record)

    offered = file.sources if file and options.origin is None else ()
    sources = tuple(each for each in offered if options.source in (None, *each.names))

    def plan(action: Action, reason: str, fix: str = "") -> Plan:
        name = file.name if file else f"{store}.pkl"
        return Plan(level, split, name, store, action, reason, sources, expected, fix)

    unchanged: Action = "check" if options.check else "nothing"
    if file is None and options.origin is None:
        fix = "record it with `demotools generate`, or pass --from FILE"
        return plan("refuse", "the manifest names no file for this split", fix)
    if offered and not sources:
        names = ", ".join(dict.fromkeys(each.names[-1] for each in offered))
        return plan("refuse", f"it has no source {options.source!r}", f"use one of {names}")
    if options.convert and not options.overwrite:
        if refusal := found.store_problem or _store_refusal(found, expected, sources, options):
            return plan("refuse", refusal, "add --overwrite to replace it")
        if found.store_source is not None:
            return plan(unchanged, "the store exists")
    if options.origin is not None:
        return plan("download", f"from {options.origin}")
    if found.pickle_bytes is None or _only_datasets(sources):
        size = expected.size_bytes
        what = "its size is not published" if size is None else f"{size:,} bytes"
        part = f"{found.part_bytes:,} bytes are already downloaded"
        return plan("download", part if found.part_bytes else what)
    if expected.size_bytes not in (None, found.pickle_bytes):
        what = f"the file has {found.pickle_bytes:,} bytes, not {expected.size_bytes:,}"
        return plan("download", what)
    return plan("convert" if options.convert else unchanged, "it has been downloaded")


def _only_datasets(sources: Sequence[Source]) -> bool:
    return bool(sources) and all(source.dataset is not None for source in sources)


def _store_refusal(
    found: Found, expected: Expected, sources: Sequence[Source], options: FetchOptions
) -> str | None:
    """Why the store that exists is not what would be fetched."""
    source = found.store_source
    if source is None:
        return None
    if options.origin is not None:
        return "the store already exists"
    kind, fetched_from = source.get("kind"), source.get("fetched_from")
    if any(each.hf is not None and each.hf.endswith(ARCHIVE_SUFFIX) for each in sources):
        return None  # a whole store is published, whatever it was made of
    if kind not in ("pickle", "parquet"):
        return f"there is another store of this name, of kind {kind}"
    if options.source is not None:
        wanted = map(str, sources) if _only_datasets(sources) else [fetched_from]
        if (kind == "parquet") != _only_datasets(sources) or fetched_from not in wanted:
            return f"the store was made from {fetched_from or 'a file'}"
    if kind == "parquet":
        return None
    if expected.sha256 not in (None, *(file.get("sha256") for file in source.get("files", []))):
        return f"the store was made from a different file than the one in {expected.known_from}"
    return None


def _expected(file: PublishedFile | None, record: FetchedRecord | None) -> Expected:
    if file is not None and (file.size_bytes, file.sha256, file.md5) != (None, None, None):
        return Expected(file.size_bytes, file.sha256, file.md5)
    if record is not None:
        name = f"{RECORDS_NAME} from an earlier fetch"
        return Expected(record.size_bytes, record.sha256, None, name)
    return Expected()
