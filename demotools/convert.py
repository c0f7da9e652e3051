"""Convert legacy pickles into one demo store: safely, in bounded memory, on several cores.

One process reads the file and cuts it into parts that depend on the file alone; this process and
its helpers decode the parts and write them down, in any order; the writer joins them. A killed
conversion finds its finished parts again.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context, parent_process
from pathlib import Path
from signal import SIG_IGN, SIGINT, signal
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import numpy as np
from tqdm import tqdm

from demotools.decode import CELL_VIEW, ViewKind, decoded_part, part_images
from demotools.encodings import Evidence
from demotools.errors import DemotoolsError, PickleError, from_os_error
from demotools.grid import Encoding
from demotools.layouts import PicklePart
from demotools.manifest import level_from_environment_id, read_manifest
from demotools.pickles import PickleReader
from demotools.processes import processor_count
from demotools.store import new_store_path, read_attributes
from demotools.writer import StoreBuilder, read_notes, write_part

_STEM = re.compile(
    r"(?P<level>.+?)(?P<tags>(?:_(?:valid|train|agent|shard\d+))*)\.pkl", re.IGNORECASE
)
_TASKS_A_HELPER = 2
_EVIDENCE_EPISODES = 256
_EVIDENCE_STEPS = 1 << 12


@dataclass(frozen=True)
class ConvertOptions:
    """What the user asks for; None means: told from the file.

    encoding   an object encoding; "image" stores the views as they are
    on_error   "skip" leaves out episodes that are not well formed, "stop" refuses the file
    salvage    take what is whole of a file that was cut short
    workers    processes, this one among them; None means one for every processor
    """

    level: str | None = None
    split: str | None = None
    encoding: Encoding | Literal["image"] | None = None
    name: str | None = None
    workers: int | None = None
    on_error: Literal["stop", "skip"] = "stop"
    salvage: bool = False
    overwrite: bool = False
    quiet: bool = False


def known_encoding(name: str) -> Encoding | Literal["image"] | None:
    """What the option `--encoding` says: None for "auto".

    >>> known_encoding("2018-11-16") is Encoding.SECOND
    True
    """
    if name == "auto":
        return None
    return "image" if name == "image" else Encoding(name)


@dataclass(frozen=True)
class Converted:
    """A finished conversion: the store, and what it says of its source."""

    path: Path
    episodes: int
    steps: int
    missions: int
    source: dict[str, Any]

    def text(self) -> str:
        """What was converted, for a person."""
        lines = [
            f"converted {self.path}: {self.episodes:,} episodes, {self.steps:,} steps, "
            f"{self.missions:,} missions"
        ]
        for file in self.source["files"]:
            lines.append(f"  {file['name']}: object encoding {_PERIODS[file['encoding']]}")
            if file["skipped"]:
                number, reason = file["skipped"][0]
                lines.append(
                    f"  left out {len(file['skipped']):,} episodes, the first, {number}: {reason}"
                )
            if file["broken_at"] is not None:
                lines.append(
                    f"  the file breaks off at byte {file['broken_at']:,}; "
                    f"{file['episodes']:,} episodes before that are whole"
                )
        return "\n".join(lines)


_PERIODS = {
    Encoding.FIRST: "before 2018-11-16, recoded to today's",
    Encoding.SECOND: "2018-11-16 to 2019-01-08, recoded to today's",
    Encoding.TODAY: "since 2019-01-08, today's",
    "image": "none, the views are stored as images",
}


@dataclass(frozen=True)
class DemoFile:
    """A file to convert and what its first episodes say."""

    path: Path
    kind: ViewKind
    evidence: str
    size_bytes: int
    modified_ns: int


class Decoders(Protocol):
    """Who decodes the parts of files and writes them down, by the end of its context."""

    def decode(self, number: int, file: DemoFile, part: PicklePart, on_error: str) -> None:
        """Have one part decoded, now or later."""


def convert_files(
    files: Sequence[Path],
    folder: Path,
    options: ConvertOptions,
    origin: Mapping[str, Any] | None = None,
    decoders: Callable[[StoreBuilder], AbstractContextManager[Decoders]] | None = None,
) -> Converted:
    """Convert demo files, in the order of their shard numbers, into one store.

    folder     where stores lie
    origin     what else the store shall say of its source, JSON values (an address)
    decoders   who decodes instead of processes of this machine: see `cluster`

    PickleError, ManifestError, StoreError, or DemotoolsError for the operating system
    """
    paths = sorted(files, key=_shard_number)
    for path in paths:
        if not path.is_file():  # before its name is asked for a level
            raise PickleError(
                "this is a folder" if path.is_dir() else "there is no such file",
                path=path,
                fix="name a demo file, or `demotools fetch LEVEL` to download one",
            )
    level, split = _level_and_split(paths, options)
    manifest = read_manifest(level)
    name = options.name or (manifest.level if split == "train" else f"{manifest.level}-{split}")
    described = [_described(path, options) for path in paths]
    if len({file.kind.shape for file in described}) > 1:
        raise PickleError(
            "the files hold different kinds of view",
            path=", ".join(path.name for path in paths),
            fix="convert them one by one, each with its own --name",
        )
    job = {
        "files": [
            [file.path.name, file.size_bytes, file.modified_ns, str(file.kind)]
            for file in described
        ],
        "on_error": options.on_error,
        "salvage": options.salvage,
    }
    builder = StoreBuilder(new_store_path(name, folder), job, overwrite=options.overwrite)
    with builder:
        try:
            workers = options.workers or processor_count()
            decoding = decoders(builder) if decoders else _Decoders(workers, builder.parts)
            source = {**_convert(described, builder, options, decoding), **(origin or {})}
            path = builder.finish(
                level=manifest.level,
                split=split,
                environment_id=manifest.environment_id,
                licence=manifest.licence,
                citation=manifest.citation,
                source=source,
            )
        except PickleError:
            builder.discard()
            raise
    about = read_attributes(path)
    return Converted(path, about.episodes, about.steps, about.missions, source)


def _level_and_split(paths: Sequence[Path], options: ConvertOptions) -> tuple[str, str]:
    """The level and split that all file names agree on, unless the options say them.

    PickleError  the names disagree
    """
    found = [guessed_level_and_split(path.name) for path in paths]
    levels, splits = ({pair[side] for pair in found} for side in (0, 1))
    for option, names, what in ((options.level, levels, "level"), (options.split, splits, "split")):
        if option is None and len(names) > 1:
            raise PickleError(
                f"the file names disagree on the {what}: {', '.join(sorted(names))}",
                path=", ".join(path.name for path in paths),
                fix=f"convert them one by one, or say it with --{what}",
            )
    level = level_from_environment_id(options.level or levels.pop())
    return level, options.split or splits.pop()


def guessed_level_and_split(name: str) -> tuple[str, str]:
    """What a file name of BabyAI's scripts says; a name without a tag is a training file.

    >>> guessed_level_and_split("BabyAI-GoToLocal-v0_agent_valid_shard3.pkl")
    ('GoToLocal', 'valid')
    """
    found = _STEM.fullmatch(name)
    if found is None:
        return level_from_environment_id(name.removesuffix(".pkl")), "train"
    split = "valid" if "_valid" in found["tags"].lower() else "train"
    return level_from_environment_id(found["level"]), split


def _shard_number(path: Path) -> tuple[int, str]:
    found = re.search(r"_shard(\d+)", path.name)
    return (int(found[1]), "") if found else (0, "")


def _described(path: Path, options: ConvertOptions) -> DemoFile:
    """What the first episodes of a file say: their shape, and the encoding unless it is given."""
    try:
        status = path.stat()
        kind, evidence = _view_kind(path, options)
    except OSError as error:
        raise from_os_error(error, path) from error
    return DemoFile(path, kind, evidence, status.st_size, status.st_mtime_ns)


def _view_kind(path: Path, options: ConvertOptions) -> tuple[ViewKind, str]:
    evidence, shape = Evidence(), None
    skipped: list[tuple[int, str]] = []
    for part in PickleReader(path, salvage=options.salvage, part_steps=_EVIDENCE_STEPS):
        for place, data, found in part_images(path, part, skipped):
            shape = shape or found
            if shape != CELL_VIEW or options.encoding == "image":
                return ViewKind(shape, None), ""
            if options.encoding is not None:
                return ViewKind(shape, options.encoding), ""
            if found == CELL_VIEW:
                images = np.frombuffer(data, np.uint8).reshape(-1, *found)
                evidence.add(images, part.mission[place], part.action[place][-1])
            if evidence.episodes % _EVIDENCE_EPISODES == 0 and evidence.encoding is not None:
                return ViewKind(shape, evidence.encoding), str(evidence)
        skipped += part.skipped
        if skipped and options.on_error == "stop":
            raise _not_well_formed(path, skipped)
    if shape is None:
        raise _not_well_formed(path, skipped)
    if evidence.encoding is None:
        raise PickleError(
            f"the data does not tell its object encoding: {evidence}",
            path=path,
            fix=f"say it with --encoding, one of {', '.join(Encoding)}, by the day the file was "
            "made; or image, to store the views as they are",
        )
    return ViewKind(shape, evidence.encoding), str(evidence)


def _convert(
    files: Sequence[DemoFile],
    builder: StoreBuilder,
    options: ConvertOptions,
    decoding: AbstractContextManager[Decoders],
) -> dict[str, Any]:
    """Write the parts that are missing; gives what the store says of its source."""
    finished = set(builder.finished_parts())
    bar = tqdm(
        total=sum(file.size_bytes for file in files),
        desc=builder.path.name,
        unit="B",
        unit_scale=True,
        disable=True if options.quiet else None,
    )
    sources = []
    number = 0
    with bar, decoding as decoders:
        for file in files:
            reader = PickleReader(file.path, salvage=options.salvage)
            first, before = number, bar.n
            for part in reader:
                if number not in finished:
                    decoders.decode(number, file, part, options.on_error)
                number += 1
                bar.update(before + reader.position - bar.n)
            sources.append(_source_of(file, reader, range(first, number)))
    for source in sources:
        parts = source.pop("parts")
        skipped = [pair for part in parts for pair in read_notes(builder.parts, part)["skipped"]]
        source["skipped"] = skipped
    return {"kind": "pickle", "files": sources}


def _source_of(file: DemoFile, reader: PickleReader, parts: range) -> dict[str, Any]:
    return {
        "name": file.path.name,
        "size_bytes": reader.position,
        "sha256": reader.sha256,
        "encoding": file.kind.encoding or "image",
        "evidence": file.evidence,
        "episodes": reader.episodes,
        "broken_at": reader.broken_at,
        "parts": parts,
    }


def decode_part(folder: Path, number: int, file: DemoFile, part: PicklePart, on_error: str) -> None:
    """Decode one part and write it down; runs in any process."""
    episodes, skipped = decoded_part(file.path, part, file.kind)
    if skipped and on_error == "stop":
        raise _not_well_formed(file.path, skipped)
    write_part(folder, number, episodes, {"skipped": skipped})


def _not_well_formed(path: Path, skipped: list[tuple[int, str]]) -> PickleError:
    episode, reason = min(skipped)
    return PickleError(
        f"episode {episode} is not well formed: {reason}",
        path=path,
        fix="get the file again, or leave such episodes out with --on-error skip",
    )


class _Decoders:
    """This process and `workers - 1` helpers, which decode parts and write them down.

    This process decodes too, whenever the helpers have enough to do.
    """

    def __init__(self, workers: int, folder: Path) -> None:
        self._folder = folder
        self._room = _TASKS_A_HELPER * (workers - 1)
        self._under_way: set[Future[None]] = set()
        self._executor = _helpers(workers - 1) if workers > 1 else None

    def decode(self, number: int, file: DemoFile, part: PicklePart, on_error: str) -> None:
        """Have a part decoded: by a helper that has room, else here and now."""
        task = (self._folder, number, file, part, on_error)
        self._collect({future for future in self._under_way if future.done()})
        if self._executor is not None and len(self._under_way) < self._room:
            with warnings.catch_warnings():
                # the helpers are forked: see _helpers
                warnings.simplefilter("ignore", DeprecationWarning)
                self._under_way.add(self._executor.submit(decode_part, *task))
        else:
            decode_part(*task)

    def _collect(self, done: set[Future[None]]) -> None:
        self._under_way -= done
        try:
            for future in done:
                future.result()
        except BrokenProcessPool as error:
            raise DemotoolsError(
                "a helper process died: killed from outside, or out of memory",
                path=self._folder,
                fix="run the command again, it goes on where it was; --workers 1 needs less memory",
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._executor is None:
            return
        try:
            if kind is None:
                import_module("demotools.joining")  # needed next, and slow: while helpers finish
                self._collect(set(self._under_way))
        finally:
            self._executor.shutdown(cancel_futures=True)


def _helpers(count: int) -> ProcessPoolExecutor:
    # A forked helper shares the modules that are imported here: it starts in milliseconds and
    # costs hardly any memory; the helpers use none of the threads that a fork leaves behind.
    method = "fork" if sys.platform == "linux" else "spawn"
    return ProcessPoolExecutor(count, get_context(method), initializer=_end_with_parent)


def _end_with_parent() -> None:
    """Leave Ctrl-C to the main process, and end when it ends, however it ends."""
    signal(SIGINT, SIG_IGN)
    parent = parent_process()

    def wait_and_exit() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=wait_and_exit, daemon=True).start()
