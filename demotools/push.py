"""Publish a store on the Hugging Face hub: its archive and its card, in one commit.

Goes through the package `huggingface_hub` (the extra `hf`), which finds the token where it always
does: `$HF_TOKEN`, or where `hf auth login` left it. The token is never printed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demotools.archive import ARCHIVE_SUFFIX, archive_store
from demotools.card import store_card
from demotools.errors import FetchError, from_os_error
from demotools.output import working_folder, write_output
from demotools.store import open_store

_REPOSITORY = re.compile(r"hf:([\w.-]+/[\w.-]+)")
_CARD = "README.md"


@dataclass(frozen=True)
class Pushed:
    """What was published.

    repository   OWNER/NAME
    files        the names of the files that were sent
    url          of the commit
    """

    repository: str
    files: tuple[str, ...]
    url: str


def push_store(path: Path, place: str, *, private: bool = False, quiet: bool = False) -> Pushed:
    """Publish a store in the dataset `hf:OWNER/NAME`, which is made where it does not exist.

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
    return Pushed(repository, tuple(files), str(commit.commit_url))


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
