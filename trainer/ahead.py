"""One step ahead: results computed in a thread while the caller uses the ones before."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

_Result = TypeVar("_Result")


class Ahead(Generic[_Result]):
    """The results of calling `produce` again and again, in order, some of them ahead of time.

    produce  is only ever called by one thread at a time
    depth    how many results are computed ahead; 0 calls `produce` in the caller's thread
    """

    def __init__(self, produce: Callable[[], _Result], depth: int) -> None:
        self._produce = produce
        self.depth = depth
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._waiting: deque[Future[_Result]] = deque()
        self._thread = ThreadPoolExecutor(1, "rollouts") if self.depth else None

    @property
    def forked(self) -> bool:
        """Whether this is a copy in a forked process, where the thread is missing."""
        return self._process != os.getpid()

    def next(self) -> _Result:
        """The next result; what `produce` raised is raised here."""
        if self._thread is None:
            return self._produce()
        while len(self._waiting) <= self.depth:
            self._waiting.append(self._thread.submit(self._produce))
        return self._waiting.popleft().result()

    def forget(self) -> None:
        """Throw away what was computed ahead; returns when `produce` is not running."""
        if self.forked:
            self._begin()
        while self._waiting:
            future = self._waiting.popleft()
            if not future.cancel():
                future.exception()
