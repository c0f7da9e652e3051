"""File access: writes that are all or nothing, reads of regular files only, locks, progress bars.

Everything that writes a final file uses `written_whole`; everything that opens a file named by a
user, or by somebody else's data, uses `open_regular`; whatever creates or replaces something holds
its `acquired_lock`.
"""

from __future__ import annotations

import errno
import glob
import io
import logging
import os
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import filelock
import platformdirs

from demotools.errors import DemotoolsError, StoreError, from_os_error, os_refusals, printable_text

if TYPE_CHECKING:
    from tqdm import tqdm

_log = logging.getLogger(__name__)

_LINE_SECONDS = 60.0
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def check_output(path: Path, *, overwrite: bool) -> None:
    """DemotoolsError where `path` must not or cannot be written: to be asked before the work."""
    if path.exists() and not path.is_file():
        raise DemotoolsError(
            "this is a folder, a device or a pipe; output must be a regular file",
            path=path,
            fix="name a file",
        )
    if path.exists() and not overwrite:
        raise DemotoolsError(
            "the file already exists", path=path, fix="add --overwrite to replace it"
        )
    if not path.parent.is_dir():
        raise DemotoolsError(
            "there is no such folder", path=path.parent, fix="create it, or name another file"
        )
    if not os.access(path.parent, os.W_OK):
        raise DemotoolsError(
            "this folder is not writable", path=path.parent, fix="name a file in another folder"
        )


@contextmanager
def written_whole(path: Path, *, synced: bool = True) -> Iterator[IO[bytes]]:
    """A stream whose content appears under `path` when the block ends, and only when it ends well.

    The temporary file lies in the same folder under a name that nobody else has; it is synced to
    the disk before it is renamed. Where `path` is a link to a file, that file is replaced.

    synced   False where a file that a power cut damages is found out and made again

    DemotoolsError  the disk is full or cannot be written; `path` is no regular file
    """
    target = path.resolve()
    temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(6)}.tmp")
    try:
        if target.exists() and not target.is_file():
            raise IsADirectoryError(errno.EISDIR, "output must be a regular file")
        if synced:  # what is not goes into a folder that is thrown away
            _remove_what_was_killed(target)
        with _locked_file(temporary) as stream:
            yield stream
            stream.flush()
            if synced:
                os.fsync(stream.fileno())
        temporary.replace(target)
    except OSError as error:
        # the user named `path`, not the temporary file that the error names
        raise from_os_error(OSError(error.errno, error.strerror), path) from error
    finally:
        temporary.unlink(missing_ok=True)


def _remove_what_was_killed(target: Path) -> None:
    """Remove temporary files of writers of `target` that have ended: nobody has them locked."""
    for left in target.parent.glob(f".{glob.escape(target.name[:200])}.????????????.tmp"):
        with suppress(OSError), left.open("rb") as stream:
            if _locked(stream, wait=False):
                left.unlink()


def _locked_file(path: Path) -> IO[bytes]:
    """A new file, locked until it is closed."""
    while True:
        stream = path.open("xb")
        # before it was locked, another may have taken it for one that was left
        if not _locked(stream, wait=True) or path.exists():
            return stream
        stream.close()


def _locked(stream: IO[bytes], *, wait: bool) -> bool:
    """Lock an open file until it is closed; False where another has it, or none can be had."""
    try:
        import fcntl

        fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (ImportError, OSError):  # Windows, or a file system without locks
        return False
    return True


def write_output(path: Path, content: bytes, *, overwrite: bool) -> None:
    """Write `content` to `path`, which appears only when whole.

    DemotoolsError  see `check_output` and `written_whole`
    """
    check_output(path, overwrite=overwrite)
    with written_whole(path) as stream:
        stream.write(content)


def check_room(folder: Path, size_bytes: float) -> None:
    """DemotoolsError where the disk has less free than `size_bytes`."""
    free = shutil.disk_usage(folder).free
    if size_bytes > free:
        raise DemotoolsError(
            f"the disk has {free:,} bytes free, but {int(size_bytes):,} are needed",
            path=folder,
            fix="free some space, or name another folder with --data-dir",
        )


def open_regular(path: Path) -> io.BufferedReader:
    """A regular file open for reading; a pipe or a device, which may never answer, is refused.

    DemotoolsError  missing, not readable, or no regular file
    """
    with os_refusals(path):
        # without O_NONBLOCK opening a pipe waits for a writer, for ever
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise DemotoolsError(
            "this is a folder, a device or a pipe, not a regular file",
            path=path,
            fix="name a file",
        )
    return os.fdopen(number, "rb")


def read_regular(path: Path, at_most: int | None = None) -> bytes:
    """The content of a regular file.

    DemotoolsError  see `open_regular`; or it has more than `at_most` bytes
    """
    with open_regular(path) as stream:
        content = stream.read(-1 if at_most is None else at_most + 1)
    if at_most is not None and len(content) > at_most:
        raise DemotoolsError("the file is far too large", path=path, fix="name another file")
    return content


