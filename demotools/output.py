"""Write a file for people to look at: whole or not at all, and never over another unasked."""

from __future__ import annotations

import os
from pathlib import Path

from demotools.errors import DemotoolsError, from_os_error


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """DemotoolsError where `path` exists and must not be replaced: to be asked before the work."""
    if path.exists() and not overwrite:
        raise DemotoolsError(
            "the file exists already", path=path, fix="add --overwrite to replace it"
        )


def write_output(path: Path, content: bytes, *, overwrite: bool) -> None:
    """Write `content` to `path`, which appears only when whole.

    DemotoolsError  it exists and `overwrite` is False, or it cannot be written
    """
    refuse_existing(path, overwrite=overwrite)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise from_os_error(error, path) from error
