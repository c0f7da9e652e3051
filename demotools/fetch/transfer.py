"""Transfers a remote file over an unreliable network: pages, retries, Range and If-Range.

New bytes are never appended to the bytes of an older version of the file: the rest is joined only
if the response repeats what identified the version when the first bytes arrived: a strong ETag, or
the hash that Google sends. A date or a weak ETag may stay the same when the content changes, so
with these, or with none, the file is read from the start. Retries end after a few attempts in a row
that bring no new data.
"""

from __future__ import annotations

import http.client
import random
import re
import socket
import ssl
import sys
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

import requests
import urllib3
from tqdm import tqdm
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError

from demotools.errors import printable_text
from demotools.fetch.places import (
    Place,
    RefusedError,
    UnreachableError,
    page_problem,
    url_behind_page,
)
from demotools.fetch.plan import FetchOptions
from demotools.output import progress_bar

# under 128 KiB, where malloc starts to map pages afresh for each block: half the system time
_BLOCK_BYTES = 96 << 10
_PAGE_BYTES = 1 << 20
_PAGES_AT_MOST = 3
_REDIRECTS_AT_MOST = 10
_FIRST_WAIT_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 60.0
# without a network every attempt meets the same; it is worth no more than one retry
_RETRIES_WITHOUT_CONNECTION = 1
_CONNECT_SECONDS = 10.0
_USER_AGENT = "Mozilla/5.0 (compatible; demotools)"
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}


class _PassingError(Exception):
    """A failure that another attempt may not meet; its text holds no word of the server's.

    wait_seconds   that the server asks for
    lost           the host, where no connection to it came about
    """

    def __init__(self, what: str, wait_seconds: float = 0.0, lost: str | None = None) -> None:
        super().__init__(what)
        self.wait_seconds = wait_seconds
        self.lost = lost


