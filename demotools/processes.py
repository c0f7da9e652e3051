"""Helper processes that end with the process that started them, however it ends.

Processes are spawned, not forked: a fork copies locks that other threads hold (progress bar,
numeric libraries), and spawning costs about a second, once.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import ParamSpec, TypeVar

from demotools.errors import DemotoolsError

P = ParamSpec("P")
T = TypeVar("T")


def processor_count() -> int:
    """The processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def submitting(task: Callable[P, T], workers: int, path: Path) -> Iterator[Callable[P, Future[T]]]:
    """A function that begins the task with its arguments in one of `workers` processes.

    workers   1: no process is started, the task is done at once, here
    path      what the work is for, named if a process dies

    DemotoolsError  a process died
    """
    if workers == 1:

        def do(*args: P.args, **kwargs: P.kwargs) -> Future[T]:
            future: Future[T] = Future()
            future.set_result(task(*args, **kwargs))
            return future

        yield do
        return
    context = multiprocessing.get_context("spawn")
    reader, lifeline = context.Pipe(duplex=False)
    executor = ProcessPoolExecutor(workers, context, _end_with, (reader,))

    def begin(*args: P.args, **kwargs: P.kwargs) -> Future[T]:
        # which cuts the lifeline of the others
        with ctrl_c_for_this_process_alone():
            return executor.submit(task, *args, **kwargs)

    try:
        yield begin
        executor.shutdown()
    except BrokenProcessPool as error:
        raise DemotoolsError(
            "a helper process died: killed from outside, or out of memory",
            path=path,
            fix="run the command again, it goes on where it was; fewer --workers need less memory",
        ) from error
    finally:
        lifeline.close()
        executor.shutdown(cancel_futures=True)
        reader.close()


@contextmanager
def ctrl_c_for_this_process_alone() -> Iterator[None]:
    """Processes that start inside never see Ctrl-C, not even while they import; this one does."""
    # multiprocessing starts its tracker on its first use, and unblocks the signal after that
    resource_tracker.ensure_running()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _end_with(reader: Connection) -> None:
    """Make this process end as soon as the other end of `reader` is closed, or its owner dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait_and_exit() -> None:
        reader.poll(None)
        os._exit(1)

    threading.Thread(target=wait_and_exit, daemon=True).start()
