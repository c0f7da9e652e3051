"""Write a file for people to look at: whole or not at all, and never over another unasked."""

from __future__ import annotations

import os
from pathlib import Path

from demotools.errors import DemotoolsError, from_os_error


def check_output(path: Path, *, overwrite: bool) -> None:
    """DemotoolsError where `path` must not or cannot be written: to be asked before the work."""
    if path.exists() and not overwrite:
        raise DemotoolsError(
            "the file exists already", path=path, fix="add --overwrite to replace it"
        )
    if not path.parent.is_dir():
        raise DemotoolsError(
            "there is no such folder", path=path.parent, fix="make it, or name another file"
        )
    if not os.access(path.parent, os.W_OK):
        raise DemotoolsError(
            "this folder cannot be written to", path=path.parent, fix="name a file elsewhere"
        )


def write_output(path: Path, content: bytes, *, overwrite: bool) -> None:
    """Write `content` to `path`, which appears only when whole.

    DemotoolsError  see `check_output`; or the disk is full
    """
    check_output(path, overwrite=overwrite)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        # the user named `path`, not the temporary file that the error names
        raise from_os_error(OSError(error.errno, error.strerror), path) from error