def acquired_lock(path: Path) -> filelock.BaseFileLock:
    """The lock of whoever makes or replaces `path`; release it.

    Where the file system has no locks (some network file systems) a file stands for the lock; that
    is said, because a process that is killed leaves it behind.

    StoreError  another process has it
    """
    lock: filelock.BaseFileLock = filelock.FileLock(path.with_name(f".{path.name}.lock"))
    fix = "wait for it to finish, or stop it"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not _has_locks(path.parent):
            file = path.with_name(f".{path.name}.making")
            lock = filelock.SoftFileLock(file)
            fix += f"; if no such process exists, remove {file}"
            sys.stderr.write(f"this file system does not support locks; using {file} instead\n")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout as error:
            # filelock says so of a file too that cannot be made: then this says why
            Path(lock.lock_file).touch()
            raise StoreError("another process is writing this", path=path, fix=fix) from error
    except OSError as error:
        # the user named `path`, not the file with which the folder was tried
        raise from_os_error(OSError(error.errno, error.strerror), path) from error
    return lock


@contextmanager
def locked(path: Path) -> Iterator[filelock.BaseFileLock]:
    """The same lock, until the block ends."""
    lock = acquired_lock(path)
    try:
        yield lock
    finally:
        lock.release()


@contextmanager
def working_folder(path: Path) -> Iterator[Path]:
    """An empty folder at `path`, gone afterwards; what a killed process left there goes first.

    StoreError  another process is working there
    """
    with locked(path) as lock:
        try:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            with suppress(OSError):  # Windows removes no open file
                Path(lock.lock_file).unlink()


def _has_locks(folder: Path) -> bool:
    """Whether files of this folder can be locked; versions of filelock differ where they cannot."""
    try:
        import fcntl
    except ImportError:  # Windows, where they can
        return True
    with tempfile.TemporaryFile(dir=folder) as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in _NO_LOCKS
    return True


def progress_bar(
    total: int | None,
    description: str,
    unit: str,
    *,
    quiet: bool,
    done: int = 0,
    items: Iterable[Any] | None = None,
) -> tqdm[Any]:
    """A bar on stderr; where stderr is no terminal, a line a minute in the log (`log_to_stderr`).

    total   None: not known
    unit    a noun in the plural, or B for bytes; bytes and steps are shown in thousands
    done    of `total`, by an earlier call
    items   the bar iterates over them
    """
    from tqdm import tqdm  # many commands show none

    kind: type[tqdm[Any]] = tqdm
    more: dict[str, Any] = {}
    if not quiet and not sys.stderr.isatty():
        kind = _line_bar()
        known = "{n_fmt} of {total_fmt}{unit} ({percentage:.0f}%)"
        shown = f"{{desc}}: {known if total else '{n_fmt}{unit}'}{{postfix}}, {{rate_noinv_fmt}}"
        more["bar_format"] = f"{shown}, {{remaining}} left" if total else shown
        # what is no terminal may be full, or gone: only the log writes there
        more |= {"file": io.StringIO(), "miniters": 1, "leave": False}
        more |= dict.fromkeys(("delay", "mininterval", "maxinterval"), _LINE_SECONDS)
    return kind(
        items,
        total=total,
        initial=done,
        desc=printable_text(description),
        unit=unit if unit == "B" else f" {unit}",
        unit_scale=unit == "B" or unit.endswith("steps"),
        disable=quiet,
        **more,
    )


def _line_bar() -> type[tqdm[Any]]:
    """A bar whose every refreshment is a line of the log."""
    from tqdm import tqdm

    class LineBar(tqdm):  # type: ignore[misc]
        monitor_interval = 0  # no thread

        def display(self, msg: str | None = None, pos: int | None = None) -> None:  # noqa: ARG002
            if msg is None:  # else it is to be cleared away
                _log.info(str(self))

    return LineBar


def log_to_stderr(level: str = "info") -> None:
    """Write what our modules log, from this level on, to stderr, each line with its time."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    for name in ("demotools", "trainer"):
        logging.getLogger(name).setLevel(level.upper())


@contextmanager
def variable_set(name: str, value: str) -> Iterator[None]:
    """An environment variable, for a while; processes that start meanwhile see it too."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


DATA_VARIABLE = "DEMOTOOLS_DATA"


def data_folder(explicit: Path | None = None) -> Path:
    """Where stores lie: `--data-dir`, else `$DEMOTOOLS_DATA`, else the user's data folder."""
    if explicit is not None:
        return explicit
    if variable := os.environ.get(DATA_VARIABLE):
        return Path(variable)
    return platformdirs.user_data_path("demotools", appauthor=False)


def size_on_disk(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def counted(number: int, noun: str) -> str:
    """A number of things, for people.

    >>> counted(1, "episode"), counted(5412, "step"), counted(0, "batch")
    ('1 episode', '5,412 steps', '0 batches')
    """
    plural = f"{noun}es" if noun.endswith(("s", "ch")) else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def size_text(size_bytes: int) -> str:
    """A size for people, in powers of 1,000.

    >>> size_text(512), size_text(270_048), size_text(281_000_000)
    ('512 B', '270.0 kB', '281.0 MB')
    """
    value, unit = float(size_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
