"""Work that is done elsewhere and delivered here: a part of a store, whoever makes it.

Workers write into a folder of this one call, below the store's own building folder, and a part
counts once this process has moved it from there: a worker that was given up for lost, and comes
back, finds its folder gone and can spoil nothing. Where workers do not share the folder (each looks
for a file with a random word) nothing is begun; or they send the parts back.
"""

from __future__ import annotations

import platform
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from demotools.errors import DemotoolsError, from_os_error
from demotools.output import written_whole
from demotools.writer import StoreBuilder, part_file

PACKAGES = ("demotools", "gymnasium", "minigrid", "numpy")
_PROBE = "shared"
# A folder made on one machine shows on another after a while: file systems cache what they saw.
_APPEARS_SECONDS = 10


@dataclass(frozen=True)
class Errand:
    """What a worker needs to know besides its part.

    folder     the folder of this call; None means that parts are sent back
    word       what stands in the folder's probe file
    versions   of the packages, as they are where the command was given
    """

    folder: str | None
    word: str = field(default_factory=lambda: uuid.uuid4().hex)
    versions: dict[str, str] = field(default_factory=lambda: installed_versions())


@dataclass(frozen=True)
class Delivered:
    """One part that a worker has made: its file, or where the file lies."""

    episodes: int
    path: str
    content: bytes | None


def installed_versions() -> dict[str, str]:
    """The versions that a recording depends on, of this process."""
    found = {"Python": ".".join(platform.python_version_tuple()[:2])}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def refusal(errand: Errand) -> str:
    """Why this process must not play for an errand; empty where it may."""
    own = installed_versions()
    other = [
        f"{name} {own[name]} instead of {wanted}"
        for name, wanted in errand.versions.items()
        if own[name] != wanted
    ]
    if other:
        return f"it has {', '.join(other)}"
    if errand.folder is None:
        return ""
    probe = Path(errand.folder) / _PROBE
    if not _appears(probe) or probe.read_text("utf-8") != errand.word:
        return f"it does not see the folder {errand.folder}"
    return ""


@contextmanager
def opened_errand(builder: StoreBuilder, return_parts: bool) -> Iterator[Errand]:
    """An errand for the parts of one store; its folder is gone afterwards."""
    if return_parts:
        yield Errand(None)
        return
    with tempfile.TemporaryDirectory(
        prefix="cluster-", dir=builder.folder, ignore_cleanup_errors=True
    ) as folder:
        errand = Errand(str(Path(folder).absolute()))
        (Path(folder) / _PROBE).write_text(errand.word, "utf-8")
        yield errand


def delivered(errand: Errand, part: int, work: Callable[[Path], int]) -> Delivered:
    """Make one part; runs on a worker.

    work            writes the part into a folder; gives the number of episodes

    DemotoolsError  see `refusal`: workers may join after the others were asked
    """
    if reason := refusal(errand):
        raise refused({socket.gethostname(): reason})
    if errand.folder is not None:
        # a folder for each attempt: a part may be made twice at the same time
        folder = Path(tempfile.mkdtemp(dir=errand.folder))
        return Delivered(work(folder), str(part_file(folder, part)), None)
    with tempfile.TemporaryDirectory() as temporary:
        episodes = work(Path(temporary))
        file = part_file(Path(temporary), part)
        return Delivered(episodes, file.name, file.read_bytes())


def refused(unfit: dict[str, str]) -> DemotoolsError:
    """The error for workers that must not take part, each with its reason."""
    reason = next(iter(unfit.values()))
    fix = "install the same versions on every machine, or end these workers"
    if "does not see the folder" in reason:
        fix = "name a --data-dir that all machines share, or add --return-parts"
    elif "does not see the file" in reason:
        fix = "put the files where all machines see them under the same name"
    return DemotoolsError(
        f"{len(unfit)} of the cluster's workers cannot take part: {reason}",
        path=", ".join(sorted(unfit)),
        fix=fix,
    )


def adopting(made: Future[Delivered], parts: Path) -> Future[int]:
    """The number of episodes, once the part lies in `parts`."""
    adopted: Future[int] = Future()

    def adopt(done: Future[Delivered]) -> None:
        if done.cancelled():
            adopted.cancel()
            adopted.set_running_or_notify_cancel()  # wakes who waits
        elif (reason := done.exception()) is not None:
            adopted.set_exception(reason)
        else:
            try:
                adopted.set_result(_adopt(done.result(), parts))
            except OSError as error:
                adopted.set_exception(from_os_error(error, parts))
            except DemotoolsError as error:
                adopted.set_exception(error)

    made.add_done_callback(adopt)
    return adopted


def _adopt(part: Delivered, parts: Path) -> int:
    file = Path(part.path)
    if part.content is not None:
        with written_whole(parts / file.name) as stream:
            stream.write(part.content)
    else:
        _appears(file)
        file.replace(parts / file.name)
    return part.episodes


def _appears(file: Path) -> bool:
    """Whether a file is there, or will be soon."""
    until = time.monotonic() + _APPEARS_SECONDS
    while not file.is_file():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True
