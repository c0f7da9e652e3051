"""Remove stores and nothing else: refuses what is not a demo store, and does not follow links."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from demotools.errors import DemotoolsError, StoreError, os_refusals
from demotools.output import counted, locked, size_on_disk, size_text
from demotools.store.building import recover, trash_folder
from demotools.store.format import is_ours, present_folder, read_attributes


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
        episodes = "damaged" if self.episodes is None else counted(self.episodes, "episode")
        return f"{self.path} ({episodes}, {size_text(self.size_bytes)})"


def planned_removals(paths: Sequence[Path]) -> list[Removal]:
    """What is to be removed; nothing is touched.

    StoreError  one of them is not a demo store, or is a link to one
    """
    return [_planned(path) for path in dict.fromkeys(paths)]


def _planned(path: Path) -> Removal:
    folder = present_folder(path)
    if path.is_symlink():
        raise StoreError(
            "this is a link, and demotools does not follow links to remove stores",
            path=path,
            fix="remove the link itself, or name the folder that it points to",
        )
    if not folder.exists():
        raise StoreError(
            "there is no such demo store", path=path, fix="list the stores with `demotools list`"
        )
    if not is_ours(folder):
        raise StoreError(
            "this is not a demo store, so it was not removed",
            path=path,
            fix="if you are sure, remove it by other means",
        )
    try:
        episodes = read_attributes(path).episodes
    except StoreError:
        episodes = None
    return Removal(path, episodes, size_on_disk(folder))


def remove_store(removal: Removal) -> None:
    """Remove one store.

    A store that is half removed does not look like one: its folder gets another name first.

    StoreError  another process is making it, or not all of it can be removed
    """
    path, trash = removal.path, trash_folder(removal.path)
    try:
        with locked(path), os_refusals(path):
            recover(path)
            path.rename(trash)
            try:
                _empty(trash)
            except OSError as error:
                trash.rename(path)
                raise StoreError(
                    f"part of this store could not be removed: {(error.strerror or '').lower()}",
                    path=path,
                    fix=f"check the permissions of {error.filename}, then rerun this command",
                ) from error
            shutil.rmtree(trash)
    except DemotoolsError as error:
        if not isinstance(error, StoreError):
            error.fix = "make its folder writable, then rerun this command"
        raise


def _empty(folder: Path) -> None:
    """Remove everything but the file that says what the folder is."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            # links inside are removed, not what they point to
            shutil.rmtree(entry)
        elif entry.name != "zarr.json":
            entry.unlink()
