"""The bytes of a remote file, whatever the network does: pages, retries, Range and If-Range.

A file that was replaced is never spliced onto old bytes: the rest is asked for with the validator
(ETag or date) that the first bytes came with, and a server that names none, or ignores Range, is
read from the start. Retries end after a few attempts in a row that brought nothing new.
"""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from http import HTTPStatus

import requests
import urllib3

from demotools.outage import (
    UnreachableError,
    host_of,
    is_unreachable,
    raise_if_final,
    told,
    unreachable,
)
from demotools.sources import Place, RefusedError, page_problem

# under 128 KiB, where malloc starts to map pages afresh for each block: half the system time
_BLOCK_BYTES = 96 << 10
_PAGE_BYTES = 1 << 20
_PAGES_AT_MOST = 3
_LONGEST_WAIT_SECONDS = 60.0
# without a network every attempt meets the same; it is worth no more than one retry
_RETRIES_WITHOUT_CONNECTION = 1
_CONNECT_SECONDS = 10.0
_USER_AGENT = "Mozilla/5.0 (compatible; demotools)"
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class Patience:
    """How long to bear with a server.

    timeout_seconds   without a byte
    retries           attempts in a row that bring nothing new
    wait_seconds      before the first retry; doubled for each further one, a minute at most
    """

    timeout_seconds: float = 30.0
    retries: int = 5
    wait_seconds: float = 1.0


@dataclass(frozen=True)
class Terms:
    """How to download: patience, when to stop, what to show, and the room a byte will take.

    room          bytes needed on disk for one byte of the file, the file itself included
    unreachable   by host, why it is not asked again in this run
    """

    patience: Patience
    stop: threading.Event
    quiet: bool = False
    room: float = 1.0
    unreachable: dict[str, str] = field(default_factory=dict)

    @property
    def hidden(self) -> bool | None:
        """Of progress bars: None, which means on a terminal only, or True."""
        return True if self.quiet else None


@dataclass(frozen=True)
class Known:
    """What an earlier run has of a file: its first bytes, and what the server said of it."""

    offset: int = 0
    validator: str | None = None
    total: int | None = None


class StoppedError(Exception):
    """The transfer was told to stop; what has come stays for the next run."""


class _PassingError(Exception):
    """A failure that another attempt may not meet."""

    def __init__(self, what: str, wait_seconds: float = 0.0) -> None:
        super().__init__(what)
        self.wait_seconds = wait_seconds


