"""Parquet files as the JAT data set has them, written by pyarrow alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from demotools.store.reading import Store

Row = dict[str, Any]


def jat_rows(store: Store) -> list[Row]:
    """The rows that JAT would have of the episodes of a store."""
    rows = []
    for episode in range(store.episodes):
        start, stop = store.bounds(episode)
        mission = store.mission_text[store.episode_mission[episode]]
        views = store.images(start, stop).reshape(stop - start, -1).tolist()
        directions = store.direction.span(start, stop).tolist()
        rows.append(
            {
                "text_observations": [mission] * (stop - start),
                "discrete_observations": [
                    [direction, *view] for direction, view in zip(directions, views, strict=True)
                ],
                "discrete_actions": store.action.span(start, stop).tolist(),
                "rewards": [0.0] * (stop - start - 1) + [1.0],
            }
        )
    return rows


def write_rows(
    path: Path,
    rows: Sequence[Row],
    *,
    kind: str = "int64",
    rows_in_group: int = 1000,
    rename: Mapping[str, str] | None = None,
) -> None:
    """Write rows; what does not fit the schema gets the type that pyarrow finds.

    kind   int64 or int32 lists, "fixed": views in lists of 148, "text_dictionary"
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    whole = pa.int32() if kind == "int32" else pa.int64()
    view = pa.list_(whole, 148) if kind == "fixed" else pa.list_(whole)
    text = pa.dictionary(pa.int32(), pa.string()) if kind == "text_dictionary" else pa.string()
    types = {
        "text_observations": pa.list_(text),
        "discrete_observations": pa.list_(view),
        "discrete_actions": pa.list_(pa.int64()),
        "rewards": pa.list_(pa.float32()),
    }
    columns = {}
    for name, column_type in types.items():
        values = [row[name] for row in rows]
        try:
            column = pa.array(values, column_type)
        except (pa.ArrowInvalid, pa.ArrowTypeError, TypeError):
            column = pa.array(values)
        columns[(rename or {}).get(name, name)] = column
    pq.write_table(pa.table(columns), path, row_group_size=rows_in_group)
