"""What `demotools list` shows: each level's stores, downloads and sources, readable or not."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from demotools.babyai.levels import SPLITS, level_names, levels_of_datasets, read_manifest
from demotools.errors import DemotoolsError, printable_values
from demotools.fetch.job import read_records
from demotools.fetch.plan import DOWNLOADS, FetchedRecord
from demotools.output import counted, size_on_disk, size_text
from demotools.store.building import is_unfinished
from demotools.store.format import SUFFIX, present_folder, store_exists, stores_in
from demotools.store.reading import open_store

_ROLES = {"train": "", "valid": "-valid", "small": "-small"}
_PLACES = {
    "gdrive": "Google Drive",
    "https": "a web address",
    "hf": "Hugging Face",
    "archive": "the archive of all levels",
    "jat": "the JAT data set",
}
_NEXT = (
    "next: `demotools fetch LEVEL` downloads and converts, "
    "`demotools generate LEVEL --episodes 1000` records the bot"
)


def listing(folder: Path) -> dict[str, Any]:
    """All levels and all stores of a folder, as JSON values.

    Nothing that lies in the folder makes this fail: what cannot be read is listed with the reason.
    """
    problem, records = None, {}
    try:
        records = read_records(folder)
    except DemotoolsError as error:
        problem = error.what
    more_levels: list[str] = []
    with suppress(DemotoolsError):  # somebody's families.toml that does not parse
        more_levels = levels_of_datasets()
    names = level_names()
    known = {f"{name}{suffix}{SUFFIX}" for name in names for suffix in _ROLES.values()}
    others = [path for path in stores_in(folder) if path.name not in known]
    levels = [_level_entry(name, folder, records) for name in names]
    strangers = [_store_entry(path) for path in others]
    stores = [*strangers, *(store for entry in levels for store in entry["stores"].values())]
    downloads = [size for entry in levels for size in entry["downloads"].values()]
    return {
        "folder": str(folder),
        "size_bytes": sum(store.get("size_bytes", 0) for store in stores) + sum(downloads),
        "levels": levels,
        "others": strangers,
        "more_levels": more_levels,
        "problem": problem,
    }


def listing_text(found: Mapping[str, Any]) -> str:
    """The same as lines of text: one for each level that is here and each other store; then what
    else there is.
    """
    found = printable_values(found)
    lines = [f"stores in {found['folder']}, {size_text(found['size_bytes'])} with downloads"]
    if found["problem"]:
        lines.append(f"problem: {found['problem']}")
    rows: list[tuple[str, str]] = []
    absent: dict[str, list[str]] = {}
    for entry in found["levels"]:
        if texts := _level_texts(entry):
            rows.append((entry["level"], "; ".join(texts)))
        else:
            absent.setdefault(_places_text(entry), []).append(entry["level"])
    for store in found["others"]:
        rows.append((Path(store["path"]).stem, _store_text(store["split"] or "it", store)))
    width = max((len(name) for name, _ in rows), default=0)
    lines += [f"  {name:<{width}}  {text}" for name, text in rows] or ["  none yet"]
    lines += [f"{places}: {', '.join(names)}" for places, names in absent.items()]
    if more := found["more_levels"]:
        lines.append(f"{len(more)} more levels can be fetched from data sets: {', '.join(more)}")
    return "\n".join([*lines, _NEXT])


def _level_entry(level: str, folder: Path, records: Mapping[str, FetchedRecord]) -> dict[str, Any]:
    paths = {role: folder / f"{level}{suffix}{SUFFIX}" for role, suffix in _ROLES.items()}
    entry: dict[str, Any] = {
        "level": level,
        "stores": {role: _store_entry(path) for role, path in paths.items() if store_exists(path)},
        "unfinished": [role for role, path in paths.items() if is_unfinished(path)],
        "fetched": {
            record.split: {"file": name, **record.model_dump(exclude={"level", "split"})}
            for name, record in records.items()
            if record.level == level
        },
        "downloads": {},
        "sources": {},
        "problem": None,
    }
    try:
        files = read_manifest(level).files
    except DemotoolsError as error:
        return {**entry, "problem": error.what}
    for split in (split for split in SPLITS if split in files):
        entry["sources"][split] = [str(source) for source in files[split].sources]
        entry["downloads"] |= _download_sizes(folder / DOWNLOADS, files[split].name)
    return entry


def _store_entry(path: Path) -> dict[str, Any]:
    try:
        about = open_store(path).attributes
    except DemotoolsError as error:
        return {"path": str(path), "problem": error.what, "split": None}
    except (OSError, ValueError, LookupError, TypeError) as error:
        return {"path": str(path), "problem": f"it cannot be read: {error}", "split": None}
    return {
        "path": str(path),
        "problem": None,
        "split": about.split,
        "episodes": about.episodes,
        "steps": about.steps,
        "size_bytes": size_on_disk(present_folder(path)),
        "kind": about.source.get("kind"),
        "parent": about.parent and about.parent.get("name"),
    }


def _download_sizes(folder: Path, name: str) -> dict[str, int]:
    """Whole and unfinished downloads of a file, with their bytes."""
    found = [folder / name, *sorted(folder.glob(f".{name}.*.part"))]
    return {path.name: path.stat().st_size for path in found if path.is_file()}


def _level_texts(entry: Mapping[str, Any]) -> list[str]:
    texts = [_store_text(role, store) for role, store in entry["stores"].items()]
    texts += [f"{role} unfinished" for role in entry["unfinished"]]
    texts += [f"{split} fetched {about['day']}" for split, about in entry["fetched"].items()]
    for name, size in entry["downloads"].items():
        state = "unfinished download" if name.endswith(".part") else "download"
        texts.append(f"{state} {size_text(size)}")
    if entry["problem"]:
        texts.append(f"problem: {entry['problem']}")
    return texts if entry["stores"] or not texts else ["no store", *texts]


def _places_text(entry: Mapping[str, Any]) -> str:
    places = dict.fromkeys(
        _PLACES.get(name := source.split()[0], f"the data set {name}")
        for sources in entry["sources"].values()
        for source in sources
    )
    return f"can be fetched from {' or '.join(places)}" if places else "not published"


def _store_text(role: str, store: Mapping[str, Any]) -> str:
    if store["problem"]:
        return f"{role} cannot be opened: {store['problem']}"
    return (
        f"{role} {counted(store['episodes'], 'episode')}, {counted(store['steps'], 'step')}, "
        f"{size_text(store['size_bytes'])} ({store['kind']})"
    )
