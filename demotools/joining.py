"""Join the episodes of parts into one Zarr group: one pass, raw chunk files, attributes last.

Nothing else that writes stores needs zarr, whose import takes a tenth of a second: so this module
is imported when the parts are ready.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec

from demotools.chunks import ChunkFiles, chunk_length
from demotools.errors import StoreError
from demotools.grid import OBJECTS, PACKING, VIEW_SIZE
from demotools.mission_table import MissionTable
from demotools.store import (
    SCHEMA,
    SCHEMA_VERSION,
    Episodes,
    chunk_files,
    episode_mask,
    fingerprint,
)
from demotools.vocabulary import VERSION, vocabulary_hash

_MISSIONS_A_CHUNK = 1 << 17


def join_parts(
    parts: Iterable[Episodes], count: int, steps: int, building: Path, about: Mapping[str, Any]
) -> None:
    """Write the episodes of all parts into the new Zarr group `building`.

    count, steps   of all parts together
    about          the attributes that do not follow from the episodes

    StoreError  some views pack into cells and others do not
    """
    group = zarr.create_group(building, zarr_format=3)
    missions = MissionTable(building.with_name("missions.json"))
    with missions, _EpisodeFiles(group, building, count) as rows:
        with _StepFiles(group, building, steps) as arrays:
            done = 0
            for episodes in parts:
                size = len(episodes.action)
                arrays.append(episodes, episode_mask(episodes.offset, 0, size))
                rows.append(done + episodes.offset[:-1], missions.rows(episodes.mission), episodes)
                done += size
        rows.end(steps)
    words = missions.words
    _create_raw(group, "mission_tokens", missions.tokens())
    _create_text(group, "mission_text", missions)
    attributes = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        **about,
        "episodes": count,
        "steps": steps,
        "missions": len(missions),
        "packing": PACKING,
        "objects": OBJECTS,
        "vocabulary": words,
        "vocabulary_version": VERSION,
        "vocabulary_hash": vocabulary_hash(words),
        "created_by": f"demotools {version('demotools')}",
        "fingerprint": fingerprint(building),
    }
    group.attrs.put(attributes)


class _EpisodeFiles:
    """The three arrays with a value an episode, written in one pass, one chunk file each."""

    def __init__(self, group: zarr.Group, folder: Path, episodes: int) -> None:
        self._offset = _chunk_of(group, folder, "episode_offset", np.int64, episodes + 1)
        self._mission = _chunk_of(group, folder, "episode_mission", np.int32, episodes)
        self._seed = _chunk_of(group, folder, "episode_seed", np.int64, episodes)

    def append(
        self, offset: NDArray[np.int64], mission: NDArray[np.int32], episodes: Episodes
    ) -> None:
        self._offset.append(offset.astype("<i8").view(np.uint8))
        self._mission.append(mission.astype("<i4").view(np.uint8))
        self._seed.append(episodes.seed.astype("<i8").view(np.uint8))

    def end(self, steps: int) -> None:
        """Append the last offset, the number of steps."""
        self._offset.append(np.array([steps], dtype="<i8").view(np.uint8))

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


def _chunk_of(
    group: zarr.Group, folder: Path, name: str, dtype: type[np.generic], size: int
) -> ChunkFiles:
    group.create_array(
        name,
        shape=(size,),
        dtype=dtype,
        chunks=(size,),
        serializer=BytesCodec(),
        compressors=(Crc32cCodec(),),
    )
    return ChunkFiles(chunk_files(folder, name), size * np.dtype(dtype).itemsize)


class _StepFiles:
    """The four step arrays, written as raw chunk files in one pass."""

    def __init__(self, group: zarr.Group, folder: Path, steps: int) -> None:
        self._group = group
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
        chunk = (chunk_length(self._steps), *rows.shape[1:])
        self._group.create_array(
            name,
            shape=(self._steps, *rows.shape[1:]),
            dtype=np.uint8,
            chunks=chunk,
            serializer=BytesCodec(),
            compressors=(Crc32cCodec(),),
        )
        return ChunkFiles(chunk_files(self._folder, name), int(np.prod(chunk)))

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


def _create_raw(group: zarr.Group, name: str, values: NDArray[Any]) -> None:
    array = group.create_array(
        name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=values.shape,
        serializer=BytesCodec(),
        compressors=(Crc32cCodec(),),
        config={"write_empty_chunks": True},
    )
    array[:] = values


def _create_text(group: zarr.Group, name: str, missions: MissionTable) -> None:
    array = group.create_array(
        name,
        shape=(len(missions),),
        dtype=str,
        chunks=(min(len(missions), _MISSIONS_A_CHUNK),),
        compressors=(ZstdCodec(level=3), Crc32cCodec()),
        config={"write_empty_chunks": True},
    )
    done = 0
    for texts in missions.blocks(_MISSIONS_A_CHUNK):
        array[done : done + len(texts)] = np.array(texts, dtype=np.dtypes.StringDType())
        done += len(texts)
