"""Write legacy demonstration pickles, opcode by opcode, as CPython's pickler would.

For tests, benchmarks, and programs that only read the old layout. Writing the opcodes directly,
without `pickle`, needs neither a substitute for `gym_minigrid` nor a list of all episodes.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

from demotools.babyai.cells import unpacked_cells
from demotools.output import written_whole
from demotools.store.reading import Episodes

_BATCH = 1000


def write_pickle(path: Path, episodes: Iterable[Episodes], *, enum_actions: bool = True) -> None:
    """Write blocks of episodes as one demo file that babyai's own loader reads.

    The file is as Python 3.6 and 3.7 wrote it: protocol 3, the action class by `getattr`.

    episodes       packed cells are written as images, images as they are
    enum_actions   False: actions as plain numbers, as files of a network's demonstrations have

    DemotoolsError  the disk is full, the folder is missing
    """
    with written_whole(path) as stream:
        _Pickler(stream, enum_actions=enum_actions).write(_tuples(episodes))


_Row = tuple[str, bytes, list[int], list[int]]


def _tuples(blocks: Iterable[Episodes]) -> Iterator[_Row]:
    for block in blocks:
        packed = block.view.ndim == 3
        offset = block.offset.tolist()
        for number, mission in enumerate(block.mission):
            steps = slice(offset[number], offset[number + 1])
            view = block.view[steps]
            images = unpacked_cells(view) if packed else view
            yield (
                mission,
                packed_array(images),
                block.direction[steps].tolist(),
                block.action[steps].tolist(),
            )


def packed_array(images: NDArray[np.uint8]) -> bytes:
    """What `blosc.pack_array` makes of an array, spelled as numpy 1 did, which both read."""
    raw = pickle.dumps(images, 4)
    new, old = b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray"
    if new in raw[:64]:
        size = int.from_bytes(raw[3:11], "little") - 1
        raw = raw[:3] + size.to_bytes(8, "little") + raw[11:].replace(new, old, 1)
    frame: bytes = blosc.compress(raw, b"blosclz", 9, blosc.SHUFFLE)
    return frame


class _Pickler:
    """The opcodes of one file."""

    def __init__(self, stream: IO[bytes], *, enum_actions: bool) -> None:
        self._emit = stream.write
        self._enum = enum_actions
        self._memo_size = 0
        self._actions: dict[int, bytes] = {}
        self._class = b""

    def write(self, rows: Iterable[_Row]) -> None:
        self._emit(b"\x80\x03]" + self._put())
        waiting = iter(rows)
        while batch := list(islice(waiting, _BATCH)):
            self._emit(b"(" if len(batch) > 1 else b"")
            for row in batch:
                self._write_row(row)
            self._emit(b"e" if len(batch) > 1 else b"a")
        self._emit(b".")

    def _write_row(self, row: _Row) -> None:
        mission, frame, direction, action = row
        self._emit(b"(")
        self._write_text(mission)
        size = len(frame)
        head = b"C" + bytes([size]) if size < 256 else b"B" + size.to_bytes(4, "little")
        self._emit(head + frame + self._put())
        self._write_numbers(direction, enum=False)
        self._write_numbers(action, enum=self._enum)
        self._emit(b"t" + self._put())

    def _write_text(self, text: str) -> None:
        data = text.encode("utf-8", "surrogatepass")
        self._emit(b"X" + len(data).to_bytes(4, "little") + data + self._put())

    def _write_numbers(self, numbers: list[int], *, enum: bool) -> None:
        self._emit(b"]" + self._put())
        for start in range(0, len(numbers), _BATCH):
            batch = numbers[start : start + _BATCH]
            if len(batch) > 1:
                self._emit(b"(")
            for number in batch:
                self._write_action(number) if enum else self._emit(b"K" + bytes([number]))
            self._emit(b"e" if len(batch) > 1 else b"a")

    def _write_action(self, number: int) -> None:
        """An action: by its number the first time, out of the memo from then on."""
        if number not in self._actions:
            self._write_class()
            self._emit(b"K" + bytes([number]) + b"\x85" + self._put() + b"R" + self._put())
            self._actions[number] = self._get(self._memo_size - 1)
        else:
            self._emit(self._actions[number])

    def _write_class(self) -> None:
        if self._class:
            self._emit(self._class)
            return
        self._emit(b"cbuiltins\ngetattr\n" + self._put())
        self._emit(b"cgym_minigrid.minigrid\nMiniGridEnv\n" + self._put())
        self._write_text("Actions")
        self._emit(b"\x86" + self._put() + b"R" + self._put())
        self._class = self._get(self._memo_size - 1)

    def _put(self) -> bytes:
        slot, self._memo_size = self._memo_size, self._memo_size + 1
        return b"q" + bytes([slot]) if slot < 256 else b"r" + slot.to_bytes(4, "little")

    def _get(self, slot: int) -> bytes:
        return b"h" + bytes([slot]) if slot < 256 else b"j" + slot.to_bytes(4, "little")
