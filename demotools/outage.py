"""What a failed request means, in words: nobody there, a proxy, a certificate, a cut, a silence."""

from __future__ import annotations

import socket
import ssl
from urllib.parse import urlsplit

import requests
import urllib3
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError

from demotools.sources import RefusedError


class UnreachableError(RefusedError):
    """No connection to a host: its other files need not be asked for in this run."""


def host_of(url: str) -> str:
    """The host of an address.

    >>> host_of("https://drive.google.com/uc?id=x")
    'drive.google.com'
    """
    return urlsplit(url).hostname or url


def is_unreachable(error: Exception) -> bool:
    """Whether no connection came about at all: a name not known, a refusal, no answer."""
    reason = getattr(error.args[0], "reason", None) if error.args else None
    return isinstance(error, requests.ConnectionError) and isinstance(
        reason, (NewConnectionError, ConnectTimeoutError)
    )


def unreachable(error: requests.ConnectionError) -> tuple[str, UnreachableError]:
    """The host, and the refusal that such a failure ends in."""
    assert error.request is not None
    host = host_of(str(error.request.url))
    what = f"no connection to {host} ({_cause_text(error)}): no network?"
    return host, UnreachableError(what)


def raise_if_final(error: Exception) -> None:
    """RefusedError where another attempt would meet the same."""
    if isinstance(error, requests.exceptions.SSLError):
        raise RefusedError(f"its certificate is not accepted: {_cause_text(error)}") from error
    if isinstance(error, requests.exceptions.ProxyError):
        raise UnreachableError(
            "the proxy does not answer, or refuses "
            f"(variables HTTPS_PROXY, HTTP_PROXY): {_cause_text(error)}"
        ) from error
    final = (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema)
    if isinstance(error, (*final, requests.exceptions.TooManyRedirects)):
        raise RefusedError(told(error)) from error


def told(error: Exception) -> str:
    """A failure in a few words."""
    if is_unreachable(error):
        return f"no connection ({_cause_text(error)})"
    if isinstance(error, (requests.exceptions.Timeout, urllib3.exceptions.TimeoutError)):
        return "the server fell silent"
    if isinstance(error, (requests.ConnectionError, urllib3.exceptions.ProtocolError)):
        return "the connection was cut"
    text = " ".join(str(error).split())
    return text if len(text) < 200 else text[:200] + "…"


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
    return str(error)
