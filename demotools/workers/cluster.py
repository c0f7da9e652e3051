"""Tasks on a Dask cluster, whose workers share a folder with this machine.

Workers write to a folder that belongs to this call, and their output counts once this process has
moved it out: a worker that was given up for lost and then comes back finds the folder gone and can
do no harm.
"""

from __future__ import annotations

import logging
import re
import socket
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from demotools.errors import DemotoolsError, from_os_error, optional_package

_CONNECT_SECONDS = 10
# What a scheduler holds for each thread; and for workers that join later.
_TASKS_A_THREAD, _TASKS_AT_LEAST = 3, 100
# What a result depends on.
_PACKAGES = ("demotools", "gymnasium", "minigrid", "numpy")
_START = (
    "start one: `dask scheduler --port 8786`, then on every machine "
    "`dask worker tcp://HOST:8786 --nworkers auto --nthreads 1`"
)


@contextmanager
def cluster_workers(address: str, folder: Path) -> Iterator[tuple[Callable[..., Future[Any]], int]]:
    """`submit` and `at_once` of `Workers`, for the workers of the scheduler at `address`.

    They all must see the parent of `folder`.

    DemotoolsError  Dask is not installed; no scheduler answers; it has no workers, or some with
                    other versions; a worker does not see the folder; the cluster goes away
    """
    with _client(address) as client:
        _check_versions(client, address)
        executor = client.get_executor(pure=False)
        at_once = max(_TASKS_A_THREAD * sum(client.nthreads().values()), _TASKS_AT_LEAST)
        with tempfile.TemporaryDirectory(
            prefix="cluster-", dir=folder.parent.absolute(), ignore_cleanup_errors=True
        ) as shared:

            def submit(task: Callable[..., Any], *arguments: Any) -> Future[Any]:
                made = executor.submit(_done_there, Path(shared), task, *arguments)
                moved: Future[Any] = Future()
                made.add_done_callback(lambda _made: _move(made, folder, moved))
                return moved

            try:
                yield submit, at_once
            finally:
                executor.shutdown(wait=False)


def _done_there(shared: Path, task: Callable[..., Any], *arguments: Any) -> tuple[Path, Any]:
    """Where the task wrote, and what it gave; runs on a worker."""
    try:
        # a folder for each attempt: a task may be done twice at the same time
        folder = Path(tempfile.mkdtemp(dir=shared))
        return folder, task(folder, *arguments)
    except FileNotFoundError as error:
        raise DemotoolsError(
            f"{socket.gethostname()}, a worker of the cluster, cannot access this",
            path=error.filename if shared.is_dir() else shared,
            fix="put the files, and --data-dir, on a path that all machines share",
        ) from error


def _move(made: Future[tuple[Path, Any]], folder: Path, moved: Future[Any]) -> None:
    """Move what a task wrote into `folder`; then it counts as done."""
    try:
        written, result = made.result()
        for file in written.iterdir():
            file.replace(folder / file.name)
        moved.set_result(result)
    except OSError as error:
        moved.set_exception(from_os_error(error, folder))
    except Exception as error:  # noqa: BLE001 of the task, for whoever waits for it
        moved.set_exception(error)


@contextmanager
def _client(address: str) -> Iterator[Any]:
    distributed = optional_package("distributed", "cluster")
    if not re.fullmatch(r"(tcp|tls)://[^/]+:\d+", address):
        what = "this is not the address of a Dask scheduler"
        raise DemotoolsError(what, path=address, fix="write it as tcp://HOST:8786")
    log = logging.getLogger("distributed.client")
    level = log.level
    # it tells of a lost scheduler at length, and so do the errors below
    log.setLevel(logging.CRITICAL)
    try:
        try:
            client = distributed.Client(address, timeout=_CONNECT_SECONDS, set_as_default=False)
        except OSError as error:
            what = "no Dask scheduler of the installed version answers"
            raise DemotoolsError(what, path=address, fix=_START) from error
        with client:
            yield client
    except distributed.scheduler.KilledWorker as error:
        raise DemotoolsError(
            f"several workers died on the same part: {error}",
            path=address,
            fix="check the workers' output; if they ran out of memory, start fewer per machine",
        ) from error
    except (CancelledError, distributed.comm.CommClosedError) as error:
        raise DemotoolsError(
            "the Dask scheduler was lost",
            path=address,
            fix="restart it if necessary, and run the command again: it resumes where it stopped",
        ) from error
    finally:
        log.setLevel(level)


def _check_versions(client: Any, address: str) -> None:
    versions = client.get_versions(packages=_PACKAGES)
    if not versions["workers"]:
        raise DemotoolsError("the Dask scheduler has no workers", path=address, fix=_START)
    wanted = versions["client"]["packages"]
    for worker, found in versions["workers"].items():
        for package in _PACKAGES:
            if found["packages"][package] != wanted[package]:
                raise DemotoolsError(
                    f"a worker of the cluster has {package} {found['packages'][package]} instead "
                    f"of {wanted[package]}",
                    path=worker,
                    fix="install the same versions on every machine, or stop this worker",
                )
