"""Where a published file is asked for: one function per kind of source, no request made here.

Google Drive: the page that stands before a large file is read by gdown, which follows Google's
changes; the bytes themselves come by the one transport that all kinds share (docs/log.md says why).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from html import unescape
from urllib.parse import urlsplit

from gdown.download import get_url_from_gdrive_confirmation
from gdown.exceptions import FileURLRetrievalError
from gdown.parse_url import parse_url

from demotools.errors import FetchError
from demotools.manifest import Source

_DRIVE = "https://drive.google.com/uc?id="
_QUOTA_WORDS = ("quota", "too many users", "downloadquotaexceeded")
_LOGIN_WORDS = ("accounts.google.com", "sign in", "need access", "permission")


class RefusedError(Exception):
    """A source that will not give the file, and why; the next source is asked."""


@dataclass(frozen=True)
class Place:
    """An address to ask, and what to do where a page comes instead of the file.

    source    as the manifest names it
    follow    the address that a page leads to; raises RefusedError; None where pages lead nowhere
    """

    source: str
    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    follow: Callable[[str], str] | None = None


def place_of(source: Source) -> Place:
    """Where to ask for a source that is not an archive.

    FetchError  a Hugging Face source, and the extra is not installed
    """
    if source.gdrive is not None:
        return drive_place(source.gdrive)
    if source.hf is not None:
        return _hugging_face_place(source.hf)
    assert source.https is not None, "archives are found by their own sources"
    return url_place(source.https)


def url_place(url: str) -> Place:
    """Where to ask for an address or `hf:OWNER/NAME:FILE`; a Drive link counts as its file id.

    >>> url_place("https://drive.google.com/file/d/1U8YWdd3viN2lxOP5BBy/view").source
    'gdrive 1U8YWdd3viN2lxOP5BBy'
    """
    if url.startswith("hf:"):
        return _hugging_face_place(url.removeprefix("hf:"))
    file_id, _ = parse_url(url)
    return drive_place(file_id) if file_id else Place(f"https {url}", url)


def check_address(text: str) -> None:
    """FetchError where a text with `://`, or a mirror, is not the address of a web server.

    >>> check_address("https://example.org/demos")
    """
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and " " not in text
    except ValueError:
        good = False
    if not good:
        raise FetchError(
            "this is not the address of a web server",
            path=repr(text),
            fix="write it as in https://example.org/demos",
        )


def drive_place(file_id: str) -> Place:
    """Where to ask for a file of Google Drive."""
    return Place(f"gdrive {file_id}", _DRIVE + file_id, follow=_url_behind_page)


def _hugging_face_place(name: str) -> Place:
    repository, _, file = name.partition(":")
    if not (file and repository.count("/") == 1):
        raise FetchError(
            "this names no file on the Hugging Face hub",
            path=name,
            fix="write OWNER/NAME:FILE",
        )
    try:
        from huggingface_hub import get_token, hf_hub_url
    except ImportError as error:
        raise FetchError(
            "Hugging Face sources need the package huggingface_hub",
            path=name,
            fix="install it: pip install 'demotools[hf]'",
        ) from error
    url = hf_hub_url(repository, file, repo_type="dataset")
    token = get_token()
    return Place(f"hf {name}", url, {"Authorization": f"Bearer {token}"} if token else {})


def _url_behind_page(page: str) -> str:
    try:
        return str(get_url_from_gdrive_confirmation(page))
    except FileURLRetrievalError:
        raise RefusedError(page_problem(page)) from None


def page_problem(page: str) -> str:
    """What a page, or a JSON answer, sent instead of the file says.

    >>> page_problem('{"error": {"message": "x", "errors": [{"reason": "downloadQuotaExceeded"}]}}')
    'quota page (downloadQuotaExceeded)'
    >>> page_problem("<html><title>Sign in - Google Accounts</title></html>")
    'permission page (Sign in - Google Accounts)'
    """
    said = _said(page)
    lowered = f"{said} {page[:20_000]}".lower()
    if any(word in lowered for word in _QUOTA_WORDS):
        return f"quota page ({said})"
    if any(word in lowered for word in _LOGIN_WORDS):
        return f"permission page ({said})"
    return f"a web page, not a file ({said})"


def _said(page: str) -> str:
    try:
        error = json.loads(page)["error"]
        reasons = [entry["reason"] for entry in error.get("errors", [])]
        return str(reasons[0] if reasons else error["message"])[:100]
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    for pattern in (r'uc-error-caption">(.*?)<', r"<title[^>]*>(.*?)</title>"):
        if found := re.search(pattern, page, re.DOTALL | re.IGNORECASE):
            return " ".join(unescape(found[1]).split())[:100]
    return " ".join(page.split())[:60] or "empty"
