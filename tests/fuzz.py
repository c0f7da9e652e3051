"""Mutates legal demo files and holds the reader to its promise; run as a process of its own.

    python -m tests.fuzz FOLDER FIRST COUNT

The promise: a clean refusal, or episodes that are well formed; no crash, no hang over ten seconds,
less than a gigabyte, no import, no other file, no process. Prints what broke it, one line each.
"""

from __future__ import annotations

import pickle
import random
import resource
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numcodecs import blosc

from demotools.babyai.cells import EGOCENTRIC_CODES, Encoding
from demotools.errors import DemotoolsError
from demotools.pickles.images import CELL_VIEW, ViewKind, decoded_part
from demotools.pickles.reader import PickleReader
from demotools.pickles.writer import write_pickle
from demotools.store.reading import Episodes
from tests.conftest import make_episodes
from tests.hostile import HOSTILE
from tests.pickles.test_pickles import MiniGridEnv, demos_of, gym_minigrid_modules

MEMORY_BYTES = 1 << 30
SECONDS = 10
KINDS = [
    *[ViewKind(CELL_VIEW, Encoding.TODAY)] * 5,
    *[ViewKind(CELL_VIEW, encoding) for encoding in Encoding],
    *[ViewKind((4, 5, 3), None)] * 2,
]
FORBIDDEN = ("import", "os.", "subprocess.", "socket.", "shutil.", "ctypes.", "exec", "compile")


def legal_files(folder: Path) -> list[bytes]:
    """One small file of every layout and pickler."""
    blocks = [make_episodes([3, 1, 12, 2])]
    files = []
    write_pickle(folder / "legal.pkl", blocks)
    files.append((folder / "legal.pkl").read_bytes())
    files.append(pickle.dumps(demos_of(blocks[0]), 4))
    with mock.patch.dict(sys.modules, gym_minigrid_modules()):
        files.append(pickle.dumps(demos_of(blocks[0], MiniGridEnv.Actions), 4))
    for protocol in (2, 3, 4, 5):
        for shape in (CELL_VIEW, (4, 5, 3)):
            files.append(pickle.dumps(plain_rows(shape, protocol), protocol))
    image = np.zeros(CELL_VIEW, np.uint8)
    step = ({"image": image, "direction": 1, "mission": "go to the red ball"}, 2, 0.5, False)
    files += [pickle.dumps([[step, step], [step]], 3), pickle.dumps([([step], 7)], 2)]
    for protocol in (2, 4):
        rows = [(*row, ["go"], 0.5, 7) for row in plain_rows(CELL_VIEW, protocol)]
        names = ("instructions", "images", "directions", "actions")
        fields = zip(*plain_rows(CELL_VIEW, protocol), strict=True)
        columns = {name: list(values) for name, values in zip(names, fields, strict=True)}
        files += [pickle.dumps(rows, protocol), pickle.dumps(columns, protocol)]
        array = np.ones((3, *CELL_VIEW), np.float32)
        arrays = [("go to it", array, np.array([0, 1]), np.array([2, 2.0]))]
        files.append(pickle.dumps(arrays, protocol))
    return files


def plain_rows(shape: tuple[int, ...], protocol: int) -> list[Any]:
    rows = []
    for steps in (2, 1, 7):
        images = np.ones((steps, *shape), np.uint8)
        frame = blosc.compress(pickle.dumps(images, protocol), b"blosclz", 9, blosc.SHUFFLE)
        directions = list(np.arange(steps) % 4)  # numpy integers
        rows.append(("pick up the grey box", frame, directions, [2] * steps))
    return rows


def mutated(content: bytes, others: list[bytes], dice: random.Random) -> bytes:
    """The file with one to four changes."""
    data = bytearray(content)
    for _ in range(dice.randint(1, 4)):
        dice.choice(MUTATIONS)(data, others, dice)
    return bytes(data)


def with_mutated_images(others: list[bytes], dice: random.Random) -> bytes:
    """A legal file around one frame whose inner pickle is mutated."""
    inner = pickle.dumps(np.ones((2, *CELL_VIEW), np.uint8), dice.choice([2, 3, 4, 5]))
    frame = blosc.compress(mutated(inner, others, dice), b"blosclz", 9, blosc.SHUFFLE)
    return pickle.dumps([("go to a door", frame, [0, 1], [2, 2])], dice.choice([2, 3, 4, 5]))


def _place(data: bytearray, dice: random.Random) -> int:
    return dice.randrange(len(data) + 1)


def flip(data: bytearray, _others: list[bytes], dice: random.Random) -> None:
    if data:
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)


def replace(data: bytearray, _others: list[bytes], dice: random.Random) -> None:
    if data:
        data[dice.randrange(len(data))] = dice.randrange(256)


