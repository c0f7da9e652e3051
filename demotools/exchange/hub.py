"""Publish a store on the Hugging Face hub: its archive and its dataset card, in one commit.

Goes through the package `huggingface_hub` (the extra `hf`), which finds the token where it always
does: `$HF_TOKEN`, or where `hf auth login` left it. The token is never printed.

A dataset card: Markdown under the metadata header that the Hugging Face hub reads.

Source of the header's keys and of the licence identifiers: the hub's documentation of dataset
cards. JSON is a part of YAML, so the header's values are written as JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from demotools.errors import FetchError, from_os_error, printable_values
from demotools.exchange.archive import ARCHIVE_SUFFIX, archive_store
from demotools.look.info import flat_texts, store_info
from demotools.output import size_text, working_folder, write_output
from demotools.store.reading import open_store

_REPOSITORY = re.compile(r"hf:([\w.-]+/[\w.-]+)")
_CARD = "README.md"


def push_store(
    path: Path, place: str, *, private: bool = False, quiet: bool = False
) -> tuple[list[str], str]:
    """Publish a store in the dataset `hf:OWNER/NAME`, which is made where it does not exist.

    returns  the names of the files that were sent, and the address of the commit

    A card that is there already is kept: it may be of several stores, or written by hand.

    FetchError  a wrong place, no package, no token, or the hub refuses
    StoreError  see `open_store`
    """
    repository = repository_of(place)
    store = open_store(path)
    hub, token = _hub(place)
    if quiet:
        hub.utils.disable_progress_bars()
    name = store.name + ARCHIVE_SUFFIX
    # beside the store: as much room as it has
    with (
        _as_messages(path),
        working_folder(path.with_name(f".{path.name}.push")) as folder,
        _refusals(hub, token, place),
    ):
        archive = archive_store(path, folder / name, quiet=quiet)
        api = hub.HfApi(token=token)
        api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        files = {name: archive}
        if not api.file_exists(repository, _CARD, repo_type="dataset"):
            files[_CARD] = folder / _CARD
            write_output(files[_CARD], store_card(path).encode(), overwrite=False)
        commit = api.create_commit(
            repository,
            [hub.CommitOperationAdd(file, str(local)) for file, local in files.items()],
            commit_message=f"Add {store.name}",
            repo_type="dataset",
        )
    return list(files), str(commit.commit_url)


def repository_of(place: str) -> str:
    """The OWNER/NAME of `hf:OWNER/NAME`; FetchError where it is something else.

    >>> repository_of("hf:me/babyai-demos")
    'me/babyai-demos'
    """
    match = _REPOSITORY.fullmatch(place)
    if match is None:
        raise FetchError(
            "this is no dataset on the Hugging Face hub", path=place, fix="write hf:OWNER/NAME"
        )
    return match[1]


def _hub(place: str) -> tuple[Any, str]:
    try:
        import huggingface_hub
    except ImportError as error:
        raise FetchError(
            "publishing needs the package huggingface_hub",
            path=place,
            fix="install it: pip install 'demotools[hf]'",
        ) from error
    token = huggingface_hub.get_token()
    if token is None:
        raise FetchError(
            "there is no token for the Hugging Face hub",
            path=place,
            fix="run `hf auth login`, or set $HF_TOKEN",
        )
    return huggingface_hub, token


@contextmanager
def _as_messages(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise from_os_error(error, path.parent) from error


@contextmanager
def _refusals(hub: Any, token: str, place: str) -> Iterator[None]:
    """What the hub, the network or the package refuse, as a FetchError."""
    refused = hub.errors.HfHubHTTPError
    # the package's HTTP library changed twice; its errors are the bases of this one
    bases = ("HTTPError", "RequestException")
    network = tuple(kind for kind in refused.__mro__ if kind.__name__ in bases)
    try:
        yield
    except (refused, hub.errors.HFValidationError, *network) as error:
        # the token goes before the text is cut: half a token is still a secret
        reason = " ".join(str(error).replace(token, "(token)").split())[:300]
        raise FetchError(
            f"the Hugging Face hub did not take it: {reason}",
            path=place,
            fix="check OWNER/NAME, that your token may write there, and the network",
        ) from error


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
