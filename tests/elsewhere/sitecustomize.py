"""What Windows lacks is taken away before anything else is imported, in every process of a test.

Python imports a module of this name at its start: `PYTHONPATH=tests/elsewhere python ...`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from typing import Any

_MODULES = ("fcntl", "grp", "pwd", "resource", "termios")
_OF_SIGNAL = ("pthread_sigmask", "SIGHUP", "SIGUSR1", "SIGUSR2")
_OF_OS = ("fork", "sched_getaffinity", "getpgid", "killpg", "sysconf")

for module in _MODULES:
    sys.modules[module] = None  # type: ignore[assignment]
for where, names in ((signal, _OF_SIGNAL), (os, _OF_OS)):
    for name in names:
        vars(where).pop(name)

_context = multiprocessing.get_context


def _get_context(method: str | None = None) -> Any:
    if method not in (None, "spawn"):
        raise ValueError(f"cannot find context for {method!r}")
    return _context("spawn")


multiprocessing.get_context = _get_context
