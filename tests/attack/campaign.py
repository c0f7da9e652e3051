"""What an attack is, how commands are typed at in it, and how its figures are kept."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import FrameType

import click
from click.testing import CliRunner

RESULTS = Path(__file__).with_name("results.json")
PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
TRIAL_SECONDS = 120
"""A command that has said nothing by then hangs, which is no way of holding a promise."""


@dataclass
class Arena:
    """What an attack works with.

    folder    empty, of this attack alone
    dice      seeded: the same attack tries the same things
    seconds   for trials, from the first that asks whether there is time
    tried     how many things it has tried, and `held` how many of them the promise survived
    failures  what broke it, a line each
    """

    folder: Path
    dice: random.Random
    seconds: float
    tried: int = 0
    held: int = 0
    failures: list[str] = field(default_factory=list)
    _start: float | None = None

    def note(self, what: str, problem: str) -> None:
        """Count one thing tried; `problem` is empty where the promise held."""
        self.tried += 1
        self.held += not problem
        if problem:
            text = f"{what}: {problem}"[:500]
            self.failures.append(text.encode("ascii", "backslashreplace").decode())

    @property
    def time_left(self) -> bool:
        """Whether there is time for another trial."""
        if self._start is None:
            self._start = time.monotonic()
        return time.monotonic() < self._start + self.seconds


@dataclass(frozen=True)
class Attack:
    """A promise and the function that attacks it."""

    name: str
    promise: str
    run: Callable[[Arena], None]


@dataclass(frozen=True)
class Figure:
    """What became of one attack: a row of the page."""

    name: str
    promise: str
    tried: int
    held: int
    seconds: float
    failures: list[str]


ATTACKS: dict[str, Attack] = {}


def attack(name: str, promise: str) -> Callable[[Callable[[Arena], None]], Callable[[Arena], None]]:
    """Enter a function as the attack on a promise."""

    def entered(function: Callable[[Arena], None]) -> Callable[[Arena], None]:
        ATTACKS[name] = Attack(name, promise, function)
        return function

    return entered


def conducted(chosen: Sequence[Attack], seconds: float, seed: int) -> Iterator[Figure]:
    """Run attacks one after another, each for so many seconds beside its set-up."""
    for one in chosen:
        folder = Path(tempfile.mkdtemp(prefix=f"attack-{one.name.replace(' ', '-')}-"))
        start = time.monotonic()
        arena = Arena(folder, random.Random(seed), seconds)
        try:
            one.run(arena)
        # an attack that cannot be carried out is a failure of the campaign, not the end of it
        except Exception:  # noqa: BLE001
            arena.note("the attack itself", traceback.format_exc(limit=3))
        finally:
            _open_up(folder)
            shutil.rmtree(folder, ignore_errors=True)
        took = round(time.monotonic() - start, 1)
        yield Figure(one.name, one.promise, arena.tried, arena.held, took, arena.failures[:20])


def _open_up(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)


def keep(figures: Sequence[Figure]) -> None:
    """Put figures among those kept, in the order of `ATTACKS`, and write the page anew."""
    known = {row["name"]: row for row in kept()["attacks"]}
    known |= {figure.name: asdict(figure) for figure in figures}
    content = {
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("demotools", "torch", "zarr", "numpy")},
        "attacks": [known[name] for name in ATTACKS if name in known],
    }
    RESULTS.write_text(json.dumps(content, indent=1, ensure_ascii=True) + "\n", "utf-8")
    PAGE.write_text(page_with_figures(PAGE.read_text("utf-8")), "utf-8")


def kept() -> dict[str, list[dict[str, object]]]:
    """The figures of earlier runs."""
    if not RESULTS.is_file():
        return {"attacks": []}
    content: dict[str, list[dict[str, object]]] = json.loads(RESULTS.read_text("utf-8"))
    return content


def page_with_figures(page: str) -> str:
    """The page with the figures that are kept in the place of those it has."""
    rows = [
        "| attack | promise | trials | held | seconds |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in kept()["attacks"]:
        cells = (row[key] for key in ("name", "promise", "tried", "held", "seconds"))
        rows.append(f"| {' | '.join(map(str, cells))} |")
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + "\n" + "\n".join(rows) + "\n" + END + rest.partition(END)[2]


# -- typing commands ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """How a command ended.

    problem   empty, or why no command may end like this: a traceback, a hang, a signal
    """

    code: int
    text: str
    problem: str


def typed(*words: object, seconds: float = TRIAL_SECONDS) -> Answer:
    """Run a command inside this process: a hundred times as fast as a process of its own."""
    program, *arguments = map(str, words)
    main = _program(program)
    with _alarm(seconds) as hung:
        result = CliRunner().invoke(main, arguments)
    text, error = result.output, result.exception
    if hung:
        return Answer(-1, text, f"no answer after {seconds:.0f} s")
    if error is not None and not isinstance(error, SystemExit):
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        return Answer(1, text, f"{type(error).__name__} at {where}: {error}")
    return Answer(result.exit_code, text, _wrong_words(result.exit_code, text))


def forked(*words: object, preparation: Callable[[], None]) -> Answer:
    """Run a command in a copy of this process, changed by `preparation`.

    As quick as `typed`, and what it does to the process and its modules ends with the copy.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        preparation()
        sender.send(typed(*words))

    process = context.Process(target=run)
    process.start()
    sender.close()
    try:
        if not receiver.poll(TRIAL_SECONDS):
            process.kill()
        answer: Answer = receiver.recv()
    except EOFError:
        answer = Answer(-1, "", "the process ended in the middle of its command")
    process.join()
    return answer


