"""Parquet files in the schema of the JAT data set: read into a store, and written from one.

One row an episode, four columns, whatever the width of their integers:

text_observations      list of text, the mission at every step
discrete_observations  list of 148 integers: the direction, then the 7 x 7 x 3 view in C order
discrete_actions       list of integers
rewards                list of floats; the last of a success is over 0

There are no seeds. A file is read in batches of rows whose steps take bounded memory, whatever the
size of its row groups. Rows that are not demonstrations (failed or damaged) are left out and
counted by reason.

Source: huggingface/jat, and how `datasets` writes lists.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from demotools.babyai.cells import (
    ACTIONS,
    LAST_VALUES,
    VIEW_SIZE,
    Encoding,
    fits_cells,
    packed_cells,
    shows_agent,
    unpacked_cells,
)
from demotools.babyai.levels import Manifest, Split, level_of_configuration, manifest_of_data
from demotools.babyai.vocabulary import mission_words
from demotools.errors import (
    SettingsError,
    StoreError,
    optional_package,
    printable_text,
)
from demotools.exchange.export import (
    ATTRIBUTES_KEY,
    SUCCESS_REWARD,
    Exported,
    KeptAttributes,
    store_batches,
    what_it_lacks,
)
from demotools.exchange.minari_import import Imported
from demotools.output import check_output, open_regular, progress_bar, written_whole
from demotools.pickles.encoding import Evidence
from demotools.store.building import StoreBuilder, write_part
from demotools.store.reading import Episodes, Store

SUFFIX = ".parquet"
_TEXTS, _VIEWS, _ACTIONS, _REWARDS = COLUMNS = (
    *("text_observations", "discrete_observations", "discrete_actions", "rewards"),
)
_NUMBERS = 1 + VIEW_SIZE * VIEW_SIZE * 3
# 148 integers of eight bytes a step, and as much again while they are unpacked
_STEPS_A_BATCH = 1 << 13
_EVIDENCE_EPISODES = 256
_BLOCK_BYTES = 1 << 20
_SHARD = re.compile(r"(train|test|valid|validation)-(\d+)-of-(\d+).*\.parquet")
# in place of the number of a mission
_NO_TEXT, _FOREIGN = -1, -2
FAILURE = "not solved: the last reward is not above 0"
_SPLITS: dict[str, Split] = {"test": "valid", "validation": "valid"}
_BROKEN = "get the file again"


@dataclass(frozen=True)
class ParquetFiles:
    """The files of one split, in the order of their shards, and what a store says of them.

    sha256      of each file
    ours        what `demotools export` keeps of a store's attributes, None for others' files
    origin      what else the store shall say of its source, JSON values
    """

    paths: tuple[Path, ...]
    sha256: tuple[str, ...]
    level: str
    split: Split
    licence: str
    citation: str
    ours: KeptAttributes | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)


def pyarrow_package() -> Any:
    """The package `pyarrow`; DemotoolsError where it is not installed."""
    return optional_package("pyarrow", "hf", "parquet", "compute", "types")


def sha256_of(path: Path) -> str:
    """The sha256 of a regular file."""
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def shard_of(name: str) -> tuple[Split, int, int] | None:
    """Split, number and count of shards that a file's name says; None where it says none.

    >>> shard_of("test-00000-of-00002-0a1b.parquet"), shard_of("demos.parquet")
    (('valid', 0, 2), None)
    """
    found = _SHARD.fullmatch(name)
    if found is None:
        return None
    return _SPLITS.get(found[1], "train"), int(found[2]), int(found[3])


def opened_parquet(
    path: Path, *, level: str | None = None, split: Split | None = None
) -> ParquetFiles:
    """A parquet file, or the folder of the shards of one split, to be imported.

    level, split   None means: what our export keeps in the file, else what the names say

    SettingsError   they say no level, or the folder has several splits
    StoreError      there is no such file, a shard is missing, or it is no parquet file
    DemotoolsError  pyarrow is not installed, a file that is no regular one
    """
    paths = _shards(path, split) if path.is_dir() else (path,)
    for each in paths:
        open_regular(each).close()
    ours = _kept(paths[0])
    level = level or (ours and ours.one_level(path)) or level_in_name(path.absolute())
    if level is None:
        raise SettingsError(
            "neither the file nor its name gives the level", path=path, fix="add --level"
        )
    named = shard_of(paths[0].name)
    manifest = manifest_of_data(level)
    return ParquetFiles(
        paths,
        tuple(map(sha256_of, paths)),
        manifest.level,
        split or (ours.split if ours else named[0] if named else "train"),
        licence=ours.licence if ours else f"see {path.name}",
        citation=ours.citation if ours else f"{path.name}, a parquet file",
        ours=ours,
    )


def level_in_name(path: Path) -> str | None:
    """The level that the last two parts of a path name, as we or JAT spell it; or None.

    >>> level_in_name(Path("data/babyai-go-to-local/train-00000-of-00002.parquet"))
    'GoToLocal'
    """
    names = (path.name.removesuffix(SUFFIX), path.parent.name)
    return next(filter(None, map(level_of_configuration, names)), None)


def _shards(folder: Path, split: Split | None) -> tuple[Path, ...]:
    found = {file: shard_of(file.name) for file in sorted(folder.glob(f"*{SUFFIX}"))}
    splits = {shard[0] for shard in found.values() if shard}
    if split is None and len(splits) > 1:
        raise SettingsError(
            "the folder has files of several splits", path=folder, fix="choose one with --split"
        )
    chosen = [file for file, shard in found.items() if not shard or split in (None, shard[0])]
    if not chosen:
        raise StoreError(
            f"the folder has no parquet file{f' of the {split} split' if split else ''}",
            path=folder,
            fix="name the folder that has them, or another --split",
        )
    check_shards([file.name for file in chosen], folder)
    return tuple(chosen)


def check_shards(names: Sequence[str], where: Path | str) -> None:
    """StoreError where the shards that the names announce are not there, each once."""
    shards = [shard for name in names if (shard := shard_of(name))]
    counts = {count for _split, _number, count in shards}
    numbers = sorted(number for _split, number, _count in shards)
    if shards and (len(counts) > 1 or numbers != list(range(counts.pop()))):
        raise StoreError(
            f"the shards are incomplete, or from several sets: {', '.join(sorted(names)[:4])}",
            path=where,
            fix="use all files of one set, and no others",
        )


def _kept(path: Path) -> KeptAttributes | None:
    """What `demotools export` keeps of a store's attributes; None in others' files."""
    with _opened(path) as file:
        content = (file.schema_arrow.metadata or {}).get(ATTRIBUTES_KEY.encode())
    try:
        return None if content is None else KeptAttributes.model_validate_json(content)
    except ValidationError:
        return None


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A parquet file in the schema; what pyarrow raises on damaged data is a StoreError."""
    pyarrow = pyarrow_package()
    with open_regular(path) as stream:
        try:
            found = pyarrow.parquet.read_metadata(stream).schema
            leaves = [found.column(number).path for number in range(len(found))]
            file = pyarrow.parquet.ParquetFile(
                path,
                # a mission stands at every step: read once
                read_dictionary=[leaf for leaf in leaves if leaf.startswith(f"{_TEXTS}.")],
                buffer_size=_BLOCK_BYTES,
            )
        except (pyarrow.ArrowException, OSError) as error:
            raise _broken(f"this is not a parquet file: {_reason(error)}", path) from error
    with file:
        if problem := _schema_problem(file.schema_arrow):
            raise StoreError(problem, path=path, fix=f"name a file with {', '.join(COLUMNS)}")
        yield file


