"""Convert legacy pickles to one demo store: safely, in bounded memory, on several cores.

This process reads the files and cuts them into parts, which depend only on the files; workers
decode and write the parts; then the parts are joined. A killed conversion resumes from the parts
that were written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from demotools.babyai.cells import Encoding
from demotools.babyai.levels import (
    SEEDS,
    Manifest,
    guessed_manifest,
    level_from_environment_id,
    read_manifest,
    store_name,
)
from demotools.errors import PickleError, StoreError, printable_text
from demotools.output import counted, progress_bar
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
from demotools.store.building import StoreBuilder, read_notes, write_part
from demotools.store.format import read_attributes
from demotools.store.reading import new_store_path
from demotools.workers.processes import bounded_workers, opened_workers, processor_count

# Less than a part of a file takes: where there is one part, a second process has nothing to do.
_PART_FILE_BYTES = 1 << 21


@dataclass(frozen=True)
class ConvertOptions:
    """What the user asks for; None means: found in the file.

    encoding   a value of `Encoding`; "auto": found in the file; "image": the views as they are
    on_error   "skip" leaves out episodes that are not well formed, "stop" refuses the file
    salvage    take what is whole of a file that was cut short
    workers    processes; None means one for every processor
    dask       the address of a Dask scheduler, whose workers do the work instead
    """

    level: str | None = None
    split: str | None = None
    encoding: str = "auto"
    name: str | None = None
    workers: int | None = None
    dask: str | None = None
    on_error: OnError = "stop"
    salvage: bool = False
    overwrite: bool = False
    quiet: bool = False


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
            f"converted {printable_text(self.path)}: {counted(self.episodes, 'episode')}, "
            f"{counted(self.steps, 'step')}, {counted(self.missions, 'mission')}"
        ]
        for file in self.source["files"]:
            lines.append(
                f"  {printable_text(file['name'])}: object encoding {_PERIODS[file['encoding']]}"
            )
            lines += [
                f"  left out of {counted(number, 'episode')}: {what}"
                for what, number in file["left_out"].items()
            ]
            if file["skipped"]:
                number, reason = file["skipped"][0]
                lines.append(
                    f"  left out {counted(len(file['skipped']), 'episode')}, the first, {number}: "
                    f"{printable_text(reason)}"
                )
            if file["broken_at"] is not None:
                lines.append(
                    f"  the file is cut short at byte {file['broken_at']:,}, after "
                    f"{file['episodes']:,} intact episodes"
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
) -> Converted:
    """Convert demo files, in the order of their shard numbers, into one store.

    folder     where stores lie
    origin     what else the store shall say of its source, JSON values (an address)

    PickleError, ManifestError, StoreError, or DemotoolsError for the operating system
    """
    paths = in_shard_order(files)
    level, split = _level_and_split(paths, options)
    if options.level is None:
        manifest = guessed_manifest(level, paths[0], "the file's name")
    else:
        manifest = read_manifest(level)
    store = new_store_path(options.name or store_name(manifest.level, split), folder)
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
        source = _converted(described, store, manifest, split, options, origin)
    about = read_attributes(store)
    return Converted(store, about.episodes, about.steps, about.missions, source)


def _converted(
    described: Sequence[DemoFile],
    store: Path,
    manifest: Manifest,
    split: str,
    options: ConvertOptions,
    origin: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Make the store; what it says of its source."""
    paths = [file.path for file in described]
    if len({file.kind.shape for file in described}) > 1:
        raise PickleError(
            "the files have different kinds of views",
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
            source = {"kind": "pickle", "files": _decoded(described, builder, options, split)}
            source |= origin or {}
            builder.finish(**manifest.store_attributes(split=split), source=source)
        except StoreError as error:  # it names a folder that is removed now
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


def _decoded(
    files: Sequence[DemoFile], builder: StoreBuilder, options: ConvertOptions, split: str
) -> list[dict[str, Any]]:
    """Have the missing parts decoded and written down: what the store says of each file."""
    finished = set(builder.finished_parts())
    total = sum(file.content.stat().st_size for file in files)
    count = bounded_workers(options.workers or processor_count(), -(-total // _PART_FILE_BYTES))
    bar = progress_bar(total, builder.path.name, "B", quiet=options.quiet)
    readers, parts, number = [], [], 0
    seeds = _Seeds(split)
    _keep_freed_memory()
    pool = opened_workers(count, builder.parts, dask=options.dask, forked=True)
    with bar, pool as workers:
        under_way: set[Future[None]] = set()
        for file in files:
            reader = PickleReader(file.content, salvage=options.salvage)
            there = replace(file, content=file.content.absolute())  # for workers elsewhere
            first, before = number, bar.n
            for part in reader:
                seeds.check(file, reader, part)
                if number not in finished:
                    if len(under_way) >= workers.at_once:
                        done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                        for future in done:
                            future.result()
                    task = (number, there, part, options.on_error)
                    under_way.add(workers.submit(decode_part, *task))
                number += 1
                bar.update(before + reader.position - bar.n)
            readers.append(reader)
            parts.append(range(first, number))
        for future in under_way:
            future.result()
    sources = [_source_of(*each) for each in zip(files, readers, strict=True)]
    for source, numbers in zip(sources, parts, strict=True):
        # where no episode may be left out, none was
        noted = numbers if options.on_error == "skip" else ()
        source["skipped"] = [
            pair for part in noted for pair in read_notes(builder.parts, part)["skipped"]
        ]
    return sources


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
                reader.left_out["the seed, because seeds repeat"] += 1
            elif seed not in self._allowed:
                raise PickleError(
                    f"episode {part.number[place]} has seed {seed}, which does not belong to the "
                    f"{self._split} split: {self._allowed.start:,} to {self._allowed.stop - 1:,}",
                    path=file.path,
                    fix="name the other split with --split; seeds beyond both are for evaluation",
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


def decode_part(
    folder: Path, number: int, file: DemoFile, part: PicklePart, on_error: OnError
) -> None:
    """Decode one part and write it down; runs in any process."""
    episodes, skipped = decoded_part(file.content, part, file.kind)
    if skipped and on_error == "stop":
        raise not_well_formed(file.path, skipped)
    write_part(folder, number, episodes, {"skipped": skipped})


def _keep_freed_memory() -> None:
    """Have memory of up to 16 MiB that is freed used again, here and in processes forked later.

    glibc gives larger blocks back to the system at once, unless one of their size was freed
    before; and fresh pages cost more than what is done with them.
    """
    np.empty(1 << 24, np.uint8)
