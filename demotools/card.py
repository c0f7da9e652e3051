"""A dataset card: Markdown under the metadata header that the Hugging Face hub reads.

Source of the header's keys and of the licence identifiers: the hub's documentation of dataset
cards. JSON is a part of YAML, so the header's values are written as JSON.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from demotools.errors import printable_values
from demotools.info import flat_texts, size_text, store_info

# The hub's name of each licence that stores of ours carry; anything else is "other", with its text.
_LICENCES = {
    "BSD-3-Clause": "bsd-3-clause",
    "BSD-2-Clause": "bsd-2-clause",
    "MIT": "mit",
    "Apache-2.0": "apache-2.0",
    "CC-BY-4.0": "cc-by-4.0",
    "CC0-1.0": "cc0-1.0",
}
_SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M")


def store_card(path: Path) -> str:
    """The card of a store.

    StoreError  see `open_store`
    """
    info = printable_values(store_info(path))
    lines = ["---", *_header(info), "---", "", f"# {info['name']}", "", *_introduction(info)]
    lines += ["", "## Use", "", *_use(info), "", "## Arrays", "", *_arrays(info)]
    lines += ["", "## Where it came from", "", *_provenance(info)]
    lines += ["", "## Licence and citation", "", info["licence"], "", info["citation"], ""]
    return "\n".join(lines)


def _header(info: dict[str, Any]) -> list[str]:
    values: dict[str, Any] = {
        "pretty_name": f"BabyAI {info['level']} demonstrations ({info['name']})",
        **_licence(info["licence"]),
        "language": ["en"],
        "task_categories": ["reinforcement-learning", "robotics"],
        "size_categories": [size_category(info["episodes"])],
        "tags": ["babyai", "minigrid", "imitation-learning", "instruction-following", "zarr"],
    }
    return [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]


def _licence(text: str) -> dict[str, str]:
    # the name alone, or with a remark in brackets: "MIT-0" and "MIT or later" are others
    known = _LICENCES.get(re.sub(r"\s*\([^()]*\)$", "", text))
    return {"license": known} if known else {"license": "other", "license_name": text}


def size_category(episodes: int) -> str:
    """The hub's name of a size.

    >>> size_category(999), size_category(1000), size_category(1_000_000)
    ('n<1K', '1K<n<10K', '1M<n<10M')
    """
    return _SIZES[min(max(len(str(episodes)) - 3, 0), len(_SIZES) - 1)]


def _introduction(info: dict[str, Any]) -> list[str]:
    environment = info["environment_id"] or "none in today's minigrid"
    return [
        f"Expert demonstrations of the BabyAI level {info['level']} (environment: {environment}), "
        f"{info['split']} split: {info['episodes']:,} episodes of {info['mean_length']:.2f} steps "
        f"on average, {info['longest']:,} at most, {info['steps']:,} steps in all; "
        f"{info['missions']:,} distinct missions.",
        "",
        "At each step, the agent sees 7 x 7 cells before it and is told a mission in a small "
        "English-like language; the expert's action is stored beside it.",
    ]


def _use(info: dict[str, Any]) -> list[str]:
    archive = f"{info['name']}.zarr.zip"
    return [
        f"`{archive}` is a Zarr v3 store in a zip file, which plain zarr reads:",
        "",
        "```python",
        "import zarr",
        "",
        f'store = zarr.storage.ZipStore({json.dumps(archive)}, mode="r")',
        'group = zarr.open_group(store, mode="r")',
        'first, last = group["episode_offset"][:2]',
        'mission = int(group["episode_mission"][0])',
        'print(group["mission_text"][mission], group["action"][first:last])',
        "```",
        "",
        f"`demotools unarchive {archive}` restores the folder of memory-mapped chunk files "
        f"({size_text(info['size_bytes'])}).",
    ]


def _arrays(info: dict[str, Any]) -> list[str]:
    rows = [
        f"| {array['name']} | {array['dtype']} | {' x '.join(map(str, array['shape']))} "
        f"| {array['meaning']} |"
        for array in info["arrays"]
    ]
    return ["| array | dtype | shape | meaning |", "| --- | --- | --- | --- |", *rows]


def _provenance(info: dict[str, Any]) -> list[str]:
    lines = [f"- {_inline(text)}" for text in flat_texts(info["source"])]
    lines += [f"- parent's {_inline(text)}" for text in flat_texts(info["parent"] or {})]
    return [
        *lines,
        f"- made by: {info['created_by']}",
        f"- schema: babyai-demos, version {info['schema_version']}",
        f"- fingerprint: `{info['fingerprint']}`",
    ]


def _inline(value: Any) -> str:
    return " ".join(str(value).split())
