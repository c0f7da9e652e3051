"""Work on a Dask cluster: parts are its tasks, the store is the same bit for bit.

How parts get from the workers into the store is told at `Errand`.

Work that is done elsewhere and delivered here: a part of a store, whoever makes it.

Workers write into a folder of this one call, below the store's own building folder, and a part
counts once this process has moved it from there: a worker that was given up for lost, and comes
back, finds its folder gone and can spoil nothing. Where workers do not share the folder (each looks
for a file with a random word) nothing is begun; or they send the parts back.
"""

from __future__ import annotations

import logging
import platform
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from demotools.errors import DemotoolsError, from_os_error
from demotools.output import written_whole
from demotools.store.building import StoreBuilder, part_file

_PROTOCOLS = ("tcp", "tls")
_CONNECT_SECONDS = 10


@dataclass(frozen=True)
class Delivered:
    """One part that a worker has made: its file, or where the file lies."""

    episodes: int
    path: str
    content: bytes | None


Submit = Callable[..., Future[Delivered]]
"""Begins a task on a worker, given the errand and its further arguments."""


@contextmanager
def cluster_workers(
    address: str, builder: StoreBuilder, return_parts: bool
) -> Iterator[tuple[Submit, int]]:
    """What begins a task on a worker, and how many the workers do at the same time."""
    with _client(address) as client, opened_errand(builder, return_parts) as errand:
        _refuse_unfit_workers(client, address, errand)
        executor = client.get_executor(pure=False)
        slots = sum(client.nthreads().values())
        try:
            yield lambda task, *arguments: executor.submit(task, errand, *arguments), slots
        finally:
            executor.shutdown(wait=False)


def _refuse_unreachable(address: str) -> None:
    """Dask's own client leaves threads behind, which may hang, where it finds no scheduler."""
    fix = (
        "start one: `dask scheduler --port 8786`, then on every machine "
        "`dask worker tcp://HOST:8786 --nworkers auto --nthreads 1`"
    )
    try:
        place = urlsplit(address)
        if place.scheme not in _PROTOCOLS or not place.hostname or not place.port:
            raise ValueError("no tcp://HOST:PORT")
    except ValueError as error:
        what = f"this is not the address of a Dask scheduler: {error}"
        raise DemotoolsError(what, path=address, fix="spell it tcp://HOST:8786") from error
    try:
        socket.create_connection((place.hostname, place.port), _CONNECT_SECONDS).close()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        what = f"no Dask scheduler answers: {reason}"
        raise DemotoolsError(what, path=address, fix=fix) from error


@contextmanager
def _client(address: str) -> Iterator[Any]:
    try:
        from distributed import Client
        from distributed.comm.core import CommClosedError
        from distributed.scheduler import KilledWorker
    except ImportError as error:
        raise DemotoolsError(
            "Dask is not installed", path="distributed", fix="pip install 'demotools[cluster]'"
        ) from error
    _refuse_unreachable(address)
    try:
        client: Any = Client(  # type: ignore[no-untyped-call]
            address, timeout=_CONNECT_SECONDS, set_as_default=False
        )
    except OSError as error:
        raise DemotoolsError(
            "something answers, but it is no Dask scheduler of this version",
            path=address,
            fix="check host and port; install the same version of Dask on every machine",
        ) from error
    log = logging.getLogger("distributed.client")
    level = log.level
    # it tells of a lost scheduler at length, and so does the error below
    log.setLevel(logging.CRITICAL)
    try:
        with client:
            yield client
    except KilledWorker as error:
        raise DemotoolsError(
            f"the same part ended several workers: {error}",
            path=address,
            fix="look at the workers' own output; out of memory, start fewer on each machine",
        ) from error
    except (CancelledError, CommClosedError) as error:
        raise DemotoolsError(
            "the Dask scheduler went away",
            path=address,
            fix="start it again and run the command again: it resumes where it stopped",
        ) from error
    finally:
        log.setLevel(level)


def _refuse_unfit_workers(client: Any, address: str, errand: Errand) -> None:
    answers = client.run(refusal, errand, on_error="return")
    if not answers:
        raise DemotoolsError(
            "the Dask scheduler has no workers",
            path=address,
            fix=f"start some: `dask worker {address} --nworkers auto --nthreads 1`",
        )
    unfit = {
        worker: f"it cannot run demotools: {answer}" if isinstance(answer, Exception) else answer
        for worker, answer in answers.items()
        if answer
    }
    if unfit:
        raise refused(unfit)


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
