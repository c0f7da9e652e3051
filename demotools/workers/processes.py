"""Worker processes that end with the process that started them, however it ends.

Spawned workers take about a second to start, once, and inherit no locks that other threads held
(progress bar, numeric libraries). Forked workers share what is imported here: they start in
milliseconds and need hardly any memory, but their task must not need any thread, because a fork
leaves those behind.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from demotools.errors import DemotoolsError

_log = logging.getLogger(__name__)

# More only take memory and each other's time.
_MOST_A_PROCESSOR = 4
_TASKS_A_PROCESS = 2

SPAWN_ADVICE = (
    'put the code of the script under `if __name__ == "__main__":` in a file, or use one process'
)
"""What to do where `what_hinders_spawning` says something."""


def processor_count() -> int:
    """The processors that this process may use: by its affinity and by its control groups."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    return max(min(count, *_quotas(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")), count), 1)


def _quotas(groups: Path, root: Path) -> Iterator[int]:
    """The processors, rounded up, that each control group of this process leaves it.

    groups   the kernel's list of them, `number:controllers:path` a line
    """
    try:
        lines = groups.read_text("utf-8").splitlines()
    except OSError:
        return  # no such system
    for line in lines:
        _number, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # inside a container the path is often that of the host, and the root is the group itself
        for folder in [root / path.lstrip("/"), *(root / path.lstrip("/")).parents]:
            yield from _quota(folder)
            if folder == root:
                break
        if controllers:
            for base in ("cpu", "cpu,cpuacct"):
                yield from _quota(root / base / path.lstrip("/"))
                yield from _quota(root / base)


def _quota(folder: Path) -> Iterator[int]:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text("ascii").split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text("ascii")
            period = (folder / "cpu.cfs_period_us").read_text("ascii")
        if quota != "max" and int(quota) > 0:
            yield -(-int(quota) // int(period))
    except (OSError, ValueError, ZeroDivisionError):
        return


def what_hinders_spawning() -> str:
    """Why a spawned process cannot import the program that runs; empty where nothing is known."""
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    if file is None:
        return ""  # an interactive session, which nothing has to import
    if not Path(file).is_file():
        return "it would have to import the program, which comes from standard input"
    try:
        guarded = b"__name__" in Path(file).read_bytes()
    except OSError:
        return ""
    return "" if guarded else 'it imports the script, which has no `if __name__ == "__main__":`'


def bounded_workers(asked: int, parts: int | None = None) -> int:
    """As many processes as were asked for, but no more than there are parts, or than help.

    parts   of the work: none has more than one process; None where they are not counted
    """
    most = _MOST_A_PROCESSOR * processor_count()
    wanted = min(asked, parts or asked)
    if wanted > most:
        _log.warning(
            "using %d processes instead of %d: more than %d per processor do not help",
            *(most, wanted, _MOST_A_PROCESSOR),
        )
    return min(wanted, most)


class Workers(NamedTuple):
    """What carries out tasks: this process, processes of this machine, or a cluster.

    submit    begins a task: a function, which is given the folder to write into, and its further
              arguments; all of them pickle
    at_once   tasks that are worth having under way
    """

    submit: Callable[..., Future[Any]]
    at_once: int


@contextmanager
def opened_workers(
    count: int,
    folder: Path,
    *,
    dask: str | None = None,
    forked: bool = False,
    resumes: bool = True,
) -> Iterator[Workers]:
    """Workers, until the block ends: `count` processes, or those of a Dask cluster.

    count     1: no process is started, tasks are done at once, here
    folder    where the files that the tasks write appear; named if a process dies
    dask      the address of a scheduler, whose workers do the tasks: see `cluster`
    forked    where the system forks safely; see the module's text
    resumes   whether a job that fails goes on where it stopped: only to be said

    DemotoolsError  a process died, or the cluster went away
    """
    if dask is not None:
        from demotools.workers.cluster import cluster_workers

        with cluster_workers(dask, folder) as (submit, at_once):
            yield Workers(submit, at_once)
    elif count == 1:
        yield Workers(partial(_done_here, folder), 1)
    else:
        resuming = "; it resumes where it stopped" if resumes else ""
        with _processes(count, folder, resuming, forked=forked) as workers:
            yield workers


def _done_here(folder: Path, task: Callable[..., Any], *arguments: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(task(folder, *arguments))
    return future


@contextmanager
def _processes(count: int, folder: Path, resuming: str, *, forked: bool) -> Iterator[Workers]:
    forked = forked and sys.platform == "linux" and hasattr(os, "fork")
    context = multiprocessing.get_context("fork" if forked else "spawn")
    reader, lifeline = context.Pipe(duplex=False)
    # a forked helper has the other end too, and would keep itself alive
    ends = (reader, lifeline) if forked else (reader,)
    executor = ProcessPoolExecutor(count, context, _end_with, ends)
    if not forked:
        _start_resource_tracker()

    def submit(task: Callable[..., Any], *arguments: Any) -> Future[Any]:
        # Ctrl-C would cut the lifeline of the others
        with _held_back([signal.SIGINT]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
            try:
                return executor.submit(task, folder, *arguments)
            except OSError as error:
                raise DemotoolsError(
                    f"a worker process cannot be started: {(error.strerror or str(error)).lower()}",
                    path=folder,
                    fix=f"run it again, with fewer --workers{resuming}",
                ) from error

    try:
        yield Workers(submit, _TASKS_A_PROCESS * count)
        executor.shutdown()
    except BrokenProcessPool as error:
        if why := what_hinders_spawning():
            raise DemotoolsError(
                f"no worker process could be started: {why}", path=folder, fix=SPAWN_ADVICE
            ) from error
        raise DemotoolsError(
            "a worker process died: it was killed, or ran out of memory",
            path=folder,
            fix=f"run it again, with fewer --workers to use less memory{resuming}",
        ) from error
    finally:
        lifeline.close()
        executor.shutdown(cancel_futures=True)
        reader.close()


@contextmanager
def signals_for_this_process_alone(numbers: Iterable[int]) -> Iterator[None]:
    """Processes that start inside never see these signals, not even while they import; this does.

    A terminal or a scheduler sends them to every process of a run. Where a system cannot hold
    signals back (Windows), processes that start inside see them as this one does.
    """
    _start_resource_tracker()
    with _held_back(numbers):
        yield


def _start_resource_tracker() -> None:
    # multiprocessing starts it on its first use, and unblocks Ctrl-C after that
    if os.name == "posix":
        resource_tracker.ensure_running()


@contextmanager
def _held_back(numbers: Iterable[int]) -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _end_with(reader: Connection, *others: Connection) -> None:
    """Make this process end as soon as the other end of `reader` is closed, or its owner dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for end in others:
        end.close()

    def wait_and_exit() -> None:
        reader.poll(None)
        os._exit(1)

    threading.Thread(target=wait_and_exit, daemon=True).start()
