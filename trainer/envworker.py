"""A process that holds some of the environments, seen from the main process."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, NamedTuple
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from demotools.errors import DemotoolsError, SettingsError
from demotools.processes import (
    SPAWN_ADVICE,
    ctrl_c_for_this_process_alone,
    what_hinders_spawning,
)
from trainer.envgroup import FIELDS, EnvironmentKind, Group
from trainer.interrupt import stopping_held_back
from trainer.named import recipe_folders, search_recipe_folders

_SECONDS_TO_END = 5.0


class WorkerLostError(Exception):
    """The process died or hangs; its text says which."""


class RemoteError(Exception):
    """What caused a failure in the process; its text is the traceback there."""


class Failure(NamedTuple):
    """An answer: what was raised in the process, and the traceback of its cause, if it has one."""

    error: DemotoolsError
    cause: str


class Start(NamedTuple):
    """Where environments begin: see `VectorEnvironment.reset`."""

    streams: Sequence[range]
    taken: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Shared:
    """What every process of a vector has of it.

    memory   of all environments, by the names of FIELDS
    count    of all environments
    """

    kind: EnvironmentKind
    memory: dict[str, Any]
    count: int

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The memory as arrays [count, ...]."""
        return {
            name: np.frombuffer(self.memory[name], dtype).reshape(self.count, *shape)
            for name, (dtype, shape) in FIELDS.items()
        }


class Worker:
    """The process of the environments `span`; WorkerLostError where it does not answer."""

    def __init__(self, shared: Shared, span: range) -> None:
        context = multiprocessing.get_context("spawn")
        self.span = span
        self._connection, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(
            target=_serve, args=(theirs, shared, span, recipe_folders()), daemon=True
        )
        with ctrl_c_for_this_process_alone(), stopping_held_back():
            self.process.start()
        theirs.close()
        self._started = False
        _workers.add(self)

    def send(self, start: Start | None) -> None:
        """Have it begin anew, or take a step."""
        # that it is gone is noticed, and said, where the answer is awaited
        with suppress(OSError):
            self._connection.send(start)

    def receive(self, seconds: float) -> dict[int, str]:
        """Its answer: the missions that are new; DemotoolsError where that is the answer."""
        try:
            if not self._connection.poll(seconds):
                self.process.kill()
                raise WorkerLostError(f"did not answer for {seconds:.0f} seconds")
            reply: dict[int, str] | Failure = self._connection.recv()
        except (EOFError, OSError) as error:
            self.process.join(_SECONDS_TO_END)
            if not self._started and (why := what_hinders_spawning()):
                raise SettingsError(
                    f"no environment process could be started: {why}",
                    path="processes",
                    fix=SPAWN_ADVICE,
                ) from error
            raise WorkerLostError(f"died (exit code {self.process.exitcode})") from error
        self._started = True
        if isinstance(reply, Failure):
            raise reply.error from (RemoteError(reply.cause) if reply.cause else None)
        return reply

    def hang_up(self) -> None:
        """Tell it to end."""
        self._connection.close()

    def end(self) -> None:
        """Wait for its end, not for long."""
        self.process.join(_SECONDS_TO_END)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


_workers: WeakSet[Worker] = WeakSet()


@atexit.register
def _end_all() -> None:
    # multiprocessing would send SIGTERM, which they do not see, and wait
    for worker in list(_workers):
        worker.hang_up()


def _serve(connection: Connection, shared: Shared, span: range, folders: list[str]) -> None:
    """A worker's life: one reply for every message, until the other end is closed.

    folders   see `recipe_folders`
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    search_recipe_folders(folders)
    arrays = {name: array[span.start : span.stop] for name, array in shared.arrays().items()}
    group: Group | None = None
    while True:
        try:
            start: Start | None = connection.recv()
            try:
                group = group or Group(shared.kind, arrays)
                connection.send(group.step() if start is None else group.reset(*start))
            except DemotoolsError as error:
                cause = traceback.format_exception(error.__cause__) if error.__cause__ else []
                connection.send(Failure(error, "".join(cause)))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return