class Transfer:
    """The bytes of a remote file from `offset` on, over as many connections as it takes.

    name         in the bar, and in the lines about retries where no bar is shown
    offset       bytes that the caller has
    validators   headers that came with them, which the answer must repeat; empty: start again
    total        length of the file, None while unknown
    """

    def __init__(
        self,
        name: str,
        place: Place,
        options: FetchOptions,
        *,
        offset: int = 0,
        validators: Mapping[str, str] | None = None,
        total: int | None = None,
    ) -> None:
        self.place = place
        self.offset = offset
        self.validators = dict(validators or {})
        self.total = total
        self._name = printable_text(name)
        self._options = options
        self._came = False

    def blocks(self) -> Generator[bytes | None]:
        """Blocks of bytes in order; None means: throw away what came before, it starts again.

        RefusedError   the server will not give the file, or has failed too often
        """
        failures, furthest = 0, self.offset
        quiet = self._options.quiet
        with (
            requests.Session() as session,
            progress_bar(None, self._name, "B", quiet=quiet, done=self.offset) as bar,
        ):
            session.headers["User-Agent"] = _USER_AGENT
            session.max_redirects = _REDIRECTS_AT_MOST
            session.hooks["response"].append(_close_redirection)
            while True:
                try:
                    for block in self._attempt(session):
                        if block is None:
                            bar.reset()
                        elif not block:
                            bar.total = self.total
                            bar.set_description_str(self._name)
                        else:
                            bar.update(len(block))
                        yield block
                    return
                except _PassingError as error:
                    failures = 0 if self.offset > furthest else failures + 1
                    furthest = max(furthest, self.offset)
                    retries = self._options.retries
                    if error.lost and not self._came:
                        retries = min(retries, _RETRIES_WITHOUT_CONNECTION)
                    if failures > retries:
                        raise self._refusal(error, failures) from error
                    grown = _FIRST_WAIT_SECONDS * 2 ** min(failures, 10) * random.uniform(0.5, 1)
                    seconds = min(max(grown, error.wait_seconds), _LONGEST_WAIT_SECONDS)
                    attempt = f"try {failures + 1} of {retries + 1}"
                    self._show(bar, f"waiting {seconds:.0f} s, {attempt}: {error}")
                    time.sleep(seconds)

    def _show(self, bar: tqdm[Any], text: str) -> None:
        """In the bar, or in a line on stderr where no bar is shown."""
        if self._options.quiet:
            return
        if sys.stderr.isatty():
            bar.set_description_str(f"{self._name}, {text}")
        else:
            tqdm.write(printable_text(f"{self._name}: {text}"), file=sys.stderr)

    def _refusal(self, error: _PassingError, failures: int) -> RefusedError:
        if error.lost:
            what = str(error).replace("no connection", f"no connection to {error.lost}", 1)
            return UnreachableError(f"{what}: no network?")
        times = f", {failures} times in a row" if failures > 1 else ""
        of = f"of {self.total:,} " if self.total else ""
        at = f"after {self.offset:,} {of}bytes" if self.offset else "before its first byte"
        return RefusedError(f"{error}{times}, {at}")

    def _attempt(self, session: requests.Session) -> Generator[bytes | None]:
        with self._answer(session) as response:
            if not self._is_rest(response):
                self.validators = {}  # so the next attempt asks for the whole file
                raise _PassingError("the server sent a part of another file, or another part")
            if response.status_code != HTTPStatus.PARTIAL_CONTENT:
                if self.offset:
                    self.offset = 0
                    yield None
                self.total = _number(response.headers.get("Content-Length"))
                self.validators = _validators(response)
            yield b""  # the caller learns the length before the first byte is read
            # read1: what has come is on disk before a silence or a kill can take it
            while block := self._block(response):
                if self.total is not None and self.offset + len(block) > self.total:
                    self.validators = {}
                    raise _PassingError("the server sent more bytes than it had announced")
                self.offset += len(block)
                self._came = True
                yield block
        if self.total is not None and self.offset != self.total:
            raise _PassingError(f"the server sent {self.offset:,} of {self.total:,} bytes")

    def _is_rest(self, response: requests.Response) -> bool:
        """Whether the answer is what was asked for; remembers the length that a part tells."""
        if response.status_code != HTTPStatus.PARTIAL_CONTENT:
            return response.status_code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
        text = response.headers.get("Content-Range", "")
        found = re.fullmatch(r"bytes ([0-9]{1,40})-([0-9]{1,40})/([0-9]{1,40})", text)
        if found is None:
            return False
        first, last, total = map(int, found.groups())
        length = _number(response.headers.get("Content-Length"))
        given = _validators(response)
        if not self.offset:  # nobody asked for a part: then this says what the file is
            self.total, self.validators = total, given
        shared = self.validators.keys() & given.keys()
        same = bool(shared) and all(self.validators[name] == given[name] for name in shared)
        return (
            first == self.offset
            and first <= last < total
            and length in (None, last - first + 1)
            and self.total in (None, total)
            and (same or not self.offset)
        )

    def _block(self, response: requests.Response) -> bytes:
        with _boundary(str(response.url)):
            return bytes(response.raw.read1(_BLOCK_BYTES, decode_content=False))

    def _answer(self, session: requests.Session) -> requests.Response:
        """The answer that carries the file; pages before it are followed."""
        url, silence = self.place.url, self._options.timeout_seconds
        timeout = (min(silence, _CONNECT_SECONDS), silence)
        for _ in range(_PAGES_AT_MOST):
            headers = self._headers()
            with _boundary(url):
                response = session.get(url, headers=headers, stream=True, timeout=timeout)
            if _is_file(response):
                return response
            with response:
                page = self._page(response)
                _raise_for_status(response, page)
                url = url_behind_page(self.place, page)
        raise RefusedError("the pages only lead to further pages, never to the file")

    def _headers(self) -> dict[str, str]:
        # byte offsets must count the bytes of the file, so nothing may be packed on the way
        headers = {"Accept-Encoding": "identity"}
        if self.offset and self.validators:
            headers["Range"] = f"bytes={self.offset}-"
            if tag := self.validators.get("ETag"):
                headers["If-Range"] = tag
        return headers

    def _page(self, response: requests.Response) -> str:
        """The beginning of a page: as much as comes in the time that a silence may take."""
        page, end = b"", time.monotonic() + self._options.timeout_seconds
        with _boundary(str(response.url)):
            while len(page) < _PAGE_BYTES and time.monotonic() < end:
                block = response.raw.read1(_BLOCK_BYTES, decode_content=True)
                if not block:
                    break
                page += block
        return page[:_PAGE_BYTES].decode("utf-8", "replace")


