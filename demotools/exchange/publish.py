"""Publish stores on the Hugging Face hub: their archives and one dataset card.

A card is Markdown (from the template `card.md`) below the metadata header that the hub reads.

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

from demotools.babyai.levels import SPLITS, manifest_text, store_name
from demotools.errors import printable_values
from demotools.exchange.archive import ARCHIVE_SUFFIX, archive_store
from demotools.exchange.hub import CARD, Repository, repository_of
from demotools.look.info import flat_texts, store_info
from demotools.look.report import rendered_page
from demotools.output import check_output, counted, working_folder, write_output
from demotools.store.reading import open_store


@dataclass(frozen=True)
class PushedStore:
    """One store that was published; `url` is None where it only would have been.

    part_of  the name of the store that it holds a part of, if it does
    files    names of those sent
    source   by which a manifest names the archive, `OWNER/NAME/STORE.zarr.zip`
    """

    store: str
    level: str
    split: str
    part_of: str | None
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
        part_of = None if about.parent is None else str(about.parent.get("name"))
        source = f"{name}/{archive}"
        yield PushedStore(store.name, about.level, about.split, part_of, sent, source, url)


@dataclass(frozen=True)
class WrittenManifests:
    """The manifests that were written, and of each store that none names, why."""

    paths: list[Path]
    left_out: dict[str, str]

    def text(self, folder: Path) -> str:
        """All of it for a person; `folder` is where they are."""
        lines = [f"made {counted(len(self.paths), 'manifest')} in {folder}"]
        lines += [f"  without {store}: {why}" for store, why in self.left_out.items()]
        return "\n".join(lines)


def write_manifests(
    pushed: Sequence[PushedStore], folder: Path, *, overwrite: bool
) -> WrittenManifests:
    """Write the manifests of the levels, with what was published as the first source of each file.

    Only whole stores with the names that `demotools fetch` gives are named there. What was split
    off, shrunk or selected is not: other sources of the same file would give all its episodes,
    those of the other part too.

    ManifestError   a store of an unknown level
    DemotoolsError  a manifest is there already, or cannot be written
    """
    texts: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for one in pushed:
        if why := _no_source(one):
            left_out[one.store] = why
            continue
        text = texts.get(one.level) or manifest_text(one.level)
        texts[one.level] = _with_source(text, one)
    written = [folder / f"{level}.toml" for level in texts]
    for path in written:
        folder.mkdir(parents=True, exist_ok=True)
        check_output(path, overwrite=overwrite)
    for path, text in zip(written, texts.values(), strict=True):
        write_output(path, text.encode(), overwrite=overwrite)
    return WrittenManifests(written, left_out)


def _no_source(pushed: PushedStore) -> str:
    """Why no manifest may name a store; nothing where one may."""
    if pushed.part_of is not None:
        return f"it holds only a part of {pushed.part_of}"
    if pushed.split not in SPLITS:
        return f"its split is {pushed.split!r}"
    name = store_name(pushed.level, pushed.split)
    return "" if pushed.store == name else f"`demotools fetch` would call it {name}"


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
_TITLE = "BabyAI demonstrations"


def stores_card(paths: Sequence[Path]) -> str:
    """The card of a store, or of several.

    StoreError  see `open_store`
    """
    infos = [printable_values(store_info(path)) for path in paths]
    one = infos[0] if len(infos) == 1 else None
    title = f"BabyAI {one['level']} demonstrations ({one['name']})" if one else _TITLE
    licences = sorted({info["licence"] for info in infos})
    arrays = {array["name"]: array for info in infos for array in info["arrays"]}
    text = rendered_page(
        "card.md",
        header=_header(title, licences, sum(info["episodes"] for info in infos)),
        one=one,
        infos=infos,
        levels=counted(len({info["level"] for info in infos}), "BabyAI level"),
        suffix=ARCHIVE_SUFFIX,
        first_archive=json.dumps(infos[0]["name"] + ARCHIVE_SUFFIX),
        arrays=[arrays[name] for name in sorted(arrays)],
        origin=_origin,
        licences=licences,
    )
    return text + "\n"


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
    texts = flat_texts(info["source"])
    texts += [f"parent's {text}" for text in flat_texts(info["parent"] or {})]
    return [" ".join(text.split()) for text in texts]


def size_category(episodes: int) -> str:
    """The hub's name of a size.

    >>> size_category(999), size_category(1000), size_category(1_000_000)
    ('n<1K', '1K<n<10K', '1M<n<10M')
    """
    return _SIZES[min(max(len(str(episodes)) - 3, 0), len(_SIZES) - 1)]
