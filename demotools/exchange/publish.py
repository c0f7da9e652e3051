"""Publish stores on the Hugging Face hub: their archives, and one dataset card.

A dataset card: Markdown under the metadata header that the Hugging Face hub reads.

Source of the header's keys and of the licence identifiers: the hub's documentation of dataset
cards. JSON is a part of YAML, so the header's values are written as JSON.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from demotools.errors import printable_values
from demotools.exchange.archive import ARCHIVE_SUFFIX, archive_store
from demotools.exchange.hub import CARD, Repository
from demotools.look.info import flat_texts, store_info
from demotools.output import size_text, working_folder, write_output
from demotools.store.reading import open_store


def push_store(
    path: Path, place: str, *, private: bool = False, quiet: bool = False
) -> tuple[list[str], str]:
    """Publish a store in the dataset `hf:OWNER/NAME`, which is made where it does not exist.

    returns  the names of the files that were sent, and the address of the commit

    A card that is there already is kept: it may be of several stores, or written by hand.

    FetchError  see `Repository`
    StoreError  see `open_store`
    """
    store = open_store(path)
    repository = Repository(place, "dataset", private=private, quiet=quiet)
    name = store.name + ARCHIVE_SUFFIX
    # beside the store: as much room as it has
    with working_folder(path.with_name(f".{path.name}.push")) as folder:
        files = {name: archive_store(path, folder / name, quiet=quiet), CARD: folder / CARD}
        write_output(files[CARD], store_card(path).encode(), overwrite=False)
        return repository.commit(files, f"Add {store.name}", kept=[CARD])


# Licences of stores that the hub knows, in lower case; others are "other", with their text.
_LICENCES = {"BSD-3-Clause", "BSD-2-Clause", "MIT", "Apache-2.0", "CC-BY-4.0", "CC0-1.0"}
_SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M")
_CARD_TEXT = """\
---
{header}
---

# {name}

Expert demonstrations of the BabyAI level {level} (environment: {environment}), {split} split: \
{episodes:,} episodes of {mean_length:.2f} steps on average, {longest:,} at most, {steps:,} steps \
in all; {missions:,} distinct missions.

At each step, the agent sees 7 x 7 cells before it and is told a mission in a small English-like \
language; the expert's action is stored beside it.

## Use

`{archive}` is a Zarr v3 store in a zip file, which plain zarr reads:

```python
import zarr

store = zarr.storage.ZipStore({quoted_archive}, mode="r")
group = zarr.open_group(store, mode="r")
first, last = group["episode_offset"][:2]
mission = int(group["episode_mission"][0])
print(group["mission_text"][mission], group["action"][first:last])
```

`demotools unarchive {archive}` restores the folder of memory-mapped chunk files ({size}).

## Arrays

| array | dtype | shape | meaning |
| --- | --- | --- | --- |
{rows}

## Where it came from

{provenance}
- made by: {created_by}
- schema: babyai-demos, version {schema_version}
- fingerprint: `{fingerprint}`

## Licence and citation

{licence}

{citation}
"""


def store_card(path: Path) -> str:
    """The card of a store.

    StoreError  see `open_store`
    """
    info = printable_values(store_info(path))
    archive = info["name"] + ARCHIVE_SUFFIX
    # the licence's name alone, or with a remark in brackets: "MIT-0" and "MIT or later" are others
    licence = re.sub(r"\s*\([^()]*\)$", "", info["licence"])
    header = {
        "pretty_name": f"BabyAI {info['level']} demonstrations ({info['name']})",
        **(
            {"license": licence.lower()}
            if licence in _LICENCES
            else {"license": "other", "license_name": info["licence"]}
        ),
        "language": ["en"],
        "task_categories": ["reinforcement-learning", "robotics"],
        "size_categories": [size_category(info["episodes"])],
        "tags": ["babyai", "minigrid", "imitation-learning", "instruction-following", "zarr"],
    }
    origin = [("- ", text) for text in flat_texts(info["source"])]
    origin += [("- parent's ", text) for text in flat_texts(info["parent"] or {})]
    rows = (
        f"| {each['name']} | {each['dtype']} | {' x '.join(map(str, each['shape']))} "
        f"| {each['meaning']} |"
        for each in info["arrays"]
    )
    return _CARD_TEXT.format(
        **info,
        header="\n".join(f"{k}: {json.dumps(v, ensure_ascii=False)}" for k, v in header.items()),
        environment=info["environment_id"] or "none in today's minigrid",
        archive=archive,
        quoted_archive=json.dumps(archive),
        size=size_text(info["size_bytes"]),
        rows="\n".join(rows),
        provenance="\n".join(mark + " ".join(str(text).split()) for mark, text in origin),
    )


def size_category(episodes: int) -> str:
    """The hub's name of a size.

    >>> size_category(999), size_category(1000), size_category(1_000_000)
    ('n<1K', '1K<n<10K', '1M<n<10M')
    """
    return _SIZES[min(max(len(str(episodes)) - 3, 0), len(_SIZES) - 1)]