def started(
    *words: object,
    before: Sequence[str] = (),
    preparation: Callable[[], None] | None = None,
    **variables: str,
) -> subprocess.Popen[bytes]:
    """A command in a process of its own, the leader of a group that can be killed as one.

    before   words of a program that starts it in its own way
    """
    program, *arguments = map(str, words)
    return subprocess.Popen(
        [*before, sys.executable, "-m", program, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        preexec_fn=preparation,  # no threads are running here
        start_new_session=True,
    )


def ended(process: subprocess.Popen[bytes], seconds: float = TRIAL_SECONDS) -> Answer:
    """Wait for a process that was `started`."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill(process)
        return Answer(-1, "", f"no answer after {seconds:.0f} s")
    text = output.decode("utf-8", "replace")
    code = process.returncode
    return Answer(code, text, _wrong_words(code, text))


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that it started, as a machine without power would."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _wrong_words(code: int, text: str) -> str:
    if "Traceback (most recent call last)" in text:
        return "a traceback: " + text.strip().splitlines()[-1]
    if code < 0:
        return f"ended by signal {-code}"
    if code == 1 and "next:" not in text:
        return f"a refusal without its three parts: {text.strip()[-200:]!r}"
    return ""


def _program(name: str) -> click.Command:
    command: click.Command = importlib.import_module(f"{name}.cli").main
    return command


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[list[bool]]:
    rung: list[bool] = []

    def ring(_number: int, _frame: FrameType | None) -> None:
        rung.append(True)
        raise TimeoutError("the command hangs")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield rung
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# -- looking at what is left ----------------------------------------------------------------------


def digest(path: Path) -> str:
    """Of a file or of all files of a folder, names and bytes; empty where there is nothing."""
    if not path.exists():
        return ""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    total = hashlib.sha256()
    for file in files:
        total.update(str(file.relative_to(path)).encode("utf-8", "surrogateescape") + b"\0")
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def litter(folder: Path, known: Sequence[str] = ()) -> list[str]:
    """Files that no command would name, and that nobody wants: all hidden ones but locks."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.name.startswith(".") and not path.name.endswith(".lock") and path.name not in known
    )


def special_file(path: Path, kind: str) -> None:
    """Put a pipe, a socket's place-holder, a device or a folder at `path`."""
    if path.exists() or path.is_symlink():
        path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        raise ValueError(kind)


def is_pipe(path: Path) -> bool:
    """Whether a pipe lies there still."""
    return stat.S_ISFIFO(path.lstat().st_mode)