class Transfer:
    """The bytes of a remote file from `offset` on, over as many connections as it takes.

    offset      bytes that the caller has
    validator   the server's ETag or date for them: they are used only while it stays the same
    total       length of the file, None while unknown
    waiting     called before each retry with why and how long, for a person
    """

    def __init__(
        self,
        place: Place,
        terms: Terms,
        known: Known | None = None,
        waiting: Callable[[str], None] = lambda _text: None,
    ) -> None:
        known = known or Known()
        self.place = place
        self.offset = known.offset
        self.validator = known.validator
        self.total = known.total
        self._terms = terms
        self._patience = terms.patience
        self._stop = terms.stop
        self._waiting = waiting
        self._came = False

    def blocks(self) -> Generator[bytes | None]:
        """Blocks of bytes in order; None means: throw away what came before, it starts again.

        RefusedError   the server will not give the file, or has failed too often
        StoppedError   `stop` was set
        """
        failures, furthest = 0, self.offset
        with requests.Session() as session:
            session.headers["User-Agent"] = _USER_AGENT
            while True:
                try:
                    yield from self._attempt(session)
                    return
                except (
                    _PassingError,
                    requests.RequestException,
                    urllib3.exceptions.HTTPError,
                ) as error:
                    failures = 0 if self.offset > furthest else failures + 1
                    furthest = max(furthest, self.offset)
                    raise_if_final(error)
                    retries = self._retries(error)
                    if failures > retries:
                        raise self._refusal(error, failures) from error
                    self._wait(error, f"try {failures + 1} of {retries + 1}", failures)

    def _retries(self, error: Exception) -> int:
        retries = self._patience.retries
        lost = is_unreachable(error) and not self._came
        return min(retries, _RETRIES_WITHOUT_CONNECTION) if lost else retries

    def _refusal(self, error: Exception, failures: int) -> RefusedError:
        if isinstance(error, requests.ConnectionError) and is_unreachable(error):
            host, refusal = unreachable(error)
            self._terms.unreachable[host] = str(refusal)
            return refusal
        times = f", {failures} times in a row" if failures > 1 else ""
        return RefusedError(f"{told(error)}{times}, {self._progress()}")

    def _progress(self) -> str:
        if not self.offset:
            return "before its first byte"
        return f"after {self.offset:,} {'' if self.total is None else f'of {self.total:,} '}bytes"

    def _wait(self, error: Exception, attempt: str, failures: int) -> None:
        grown = self._patience.wait_seconds * 2 ** min(failures, 10) * random.uniform(0.5, 1)
        asked = error.wait_seconds if isinstance(error, _PassingError) else 0.0
        seconds = min(max(grown, asked), _LONGEST_WAIT_SECONDS)
        self._waiting(f"waiting {seconds:.0f} s, {attempt}: {told(error)}")
        if self._stop.wait(seconds):
            raise StoppedError

    def _attempt(self, session: requests.Session) -> Generator[bytes | None]:
        with self._answer(session) as response:
            if response.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                self.validator = None  # so the next attempt asks for the whole file
                raise _PassingError("the server has no such range")
            if response.status_code != HTTPStatus.PARTIAL_CONTENT and self.offset:
                self.offset = 0
                self.validator = None
                yield None
            self._take_headers(response)
            yield b""  # the caller learns the length before the first byte is read
            # read1: what has come is on disk before a silence or a kill can take it
            while block := response.raw.read1(_BLOCK_BYTES, decode_content=False):
                if self._stop.is_set():
                    raise StoppedError
                self.offset += len(block)
                self._came = True
                yield block
        if self.total is not None and self.offset != self.total:
            raise _PassingError(f"the server sent {self.offset:,} of {self.total:,} bytes")

    def _answer(self, session: requests.Session) -> requests.Response:
        """The answer that carries the file; pages before it are followed."""
        url = self.place.url
        for _ in range(_PAGES_AT_MOST):
            response = self._asked(session, url)
            if _is_file(response):
                return response
            with response:
                page = response.raw.read(_PAGE_BYTES, decode_content=True).decode(
                    "utf-8", "replace"
                )
                _raise_for_status(response, page)
                if self.place.follow is None:
                    raise RefusedError(page_problem(page))
                url = self.place.follow(page)
        raise RefusedError("one page leads to the next, none to the file")

    def _asked(self, session: requests.Session, url: str) -> requests.Response:
        """The head of an answer; a host without a connection is not asked again in this run."""
        silence = self._patience.timeout_seconds
        timeout = (min(silence, _CONNECT_SECONDS), silence)
        if known := self._terms.unreachable.get(host_of(url)):
            raise UnreachableError(known)
        return session.get(url, headers=self._headers(), stream=True, timeout=timeout)

    def _headers(self) -> dict[str, str]:
        # byte offsets must count the bytes of the file, so nothing may be packed on the way
        headers = {"Accept-Encoding": "identity", **self.place.headers}
        if self.offset and self.validator:
            headers |= {"Range": f"bytes={self.offset}-", "If-Range": self.validator}
        return headers

    def _take_headers(self, response: requests.Response) -> None:
        length = response.headers.get("Content-Length", "")
        total = self.offset + int(length) if length.isdigit() else None
        tag = response.headers.get("ETag", "W/")
        validator = response.headers.get("Last-Modified") if tag.startswith("W/") else tag
        if response.status_code == HTTPStatus.PARTIAL_CONTENT:
            found = re.fullmatch(
                r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "")
            )
            size = int(found[2]) if found and found[2] != "*" else total
            same = self.total in (None, size) and validator in (None, self.validator)
            if found is None or int(found[1]) != self.offset or not same:
                self.validator = None
                raise _PassingError("the server sent a part of another file, or another part")
            total = size
        self.total, self.validator = total, validator or self.validator


def _is_file(response: requests.Response) -> bool:
    if response.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        return True
    page = response.headers.get("Content-Type", "").startswith(("text/html", "application/json"))
    return response.ok and (not page or "Content-Disposition" in response.headers)


def _raise_for_status(response: requests.Response, page: str) -> None:
    if response.ok:
        return
    status = f"HTTP {response.status_code} {response.reason}"
    if response.status_code in _TRANSIENT:
        after = response.headers.get("Retry-After", "")
        raise _PassingError(status, float(after) if after.isdigit() else 0.0)
    raise RefusedError(f"{status}, {page_problem(page)}" if page.strip() else status)
