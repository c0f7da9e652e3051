"""`demotools fetch`: from a level's name to verified stores, doing only what is missing.

For each file: decide (fetch_plan.py), download (fetch_sources.py), convert, record. A download is
under its name only when whole and checked, a store likewise.
"""

from __future__ import annotations

import contextlib
import datetime
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import filelock

from demotools.archive import ARCHIVE_SUFFIX, archived_attributes, unarchive_store
from demotools.content import content_kind
from demotools.convert import ConvertOptions, convert_files
from demotools.download import Downloaded, part_bytes, taken_copy
from demotools.errors import DemotoolsError, FetchError, PickleError, StoreError, from_os_error
from demotools.fetch_plan import DOWNLOADS, FetchedRecord, Found, Plan, Wishes, decided, store_name
from demotools.fetch_sources import downloads
from demotools.manifest import PublishedFile, Split, read_manifest
from demotools.records import read_records, write_record
from demotools.sources import RefusedError, place_of
from demotools.store import open_store, store_path
from demotools.transfer import Patience, Terms
from demotools.verify import raise_if_damaged, verify_store

# A store and the parts that it is made of take about twice the bytes of their pickle; said, and
# checked, before the first byte is downloaded.
_ROOM_TO_CONVERT = 3.0
# of many failures: `fetch all` would name 38 files
_TEXTS_AT_MOST = 4


@dataclass(frozen=True)
class Fetched:
    """What was done for one level and split."""

    plan: Plan
    text: str


def fetch_plans(
    levels: Sequence[str], splits: Sequence[Split], folder: Path, wishes: Wishes
) -> list[Plan]:
    """What a fetch would do, from what lies on disk now.

    ManifestError  an unknown level
    FetchError     the records of earlier fetches cannot be read
    """
    records = read_records(folder)
    plans = []
    for manifest in map(read_manifest, levels):
        for split in splits:
            file = manifest.files.get(split)
            if wishes.origin is not None and wishes.origin.endswith(".zip"):
                store = store_name(manifest.level, split)
                file = PublishedFile(name=store + ARCHIVE_SUFFIX, sources=())
            found = _found(folder, store_name(manifest.level, split), file)
            record = records.get(file.name) if file else None
            plans.append(decided(manifest.level, split, file, found, record, wishes))
    return plans


def fetch_levels(
    levels: Sequence[str],
    splits: Sequence[Split],
    folder: Path,
    wishes: Wishes,
    patience: Patience,
    *,
    jobs: int = 1,
    quiet: bool = False,
) -> Iterator[Fetched]:
    """Do what is missing; yields what was done, file by file. All are tried before one is raised.

    jobs   downloads at once

    FetchError, PickleError, StoreError   as the first failure was; the others are named with it
    """
    failures: list[DemotoolsError] = []
    with contextlib.ExitStack() as locks:
        for level in dict.fromkeys(read_manifest(level).level for level in levels):
            locks.enter_context(_level_lock(folder, level))
        plans = fetch_plans(levels, splits, folder, wishes)
        missing = []
        for plan in plans:
            try:
                if plan.action == "download":
                    missing.append(plan)
                else:
                    yield _without_network(plan, folder, wishes, quiet=quiet)
            except DemotoolsError as error:
                failures.append(error)
        room = _ROOM_TO_CONVERT if wishes.convert else 1.0
        terms = Terms(patience, threading.Event(), quiet, room)
        for plan, file in downloads(missing, folder / DOWNLOADS, wishes, terms, jobs):
            try:
                if isinstance(file, DemotoolsError):
                    raise file
                yield _finished(plan, file, folder, wishes, quiet=quiet)
            except DemotoolsError as error:
                failures.append(error)
    if failures:
        raise _joined(failures)


def _found(folder: Path, store: str, file: PublishedFile | None) -> Found:
    path = store_path(store, folder)
    source, problem = None, None
    if path.exists():
        try:
            source = open_store(path).attributes.source
        except StoreError as error:
            problem = error.what
    if file is None:
        return Found(source, problem)
    final = folder / DOWNLOADS / file.name
    names = [place_of(s).source for s in file.sources if s.gdrive or s.https]
    parts = {name: size for name in names if (size := part_bytes(final, name))}
    return Found(source, problem, final.stat().st_size if final.is_file() else None, parts)


