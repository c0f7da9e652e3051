"""Signals that ask for the end, as a wish that the loop fulfils when its state is whole."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    if hasattr(signal, name)  # Windows has the first two
]
"""Ctrl-C, a scheduler's end of the job, a closed terminal, a scheduler's warning before it."""


class StopRequest:
    """Whether somebody wants the run to end.

    signal   the number of the signal that came, 0 before
    """

    def __init__(self) -> None:
        self.signal = 0

    def __bool__(self) -> bool:
        return self.signal != 0


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Notes the first signal that asks for the end; a second Ctrl-C interrupts at once.

    What was ignored when the program was started (`nohup`) stays ignored.
    """
    request = StopRequest()

    def note(number: int, _frame: FrameType | None) -> None:
        if request and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal = number

    heeded = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heeded}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stopping_held_back() -> Iterator[None]:
    """Processes that start inside never see the signals that ask for the end; this one does.

    A terminal or a scheduler sends them to every process of the run, and the loop needs its
    helpers until its state is whole.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