def _number(text: str | None) -> int | None:
    """The number in a header; None where there is none, or something else.

    >>> _number("12"), _number("-1"), _number("1e3"), _number("\\N{SUPERSCRIPT TWO}"), _number(None)
    (12, None, None, None, None)
    """
    return int(text) if text and re.fullmatch("[0-9]{1,40}", text) else None


def _validators(response: requests.Response) -> dict[str, str]:
    """The headers of an answer that no other version of the file would have."""
    found = {name: response.headers.get(name, "") for name in ("ETag", "X-Goog-Hash")}
    if not re.fullmatch('"[^"]*"', found["ETag"]):  # weak tags begin with W/
        del found["ETag"]
    return {name: value for name, value in found.items() if value}


def _is_file(response: requests.Response) -> bool:
    """Whether an answer carries the file; RefusedError where its bytes are packed."""
    status = response.status_code
    if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        return True
    page = response.headers.get("Content-Type", "").lower()
    page_only = page.startswith(("text/html", "application/json"))
    if not 200 <= status < 300 or (page_only and "Content-Disposition" not in response.headers):
        return False
    packed = response.headers.get("Content-Encoding", "").strip().lower()
    if packed not in ("", "identity"):
        response.close()
        raise RefusedError(f"the server compresses the file ({packed[:40]}), against our request")
    return True


def _close_redirection(response: requests.Response, **_settings: object) -> None:
    """Else requests reads the body of a redirection to its end, which may never come."""
    if response.is_redirect:
        response.raw.close()


def _raise_for_status(response: requests.Response, page: str) -> None:
    status = response.status_code
    if 200 <= status < 300:
        return
    # the usual words for this status, not those that the server sent
    text = f"HTTP {status} {http.client.responses.get(status, '')}".rstrip()
    if status in _TRANSIENT:
        raise _PassingError(text, float(_number(response.headers.get("Retry-After")) or 0))
    raise RefusedError(f"{text}, {page_problem(page)}" if page.strip() else text)


@contextmanager
def _boundary(url: str) -> Iterator[None]:
    """Around calls into requests alone: whatever it raises about an answer, in our words.

    A server can make a library raise anything, so the list is not closed; none of our own
    code runs in here.
    """
    try:
        yield
    except Exception as error:
        raise _failure(error, url) from error


def _failure(error: Exception, url: str) -> _PassingError | RefusedError:
    cause = _cause_text(error)
    if isinstance(error, requests.exceptions.SSLError):
        return RefusedError(f"its certificate was rejected: {cause}")
    if isinstance(error, requests.exceptions.ProxyError):
        return UnreachableError(
            f"the proxy does not answer or refuses (see HTTPS_PROXY and HTTP_PROXY): {cause}"
        )
    reason = getattr(error.args[0], "reason", None) if error.args else None
    if isinstance(reason, (NewConnectionError, ConnectTimeoutError)):
        request = getattr(error, "request", None)  # of the last redirection
        host = urlsplit(request.url if request else url).hostname or url
        return _PassingError(f"no connection ({cause})", lost=host)
    if isinstance(error, (requests.exceptions.Timeout, urllib3.exceptions.TimeoutError)):
        return _PassingError("the server stopped sending")
    network = (requests.RequestException, urllib3.exceptions.HTTPError, OSError)
    # addresses and headers that cannot be read are of these kinds too
    final = (ValueError, requests.TooManyRedirects)
    if isinstance(error, network) and not isinstance(error, final):
        return _PassingError("the connection was lost")
    text = " ".join(str(error).split()) or type(error).__name__
    return RefusedError(f"its answer cannot be read: {text[:200]}")


def _cause_text(error: BaseException) -> str:
    """What the operating system said, below the layers of the libraries."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    if isinstance(error, socket.gaierror):
        return "name not known"
    if isinstance(error, TimeoutError):
        return "no answer"
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return " ".join(str(error).split())[:200]