def cut(data: bytearray, _others: list[bytes], dice: random.Random) -> None:
    start = _place(data, dice)
    del data[start : start + int(dice.expovariate(0.05))]


def truncate(data: bytearray, _others: list[bytes], dice: random.Random) -> None:
    del data[_place(data, dice) :]


def splice(data: bytearray, others: list[bytes], dice: random.Random) -> None:
    other = dice.choice(others)
    start = dice.randrange(len(other))
    piece = other[start : start + int(dice.expovariate(0.02))]
    at = _place(data, dice)
    data[at : at + dice.choice([0, len(piece)])] = piece


def splice_opcode(data: bytearray, _others: list[bytes], dice: random.Random) -> None:
    at = _place(data, dice)
    data[at:at] = dice.choice(OPCODES)


def announce(data: bytearray, _others: list[bytes], dice: random.Random) -> None:
    at = _place(data, dice)
    number = dice.choice([0, 1, 255, 256, 1 << 16, 1 << 24, (1 << 27) - 1, (1 << 31) - 1, 1 << 31])
    data[at : at + 4] = struct.pack("<I", number)


MUTATIONS: list[Callable[[bytearray, list[bytes], random.Random], None]] = [
    *(flip, replace, cut, truncate, splice, splice_opcode, announce),
]
OPCODES = [
    *(bytes([code]) for code in b"().0]}aeubstRN12\x85\x86\x87\x88\x89\x8f\x90\x91\x93\x94"),
    *(b"K\x07", b"M\xff\xff", b"J\xff\xff\xff\xff", b"h\x00", b"q\x00", b"h\x05", b"j\x01\0\0\0"),
    *(b"r\xff\xff\xff\x7f", b"\x8a\x08" + b"\xff" * 8, b"G" + b"\xff" * 8, b"\x95" + b"\xff" * 8),
    *(b"cos\nsystem\n", b"cbuiltins\ngetattr\n", b"cnumpy\nndarray\n", b"\x82\x01", b"Px\n", b"Q"),
    *(b"\x81", b"o", b"\x96" + b"\x00" * 8, b"B\xff\xff\xff\x7f", b"X\xff\xff\xff\x7f", b"\x97"),
]


def check_well_formed(episodes: Episodes, kind: ViewKind) -> None:
    """Assert what every store needs."""
    steps = int(episodes.length.sum())
    count = len(episodes.length)
    assert (episodes.length >= 1).all()
    assert len(episodes.mission) == len(episodes.seed) == count
    assert all(type(text) is str and text for text in episodes.mission)
    assert episodes.action.shape == episodes.direction.shape == (steps,)
    assert not steps or (episodes.action.max() <= 6 and episodes.direction.max() <= 3)
    assert episodes.view.shape == (steps, *(kind.shape[:2] if kind.encoding else kind.shape))
    assert not steps or not kind.encoding or episodes.view.max() < EGOCENTRIC_CODES


class Guard:
    """Notes every forbidden thing that the interpreter does while it is on."""

    def __init__(self, allowed: Path) -> None:
        self.on = False
        self.seen: list[str] = []
        self._allowed = str(allowed)
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[object, ...]) -> None:
        if not self.on:
            return
        # a number is a file that is open already
        named = event == "open" and not isinstance(arguments[0], int)
        opened = named and str(arguments[0]) != self._allowed
        if opened or event.startswith(FORBIDDEN):
            self.seen.append(f"{event} {arguments}"[:200])


def read_all(path: Path, dice: random.Random) -> int:
    """The number of episodes that the reader finds; asserts that they are well formed."""
    kind = dice.choice(KINDS)
    found = 0
    for part in PickleReader(path, salvage=dice.random() < 0.5):
        episodes, _skipped = decoded_part(path, part, kind)
        check_well_formed(episodes, kind)
        found += len(episodes.length)
    return found


def main() -> None:
    folder, first, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    legal = legal_files(folder)
    others = legal + [content for content, _what in HOSTILE.values() if len(content) < 5000]
    path = folder / f"mutated{first}.pkl"
    guard = Guard(path)
    refused = passed = 0
    for number in range(first, first + count):
        dice = random.Random(number)
        if number % 4:
            path.write_bytes(mutated(dice.choice(legal), others, dice))
        else:
            path.write_bytes(with_mutated_images(others, dice))
        signal.alarm(SECONDS)
        guard.on = True
        try:
            passed += read_all(path, dice) > 0
        except DemotoolsError:
            refused += 1
        finally:
            guard.on = False
            signal.alarm(0)
        if guard.seen:
            sys.exit(f"mutation {number}: {guard.seen}")
    sys.stdout.write(f"{refused} refused, {passed} with episodes\n")


if __name__ == "__main__":
    main()
