"""Join the episodes of parts into one Zarr group: one pass, raw chunk files, attributes last."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from demotools.arrays import TEXTS_A_CHUNK, group_json, raw_array, write_rows, write_texts
from demotools.chunks import ChunkFiles, chunk_length
from demotools.errors import StoreError
from demotools.grid import OBJECTS, PACKING, VIEW_SIZE
from demotools.metadata import array_json, array_names
from demotools.mission_table import MissionTable
from demotools.store import (
    NO_HASH,
    SCHEMA,
    SCHEMA_VERSION,
    Episodes,
    episode_mask,
    fingerprint,
    metadata_hash,
)
from demotools.vocabulary import VERSION, vocabulary_hash


def join_parts(
    parts: Iterable[Episodes], count: int, steps: int, building: Path, about: Mapping[str, Any]
) -> None:
    """Write the episodes of all parts into the new Zarr group `building`.

    count, steps   of all parts together
    about          the attributes that do not follow from the episodes

    StoreError  some views pack into cells and others do not
    """
    building.mkdir()
    # what is found of it, wherever somebody carries it, is known for what it is
    (building / "zarr.json").write_bytes(group_json({"schema": SCHEMA, "unfinished": True}))
    missions = MissionTable(building.with_name("missions.json"))
    with missions, _EpisodeFiles(building, count) as rows:
        with _StepFiles(building, steps) as arrays:
            done = 0
            for episodes in parts:
                size = len(episodes.action)
                arrays.append(episodes, episode_mask(episodes.offset, 0, size))
                rows.append(done + episodes.offset[:-1], missions.rows(episodes.mission), episodes)
                done += size
        rows.end(steps)
    tokens = missions.tokens()
    files = raw_array(building, "mission_tokens", tokens.dtype.name, tokens.shape, len(tokens))
    write_rows(files, tokens)
    write_texts(building, missions.blocks(TEXTS_A_CHUNK), len(missions))
    attributes = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        **about,
        "episodes": count,
        "steps": steps,
        "missions": len(missions),
        "packing": PACKING,
        "objects": OBJECTS,
        "vocabulary": missions.words,
        "vocabulary_version": VERSION,
        "vocabulary_hash": vocabulary_hash(missions.words),
        "created_by": f"demotools {version('demotools')}",
        "fingerprint": fingerprint(building),
    }
    unsigned = group_json({**attributes, "metadata_hash": NO_HASH})
    described = {name: array_json(building, name) for name in array_names(building)}
    signed = group_json({**attributes, "metadata_hash": metadata_hash(unsigned, described)})
    (building / "zarr.json").write_bytes(signed)


class _EpisodeFiles:
    """The three arrays with a value an episode, written in one pass, one chunk file each."""

    def __init__(self, folder: Path, episodes: int) -> None:
        size = episodes + 1
        self._offset = raw_array(folder, "episode_offset", "int64", [size], size)
        self._mission = raw_array(folder, "episode_mission", "int32", [episodes], episodes)
        self._seed = raw_array(folder, "episode_seed", "int64", [episodes], episodes)

    def append(
        self, offset: NDArray[np.int64], mission: NDArray[np.int32], episodes: Episodes
    ) -> None:
        write_rows(self._offset, offset)
        write_rows(self._mission, mission)
        write_rows(self._seed, episodes.seed)

    def end(self, steps: int) -> None:
        """Append the last offset, the number of steps."""
        write_rows(self._offset, np.array([steps]))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for files in (self._offset, self._mission, self._seed):
            files.close(complete=kind is None)


class _StepFiles:
    """The four step arrays, written as raw chunk files in one pass."""

    def __init__(self, folder: Path, steps: int) -> None:
        self._folder = folder
        self._steps = steps
        self._files: dict[str, ChunkFiles] = {}

    def append(self, episodes: Episodes, mask: NDArray[np.uint8]) -> None:
        packed = episodes.view.shape[1:] == (VIEW_SIZE, VIEW_SIZE)
        columns = {
            "cells" if packed else "image": episodes.view,
            "direction": episodes.direction,
            "action": episodes.action,
            "mask": mask,
        }
        if not self._files:
            self._files = {name: self._create(name, rows) for name, rows in columns.items()}
        if set(self._files) != set(columns):
            raise StoreError(
                "some views pack into cells and others do not",
                path=self._folder,
                fix="convert the files with different kinds of view one by one",
            )
        for name, rows in columns.items():
            self._files[name].append(rows)

    def _create(self, name: str, rows: NDArray[np.uint8]) -> ChunkFiles:
        shape = [self._steps, *rows.shape[1:]]
        return raw_array(self._folder, name, "uint8", shape, chunk_length(self._steps))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for files in self._files.values():
            files.close(complete=kind is None)
