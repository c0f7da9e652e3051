"""Remove stores, and nothing else: what is not a demo store is refused, links are not followed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from demotools.errors import StoreError, from_os_error
from demotools.info import size_on_disk, size_text
from demotools.output import acquired_lock
from demotools.store import SCHEMA


@dataclass(frozen=True)
class Removal:
    """A store that may be removed.

    path         its folder
    episodes     as its attributes say; None where they are damaged
    size_bytes   what its files take on disk
    """

    path: Path
    episodes: int | None
    size_bytes: int

    def text(self) -> str:
        """What would be lost."""
        episodes = "damaged" if self.episodes is None else f"{self.episodes:,} episodes"
        return f"{self.path} ({episodes}, {size_text(self.size_bytes)})"


def planned_removals(paths: Sequence[Path]) -> list[Removal]:
    """What is to be removed; nothing is touched.

    StoreError  one of them is not a demo store, or is a link to one
    """
    return [_planned(path) for path in dict.fromkeys(paths)]


def _planned(path: Path) -> Removal:
    if path.is_symlink():
        raise StoreError(
            "this is a link, which demotools does not follow to remove things",
            path=path,
            fix="remove the link itself, or name the folder that it points to",
        )
    if not path.exists():
        raise StoreError(
            "there is no such demo store", path=path, fix="see `demotools list` for their names"
        )
    try:
        attributes = json.loads((path / "zarr.json").read_bytes())["attributes"]
        ours = attributes["schema"] == SCHEMA
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        ours = False
    if not ours:
        raise StoreError(
            "this is not a finished demo store, so it is left alone",
            path=path,
            fix="remove it by other means if you are sure of it",
        )
    episodes = attributes.get("episodes")
    return Removal(path, episodes if isinstance(episodes, int) else None, size_on_disk(path))


def remove_store(removal: Removal) -> None:
    """Remove one store.

    A store that is half removed does not look like one: its folder gets another name first.

    StoreError      another process is making it
    DemotoolsError  it cannot be removed
    """
    path = removal.path
    aside = path.with_name(f".{path.name}.removing")
    lock = acquired_lock(path)
    try:
        if aside.exists():
            shutil.rmtree(aside)
        path.rename(aside)
        # rmtree removes links that it meets, not what they point to
        shutil.rmtree(aside)
    except OSError as error:
        raise from_os_error(error, path) from error
    finally:
        lock.release()
