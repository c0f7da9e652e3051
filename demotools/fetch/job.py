"""`demotools fetch`: from a level's name to verified stores, doing only what is missing.

For each file: decide (plan.py), download, convert, record. Downloads and stores get their names
only when complete and checked. The sources of a file are tried in the order of its manifest;
archives are read once all files have tried the sources before them, and all wanted members of one
archive are read in one pass.
"""

from __future__ import annotations

import contextlib
import datetime
import re
import shutil
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from itertools import dropwhile, takewhile
from pathlib import Path

import filelock
import tomli_w
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from demotools.babyai.levels import (
    Manifest,
    PublishedFile,
    Source,
    Split,
    read_archive,
    read_manifest,
    store_name,
)
from demotools.errors import (
    DemotoolsError,
    FetchError,
    PickleError,
    StoreError,
    first_problem,
    from_os_error,
)
from demotools.exchange.archive import ARCHIVE_SUFFIX, archived_attributes, unarchive_store
from demotools.exchange.parquet import ParquetFiles, import_parquet
from demotools.fetch.dataset import download_shards
from demotools.fetch.part_file import Downloaded, checked_file, content_kind, download, part_bytes
from demotools.fetch.places import Place, RefusedError, UnreachableError, place_of
from demotools.fetch.plan import (
    DOWNLOADS,
    RECORDS_NAME,
    Expected,
    FetchedRecord,
    FetchOptions,
    Found,
    Plan,
    decided,
)
from demotools.fetch.tarball import extract_members
from demotools.output import counted, locked, open_regular, read_regular, written_whole
from demotools.pickles.convert import ConvertOptions, convert_files
from demotools.store.format import store_exists
from demotools.store.reading import open_store, store_path
from demotools.store.verify import raise_if_damaged, verify_store

# of many failures: `fetch all` would name 38 files
_TEXTS_AT_MOST = 4
_RECORDS = TypeAdapter(dict[str, FetchedRecord])

# who refused, and why
Refusal = tuple[str, RefusedError]
_Failure = tuple[str, DemotoolsError]


def fetch_plans(
    levels: Sequence[str], splits: Sequence[Split], folder: Path, options: FetchOptions
) -> list[Plan]:
    """What a fetch would do, from what lies on disk now.

    ManifestError  an unknown level
    FetchError     a file in place of a level; records of earlier fetches that cannot be read
    """
    manifests = list(map(_manifest, levels))
    records = read_records(folder)
    plans = []
    for manifest in manifests:
        for split in splits:
            file = manifest.files.get(split)
            store = store_name(manifest.level, split)
            if options.origin is not None and options.origin.path.endswith(".zip"):
                file = PublishedFile(name=store + ARCHIVE_SUFFIX, sources=())
            found = _found(folder, store, file)
            record = records.get(file.name) if file else None
            plans.append(decided(manifest.level, split, file, found, record, options))
    return plans


def _manifest(level: str) -> Manifest:
    if re.search(r"[/:]|\.\w+$", level):
        raise FetchError(
            "this is a file or an address, not the name of a level",
            path=level,
            fix="add the level: `demotools fetch LEVEL --from FILE`",
        )
    return read_manifest(level)


def fetch_levels(
    levels: Sequence[str], splits: Sequence[Split], folder: Path, options: FetchOptions
) -> Iterator[str]:
    """Do what is missing; yields what was done, file by file. All are tried before one is raised.

    FetchError, PickleError, StoreError   as the first failure was; the others are named with it
    """
    failures: list[_Failure] = []
    refused: dict[str, list[Refusal]] = {}
    downloads = folder / DOWNLOADS
    with contextlib.ExitStack() as locks:
        for level in dict.fromkeys(_manifest(level).level for level in levels):
            locks.enter_context(locked(folder / f"{level}.fetch"))
        locks.callback(_remove_if_empty, downloads)
        rest = []
        for plan in fetch_plans(levels, splits, folder, options):
            with _failing_into(failures, plan.store, downloads / plan.name):
                if plan.action != "download":
                    yield _without_network(plan, folder, options)
                elif done := _from_sources(plan, _first(plan, options), folder, options, refused):
                    yield done
                else:
                    rest.append(plan)
        for name in dict.fromkeys(name for plan in rest for name in _archives(plan)):
            missing = {pattern: p for p in rest if (pattern := _archives(p).get(name))}
            with _failing_into(failures, f"the archive {name}", downloads):
                members = _from_archive(name, missing, downloads, options, refused)
                for plan, file in members:
                    rest.remove(plan)
                    with _failing_into(failures, plan.store, downloads / plan.name):
                        done = _finished(plan, file, folder, options)
                        yield done + _taken(plan, f"archive {name}", options, refused)
                continue
            rest = [plan for plan in rest if plan not in missing.values()]
        for plan in rest:
            with _failing_into(failures, plan.store, downloads / plan.name):
                done = _from_sources(plan, _last(plan), folder, options, refused)
                if done is None:
                    raise _nobody_gave(plan, downloads, refused[plan.store])
                yield done
    if failures:
        raise _joined(failures)


