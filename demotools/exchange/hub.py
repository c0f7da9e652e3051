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

from demotools.errors import FetchError, from_os_error, optional_package, printable_values
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
    hub = hub_package()
    if hub.get_token() is None:
        raise FetchError(
            "there is no token for the Hugging Face hub",
            path=place,
            fix="run `hf auth login`, or set $HF_TOKEN",
        )
    if quiet:
        hub.utils.disable_progress_bars()
    name = store.name + ARCHIVE_SUFFIX
    # beside the store: as much room as it has
    with (
        working_folder(path.with_name(f".{path.name}.push")) as folder,
        _refusals(hub, place, path),
    ):
        archive = archive_store(path, folder / name, quiet=quiet)
        api = hub.HfApi(token=hub.get_token())
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


def hub_package() -> Any:
    """The package `huggingface_hub`, with `utils`, which it does not import by itself.

    DemotoolsError  it is not installed
    """
    optional_package("huggingface_hub.utils", "hf")
    return optional_package("huggingface_hub", "hf")


def hub_reason(error: Exception, hub: Any) -> str:
    """Why the hub refused, in one line without the token."""
    reason = " ".join(str(error).split()) or type(error).__name__
    # the token goes before the text is cut: half a token is still a secret
    return reason.replace(hub.get_token() or "\0", "(token)")[:300]


@contextmanager
def _refusals(hub: Any, place: str, path: Path) -> Iterator[None]:
    """What the hub, the network or the package refuse, as a FetchError."""
    refused = hub.errors.HfHubHTTPError
    # the package's HTTP library changed twice; its errors are the bases of this one
    bases = ("HTTPError", "RequestException")
    network = tuple(kind for kind in refused.__mro__ if kind.__name__ in bases)
    try:
        yield
    except (refused, hub.errors.HFValidationError, *network) as error:
        raise FetchError(
            f"the Hugging Face hub did not accept it: {hub_reason(error, hub)}",
            path=place,
            fix="check OWNER/NAME, that your token may write there, and the network",
        ) from error
    except OSError as error:
        raise from_os_error(error, path.parent) from error


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