@contextlib.contextmanager
def _level_lock(folder: Path, level: str) -> Iterator[None]:
    lock = filelock.FileLock(folder / f".{level}.fetch.lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise FetchError(
            "another process is fetching this level",
            path=store_path(level, folder),
            fix="wait until it has finished, then run the command again",
        ) from error
    except OSError as error:
        raise from_os_error(error, folder) from error
    with lock:
        lock.release()  # counts down: `with` has acquired it a second time
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # something is in it still, or it never was
                (folder / DOWNLOADS).rmdir()


def _without_network(plan: Plan, folder: Path, wishes: Wishes, *, quiet: bool) -> Fetched:
    """Carry out a plan that downloads nothing."""
    path = store_path(plan.store, folder)
    if plan.action == "refuse":
        raise FetchError(plan.reason, path=path, fix=plan.fix)
    pickle = folder / DOWNLOADS / plan.name
    try:
        if pickle.is_file() and (plan.action == "convert" or wishes.check):
            file = taken_copy(pickle, plan.expected)
    except RefusedError as error:
        raise FetchError(str(error), path=pickle, fix="remove the file, then fetch it") from error
    if plan.action == "convert":
        return _finished(plan, file, folder, wishes, quiet=quiet)
    if plan.action == "check" and wishes.convert:
        raise_if_damaged(path, verify_store(path, quiet=quiet))
    done = "every byte of it was checked" if plan.action == "check" else "nothing to do"
    return Fetched(plan, f"{plan.store}: {plan.reason}, {done}")


def _finished(
    plan: Plan, file: Downloaded, folder: Path, wishes: Wishes, *, quiet: bool
) -> Fetched:
    """Convert a checked file and keep its record; the file goes unless it is to be kept."""
    record = FetchedRecord(
        level=plan.level,
        split=plan.split,
        size_bytes=file.size_bytes,
        sha256=file.sha256,
        source=file.source,
        day=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )
    ours = file.path.parent == folder / DOWNLOADS
    if not wishes.convert:
        write_record(folder, plan.name, record)
        return Fetched(plan, f"{file.path}: {file.size_bytes:,} bytes from {file.source}")
    try:
        text = _converted(plan, file, folder, wishes, quiet=quiet)
    except PickleError as error:
        if not ours:
            raise
        refused = file.path.with_name(file.path.name + ".refused")
        file.path.replace(refused)
        raise FetchError(
            f"what {file.source} gave cannot be converted: {error.what}",
            path=refused,
            fix=f"{error.fix}; fetching again gets a new copy",
        ) from error
    write_record(folder, plan.name, record)
    if ours and not wishes.keep_pickle:
        file.path.unlink()
    return Fetched(plan, text)


def _converted(plan: Plan, file: Downloaded, folder: Path, wishes: Wishes, *, quiet: bool) -> str:
    if content_kind(file.path) == "archive":
        path = store_path(plan.store, folder)
        about = archived_attributes(file.path)
        if (about["level"], about["split"]) != (plan.level, plan.split):
            raise FetchError(
                f"the archive holds {about['level']}, {about['split']} split, "
                f"not {plan.level}, {plan.split} split",
                path=file.path,
                fix="name its level and --split, or restore it with `demotools unarchive`",
            )
        unarchive_store(file.path, path, overwrite=wishes.overwrite, quiet=quiet)
        return f"{path}: {about['episodes']:,} episodes from {file.source}"
    options = ConvertOptions(
        level=plan.level, split=plan.split, overwrite=wishes.overwrite, quiet=quiet
    )
    origin = {"fetched_from": file.source, "url": file.url}
    return convert_files([file.path], folder, options, origin).text()


def _joined(failures: Sequence[DemotoolsError]) -> DemotoolsError:
    if len(failures) == 1:
        return failures[0]
    whats = list(dict.fromkeys(error.what for error in failures))
    fixes = list(dict.fromkeys(error.fix for error in failures))
    if len(whats) == 1:  # one cause, such as no network: one way out of it, for each level
        told, fix = whats[0], fixes[0] + (", and so for the others" if len(fixes) > 1 else "")
    else:
        told, fix = f"{len(failures)} files failed: {_few(whats, '; ')}", _few(fixes, " | ")
    return FetchError(told, path=_few([error.path for error in failures], ", "), fix=fix)


def _few(texts: Sequence[str], between: str) -> str:
    """The first texts, and how many there are besides."""
    more = len(texts) - _TEXTS_AT_MOST
    return between.join([*texts[:_TEXTS_AT_MOST], *([f"{more} more"] if more > 0 else [])])
