"""Publish stores on the Hugging Face hub: their archives, and one dataset card.

A dataset card: Markdown under the metadata header that the Hugging Face hub reads.

Source of the header's keys and of the licence identifiers: the hub's documentation of dataset
cards. JSON is a part of YAML, so the header's values are written as JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demotools.babyai.levels import SPLITS, manifest_text
from demotools.errors import printable_values
from demotools.exchange.archive import ARCHIVE_SUFFIX, archive_store
from demotools.exchange.hub import CARD, Repository, repository_of
from demotools.look.info import flat_texts, store_info
from demotools.output import check_output, size_text, working_folder, write_output
from demotools.store.reading import open_store


@dataclass(frozen=True)
class PushedStore:
    """One store that was published; `url` is None where it only would have been.

    files    names of those sent
    source   by which a manifest names the archive, `OWNER/NAME/STORE.zarr.zip`
    """

    store: str
    level: str
    split: str
    files: list[str]
    source: str
    url: str | None

    def text(self) -> str:
        """All of it for a person."""
        what = ", ".join(self.files)
        return f"published {what}: {self.url}" if self.url else f"would publish {what}"


def push_stores(
    paths: Sequence[Path],
    place: str,
    *,
    private: bool = False,
    replace_card: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
) -> Iterator[PushedStore]:
    """Publish stores in the dataset `hf:OWNER/NAME`, which is made where it does not exist.

    Each goes in a commit of its own, as soon as it is packed; the first one takes the card of all.
    What the hub has already is not sent again.

    replace_card   else a card that is there already is kept: it may be written by hand
    dry_run        send nothing

    FetchError  see `Repository`
    StoreError  see `open_store`
    """
    name, _ = repository_of(place)
    repository = None if dry_run else Repository(place, "dataset", private=private, quiet=quiet)
    card = stores_card(paths)
    for number, path in enumerate(paths):
        store = open_store(path)
        archive = store.name + ARCHIVE_SUFFIX
        about = store.attributes
        sent, url = [archive, CARD][: 2 - bool(number)], None
        if repository is not None:
            # beside the store: as much room as it has
            with working_folder(path.with_name(f".{path.name}.push")) as folder:
                files = {archive: archive_store(path, folder / archive, quiet=quiet)}
                if CARD in sent:
                    files[CARD] = folder / CARD
                    write_output(files[CARD], card.encode(), overwrite=False)
                kept = [] if replace_card else [CARD]
                sent, url = repository.commit(files, f"Add {store.name}", kept=kept)
        yield PushedStore(store.name, about.level, about.split, sent, f"{name}/{archive}", url)


def write_manifests(pushed: Sequence[PushedStore], folder: Path, *, overwrite: bool) -> list[Path]:
    """Write the manifests of the levels, with what was published as the first source of each file.

    Only stores that `demotools fetch` makes are named there, not small twins and the like.

    ManifestError   a store of an unknown level
    DemotoolsError  a manifest is there already, or cannot be written
    """
    texts: dict[str, str] = {}
    for one in pushed:
        if one.split not in SPLITS or one.store not in (one.level, f"{one.level}-{one.split}"):
            continue
        text = texts.get(one.level) or manifest_text(one.level)
        texts[one.level] = _with_source(text, one)
    written = [folder / f"{level}.toml" for level in texts]
    for path in written:
        folder.mkdir(parents=True, exist_ok=True)
        check_output(path, overwrite=overwrite)
    for path, text in zip(written, texts.values(), strict=True):
        write_output(path, text.encode(), overwrite=overwrite)
    return written


def _with_source(manifest: str, pushed: PushedStore) -> str:
    """The text of a manifest with one more source, before all others."""
    line = f"  {{ hf = {json.dumps(pushed.source)} }},\n"
    if line in manifest:
        return manifest
    table = re.search(rf"(?ms)^\[files\.{pushed.split}\].*?^sources = \[\n", manifest)
    if table is not None:
        return manifest[: table.end()] + line + manifest[table.end() :]
    name = json.dumps(pushed.store + ARCHIVE_SUFFIX)
    new = f"\n[files.{pushed.split}]\nname = {name}\nsources = [\n{line}]\n"
    return manifest.rstrip("\n") + "\n" + new


# Licences of stores that the hub knows, in lower case; others are "other", with their text.
_LICENCES = {"BSD-3-Clause", "BSD-2-Clause", "MIT", "Apache-2.0", "CC-BY-4.0", "CC0-1.0"}
_SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M")
_EXAMPLE = """\
```python
import zarr

store = zarr.storage.ZipStore({quoted_archive}, mode="r")
group = zarr.open_group(store, mode="r")
first, last = group["episode_offset"][:2]
mission = int(group["episode_mission"][0])
print(group["mission_text"][mission], group["action"][first:last])
```"""
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

{example}

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


_CARD_OF_SEVERAL = """\
---
{header}
---

# BabyAI demonstrations

