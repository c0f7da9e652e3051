"""Every failure a user can cause.

    DemotoolsError          what happened, which file, what to do next
    ├── FetchError          the network, a server, a downloaded file
    ├── PickleError         a legacy pickle that is damaged or not a demo file
    │   └── UnsafePickleError   a pickle that names something outside the allow-list
    ├── StoreError          a demo store: missing, unfinished, damaged, of another version
    ├── ManifestError       an unknown level, a manifest that does not parse
    ├── LevelError            a level without an environment, a bot that cannot solve it
    ├── SettingsError       a training file: unknown key, wrong value
    └── CheckpointError     a checkpoint: missing, damaged, of another network or vocabulary

Raised at the first line that knows all three parts; only the command lines turn them into text.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path


class DemotoolsError(Exception):
    """A failure in three parts: what happened, which file (or level, or key), what to do next."""

    def __init__(self, what: str, *, path: Path | str, fix: str) -> None:
        super().__init__(what)
        self.what = what
        self.path = str(path)
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what}\n  where: {self.path}\n  next:  {self.fix}"

    def __reduce__(self) -> tuple[object, ...]:
        # keyword-only arguments do not survive the default pickling between processes
        return _rebuild, (type(self), self.what, self.path, self.fix)


def _rebuild(kind: type[DemotoolsError], what: str, path: str, fix: str) -> DemotoolsError:
    return kind(what, path=path, fix=fix)


class FetchError(DemotoolsError):
    """The network, a server, or a downloaded file."""


class PickleError(DemotoolsError):
    """A legacy pickle that is damaged or is not a demo file."""


class UnsafePickleError(PickleError):
    """A pickle that names something outside the allow-list; nothing of it was run."""


class StoreError(DemotoolsError):
    """A demo store that is missing, unfinished, damaged or of another version."""


class ManifestError(DemotoolsError):
    """An unknown level, or a manifest that does not parse."""


class LevelError(DemotoolsError):
    """A level without an environment, or one that the bot cannot solve."""


class SettingsError(DemotoolsError):
    """A training file with an unknown key or a wrong value."""


class CheckpointError(DemotoolsError):
    """A checkpoint that is missing, damaged, or of another network or vocabulary."""


def from_os_error(error: OSError, path: Path | str) -> DemotoolsError:
    """An operating-system failure (disk full, read-only, missing) in three parts."""
    fixes = {
        errno.ENOSPC: "free some space, or name another folder with --data-dir (or -o)",
        errno.EDQUOT: "free some of your quota, or name another folder with --data-dir (or -o)",
        errno.EROFS: "name a folder that can be written with --data-dir (or -o)",
        errno.EACCES: "check the permissions, or name another folder with --data-dir (or -o)",
        errno.EPERM: "check the permissions, or name another folder with --data-dir (or -o)",
        errno.ENOENT: "check the spelling of the path",
        errno.EISDIR: "name a file, not a folder",
        errno.ENOTDIR: "one part of this path is a file; name another folder",
    }
    what = (error.strerror or str(error)).lower()
    where = error.filename if error.filename is not None else path
    fix = fixes.get(error.errno or 0, "check the path and try again")
    return DemotoolsError(what, path=str(where), fix=fix)


@contextmanager
def exit_with_message() -> Iterator[None]:
    """For the two command lines: a failure becomes its message and exit code 1, Ctrl-C 130.

    The notes of a KeyboardInterrupt say what is kept of the work.
    """
    _open_closed_streams()
    try:
        yield
    except BrokenPipeError:
        # the reader of our output (`| head`) has gone: nothing to say, and nobody to say it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (DemotoolsError, OSError) as error:
        known = error if isinstance(error, DemotoolsError) else from_os_error(error, "-")
        sys.stderr.write(f"error: {known}\n")
        raise SystemExit(1) from error
    except KeyboardInterrupt as error:
        told = "; ".join(["interrupted", *getattr(error, "__notes__", [])])
        sys.stderr.write(f"\n{told}\n")
        raise SystemExit(130) from None


def _open_closed_streams() -> None:
    """Give a stream that the shell closed (`2>&-`) a place to go: Python has None there."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # it stays open as long as the process: nothing to close
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, TextIOWrapper):
        # the name of a file may be no text: it is shown as it can be, as stderr does
        sys.stdout.reconfigure(errors="backslashreplace")
