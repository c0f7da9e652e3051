"""Downloads from and uploads to the Hugging Face hub, each in one commit.

Uses the package `huggingface_hub` (the extra `hf`), which looks for the token in the usual places:
`$HF_TOKEN`, or where `hf auth login` stored it. The token is never printed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from demotools.errors import FetchError, from_os_error, optional_package

Kind = Literal["dataset", "model"]
CARD = "README.md"
_REPOSITORY = re.compile(r"hf:(?://?)?([\w.-]+/[\w.-]+)(?:@([^@]+))?")


def on_hub(place: Path | str) -> bool:
    """Whether this names a repository on the hub, not a path.

    >>> on_hub("hf:me/policy"), on_hub(Path("hf:/me/policy")), on_hub("runs/hf")
    (True, True, False)
    """
    return str(place).startswith("hf:")


def repository_of(place: str, kind: Kind = "dataset") -> tuple[str, str | None]:
    """OWNER/NAME and revision of `hf:OWNER/NAME@REVISION`; FetchError where it is something else.

    >>> repository_of("hf:me/babyai-demos"), repository_of("hf://me/policy@v1")
    (('me/babyai-demos', None), ('me/policy', 'v1'))
    """
    match = _REPOSITORY.fullmatch(place)
    if match is None:
        raise FetchError(
            f"this does not name a {kind} on the Hugging Face hub",
            path=place,
            fix="write it as hf:OWNER/NAME",
        )
    return match[1], match[2]


def hub_package() -> Any:
    """The package `huggingface_hub`; DemotoolsError where it is not installed."""
    return optional_package("huggingface_hub", "hf", "utils", "errors")


def hub_reason(error: Exception, hub: Any) -> str:
    """Why the hub refused, in one line without the token."""
    reason = " ".join(str(error).split()) or type(error).__name__
    # the token goes before the text is cut: half a token is still a secret
    return reason.replace(hub.get_token() or "\0", "(token)")[:300]


class Repository:
    """A repository on the hub, to be written to; it is made where it does not exist.

    FetchError  a wrong place, no package, no token, or the hub refuses
    """

    def __init__(
        self, place: str, kind: Kind, *, private: bool = False, quiet: bool = False
    ) -> None:
        self.name, revision = repository_of(place, kind)
        if revision is not None:
            raise FetchError(
                "only the newest revision can be written to", path=place, fix="remove the @REVISION"
            )
        self._place, self._kind, self._private = place, kind, private
        self._hub = hub_package()
        if self._hub.get_token() is None:
            raise FetchError(
                "there is no token for the Hugging Face hub",
                path=place,
                fix="run `hf auth login`, or set $HF_TOKEN",
            )
        if quiet:
            self._hub.utils.disable_progress_bars()
        self._api = self._hub.HfApi(token=self._hub.get_token())
        self._made = False

    def commit(
        self, files: Mapping[str, Path], message: str, *, kept: Sequence[str] = ()
    ) -> tuple[list[str], str]:
        """Send files, by their names there; the names of those sent, and the commit's address.

        kept   names of files that are left as they are where they are there already
        """
        folder = next(iter(files.values())).parent
        with _refusals(self._hub, self._place, folder, "accept"):
            if not self._made:
                self._api.create_repo(
                    self.name, repo_type=self._kind, private=self._private, exist_ok=True
                )
                self._made = True
            sent = {
                name: file
                for name, file in files.items()
                if name not in kept
                or not self._api.file_exists(self.name, name, repo_type=self._kind)
            }
            commit = self._api.create_commit(
                self.name,
                [self._hub.CommitOperationAdd(name, str(file)) for name, file in sent.items()],
                commit_message=message,
                repo_type=self._kind,
            )
        return list(sent), str(commit.commit_url)


def downloaded_files(place: str, names: Sequence[str], kind: Kind) -> Path:
    """The folder of these files of a repository, all of one commit, in the hub's own cache.

    FetchError  a wrong place, no package, no such repository or file, no network
    """
    repository, revision = repository_of(place, kind)
    hub = hub_package()
    folder = Path()
    with _refusals(hub, place, Path(place), "give"):
        for name in names:
            file = hub.hf_hub_download(repository, name, revision=revision, repo_type=kind)
            folder = Path(file).parent
            revision = folder.name  # the cache has a folder for each commit
    return folder


_FIXES = {
    "accept": "check OWNER/NAME, that your token may write there, and the network",
    "give": "check OWNER/NAME and the network; for a private one run `hf auth login`",
}


@contextmanager
def _refusals(hub: Any, place: str, path: Path, act: Literal["accept", "give"]) -> Iterator[None]:
    """What the hub, the network or the package refuse, as a FetchError."""
    refused = hub.errors.HfHubHTTPError
    # the package's HTTP library changed twice; its errors are the bases of this one
    bases = ("HTTPError", "RequestException")
    network = tuple(kind for kind in refused.__mro__ if kind.__name__ in bases)
    missing = hub.errors.LocalEntryNotFoundError  # it is an OSError, too
    try:
        yield
    except (refused, hub.errors.HFValidationError, missing, *network) as error:
        raise FetchError(
            f"the Hugging Face hub did not {act} it: {hub_reason(error, hub)}",
            path=place,
            fix=_FIXES[act],
        ) from error
    except OSError as error:
        raise from_os_error(error, path.parent) from error
