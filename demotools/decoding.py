"""Who decodes the parts of demo files: this process and its helpers, in any order.

A part that is decoded before the number of steps is known, and the chunks with it, is written
down; a killed conversion finds it again. The last parts, which for small files are all parts, are
decoded only while the store is written, and go straight into it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from demotools.decode import decoded_part
from demotools.demofile import DemoFile, OnError, not_well_formed
from demotools.layouts import PicklePart
from demotools.processes import helped
from demotools.store import Episodes
from demotools.writer import LateParts, read_part, write_part

_TASKS_A_HELPER = 2
# Waiting parts cost a reader's memory, some 300 bytes an episode, and are lost in a kill.
_PARTS_TO_WAIT = 32
_EPISODES_TO_WAIT = 1 << 17
_PARTS_READY = 4


class Decoders(Protocol):
    """Who decodes the parts of files."""

    def decode(self, number: int, file: DemoFile, part: PicklePart, on_error: OnError) -> None:
        """Have one part decoded, now or later."""

    def finish(self) -> LateParts | None:
        """The parts that are not written down; all others are."""


def decode_part(
    folder: Path, number: int, file: DemoFile, part: PicklePart, on_error: OnError
) -> None:
    """Decode one part and write it down; runs in any process."""
    episodes, skipped = decoded_part(file.content, part, file.kind)
    if skipped and on_error == "stop":
        raise not_well_formed(file.path, skipped)
    write_part(folder, number, episodes, {"skipped": skipped})


class _Task(NamedTuple):
    number: int
    file: DemoFile
    part: PicklePart
    on_error: OnError


@contextmanager
def local_decoders(workers: int, folder: Path, *, late: bool) -> Iterator[Decoders]:
    """This process and `workers - 1` helpers, for parts that are written into `folder`.

    late   whether parts may wait until the store is written: their episodes must be those that
           the reader counted, so only where none is left out

    DemotoolsError  a helper died
    """
    _keep_freed_memory()
    if workers == 1:
        yield _LocalDecoders(folder, late=late)
        return
    with helped(decode_part, workers - 1, folder, forked=True) as begin:
        yield _LocalDecoders(folder, begin, _TASKS_A_HELPER * (workers - 1), late=late)


def _keep_freed_memory() -> None:
    """Have memory of up to 16 MiB that is freed used again, here and in helpers forked later.

    glibc gives larger blocks back to the system at once, unless one of their size was freed
    before; and fresh pages cost more than what is done with them.
    """
    np.empty(1 << 24, np.uint8)


class _LocalDecoders:
    """Decodes here whatever the helpers have no room for.

    lengths   part -> steps of its episodes, of the parts that were not written down by the end
    """

    def __init__(
        self,
        folder: Path,
        begin: Callable[..., Future[None]] | None = None,
        room: int = 0,
        *,
        late: bool,
    ) -> None:
        self.lengths: dict[int, NDArray[np.int64]] = {}
        self._folder = folder
        self._begin = begin
        self._room = room
        self._late = late
        self._waiting: deque[_Task] = deque()
        self._under_way: dict[int, tuple[_Task, Future[None]]] = {}
        self._ready: dict[int, Episodes] = {}

    def decode(self, number: int, file: DemoFile, part: PicklePart, on_error: OnError) -> None:
        """Give a part to a helper that has room; else it waits, or an earlier one is decoded."""
        self._waiting.append(_Task(number, file, part, on_error))
        self._collect()
        self._hand_on()
        while self._waiting and (not self._late or self._too_many_wait()):
            decode_part(self._folder, *self._waiting.popleft())

    def finish(self) -> LateParts:
        """Itself: the parts that wait, or that helpers have."""
        if not self._late:
            for _task, future in self._under_way.values():
                future.result()
            return self
        for task in [*self._waiting, *(task for task, _future in self._under_way.values())]:
            self.lengths[task.number] = np.array([len(each) for each in task.part.action])
        return self

    def take(self, number: int) -> Episodes:
        """A part of `lengths`, in their order; decodes others while a helper has this one."""
        self._hand_on()
        while number in self._under_way:
            _task, future = self._under_way[number]
            if future.done() or not self._waiting or len(self._ready) >= _PARTS_READY:
                future.result()
                del self._under_way[number]
                return read_part(self._folder, number)
            self._decode_here()
            self._hand_on()
        if number not in self._ready:
            self._decode_here()
        return self._ready.pop(number)

    def _decode_here(self) -> None:
        task = self._waiting.popleft()
        episodes, skipped = decoded_part(task.file.content, task.part, task.file.kind)
        if skipped:
            raise not_well_formed(task.file.path, skipped)
        self._ready[task.number] = episodes

    def _collect(self) -> None:
        for number, (_task, future) in list(self._under_way.items()):
            if future.done():
                future.result()
                del self._under_way[number]

    def _hand_on(self) -> None:
        """Give helpers that have room the parts that wait longest."""
        while self._begin is not None and self._waiting and self._busy() < self._room:
            task = self._waiting.popleft()
            self._under_way[task.number] = (task, self._begin(self._folder, *task))

    def _busy(self) -> int:
        return sum(not future.done() for _task, future in self._under_way.values())

    def _too_many_wait(self) -> bool:
        episodes = sum(len(task.part.number) for task in self._waiting)
        return len(self._waiting) > _PARTS_TO_WAIT or episodes > _EPISODES_TO_WAIT