Expert demonstrations of {levels} BabyAI levels: {episodes:,} episodes, {steps:,} steps in all. At
each step, the agent sees 7 x 7 cells before it and is told a mission in a small English-like
language; the expert's action is stored beside it.

| archive | level | split | episodes | mean length | steps | missions | size |
| --- | --- | --- | --- | --- | --- | --- | --- |
{stores}

## Use

Each archive is a Zarr v3 store in a zip file, which plain zarr reads:

{example}

`demotools fetch LEVEL --from hf:OWNER/NAME/STORE.zarr.zip` restores the folder of memory-mapped
chunk files.

## Arrays

| array | dtype | meaning |
| --- | --- | --- |
{rows}

## Where they came from

{provenance}

## Licence and citation

{licence}

{citation}
"""


def stores_card(paths: Sequence[Path]) -> str:
    """The card of several stores, or `store_card` of a single one.

    StoreError  see `open_store`
    """
    if len(paths) == 1:
        return store_card(paths[0])
    infos = [printable_values(store_info(path)) for path in paths]
    licences = sorted({info["licence"] for info in infos})
    arrays = {each["name"]: each for info in infos for each in info["arrays"]}
    episodes = sum(info["episodes"] for info in infos)
    provenance = []
    for info in infos:
        provenance += [f"**{info['name']}** (fingerprint `{info['fingerprint']}`)", ""]
        provenance += [*_origin(info), ""]
    return _CARD_OF_SEVERAL.format(
        header=_header("BabyAI demonstrations", licences, episodes),
        levels=len({info["level"] for info in infos}),
        episodes=episodes,
        steps=sum(info["steps"] for info in infos),
        stores="\n".join(
            f"| {info['name']}{ARCHIVE_SUFFIX} | {info['level']} | {info['split']} "
            f"| {info['episodes']:,} | {info['mean_length']:.2f} | {info['steps']:,} "
            f"| {info['missions']:,} | {size_text(info['size_bytes'])} |"
            for info in infos
        ),
        example=_example(infos[0]["name"] + ARCHIVE_SUFFIX),
        rows="\n".join(
            f"| {name} | {each['dtype']} | {each['meaning']} |"
            for name, each in sorted(arrays.items())
        ),
        provenance="\n".join(provenance).rstrip("\n"),
        licence="\n\n".join(licences),
        citation="\n\n".join(sorted({info["citation"] for info in infos})),
    )


def store_card(path: Path) -> str:
    """The card of a store.

    StoreError  see `open_store`
    """
    info = printable_values(store_info(path))
    archive = info["name"] + ARCHIVE_SUFFIX
    title = f"BabyAI {info['level']} demonstrations ({info['name']})"
    rows = (
        f"| {each['name']} | {each['dtype']} | {' x '.join(map(str, each['shape']))} "
        f"| {each['meaning']} |"
        for each in info["arrays"]
    )
    return _CARD_TEXT.format(
        **info,
        header=_header(title, [info["licence"]], info["episodes"]),
        environment=info["environment_id"]
        or ", ".join(info["levels"])
        or "none in today's minigrid",
        archive=archive,
        example=_example(archive),
        size=size_text(info["size_bytes"]),
        rows="\n".join(rows),
        provenance="\n".join(_origin(info)),
    )


def _example(archive: str) -> str:
    return _EXAMPLE.format(quoted_archive=json.dumps(archive))


def _header(title: str, licences: Sequence[str], episodes: int) -> str:
    """What the hub reads of a card."""
    # the licence's name alone, or with a remark in brackets: "MIT-0" and "MIT or later" are others
    plain = {re.sub(r"\s*\([^()]*\)$", "", licence) for licence in licences}
    known = len(plain) == 1 and plain <= _LICENCES
    header = {
        "pretty_name": title,
        **(
            {"license": min(plain).lower()}
            if known
            else {"license": "other", "license_name": "; ".join(licences)}
        ),
        "language": ["en"],
        "task_categories": ["reinforcement-learning", "robotics"],
        "size_categories": [size_category(episodes)],
        "tags": ["babyai", "minigrid", "imitation-learning", "instruction-following", "zarr"],
    }
    return "\n".join(f"{k}: {json.dumps(v, ensure_ascii=False)}" for k, v in header.items())


def _origin(info: dict[str, Any]) -> list[str]:
    """Where a store came from, a line a fact."""
    origin = [("- ", text) for text in flat_texts(info["source"])]
    origin += [("- parent's ", text) for text in flat_texts(info["parent"] or {})]
    return [mark + " ".join(str(text).split()) for mark, text in origin]


def size_category(episodes: int) -> str:
    """The hub's name of a size.

    >>> size_category(999), size_category(1000), size_category(1_000_000)
    ('n<1K', '1K<n<10K', '1M<n<10M')
    """
    return _SIZES[min(max(len(str(episodes)) - 3, 0), len(_SIZES) - 1)]
