"""Ctrl-C and SIGTERM as a wish that the loop fulfils when its state is whole."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


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
    """Notes the first Ctrl-C or SIGTERM; a second Ctrl-C interrupts at once."""
    request = StopRequest()

    def note(number: int, _frame: FrameType | None) -> None:
        if request and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal = number

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
