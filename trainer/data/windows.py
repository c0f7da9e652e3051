"""Reading a store that is larger than memory: the next window of the order, from front to back.

With `shuffle = "windowed"` the rollouts play one window of neighbouring episodes after another.
While they play one, a thread reads the next through the system's page cache in large blocks, so
that the gathers hardly ever wait for single pages. Nothing is kept: the blocks are thrown away,
and the system drops the pages when it needs the room.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from demotools.errors import from_os_error
from demotools.output import open_regular
from demotools.store.reading import StepArray, Store, chunk_files
from trainer.data.order import Cursors, Queues

_BLOCK_BYTES = 1 << 20


class WindowReader:
    """Reads the windows of one store, one ahead of the rollouts."""

    def __init__(self, store: Store, queues: Queues) -> None:
        self._store = store
        self._queues = queues
        self._windows = -(-queues.order.episodes // queues.order.window)
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._thread = ThreadPoolExecutor(1, "windows")
        self._last = -1

    def follow(self, cursors: Cursors, first_rollout: int) -> None:
        """Begin to read the windows up to the one after the foremost rollout's.

        cursors  of the rollouts `first_rollout`, `first_rollout` + 1, ...
        """
        if self._process != os.getpid():
            self._begin()  # a fork has no threads
        numbers = first_rollout + np.arange(len(cursors.epoch))
        slot = (numbers + cursors.position * self._queues.rollouts) // self._queues.order.window
        foremost = int((cursors.epoch * self._windows + slot).max())
        for window in range(max(self._last + 1, foremost), foremost + 2):
            self._thread.submit(self._read, window)
            self._last = window

    def _read(self, window: int) -> None:
        names = {"cells" if self._store.packed else "image": self._store.view}
        names |= {"action": self._store.action, "direction": self._store.direction}
        block = bytearray(_BLOCK_BYTES)
        for start, stop in self._spans(*divmod(window, self._windows)):
            for name, array in names.items():
                for file, first, last in _file_ranges(self._store, name, array, start, stop):
                    _read_through(file, first, last, block)

    def _spans(self, epoch: int, slot: int) -> Iterator[tuple[int, int]]:
        """The steps of a window, as one or two half-open ranges."""
        order, chosen, offset = self._queues.order, self._queues.chosen, self._queues.offset
        first = order.window_start(epoch, slot)
        count = min(order.window, order.episodes - slot * order.window)
        for begin, end in (
            (first, min(first + count, order.episodes)),
            (0, first + count - order.episodes),
        ):
            if begin < end:
                low, high = (begin, end - 1) if chosen is None else chosen[[begin, end - 1]]
                yield int(offset[low]), int(offset[high + 1])


def _file_ranges(
    store: Store, name: str, array: StepArray, start: int, stop: int
) -> Iterator[tuple[Path, int, int]]:
    """(chunk file, first byte, byte after the last) for the steps [start, stop)."""
    row_bytes = int(np.prod(array.shape[1:]))
    files = chunk_files(store.path, name)
    for number in range(start // array.chunk_length, (stop - 1) // array.chunk_length + 1):
        begin = number * array.chunk_length
        low, high = max(start - begin, 0), min(stop - begin, array.chunk_length)
        yield files[number], low * row_bytes, high * row_bytes


def _read_through(file: Path, first: int, last: int, block: bytearray) -> None:
    try:
        with open_regular(file) as stream:
            for begin in range(first, last, len(block)):
                os.preadv(stream.fileno(), [block], begin)
    except OSError as error:
        raise from_os_error(error, file) from error
