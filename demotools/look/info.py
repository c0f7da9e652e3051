"""What a store holds and where it came from, for people and for machines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from demotools.errors import printable_values
from demotools.output import counted, size_on_disk, size_text
from demotools.store.format import present_folder
from demotools.store.reading import Store, open_store

MEANING = {
    "cells": "egocentric view, one byte a cell",
    "image": "view as an image that does not pack into cells",
    "direction": "0 right, 1 down, 2 left, 3 up",
    "action": "expert action, 0 left to 6 done",
    "mask": "0 on the first step of an episode, else 1",
    "episode_offset": "first step of each episode, then S",
    "episode_mission": "row in the mission tables",
    "episode_seed": "environment seed, -1 where unknown",
    "mission_text": "the distinct missions",
    "mission_tokens": "word ids, 0 is padding",
    "taken": "the action that was taken, the expert's or a random one",
    "subgoal": "the bot's present subgoal, a code",
    "reward": "what the action brought; over 0 where an episode is solved",
    "terminated": "1 where the level's rules ended the episode, else 0",
    "episode_level": "place of each episode's level in the attribute `levels`",
}


def store_info(path: Path) -> dict[str, Any]:
    """Everything that `demotools info` shows, as JSON values.

    StoreError  see `open_store`
    """
    store = open_store(path)
    folder = present_folder(store.path)
    about = store.attributes.model_dump()
    words = about.pop("vocabulary")
    about = {name: value for name, value in about.items() if name != "subgoals" or value}
    return {
        "name": store.name,
        "path": str(store.path),
        **about,
        "words": len(words),
        "mean_length": float(store.lengths.mean()),
        "longest": int(store.lengths.max()),
        **(
            {"ends": dict(sorted(Counter(store.ends.tolist()).items()))}
            if "reward" in store.optional
            else {}
        ),
        "size_bytes": size_on_disk(folder),
        "files": sum(1 for file in folder.rglob("*") if file.is_file()),
        "arrays": [_array(store, name) for name in sorted(store.arrays)],
    }


def _array(store: Store, name: str) -> dict[str, Any]:
    metadata = store.arrays[name]
    return {
        "name": name,
        "dtype": metadata.data_type,
        "shape": list(metadata.shape),
        "chunks": metadata.chunk_count,
        "size_bytes": store.array_bytes(name),
        "meaning": MEANING.get(name, ""),
    }


def info_text(info: dict[str, Any]) -> str:
    """The same as lines of text."""
    info = printable_values(info)
    played = info["environment_id"] or ", ".join(info["levels"]) or "no environment today"
    lines = [
        f"{info['name']}: {counted(info['episodes'], 'episode')}, "
        f"{counted(info['steps'], 'step')}, {counted(info['missions'], 'mission')} of "
        f"{counted(info['words'], 'word')}",
        f"  level       {info['level']} ({played}), {info['split']} split",
        f"  length      mean {info['mean_length']:.2f} steps, longest {info['longest']:,}",
        f"  disk        {size_text(info['size_bytes'])} in {counted(info['files'], 'file')}, "
        f"{info['path']}",
    ]
    if "ends" in info:
        ends = ", ".join(f"{count:,} by {how}" for how, count in info["ends"].items())
        lines.append(f"  ended       {ends}")
    for label in ("source", "parent"):
        lines += [f"  {label:<11} {text}" for text in flat_texts(info[label] or {})]
    lines += [f"  licence     {info['licence']}", f"  citation    {info['citation']}"]
    lines += [f"  made by     {info['created_by']}", f"  fingerprint {info['fingerprint']}", ""]
    rows = [("array", "dtype", "shape", "chunks", "size", "meaning")]
    rows += [
        (
            array["name"],
            array["dtype"],
            "x".join(map(str, array["shape"])),
            str(array["chunks"]),
            size_text(array["size_bytes"]),
            array["meaning"],
        )
        for array in info["arrays"]
    ]
    return "\n".join([*lines, *aligned(rows)])


def flat_texts(value: Any, name: str = "") -> list[str]:
    """JSON values as `name: value` lines, what is nested by its path; empty ones are left out.

    >>> flat_texts({"kind": "bot", "files": [{"name": "a.pkl"}], "seeds": [0, 9], "none": {}})
    ['kind: bot', 'files 1 name: a.pkl', 'seeds: 0, 9']
    """
    if isinstance(value, dict):
        named = list(value.items())
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        named = list(enumerate(value, start=1))
    elif isinstance(value, list):
        return [f"{name}: {', '.join(map(str, value))}"] if value else []
    else:
        return [f"{name}: {value}"]
    return [text for key, item in named for text in flat_texts(item, f"{name} {key}".strip())]


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows of texts as lines with aligned columns.

    >>> aligned([("array", "dtype"), ("mask", "uint8")])
    ['  array  dtype', '  mask   uint8']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
