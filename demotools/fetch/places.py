"""Where a file comes from: a URL, Google Drive, the Hugging Face hub, or a file of the user's.

No request is made here. The page that Drive shows before a large file is parsed by gdown, which
keeps up with Google's changes; the bytes themselves are downloaded by our own code (docs/log.md
says why).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from html import unescape
from itertools import pairwise
from pathlib import Path
from typing import Literal
from urllib.parse import SplitResult, parse_qs, urlencode, urlsplit

from gdown.download import get_url_from_gdrive_confirmation

from demotools.babyai.levels import Source
from demotools.errors import FetchError

_DRIVE_HOSTS = ("drive.google.com", "docs.google.com", "drive.usercontent.google.com")
_DRIVE_ID = re.compile(r"[A-Za-z0-9_-]{10,}")
_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)/([^@]+)(?:@(.+))?")
_QUOTA_WORDS = ("quota", "too many users", "downloadquotaexceeded")
_LOGIN_WORDS = ("accounts.google.com", "sign in", "need access", "permission")
# what a page says of itself stands near its beginning
_SAID_WITHIN = 20_000


class RefusedError(Exception):
    """A place that will not give the file, and why; the next place is asked.

    fix   what the user can do about it, where that is known
    """

    def __init__(self, what: str, *, fix: str = "") -> None:
        super().__init__(what)
        self.fix = fix


class UnreachableError(RefusedError):
    """No connection to a host."""


class WrongFileError(RefusedError):
    """What came is not the file: its bytes are of no use to a later run."""


@dataclass(frozen=True)
class Place:
    """Where a file is asked for.

    name   the id on Drive, the address, OWNER/NAME/PATH@REVISION on the hub, or the file's path
    url    what is requested first; of the hub and of a file the name once more
    """

    kind: Literal["gdrive", "https", "hf", "file"]
    name: str
    url: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"

    @property
    def path(self) -> str:
        """Of the file at its place, without query or revision; empty on Drive."""
        if self.kind == "hf":
            return hub_file(self.name)[1]
        return {"https": urlsplit(self.url).path, "file": self.name}.get(self.kind, "")


def place_of(source: Source) -> Place:
    """Where to ask for a source of a manifest that is neither an archive nor a data set."""
    if source.gdrive is not None:
        return _drive_place(source.gdrive)
    if source.hf is not None:
        return place_named(f"hf:{source.hf}")
    assert source.https is not None, "archives and data sets are found by their own sources"
    return place_named(source.https)


def place_named(text: str) -> Place:
    """Where to ask for what a user names: an address, hf:OWNER/NAME/PATH@REVISION, or a file.

    FetchError  an address of no web server, a folder of Drive, a name that the hub cannot have

    >>> str(place_named("https://drive.google.com/file/d/1U8YWdd3viN2lxOP5BBy/view?usp=sharing"))
    'gdrive 1U8YWdd3viN2lxOP5BBy'
    >>> str(place_named("hf:me/demos/a.pkl@v1")), str(place_named("~/a.pkl"))
    ('hf me/demos/a.pkl@v1', 'file ~/a.pkl')
    """
    if text.startswith("hf:"):
        hub_file(text.removeprefix("hf:"))
        return Place("hf", text.removeprefix("hf:"), text)
    if "://" not in text:
        return Place("file", text, text)
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        parts, host = None, ""
    if parts is None or parts.scheme not in ("http", "https") or not host or " " in text:
        raise FetchError(
            "this is not a web address",
            path=repr(text),
            fix="write it like https://example.org/demos",
        )
    if host.rstrip(".") in _DRIVE_HOSTS:
        return _place_of_drive_link(text, parts)
    return Place("https", text, text)


def hub_file(name: str) -> tuple[str, str, str | None]:
    """Repository, path in it and revision (None is the newest) of a file on the hub.

    FetchError  no such name can be

    >>> hub_file("me/demos/train/a.pkl@refs/pr/1")
    ('me/demos', 'train/a.pkl', 'refs/pr/1')
    """
    found = _HUB_NAME.fullmatch(name)
    if found is None or ".." in Path(found[2]).parts or not Path(found[2]).name:
        raise FetchError(
            "this does not name a file on the Hugging Face hub",
            path=name,
            fix="write it as hf:OWNER/NAME/PATH or hf:OWNER/NAME/PATH@REVISION",
        )
    return found[1], found[2], found[3]


def _place_of_drive_link(url: str, parts: SplitResult) -> Place:
    """Of any link that Drive gives out or has given out: `/file/d/ID/view`, `/open?id=ID`, …"""
    steps = [step for step in parts.path.split("/") if step]
    if any(step in ("folders", "folderview", "embeddedfolderview") for step in steps):
        raise FetchError(
            "this is the link to a Drive folder, not to a file",
            path=url,
            fix="open it in a browser and pass the link to the file itself (Share, Copy link)",
        )
    query = {key.lower(): values for key, values in parse_qs(parts.query).items()}
    ids = {after for step, after in pairwise(steps) if step == "d"}
    ids = ids or set(query.get("id", []))
    if len(ids) != 1 or not _DRIVE_ID.fullmatch(file_id := ids.pop()):
        raise FetchError(
            "this Drive link does not name a file",
            path=url,
            fix="pass the link to the file itself, like https://drive.google.com/file/d/ID/view",
        )
    return _drive_place(file_id, query.get("resourcekey", [""])[0])


def _drive_place(file_id: str, resource_key: str = "") -> Place:
    query = {"id": file_id} | ({"resourcekey": resource_key} if resource_key else {})
    return Place("gdrive", file_id, f"https://drive.google.com/uc?{urlencode(query)}")


def url_behind_page(place: Place, page: str) -> str:
    """The address to which a page leads that came instead of the file.

    RefusedError  it leads nowhere
    """
    if place.kind != "gdrive":
        raise RefusedError(page_problem(page))
    try:
        url = str(get_url_from_gdrive_confirmation(page))
    except Exception as error:  # whatever gdown raises, it could not read the page
        raise RefusedError(page_problem(page)) from error
    # files shared before September 2021 are given only to those who know this key
    key = parse_qs(urlsplit(place.url).query).get("resourcekey")
    if key and "resourcekey=" not in url:
        url += f"&{urlencode({'resourcekey': key[0]})}"
    return url


def page_problem(page: str) -> str:
    """What a page, or a JSON answer, sent instead of the file says.

    >>> page_problem('{"error": {"message": "x", "errors": [{"reason": "downloadQuotaExceeded"}]}}')
    'quota page (downloadQuotaExceeded)'
    >>> page_problem("<html><title>Sign in - Google Accounts</title></html>")
    'permission page (Sign in - Google Accounts)'
    """
    said = _said(page)
    lowered = f"{said} {page[:_SAID_WITHIN]}".lower()
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
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    page = page[:_SAID_WITHIN]
    for pattern in (r'uc-error-caption">(.*?)<', r"<title[^>]*>(.*?)</title>"):
        if found := re.search(pattern, page, re.DOTALL | re.IGNORECASE):
            return " ".join(unescape(found[1]).split())[:100]
    return " ".join(page.split())[:60] or "empty"