@contextlib.contextmanager
def _failing_into(failures: list[_Failure], of: str, path: Path) -> Iterator[None]:
    """Keep a failure, and what failed, for later: the other files are tried first."""
    try:
        yield
    except DemotoolsError as error:
        failures.append((of, error))
    except OSError as error:
        failures.append((of, from_os_error(error, path)))


def read_records(folder: Path) -> dict[str, FetchedRecord]:
    """What the first whole download of each file was, by file name; empty before the first.

    FetchError  the file does not parse
    """
    path = folder / RECORDS_NAME
    if not path.exists():
        return {}
    try:
        with open_regular(path) as stream:
            return _RECORDS.validate_python(tomllib.load(stream))
    except (ValueError, RecursionError) as error:
        what = str(error)
        if isinstance(error, ValidationError):
            what = "at {}: {}".format(*first_problem(error, "toml"))
        raise FetchError(
            f"the records of earlier fetches cannot be read: {what}",
            path=path,
            fix="correct the file, or remove it: then later fetches are checked against nothing",
        ) from error
    except OSError as error:
        raise from_os_error(error, path) from error


def write_record(folder: Path, name: str, record: FetchedRecord) -> None:
    """Keep the record of a file; one that is there already stays."""
    path = folder / RECORDS_NAME
    with filelock.FileLock(path.with_name(f".{path.name}.lock")):
        records = read_records(folder)
        if name in records:
            return
        written = {**records, name: record}
        table = {key: each.model_dump(exclude_none=True) for key, each in written.items()}
        with written_whole(path) as stream:
            tomli_w.dump(dict(sorted(table.items())), stream)