def _schema_problem(schema: Any) -> str:
    """Why this is not the schema of JAT, or nothing."""
    types = pyarrow_package().types
    if missing := [name for name in COLUMNS if schema.get_field_index(name) < 0]:
        return f"the parquet file has no column {', '.join(missing)}"
    right: dict[str, tuple[int, Callable[[Any], bool]]] = {
        _TEXTS: (1, lambda kind: types.is_dictionary(kind) or types.is_string(kind)),
        _VIEWS: (2, types.is_integer),
        _ACTIONS: (1, types.is_integer),
        _REWARDS: (1, types.is_floating),
    }
    for name, (depth, is_right) in right.items():
        kind = whole = schema.field(name).type
        for _ in range(depth):
            if not (types.is_list(kind) or types.is_fixed_size_list(kind)):
                return f"the column {name} is {printable_text(whole, 100)}, no such list"
            kind = kind.value_type
        if not is_right(kind):
            return f"the column {name} is {printable_text(whole, 100)}, no such list"
    return ""


def _reason(error: Exception) -> str:
    return printable_text(" ".join(str(error).split()) or type(error).__name__, 200)


def _broken(what: str, path: Path | str) -> StoreError:
    return StoreError(what, path=path, fix=_BROKEN)


def import_parquet(
    files: ParquetFiles, store: Path, *, overwrite: bool = False, quiet: bool = False
) -> Imported:
    """Make a store of the successes in parquet files.

    StoreError  the store exists, a file is damaged, the views are of an older object encoding, or
                no episode can be kept
    """
    manifest = manifest_of_data(files.level)
    job = {"command": "import", "level": files.level, "split": files.split}
    reader = _Reader(manifest)
    with StoreBuilder(store, {**job, "files": files.sha256}, overwrite=overwrite) as builder:
        total = 0
        for path in files.paths:
            with _opened(path) as file:
                total += file.metadata.num_rows
        with progress_bar(total, store.stem, "episodes", quiet=quiet) as bar:
            number = 0
            for path in files.paths:
                for batch in _batches(path):
                    episodes = reader.episodes(batch, path)
                    bar.update(batch.num_rows)
                    if len(episodes.length):
                        write_part(builder.parts, number, episodes, {})
                        number += 1
        if not reader.kept:
            what = f"no episode can be kept: {', '.join(reader.left_out) or 'it is empty'}"
            raise StoreError(what, path=files.paths[0], fix="name another file, or another --level")
        builder.finish(
            **manifest.store_attributes(
                split=files.split, licence=files.licence, citation=files.citation
            ),
            source=_source(files, reader),
            parent=files.ours.parent if files.ours else None,
        )
    return Imported(store, reader.kept, dict(reader.left_out))


