"""Convert legacy pickles into one demo store: safely, in bounded memory, on several cores.

One process reads the file and cuts it into parts that depend on the file alone; this process and
its helpers decode the parts; the writer joins them. A killed conversion finds the
parts again that it had written.

Who decodes the parts of demo files: this process and its helpers, in any order.

A part that is decoded before the number of steps is known, and the chunks with it, is written
down; a killed conversion finds it again. The last parts, which for small files are all parts, are
decoded only while the store is written, and go straight into it.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from demotools.babyai.cells import Encoding
from demotools.babyai.levels import SEEDS, Manifest, level_from_environment_id, read_manifest
from demotools.errors import PickleError, StoreError, printable_text
from demotools.pickles.encoding import (
    DemoFile,
    OnError,
    described_file,
    guessed_level_and_split,
    in_shard_order,
    not_well_formed,
)
from demotools.pickles.episodes import PicklePart
from demotools.pickles.images import decoded_part
from demotools.pickles.reader import PickleReader, unpacked
from demotools.store.building import LateParts, StoreBuilder, read_notes, read_part, write_part
from demotools.store.reading import Episodes, new_store_path, read_attributes
from demotools.workers.cluster import (
    Delivered,
    Errand,
    Submit,
    adopting,
    cluster_workers,
    delivered,
    refused,
)
from demotools.workers.processes import bounded_workers, helped, processor_count

_PARTS_A_SLOT = 3


def decode_errand(
    errand: Errand, number: int, file: DemoFile, part: PicklePart, on_error: OnError
) -> Delivered:
    """Decode one part of a file; runs on a worker.

    DemotoolsError  see `refusal`; or the worker does not see the file
    """

    def decode(folder: Path) -> int:
        if not file.content.is_file() or file.content.stat().st_size != file.content_bytes:
            raise refused({socket.gethostname(): f"it does not see the file {file.content}"})
        decode_part(folder, number, file, part, on_error)
        return len(part.number)

    return delivered(errand, number, decode)


def cluster_decoders(
    address: str, *, return_parts: bool = False
) -> Callable[[StoreBuilder], AbstractContextManager[ClusterDecoders]]:
    """What `convert_files` takes as its decoders: as `cluster_players`.

    The files themselves must lie where every worker sees them under the same name.
    """

    @contextmanager
    def decoders(builder: StoreBuilder) -> Iterator[ClusterDecoders]:
        with cluster_workers(address, builder, return_parts) as (submit, slots):
            yield ClusterDecoders(submit, builder.parts, slots)

    return decoders


class ClusterDecoders:
    """Workers that decode the parts of files; a few parts wait for each of them."""

    def __init__(self, submit: Submit, parts: Path, slots: int) -> None:
        self._submit = submit
        self._parts = parts
        self._room = _PARTS_A_SLOT * slots
        self._under_way: set[Future[int]] = set()

    def decode(self, number: int, file: DemoFile, part: PicklePart, on_error: OnError) -> None:
        """Have a part decoded, once there is room for it."""
        while len(self._under_way) >= self._room:
            self._collect(FIRST_COMPLETED)
        absolute = replace(file, content=file.content.absolute())
        task = self._submit(decode_errand, number, absolute, part, on_error)
        self._under_way.add(adopting(task, self._parts))

    def finish(self) -> None:
        """Wait for all parts."""
        self._collect(ALL_COMPLETED)

    def _collect(self, when: str) -> None:
        done, self._under_way = wait(self._under_way, return_when=when)
        for future in done:
            future.result()


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
    on_error: OnError = "stop"
    salvage: bool = False
    overwrite: bool = False
    quiet: bool = False

    def local_decoders(self, builder: StoreBuilder) -> AbstractContextManager[Decoders]:
        """Processes of this machine that decode."""
        workers = bounded_workers(self.workers or processor_count())
        return local_decoders(workers, builder.parts, late=self.on_error == "stop")


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
            f"converted {printable_text(self.path)}: {self.episodes:,} episodes, "
            f"{self.steps:,} steps, {self.missions:,} missions"
        ]
        for file in self.source["files"]:
            lines.append(
                f"  {printable_text(file['name'])}: object encoding {_PERIODS[file['encoding']]}"
            )
            lines += [
                f"  left out of {number:,} episodes: {what}"
                for what, number in file["left_out"].items()
            ]
            if file["skipped"]:
                number, reason = file["skipped"][0]
                lines.append(
                    f"  left out {len(file['skipped']):,} episodes, the first, {number}: "
                    f"{printable_text(reason)}"
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
    paths = in_shard_order(files)
    level, split = _level_and_split(paths, options)
    manifest = read_manifest(level)
    name = options.name or (manifest.level if split == "train" else f"{manifest.level}-{split}")
    store = new_store_path(name, folder)
    with unpacked(paths, store, salvage=options.salvage) as contents:
        described = [
            described_file(
                path,
                content,
                encoding=options.encoding,
                on_error=options.on_error,
                salvage=options.salvage,
            )
            for path, content in zip(paths, contents, strict=True)
        ]
        source = _converted(described, store, manifest, split, options, origin, decoders)
    about = read_attributes(store)
    return Converted(store, about.episodes, about.steps, about.missions, source)


def _converted(
    described: Sequence[DemoFile],
    store: Path,
    manifest: Manifest,
    split: str,
    options: ConvertOptions,
    origin: Mapping[str, Any] | None,
    decoders: Callable[[StoreBuilder], AbstractContextManager[Decoders]] | None,
) -> dict[str, Any]:
    """Make the store; what it says of its source."""
    paths = [file.path for file in described]
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
    builder = StoreBuilder(store, job, overwrite=options.overwrite)
    with builder:
        try:
            with (decoders or options.local_decoders)(builder) as decoding:
                source, late = _read(described, builder, options, decoding, split)
                source |= origin or {}
                builder.finish(
                    level=manifest.level,
                    split=split,
                    environment_id=manifest.environment_id,
                    licence=manifest.licence,
                    citation=manifest.citation,
                    source=source,
                    late=late,
                )
        except (PickleError, StoreError) as error:
            builder.discard()
            if isinstance(error, StoreError):  # it names a folder that has just been removed
                error.path = ", ".join(map(str, paths))
            raise
    return source


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
                fix=f"convert them one by one, or give it with --{what}",
            )
    level = level_from_environment_id(options.level or levels.pop())
    return level, options.split or splits.pop()


def _read(
    files: Sequence[DemoFile],
    builder: StoreBuilder,
    options: ConvertOptions,
    decoders: Decoders,
    split: str,
) -> tuple[dict[str, Any], LateParts | None]:
    """Have the missing parts decoded: what the store says of its source, and the late parts."""
    finished = set(builder.finished_parts())
    bar = tqdm(
        total=sum(file.content_bytes for file in files),
        desc=builder.path.name,
        unit="B",
        unit_scale=True,
        disable=True if options.quiet else None,
    )
    readers, parts, number = [], [], 0
    seeds = _Seeds(split)
    with bar:
        for file in files:
            reader = PickleReader(file.content, salvage=options.salvage)
            first, before = number, bar.n
            for part in reader:
                seeds.check(file, reader, part)
                if number not in finished:
                    decoders.decode(number, file, part, options.on_error)
                number += 1
                bar.update(before + reader.position - bar.n)
            readers.append(reader)
            parts.append(range(first, number))
    sources = [_source_of(*each) for each in zip(files, readers, strict=True)]
    late = decoders.finish()
    for source, numbers in zip(sources, parts, strict=True):
        # where no episode may be left out, none was
        noted = numbers if options.on_error == "skip" else ()
        source["skipped"] = [
            pair for part in noted for pair in read_notes(builder.parts, part)["skipped"]
        ]
    return {"kind": "pickle", "files": sources}, late


class _Seeds:
    """Takes care that no seed of another split, and none twice, gets into a store."""

    def __init__(self, split: str) -> None:
        self._split = split
        self._allowed = SEEDS["valid" if split == "valid" else "train"]
        self._seen: set[int] = set()

    def check(self, file: DemoFile, reader: PickleReader, part: PicklePart) -> None:
        """Drop the seeds of a part that repeat; PickleError where one is of another split."""
        for place, seed in list(part.seed.items()):
            if not file.seeded or seed in self._seen:
                del part.seed[place]
                reader.left_out["a seed that is not the only one of its number"] += 1
            elif seed not in self._allowed:
                raise PickleError(
                    f"episode {part.number[place]} has the seed {seed}, which is not one of the "
                    f"{self._split} split: {self._allowed.start:,} to {self._allowed.stop - 1:,}",
                    path=file.path,
                    fix="use the other one with --split; seeds beyond both are kept for evaluation",
                )
            self._seen.add(seed)


def _source_of(file: DemoFile, reader: PickleReader) -> dict[str, Any]:
    left_out = dict(reader.left_out)
    if file.kind.one_more:
        left_out["the observation after the last action"] = reader.episodes
    return {
        "name": file.path.name,
        "size_bytes": file.size_bytes,
        "sha256": file.sha256 or reader.sha256,
        "encoding": file.kind.encoding or "image",
        "evidence": file.evidence,
        "episodes": reader.episodes,
        "broken_at": reader.broken_at,
        "left_out": left_out,
    }


_TASKS_A_HELPER = 2
# Waiting parts cost a reader's memory, some 300 bytes an episode, and are lost in a kill.
_PARTS_TO_WAIT = 32
_EPISODES_TO_WAIT = 1 << 17
_PARTS_READY = 4


class Decoders(Protocol):
    """Who decodes the parts of files."""

    def decode(self, number: int, file: DemoFile, part: PicklePart, on_error: OnError) -> None:
        """Have one part decoded, now or later."""

    def finish(self) -> LateParts | None:
        """The parts that are not written down; all others are."""


def decode_part(
    folder: Path, number: int, file: DemoFile, part: PicklePart, on_error: OnError
) -> None:
    """Decode one part and write it down; runs in any process."""
    episodes, skipped = decoded_part(file.content, part, file.kind)
    if skipped and on_error == "stop":
        raise not_well_formed(file.path, skipped)
    write_part(folder, number, episodes, {"skipped": skipped})


class _Task(NamedTuple):
    number: int
    file: DemoFile
    part: PicklePart
    on_error: OnError


@contextmanager
def local_decoders(workers: int, folder: Path, *, late: bool) -> Iterator[Decoders]:
    """This process and `workers - 1` helpers, for parts that are written into `folder`.

    late   whether parts may wait until the store is written: their episodes must be those that
           the reader counted, so only where none is left out

    DemotoolsError  a helper died
    """
    _keep_freed_memory()
    if workers == 1:
        yield _LocalDecoders(folder, late=late)
        return
    with helped(decode_part, workers - 1, folder, forked=True) as begin:
        yield _LocalDecoders(folder, begin, _TASKS_A_HELPER * (workers - 1), late=late)


def _keep_freed_memory() -> None:
    """Have memory of up to 16 MiB that is freed used again, here and in helpers forked later.

    glibc gives larger blocks back to the system at once, unless one of their size was freed
    before; and fresh pages cost more than what is done with them.
    """
    np.empty(1 << 24, np.uint8)


class _LocalDecoders:
    """Decodes here whatever the helpers have no room for.

    lengths   part -> steps of its episodes, of the parts that were not written down by the end
    """

    def __init__(
        self,
        folder: Path,
        begin: Callable[..., Future[None]] | None = None,
        room: int = 0,
        *,
        late: bool,
    ) -> None:
        self.lengths: dict[int, NDArray[np.int64]] = {}
        self._folder = folder
        self._begin = begin
        self._room = room
        self._late = late
        self._waiting: deque[_Task] = deque()
        self._under_way: dict[int, tuple[_Task, Future[None]]] = {}
        self._ready: dict[int, Episodes] = {}

    def decode(self, number: int, file: DemoFile, part: PicklePart, on_error: OnError) -> None:
        """Give a part to a helper that has room; else it waits, or an earlier one is decoded."""
        self._waiting.append(_Task(number, file, part, on_error))
        self._collect()
        self._hand_on()
        while self._waiting and (not self._late or self._too_many_wait()):
            decode_part(self._folder, *self._waiting.popleft())

    def finish(self) -> LateParts:
        """Itself: the parts that wait, or that helpers have."""
        if not self._late:
            for _task, future in self._under_way.values():
                future.result()
            return self
        for task in [*self._waiting, *(task for task, _future in self._under_way.values())]:
            self.lengths[task.number] = np.array([len(each) for each in task.part.action])
        return self

    def take(self, number: int) -> Episodes:
        """A part of `lengths`, in their order; decodes others while a helper has this one."""
        self._hand_on()
        while number in self._under_way:
            _task, future = self._under_way[number]
            if future.done() or not self._waiting or len(self._ready) >= _PARTS_READY:
                future.result()
                del self._under_way[number]
                return read_part(self._folder, number)
            self._decode_here()
            self._hand_on()
        if number not in self._ready:
            self._decode_here()
        return self._ready.pop(number)

    def _decode_here(self) -> None:
        task = self._waiting.popleft()
        episodes, skipped = decoded_part(task.file.content, task.part, task.file.kind)
        if skipped:
            raise not_well_formed(task.file.path, skipped)
        self._ready[task.number] = episodes

    def _collect(self) -> None:
        for number, (_task, future) in list(self._under_way.items()):
            if future.done():
                future.result()
                del self._under_way[number]

    def _hand_on(self) -> None:
        """Give helpers that have room the parts that wait longest."""
        while self._begin is not None and self._waiting and self._busy() < self._room:
            task = self._waiting.popleft()
            self._under_way[task.number] = (task, self._begin(self._folder, *task))

    def _busy(self) -> int:
        return sum(not future.done() for _task, future in self._under_way.values())

    def _too_many_wait(self) -> bool:
        episodes = sum(len(task.part.number) for task in self._waiting)
        return len(self._waiting) > _PARTS_TO_WAIT or episodes > _EPISODES_TO_WAIT
