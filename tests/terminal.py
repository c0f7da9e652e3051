"""Programs in a real terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def in_terminal(name: str, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """`name` with these arguments, and the terminal that it writes to and reads keys from.

    The terminal has 40 lines of 90 columns, and colours.
    """
    variables = {**os.environ, "TERM": "xterm", "COLUMNS": "90", "LINES": "40"}
    variables.pop("NO_COLOR", None)
    master, slave = pty.openpty()
    program = subprocess.Popen(
        [sys.executable, "-m", name, *arguments],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=variables,
    )
    try:
        yield program, master
    finally:
        program.kill()
        program.wait()
        os.close(slave)
        os.close(master)