def _source(files: ParquetFiles, reader: _Reader) -> dict[str, Any]:
    names = [
        {"name": path.name, "size_bytes": path.stat().st_size, "sha256": sha256}
        for path, sha256 in zip(files.paths, files.sha256, strict=True)
    ]
    left_out = {"left_out": dict(sorted(reader.left_out.items()))} if reader.left_out else {}
    through = {"files": names, "evidence": str(reader.evidence), **left_out, **files.origin}
    if files.ours:
        return {**files.ours.source, "imported": through}
    return {"kind": "parquet", **through}


def _batches(path: Path) -> Iterator[Any]:
    """The rows of a file, so many at a time that their steps take a bounded memory."""
    pyarrow = pyarrow_package()
    with _opened(path) as file:
        about = file.metadata
        for group in range(file.num_row_groups):
            group_about = about.row_group(group)
            columns = map(group_about.column, range(group_about.num_columns))
            values = max((each.num_values for each in columns), default=0)
            steps = max(values // _NUMBERS, 1)
            rows = max(group_about.num_rows * _STEPS_A_BATCH // steps, 1)
            batches = file.iter_batches(rows, row_groups=[group], columns=list(COLUMNS))
            while True:
                try:
                    batch = next(batches, None)
                except (pyarrow.ArrowException, OSError) as error:
                    raise _broken(f"the parquet file is damaged: {_reason(error)}", path) from error
                if batch is None:
                    break
                yield batch


class _Reader:
    """Makes episodes of rows, and counts those that it leaves out."""

    def __init__(self, manifest: Manifest) -> None:
        self.kept = 0
        self.left_out: Counter[str] = Counter()
        self.evidence = Evidence()
        self._manifest = manifest
        # the same missions come in batch after batch
        self._kind = lru_cache(1 << 12)(self._kind_of)

    def episodes(self, batch: Any, path: Path) -> Episodes:
        """Of the rows that are demonstrations.

        StoreError  the views are of an older object encoding
        """
        lists = {name: _as_lists(batch.column(name)) for name in COLUMNS}
        good = self._good(_shape_problems(lists))
        if not good.any():
            return Episodes.none((VIEW_SIZE, VIEW_SIZE))
        if not good.all():
            mask = pyarrow_package().array(good)
            lists = {name: column.filter(mask) for name, column in lists.items()}
        length = np.diff(_offsets(lists[_ACTIONS]))
        first = np.cumsum(length) - length
        numbers = _values(_as_lists(lists[_VIEWS].flatten()))
        actions, rewards = _values(lists[_ACTIONS]), _values(lists[_REWARDS])
        missions, mission = self._missions(lists[_TEXTS].flatten(), length, first)
        ends = rewards[first + length - 1]
        # seen as unsigned, a negative number is a large one
        large = numbers.view(f"u{numbers.itemsize}")
        wide = large > 255 if large.max() > 255 else None
        numbers = numbers.astype(np.uint8).reshape(-1, _NUMBERS)
        view = np.ascontiguousarray(numbers[:, 1:]).reshape(-1, VIEW_SIZE, VIEW_SIZE, 3)
        direction = np.ascontiguousarray(numbers[:, 0])
        outside = np.zeros(len(view), bool) if wide is None else wide.reshape(-1, _NUMBERS).any(1)
        if not fits_cells(view):
            outside |= (view > LAST_VALUES).reshape(len(view), -1).any(1)
            view = np.minimum(view, LAST_VALUES)
        outside |= direction > 3
        cells = packed_cells(view)
        strange_action = (actions < 0) | (actions >= len(ACTIONS))

        def some(steps: NDArray[np.bool_]) -> NDArray[np.bool_]:
            return np.logical_or.reduceat(steps, first)

        good = self._good(
            {
                "a reward that is not a finite number": some(~np.isfinite(rewards)),
                FAILURE: ~(ends > 0),
                "a mission that changes, or has no words": mission == _NO_TEXT,
                f"a mission that {self._manifest.level} does not have": mission == _FOREIGN,
                "a view or a direction outside today's object encoding": some(outside),
                "views that show the agent, so they are of the whole room": some(
                    shows_agent(cells)
                ),
                "an action other than the seven of BabyAI": some(strange_action),
            }
        )
        chosen = np.flatnonzero(good)
        whole = Episodes(
            length.astype(np.int64),
            [missions[row] if row >= 0 else "" for row in mission.tolist()],
            np.full(len(length), -1, np.int64),
            cells,
            direction,
            actions.astype(np.uint8),
        )
        kept = whole if good.all() else whole.take(chosen)
        self._check_encoding(kept, path)
        self.kept += len(chosen)
        return kept

    def _good(self, problems: Mapping[str, NDArray[np.bool_]]) -> NDArray[np.bool_]:
        """Which rows have none of the problems; the others are counted by their first."""
        bad = np.zeros(len(next(iter(problems.values()))), bool)
        for reason, rows in problems.items():
            if count := int((rows & ~bad).sum()):
                self.left_out[reason] += count
            bad |= rows
        return ~bad

    def _missions(
        self, texts: Any, length: NDArray[np.int64], first: NDArray[np.int64]
    ) -> tuple[list[str], NDArray[np.int64]]:
        """The distinct missions, and the row of each episode; below 0 where there is none.

        texts   at every step
        """
        pyarrow = pyarrow_package()
        if not pyarrow.types.is_dictionary(texts.type):
            texts = texts.dictionary_encode()
        row = texts.indices.to_numpy(zero_copy_only=False)
        changes = np.logical_or.reduceat(row != np.repeat(row[first], length), first)
        begins = row[first]
        distinct = [""] * len(texts.dictionary)
        kinds = np.zeros(len(distinct), np.int64)
        for place in np.unique(begins).tolist():
            with suppress(UnicodeDecodeError):  # it stays a text without words
                distinct[place] = str(texts.dictionary[place].as_py())
            kinds[place] = self._kind(distinct[place])
        mission = np.where(kinds[begins] < 0, kinds[begins], begins)
        return distinct, np.where(changes, _NO_TEXT, mission)

    def _kind_of(self, text: str) -> int:
        """Below 0 where a text is no mission of the level."""
        if not text.isprintable() or not mission_words(text):
            return _NO_TEXT
        return 0 if self._manifest.matches_mission(text) else _FOREIGN

    def _check_encoding(self, episodes: Episodes, path: Path) -> None:
        """StoreError where the first episodes are no demonstrations in today's encoding."""
        if not (self._manifest.environment_id or "BabyAI-").startswith("BabyAI-"):
            return  # other levels show goals and lava too, and have had no other encoding
        offset = episodes.offset
        for row in range(min(len(episodes.mission), _EVIDENCE_EPISODES - self.evidence.episodes)):
            steps = slice(offset[row], offset[row + 1])
            images = unpacked_cells(episodes.view[steps])
            self.evidence.add(images, episodes.mission[row], int(episodes.action[steps][-1]))
        if not self.evidence.fits(Encoding.TODAY):
            raise StoreError(
                f"the views do not use today's object encoding: {self.evidence}",
                path=path,
                fix="name a file that was recorded with minigrid 2 or later",
            )


def _as_lists(column: Any) -> Any:
    """A column of lists, those of a fixed size too, as lists."""
    pyarrow = pyarrow_package()
    if pyarrow.types.is_fixed_size_list(column.type):
        return column.cast(pyarrow.list_(column.type.value_type))
    return column


def _offsets(lists: Any) -> NDArray[np.int64]:
    """Where each list begins in `flatten()`, then its length: int64 [N + 1]."""
    offsets = lists.offsets.to_numpy().astype(np.int64)
    return np.asarray(offsets - offsets[0])


def _values(lists: Any) -> NDArray[Any]:
    """The numbers in all lists, one list after another."""
    return np.asarray(lists.flatten().to_numpy(zero_copy_only=False))


def _shape_problems(lists: Mapping[str, Any]) -> dict[str, NDArray[np.bool_]]:
    """Which rows have no four columns of one length, with 148 numbers at each step."""
    offsets = {name: _offsets(column) for name, column in lists.items()}
    lengths = [np.diff(offset) for offset in offsets.values()]
    views = _as_lists(lists[_VIEWS].flatten())
    view_offsets = _offsets(views)

    def rows_of(places: NDArray[np.int64], name: str) -> NDArray[np.bool_]:
        rows = np.zeros(len(lengths[0]), bool)
        rows[np.searchsorted(offsets[name], places, "right") - 1] = True
        return rows

    empty = np.zeros(len(lengths[0]), bool)
    for name, column in lists.items():
        empty |= _nulls(column)
        empty |= rows_of(np.flatnonzero(_nulls(column.flatten())), name)
    numbers = np.flatnonzero(_nulls(views.flatten()))
    empty |= rows_of(np.searchsorted(view_offsets, numbers, "right") - 1, _VIEWS)
    wrong = np.flatnonzero(np.diff(view_offsets) != _NUMBERS)
    different = np.logical_or.reduce([length != lengths[0] for length in lengths])
    return {
        "a missing value": empty,
        "columns of different lengths": different,
        "no steps": lengths[0] == 0,
        f"a view that is not {_NUMBERS} numbers": rows_of(wrong, _VIEWS),
    }


def _nulls(array: Any) -> NDArray[np.bool_]:
    if not array.null_count:
        return np.zeros(len(array), bool)
    return np.asarray(array.is_null().to_numpy(zero_copy_only=False))


def export_parquet(
    store: Store, path: Path | None = None, *, overwrite: bool = False, quiet: bool = False
) -> Exported:
    """Write a store in the schema of JAT, which has no place for seeds.

    path   None means beside the store; in a folder the file is named as JAT names its shards, so
           that the `datasets` library finds the split

    StoreError      the views do not pack into cells: the schema is of minigrid's 7 x 7 x 3
    DemotoolsError  the file exists and `overwrite` is False, or it cannot be written
    """
    if not store.packed:
        raise StoreError(
            "the views are not minigrid's 7 x 7 cells, and the JAT schema supports no others",
            path=store.path,
            fix="export it with --to pickle or --to minari",
        )
    if path is None:
        path = store.path.with_name(store.name + SUFFIX)
    elif path.is_dir():
        path /= f"{'test' if store.attributes.split == 'valid' else 'train'}-00000-of-00001{SUFFIX}"
    check_output(path, overwrite=overwrite)
    pyarrow = pyarrow_package()
    about = KeptAttributes.of(store).model_dump_json().encode()
    schema = pyarrow.schema(_schema_fields(pyarrow), metadata={ATTRIBUTES_KEY: about})
    texts = pyarrow.array(store.mission_text, pyarrow.string())
    with (
        progress_bar(store.episodes, path.name, "episodes", quiet=quiet) as bar,
        written_whole(path) as stream,
        pyarrow.parquet.ParquetWriter(stream, schema) as writer,
    ):
        for batch in store_batches(store):
            writer.write_batch(_row_batch(pyarrow, schema, store, texts, batch))
            bar.update(len(batch))
    return Exported(path, store.episodes, path.stat().st_size, what_it_lacks(store, "reward"))


def _schema_fields(pyarrow: Any) -> list[tuple[str, Any]]:
    whole = pyarrow.list_(pyarrow.int64())
    return [
        (_TEXTS, pyarrow.list_(pyarrow.string())),
        (_VIEWS, pyarrow.list_(whole)),
        (_ACTIONS, whole),
        (_REWARDS, pyarrow.list_(pyarrow.float32())),
    ]


def _row_batch(pyarrow: Any, schema: Any, store: Store, texts: Any, batch: range) -> Any:
    offset = store.episode_offset[batch.start : batch.stop + 1]
    start, stop = int(offset[0]), int(offset[-1])
    steps, lists = stop - start, pyarrow.array(offset - start, pyarrow.int32())
    numbers = np.empty((steps, _NUMBERS), np.int64)
    numbers[:, 0] = store.direction.span(start, stop)
    numbers[:, 1:] = store.images(start, stop).reshape(steps, -1)
    sizes = pyarrow.array(np.arange(steps + 1) * _NUMBERS, pyarrow.int32())
    rewards = np.zeros(steps, np.float32)
    rewards[offset[1:] - start - 1] = SUCCESS_REWARD
    if "reward" in store.optional:
        rewards = store.optional["reward"].span(start, stop)
    mission = np.repeat(store.episode_mission[batch.start : batch.stop], np.diff(offset))
    columns = (
        texts.take(pyarrow.array(mission)),
        pyarrow.ListArray.from_arrays(sizes, pyarrow.array(numbers.reshape(-1))),
        pyarrow.array(store.action.span(start, stop).astype(np.int64)),
        pyarrow.array(rewards),
    )
    rows = [pyarrow.ListArray.from_arrays(lists, column) for column in columns]
    return pyarrow.RecordBatch.from_arrays(rows, schema=schema)
