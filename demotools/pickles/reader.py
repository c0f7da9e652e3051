"""Read legacy demonstration pickles: yields their episodes in parts as it reads the file.

Episodes in the usual layout are matched one at a time (`episodes`), everything else is read opcode
by opcode by a machine that runs nothing (`machine`). The frames of images stay in the file: a part
records where they are, so that other processes can decode them. Memory does not grow with the file.

A gzip file is unpacked next to the store while that is being made: several processes read its
frames in any order, which gzip does not support.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from demotools.errors import DemotoolsError, PickleError, from_os_error
from demotools.output import open_regular, working_folder
from demotools.pickles.episodes import (
    PART_STEPS,
    EpisodeMatcher,
    PicklePart,
    column_episodes,
    is_whole_episode,
    pickled_episode,
)
from demotools.pickles.machine import ALLOWED, MAX_BYTES, Machine, TruncatedError, Window

_PUTS = frozenset(b"qr\x94")
_APPEND = ord("a")
_ANNOUNCED_BYTES, _ANNOUNCED_TIMES = 1 << 30, 1000
"""What all views of a file may take: so many bytes, and so many times its size."""
_SAVE = "save its lists with pickle.dump: demotools reads lists of episodes only (docs/pickles.md)"
_UNPACK = "unpack it first, and name the demo file in it:"
_START_BYTES = 512
_OTHER_FILES: tuple[tuple[bytes, str, str], ...] = (
    (rb"version https://git-lfs", "a Git LFS pointer, not the file itself", "run: git lfs pull"),
    (rb"\x80.\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19", "a file of torch.save", _SAVE),
    (
        rb"PK\x03\x04.{26}[^\0]{0,100}?/?(?:data\.pkl|\.format_version)",
        "a file of torch.save",
        _SAVE,
    ),
    (rb"PK\x03\x04.{26}[^\0]{0,100}?\.npy", "a NumPy archive (.npz)", _SAVE),
    (rb"PK\x03\x04", "a zip file", f"{_UNPACK} unzip FILE"),
    (rb"\x93NUMPY", "a NumPy array (.npy)", _SAVE),
    (rb"\x1f\x8b", "a gzip file", f"{_UNPACK} gunzip FILE"),
    (rb"BZh", "a bzip2 file", f"{_UNPACK} bunzip2 FILE"),
    (rb"\xfd7zXZ", "an xz file", f"{_UNPACK} unxz FILE"),
    (rb"\x28\xb5\x2f\xfd", "a zstd file", f"{_UNPACK} unzstd FILE"),
    (rb"7z\xbc\xaf\x27\x1c|Rar!", "a 7z or RAR archive", f"{_UNPACK} 7z x FILE"),
    (rb".{257}ustar", "a tar archive", f"{_UNPACK} tar -xf FILE"),
    (rb"PAR1", "a Parquet file", _SAVE),
    (rb"ARROW1", "an Arrow file", _SAVE),
    (rb"\x89HDF\r\n", "an HDF5 file", f"for Minari use `demotools import`; else {_SAVE}"),
    (
        rb"\x02\x01",
        "a blosc frame, the images of one episode",
        "name the whole demo file, not the images of one episode",
    ),
    (
        rb"(?:\xef\xbb\xbf)?\s*<",
        "a web page, not a demo file (a quota or login page?)",
        "download the file again; `demotools fetch LEVEL` does it and checks the result",
    ),
    (rb"(?:\xef\xbb\xbf)?\s*[\[{]\s*[\"\[{}\]\d-]", "a JSON file", _SAVE),
    (
        rb"[\t\n\r -~]{2,}+(?<!\.)\Z",
        "a text file, not a demo file",
        "name a demo file as BabyAI's make_agent_demos wrote it",
    ),
)
"""What other files begin with, what they are, and what to do with them."""


class PickleReader:
    """Reads one file: iterate over it once; afterwards it knows the file's size and sha256.

    salvage      a file that ends too early gives what is whole; `broken_at` says where it ended
    left_out     what the episodes hold that no store has, with their number
    part_steps   a part ends when its episodes have this many steps

    PickleError        the file is no list of demonstrations, or is damaged
    UnsafePickleError  it names something that no demo file does
    """

    def __init__(self, path: Path, *, salvage: bool = False, part_steps: int = PART_STEPS) -> None:
        self.path = path
        self.broken_at: int | None = None
        self.position = 0
        self.episodes = 0
        self.left_out: Counter[str] = Counter()
        self._announced = 0
        self._salvage = salvage
        self._digest = hashlib.sha256()
        self._part_steps = part_steps
        self._part = PicklePart(most_steps=part_steps)

    @property
    def sha256(self) -> str:
        """The sha256 of the file, once it has been read to its end."""
        return self._digest.hexdigest()

    def __iter__(self) -> Iterator[PicklePart]:
        with open_regular(self.path) as stream:
            window = Window(stream, self._digest.update)
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
                "the pickle holds an empty list, no episode",
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
        self.left_out.update(part.left_out)
        # what announces more than an episode may take is never decoded
        self._announced += sum(holds for holds in part.holds if holds <= MAX_BYTES)
        size = self.path.stat().st_size
        limit = max(_ANNOUNCED_BYTES, _ANNOUNCED_TIMES * size)
        if self._announced > limit:
            raise PickleError(
                f"its views would take more than {limit:,} bytes, the limit for a file of "
                f"{size:,} bytes ({_ANNOUNCED_TIMES:,} times its size, 1 GiB at least)",
                path=self.path,
                fix="check the origin of the file; if its views are real, split it into smaller "
                "files",
            )
        return part

    def _harvest(self, machine: Machine) -> None:
        """Take over the episodes that are complete, so that nothing piles up."""
        if not machine.below:
            items = machine.stack[0]
        else:
            items = machine.stack
            if not items or not is_whole_episode(items[-1]):
                return
            if machine.window.ahead(1):
                following = machine.window.buffer[machine.window.at]
                if following in _PUTS or following == _APPEND:
                    return  # the memo opcode that follows, or a list, needs what is on the stack
        self._take(items)
        items.clear()

    def _take(self, items: Iterable[Any]) -> None:
        for item in items:
            try:
                self._part.add_episode(self.episodes, pickled_episode(item))
            except ValueError as error:
                self._part.skipped.append((self.episodes, str(error)))
            self.episodes += 1

    def _check_end(self, machine: Machine) -> None:
        (value,) = machine.stack
        if type(value) is not list:
            try:
                if type(value) is not dict:
                    raise ValueError(f"holds a {type(value).__name__.lower()}, not a list")
                self._take(column_episodes(value))
            except ValueError as error:
                raise PickleError(
                    f"not supported: the pickle {error} of demonstrations",
                    path=self.path,
                    fix="name a demo file, as BabyAI's make_agent_demos wrote it",
                ) from error
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
            fix=f"get the whole file again, or add --salvage to convert the {whole} intact "
            "episodes",
        )


def _between_items(machine: Machine) -> bool:
    """Whether the machine is between two items of the outermost list."""
    below = machine.below
    if not below:
        return len(machine.stack) == 1 and type(machine.stack[0]) is list
    return len(below) == 1 and len(below[0]) == 1 and type(below[0][0]) is list


def _check_start(window: Window, path: Path) -> None:
    """Refuse what is no pickle of protocol 2 to 5 by its first bytes."""
    if not window.ahead(1):
        raise PickleError(
            "the file is empty",
            path=path,
            fix="get the file again; `demotools fetch LEVEL` downloads one",
        )
    window.ahead(_START_BYTES)
    start = window.buffer[:_START_BYTES]
    for pattern, what, fix in _OTHER_FILES:
        if re.match(pattern, start, re.DOTALL):
            raise PickleError(f"this is {what}", path=path, fix=fix)
    if start[0] != 0x80:
        raise PickleError(
            "this is not a pickle of protocol 2 to 5",
            path=path,
            fix="name a demo file as BabyAI's make_agent_demos wrote it",
        )


_BLOCK_BYTES = 1 << 20
_MOST_BYTES, _MOST_TIMES = 1 << 30, 100


class Content(NamedTuple):
    """Where the content of a file lies, and the sha256 of the file; None: in the file itself."""

    path: Path
    sha256: str | None


@contextmanager
def unpacked(files: Sequence[Path], store: Path, *, salvage: bool) -> Iterator[list[Content]]:
    """The contents of the files, packed or not, until the block ends.

    store     what is made of them: the contents lie beside it
    salvage   what a damaged file gives before its damage is taken

    PickleError  a packed file is cut short, damaged, or unpacks to too much
    """
    packed = {file for file in files if _is_packed(file)}
    if not packed:
        yield [Content(file, None) for file in files]
        return
    folder = store.with_name(f".{store.name}.unpacked")
    names: dict[str, Path] = {}
    contents = []
    try:
        with working_folder(folder):
            for number, file in enumerate(files):
                content = folder / f"{number}.pkl"
                if file in packed:
                    names[str(content)] = file
                    _unpack(file, content, salvage=salvage)
                    with file.open("rb") as stream:
                        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
                    contents.append(Content(content, sha256))
                else:
                    contents.append(Content(file, None))
            yield contents
    except DemotoolsError as error:
        error.path = str(names.get(error.path, error.path))
        raise
    except OSError as error:
        raise from_os_error(error, folder) from error


def _is_packed(path: Path) -> bool:
    with open_regular(path) as stream:
        return stream.read(2) == b"\x1f\x8b"


def _unpack(path: Path, content: Path, *, salvage: bool) -> None:
    most = max(_MOST_BYTES, _MOST_TIMES * path.stat().st_size)
    with gzip.open(path) as stream, content.open("wb") as target:
        problem = ""
        try:
            while block := stream.read1(_BLOCK_BYTES):
                target.write(block)
                if target.tell() > most:
                    raise PickleError(
                        f"this gzip file unpacks to more than {most:,} bytes, the limit for its "
                        f"size ({_MOST_TIMES} times, 1 GiB at least)",
                        path=path,
                        fix="check where it comes from; if it is genuine, unpack it: gunzip FILE",
                    )
        except EOFError:
            problem = "is cut short"
        except (gzip.BadGzipFile, zlib.error) as error:
            problem = f"is damaged: {error}"
        if problem and not (salvage and target.tell()):
            raise PickleError(
                f"this gzip file {problem}",
                path=path,
                fix="get the whole file again, or add --salvage to convert the intact part",
            )
