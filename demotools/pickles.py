"""Read legacy demonstration pickles: episodes come out in parts as the file is read.

What matches the usual spelling is taken an episode at a time (`spelling`), all else opcode by
opcode on a machine that cannot do anything (`opcodes`). The frames of images stay in the file: a
part says where they lie, so that other processes can decode them. Memory does not grow with the
file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from demotools.errors import PickleError
from demotools.inert import ALLOWED, TruncatedError, Window
from demotools.layouts import PART_STEPS, PicklePart, pickled_episode
from demotools.opcodes import Machine
from demotools.pickle_writer import write_pickle
from demotools.spelling import EpisodeMatcher

__all__ = ["PickleReader", "write_pickle"]

_PUTS = frozenset(b"qr\x94")
_OTHER_FILES = {
    b"\x1f\x8b": ("a gzip file", "unpack it first: gunzip FILE"),
    b"PK\x03\x04": ("a zip file", "unpack it first: unzip FILE"),
    b"BZh": ("a bzip2 file", "unpack it first: bunzip2 FILE"),
    b"\xfd7zXZ": ("an xz file", "unpack it first: unxz FILE"),
    b"\x28\xb5\x2f\xfd": ("a zstd file", "unpack it first: unzstd FILE"),
    b"\x02\x01": (
        "a blosc frame, the images of one episode",
        "name the whole demo file, not an episode's part of it",
    ),
    b"<": (
        "a web page, not a demo file (a quota or login page?)",
        "download the file again; `demotools fetch LEVEL` does it and checks the result",
    ),
}


class PickleReader:
    """Reads one file: iterate over it once; afterwards it knows the file's size and sha256.

    salvage      a file that ends too early gives what is whole; `broken_at` says where it ended
    part_steps   a part ends when its episodes have this many steps

    PickleError        the file is no list of demonstrations, or is damaged
    UnsafePickleError  it names something that no demo file does
    """

    def __init__(self, path: Path, *, salvage: bool = False, part_steps: int = PART_STEPS) -> None:
        self.path = path
        self.broken_at: int | None = None
        self.position = 0
        self.episodes = 0
        self._salvage = salvage
        self._digest = hashlib.sha256()
        self._part_steps = part_steps
        self._part = PicklePart(most_steps=part_steps)

    @property
    def sha256(self) -> str:
        """The sha256 of the file, once it has been read to its end."""
        return self._digest.hexdigest()

    def __iter__(self) -> Iterator[PicklePart]:
        with self.path.open("rb") as stream:
            window = Window(stream, self._digest)
            _check_start(window, self.path)
            machine = Machine(window, self.path, frozenset(ALLOWED.values()))
            try:
                yield from self._parts(machine)
                self._check_end(machine)
            except TruncatedError:
                self._end_early()
            self.position = window.position
        if self._part.number or self._part.skipped:
            yield self._next_part()
        if not self.episodes:
            raise PickleError(
                "the pickle holds an empty list",
                path=self.path,
                fix="get the file again, or record demonstrations with `demotools generate`",
            )

    def _parts(self, machine: Machine) -> Iterator[PicklePart]:
        matcher: EpisodeMatcher | None = None
        while not machine.stopped:
            if _between_items(machine):
                self._harvest(machine)
                if not machine.stack and machine.below:
                    matcher = matcher or EpisodeMatcher(machine)
                    self.episodes += matcher.take(self._part, self.episodes)
                if self._part.full:
                    self.position = machine.window.position
                    yield self._next_part()
            machine.step()

    def _next_part(self) -> PicklePart:
        part, self._part = self._part, PicklePart(most_steps=self._part_steps)
        return part

    def _harvest(self, machine: Machine) -> None:
        """Take over the episodes that are complete, so that nothing piles up."""
        if not machine.below:
            items = machine.stack[0]
        else:
            items = machine.stack
            if not items or type(items[-1]) is not tuple or len(items[-1]) != 4:
                return
            if machine.window.ahead(1) and machine.window.buffer[machine.window.at] in _PUTS:
                return  # the memo opcode that follows needs the episode on the stack
        for item in items:
            try:
                self._part.add_episode(self.episodes, pickled_episode(item))
            except ValueError as error:
                self._part.skipped.append((self.episodes, str(error)))
            self.episodes += 1
        items.clear()

    def _check_end(self, machine: Machine) -> None:
        (value,) = machine.stack
        if type(value) is not list:
            raise PickleError(
                f"the pickle holds a {type(value).__name__.lower()}, not a list of demonstrations",
                path=self.path,
                fix="name a demo file, as BabyAI's make_agent_demos wrote it",
            )
        if machine.window.ahead(1):
            raise machine.damaged("it goes on after its end")

    def _end_early(self) -> None:
        size = self.path.stat().st_size
        whole = self.episodes
        if self._salvage and whole:
            self.broken_at = size
            return
        raise PickleError(
            f"the file is cut short: it ends at byte {size} in the middle of episode {whole}",
            path=self.path,
            fix=f"get the whole file again, or add --salvage to convert the {whole} episodes "
            "that are whole",
        )


def _between_items(machine: Machine) -> bool:
    """Whether the machine is between two items of the outermost list."""
    below = machine.below
    if not below:
        return len(machine.stack) == 1 and type(machine.stack[0]) is list
    return len(below) == 1 and len(below[0]) == 1 and type(below[0][0]) is list


def _check_start(window: Window, path: Path) -> None:
    """Refuse what is no pickle of protocol 2 to 5 by its first bytes."""
    if not window.ahead(2):
        raise PickleError("the file is empty", path=path, fix="get the file again")
    start = window.buffer[:64].lstrip()
    for magic, (what, fix) in _OTHER_FILES.items():
        if start.startswith(magic):
            raise PickleError(f"this is {what}", path=path, fix=fix)
    if window.buffer[0] != 0x80:
        raise PickleError(
            "this is not a pickle of protocol 2 to 5",
            path=path,
            fix="name a demo file as BabyAI's make_agent_demos wrote it",
        )