class _Left(BaseModel):
    """What is left to do once a store is made: to keep a record, and to remove the files.

    It is written down before, so that a fetch that is killed there leaves nothing for ever.

    remove   name of the file or folder in the folder of downloads; None: nothing
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    record: FetchedRecord
    remove: str | None = Field(pattern=r"^[^/\\]*[^/\\.][^/\\]*$")


@contextlib.contextmanager
def _tidied(folder: Path, plan: Plan, left: _Left, options: FetchOptions) -> Iterator[None]:
    """Inside, the store is made; then what is left is done."""
    note = _note(folder, plan)
    note.parent.mkdir(exist_ok=True)
    with written_whole(note) as stream:
        stream.write(left.model_dump_json().encode())
    try:
        yield
    except BaseException:
        note.unlink()
        raise
    _tidy(folder, plan, options)


def _tidy(folder: Path, plan: Plan, options: FetchOptions) -> None:
    """Do what is left, perhaps by a fetch that was killed."""
    note = _note(folder, plan)
    if not note.exists():
        return
    try:
        left = _Left.model_validate_json(read_regular(note))
    except ValidationError:
        note.unlink()  # none that we wrote
        return
    write_record(folder, left.key, left.record)
    if left.remove is not None and not options.keep_pickle:
        files = note.with_name(left.remove)
        if files.is_dir():
            shutil.rmtree(files)
        else:
            files.unlink(missing_ok=True)
    note.unlink()


def _note(folder: Path, plan: Plan) -> Path:
    return folder / DOWNLOADS / f".{plan.store}.left.json"


def _found(folder: Path, store: str, file: PublishedFile | None) -> Found:
    path = store_path(store, folder)
    source, problem = None, None
    if store_exists(path):
        try:
            source = open_store(path).attributes.source
        except StoreError as error:
            problem = error.what
    if file is None:
        return Found(source, problem)
    final = folder / DOWNLOADS / file.name
    own = [each for each in file.sources if each.archive is None and each.dataset is None]
    places = map(place_of, own)
    part = max((part_bytes(final, str(place)) for place in places), default=0)
    return Found(source, problem, final.stat().st_size if final.is_file() else None, part)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # something is in it still, or it never was
        folder.rmdir()


def _without_network(plan: Plan, folder: Path, options: FetchOptions) -> str:
    """Carry out a plan that downloads nothing."""
    path = store_path(plan.store, folder)
    if plan.action == "refuse":
        raise FetchError(plan.reason, path=path, fix=plan.fix)
    if plan.action in ("nothing", "check") and options.convert:
        _tidy(folder, plan, options)
    pickle = folder / DOWNLOADS / plan.name
    try:
        if pickle.is_file() and (plan.action == "convert" or options.check):
            file = checked_file(pickle, plan.expected)
    except RefusedError as error:
        raise FetchError(str(error), path=pickle, fix="remove it, then fetch it again") from error
    if plan.action == "convert":
        return _finished(plan, file, folder, options)
    if plan.action == "check" and options.convert:
        raise_if_damaged(path, verify_store(path, quiet=options.quiet))
    done = "every byte of it was checked" if plan.action == "check" else "nothing to do"
    return f"{plan.store}: {plan.reason}, {done}"


def _archives(plan: Plan) -> dict[str, str]:
    """The archives that hold a file, with the pattern of its name there."""
    return {source.archive: source.member or plan.name for source in plan.sources if source.archive}


def _first(plan: Plan, options: FetchOptions) -> list[Source | Place]:
    """What is asked before any archive is read."""
    if options.origin is not None:
        return [options.origin]
    return [*takewhile(lambda source: source.archive is None, plan.sources)]


def _last(plan: Plan) -> list[Source]:
    """What is asked after the archives."""
    rest = dropwhile(lambda source: source.archive is None, plan.sources)
    return [source for source in rest if source.archive is None]


def _from_sources(
    plan: Plan,
    sources: Sequence[Source | Place],
    folder: Path,
    options: FetchOptions,
    refused: dict[str, list[Refusal]],
) -> str | None:
    """Ask some sources one after another; what was done, or None where none gives the file."""
    refusals = refused.setdefault(plan.store, [])
    downloads = folder / DOWNLOADS
    for source in sources:
        try:
            if isinstance(source, Source) and source.dataset is not None:
                done = _from_dataset(plan, source, folder, options)
            else:
                place = source if isinstance(source, Place) else place_of(source)
                file = download(place, downloads / plan.name, plan.expected, options)
                done = ""
        except RefusedError as error:
            refusals.append((str(source), error))
            continue
        done = done or _finished(plan, file, folder, options)
        return done + _taken(plan, str(source), options, refused)
    return None


def _taken(
    plan: Plan, source: str, options: FetchOptions, refused: Mapping[str, Sequence[Refusal]]
) -> str:
    """Which source was taken and why, in a line of its own; nothing where the user named it."""
    if options.origin is not None:
        return ""
    why = "its first source" if len(plan.sources) > 1 else "its only source"
    if refusals := refused.get(plan.store):
        why = f"because {'; '.join(f'{who}: {error}' for who, error in refusals)}"
    elif options.source is not None:
        why = f"as requested by --source {options.source}"
    return f"\n  fetched from {source}, {why}"


def _from_dataset(plan: Plan, source: Source, folder: Path, options: FetchOptions) -> str:
    """Make the store of the parquet files of a data set; they go unless they are to be kept.

    RefusedError  the data set does not give them
    """
    key = f"{source} {plan.split}"
    record = read_records(folder).get(key)
    shards = download_shards(source, plan.split, folder / DOWNLOADS, record, options)
    fetched = FetchedRecord(
        level=plan.level,
        split=plan.split,
        size_bytes=shards.size_bytes,
        sha256=shards.joint_sha256,
        source=str(source),
        day=_today(),
        commit=shards.commit,
    )
    if not options.convert:
        write_record(folder, key, fetched)
        return f"{shards.folder}: {shards.size_bytes:,} bytes from {source}"
    files = ParquetFiles(
        shards.paths,
        shards.sha256,
        plan.level,
        plan.split,
        licence=shards.dataset.licence,
        citation=shards.dataset.citation,
        origin=shards.origin(source),
    )
    path = store_path(plan.store, folder)
    left = _Left(key=key, record=fetched, remove=shards.folder.name)
    with _tidied(folder, plan, left, options):
        done = import_parquet(files, path, overwrite=options.overwrite, quiet=options.quiet)
    return f"{done.text()}\n  from {source} at commit {shards.commit}"


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def _from_archive(
    name: str,
    missing: dict[str, Plan],
    folder: Path,
    options: FetchOptions,
    refused: dict[str, list[Refusal]],
) -> Iterator[tuple[Plan, Downloaded]]:
    """The plans whose files an archive has, which leave `missing`; why not goes into `refused`."""
    archive = read_archive(name)
    expected = Expected(archive.size_bytes, archive.sha256, archive.md5)
    for place in map(place_of, archive.sources):
        wanted = {pattern: folder / plan.name for pattern, plan in missing.items()}
        refusal = RefusedError("the archive has no such member")
        try:
            for pattern, file in extract_members(place, wanted, expected, options):
                yield missing.pop(pattern), file
        except RefusedError as error:
            refusal = error
        for plan in missing.values():
            refused[plan.store].append((f"archive {name}, {place}", refusal))
        if not missing:
            return


def _nobody_gave(plan: Plan, folder: Path, refusals: Sequence[Refusal]) -> FetchError:
    lost = [str(error) for _, error in refusals if isinstance(error, UnreachableError)]
    others = [f"{who}: {e}" for who, e in refusals if not isinstance(e, UnreachableError)]
    ways = list(dict.fromkeys(error.fix for _, error in refusals if error.fix))
    ways += ["wait a day for the quota"] if any("quota" in text.lower() for text in others) else []
    ways.append("pass `--from FILE` with a copy you have")
    if read_manifest(plan.level).environment_id is not None:
        ways.append(f"record the bot: `demotools generate {plan.level} --episodes 100000`")
    what = "; ".join(dict.fromkeys([*lost, *others]))
    return FetchError(
        f"no source could provide {plan.name}: {what}" if others else what,
        path=folder / plan.name,
        fix=", or ".join(ways) if len(ways) < 3 else f"{', '.join(ways[:-1])}, or {ways[-1]}",
    )


def _finished(plan: Plan, file: Downloaded, folder: Path, options: FetchOptions) -> str:
    """Convert a checked file and keep its record; the file goes unless it is to be kept."""
    record = FetchedRecord(
        level=plan.level,
        split=plan.split,
        size_bytes=file.size_bytes,
        sha256=file.sha256,
        source=file.source,
        day=_today(),
    )
    ours = file.path.parent == folder / DOWNLOADS
    if not options.convert:
        write_record(folder, plan.name, record)
        return f"{file.path}: {file.size_bytes:,} bytes from {file.source}"
    left = _Left(key=plan.name, record=record, remove=file.path.name if ours else None)
    try:
        with _tidied(folder, plan, left, options):
            text = _converted(plan, file, folder, options)
    except (PickleError, StoreError) as error:
        if not ours or (isinstance(error, StoreError) and error.path != str(file.path)):
            raise
        refused = file.path.with_name(file.path.name + ".refused")
        file.path.replace(refused)
        raise FetchError(
            f"the file from {file.source} cannot be converted: {error.what}",
            path=refused,
            fix=f"{error.fix}; fetching again downloads a new copy",
        ) from error
    return text


def _converted(plan: Plan, file: Downloaded, folder: Path, options: FetchOptions) -> str:
    if content_kind(file.path) == "archive":
        path = store_path(plan.store, folder)
        about = archived_attributes(file.path)
        level, split = about.get("level"), about.get("split")
        if (level, split) != (plan.level, plan.split):
            raise FetchError(
                f"the archive ({file.source}) holds level {level}, {split} split, "
                f"not {plan.level}, {plan.split} split",
                path=file.path,
                fix="name its level and --split, or restore it with `demotools unarchive`",
            )
        unarchive_store(file.path, path, overwrite=options.overwrite, quiet=options.quiet)
        return f"{path}: {counted(open_store(path).episodes, 'episode')} from {file.source}"
    convert = ConvertOptions(
        level=plan.level, split=plan.split, overwrite=options.overwrite, quiet=options.quiet
    )
    origin = {"fetched_from": file.source, "url": file.url}
    return convert_files([file.path], folder, convert, origin).text()


def _joined(failures: Sequence[_Failure]) -> DemotoolsError:
    """One failure of several, each with the name of what failed."""
    errors = [error for _of, error in failures]
    if len(errors) == 1:
        return errors[0]
    whats = list(dict.fromkeys(error.what for error in errors))
    fixes = list(dict.fromkeys(error.fix for error in errors))
    if len(whats) == 1:  # one cause, such as no network: one way out of it, for each level
        what, fix = whats[0], fixes[0] + (", and likewise for the others" if len(fixes) > 1 else "")
    else:
        told = [f"{of}: {error.what}" for of, error in failures]
        what = f"{len(failures)} downloads failed. {_few(told, '; ')}"
        ways = {fix: [of for of, error in failures if error.fix == fix] for fix in fixes}
        fix = _few([f"for {', '.join(names)}: {way}" for way, names in ways.items()], "; ")
    return FetchError(what, path=_few([error.path for error in errors], ", "), fix=fix)


def _few(texts: Sequence[str], between: str) -> str:
    """The first texts, and how many there are besides."""
    more = len(texts) - _TEXTS_AT_MOST
    return between.join([*texts[:_TEXTS_AT_MOST], *([f"{more} more"] if more > 0 else [])])
