"""The parquet files of a data set on the Hugging Face hub: listed at one commit, resumed, checked.

The data set's revision (a branch, say) is resolved once to a commit, and the files are listed and
read at that commit, so that shards of different versions are never mixed. File names only have to
contain split, number and count: they are listed, not guessed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from demotools.babyai.levels import PublishedDataset, Source, Split, read_dataset
from demotools.errors import DemotoolsError, StoreError
from demotools.exchange.parquet import check_shards, pyarrow_package, sha256_of, shard_of
from demotools.fetch.part_file import compare, hub_refusals, opened_hub
from demotools.fetch.places import RefusedError, WrongFileError
from demotools.fetch.plan import Expected, FetchedRecord, FetchOptions
from demotools.output import check_room


@dataclass(frozen=True)
class Shards:
    """The downloaded files of one split, in order, as the hub has them at one commit.

    folder   that holds them and what the hub's package keeps to resume them
    sha256   of each file
    """

    dataset: PublishedDataset
    folder: Path
    paths: tuple[Path, ...]
    sha256: tuple[str, ...]
    commit: str
    size_bytes: int

    @property
    def joint_sha256(self) -> str:
        """One hash for all: of the files' own, one a line."""
        return hashlib.sha256("\n".join(self.sha256).encode()).hexdigest()

    def origin(self, source: Source) -> dict[str, Any]:
        """Where they come from, for the store to say."""
        address = f"https://huggingface.co/datasets/{self.dataset.repository}"
        return {
            "fetched_from": str(source),
            "repository": self.dataset.repository,
            "revision": self.commit,
            "url": f"{address}/tree/{self.commit}/{source.config}",
        }


def download_shards(
    source: Source,
    split: Split,
    downloads: Path,
    record: FetchedRecord | None,
    options: FetchOptions,
) -> Shards:
    """Get all files of a split, from where an earlier run stopped.

    record   of an earlier fetch: its commit is asked for, and the same files must come

    RefusedError    the hub has no such files, does not give them, or others than it says; a
                    package is missing
    DemotoolsError  the disk has no room for them
    """
    assert source.dataset is not None
    assert source.config is not None
    dataset = read_dataset(source.dataset)
    _needed(pyarrow_package)
    hub = _needed(lambda: opened_hub(options))
    wait = {"timeout": options.timeout_seconds}
    asked = {"repo_id": dataset.repository, "repo_type": "dataset"}
    with hub_refusals(hub):
        api = hub.HfApi()
        revision = (record and record.commit) or dataset.revision
        commit = api.dataset_info(dataset.repository, revision=revision, **wait).sha
        files = list(api.list_repo_tree(**asked, path_in_repo=source.config, revision=commit))
    wanted = {entry.path: entry for entry in files if _is_wanted(entry, split)}
    if not wanted:
        raise RefusedError(f"it has no parquet files of the {split} split at commit {commit}")
    try:
        check_shards([PurePosixPath(path).name for path in wanted], source.config)
    except StoreError as error:
        raise RefusedError(f"{error.what} (commit {commit})") from error
    total = sum(entry.size for entry in wanted.values())
    folder = downloads / f"{source.config}-{split}"
    folder.mkdir(parents=True, exist_ok=True)
    check_room(folder, total * options.room)
    found: dict[Path, str] = {}
    for path, entry in sorted(wanted.items()):
        with hub_refusals(hub):
            came = hub.hf_hub_download(
                **asked,
                filename=path,
                revision=commit,
                local_dir=folder,
                etag_timeout=options.timeout_seconds,
            )
        expected = Expected(entry.size, entry.lfs and entry.lfs.sha256, known_from="the hub")
        found[Path(came)] = _checked(Path(came), expected)
    shards = Shards(dataset, folder, tuple(found), tuple(found.values()), commit, total)
    if record is not None and record.commit == commit:
        known = Expected(record.size_bytes, record.sha256, known_from="an earlier fetch")
        compare(known, shards.size_bytes, shards.joint_sha256)
    return shards


def _needed(package: Callable[[], Any]) -> Any:
    """A package, or why the source cannot be asked: there may be others."""
    try:
        return package()
    except DemotoolsError as error:
        raise RefusedError(error.what, fix=error.fix) from error


def _is_wanted(entry: Any, split: Split) -> bool:
    shard = shard_of(PurePosixPath(entry.path).name)
    return shard is not None and shard[0] == split


def _checked(path: Path, expected: Expected) -> str:
    """The sha256 of a file; one that is not as the hub says is removed."""
    sha256 = sha256_of(path)
    try:
        compare(expected, path.stat().st_size, sha256)
    except WrongFileError:
        path.unlink()
        raise
    return sha256
