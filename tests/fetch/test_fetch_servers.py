"""`demotools fetch` against servers that answer what no server should: raw bytes over loopback."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import socketserver
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from demotools.cli import main
from demotools.fetch.places import RefusedError, place_named, url_behind_page

OLD = b"\x80\x04" + b"o" * 3000 + b"."
NEW = b"\x80\x04" + b"n" * 3000 + b"."
CUT = 1500
NAME = "BabyAI-GoToLocal-v0.pkl"
Answer = Callable[[str], Iterable[bytes]]


class RawServer(socketserver.ThreadingTCPServer):
    """Answers each request with whatever bytes `answer` makes of its head."""

    daemon_threads = True
    answer: Answer

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news."""


class _Answering(socketserver.StreamRequestHandler):
    server: RawServer

    def handle(self) -> None:
        head = b""
        while (line := self.rfile.readline()).strip():
            head += line
        for piece in self.server.answer(head.decode("latin-1")):
            self.wfile.write(piece)


@pytest.fixture
def server() -> Iterator[RawServer]:
    with RawServer(("127.0.0.1", 0), _Answering) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def fetch(
    server: RawServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """`fetch()` types the command for the server's file."""
    monkeypatch.setattr("demotools.fetch.transfer._LONGEST_WAIT_SECONDS", 0.02)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)

    def run(*options: str) -> Result:
        hasty = ["--timeout", "0.5", "--data-dir", str(folder)]
        origin = [] if "GoToObj" in options else ["GoToLocal", "--from", f"{server.url}/a.pkl"]
        retries = [] if "--retries" in options else ["--retries", "2"]
        return CliRunner().invoke(main, ["fetch", *origin, *hasty, *retries, *options])

    return run


def head(status: int, **headers: object) -> bytes:
    lines = [f"HTTP/1.1 {status} x", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def refused(result: Result) -> str:
    """The message of a failure in three parts; nothing else than waits for retries before it."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    waits, start, message = result.stderr.rpartition("error: ")
    assert all(": waiting " in line for line in waits.splitlines()), waits
    assert re.fullmatch(r"error: .+\n  where: .+\n  next:  .+\n", start + message, re.DOTALL)
    return message


def visible(folder: Path) -> set[str]:
    """What has a final name."""
    return {path.name for path in folder.rglob("*") if not path.name.startswith(".")}


# ------------------------------------------------------------------ never spliced

LENGTH = len(NEW)
REST = {"Content_Length": LENGTH - CUT, "Content_Range": f"bytes {CUT}-{LENGTH - 1}/{LENGTH}"}
TAG, DATE = {"ETag": '"1"'}, {"Last_Modified": "Fri, 14 Jul 2017 02:40:00 GMT"}
WEAK = {"ETag": 'W/"1"'}


def ranged(start: int, total: int | str, length: int) -> dict[str, object]:
    return {
        "Content_Length": length,
        "Content_Range": f"bytes {start}-{start + length - 1}/{total}",
    }


@pytest.mark.parametrize("between_runs", [False, True])
@pytest.mark.parametrize(
    ("first", "rest", "body"),
    [
        (TAG, REST, NEW[CUT:]),
        (TAG | DATE, REST | DATE, NEW[CUT:]),
        (TAG, REST | {"ETag": '"2"'}, NEW[CUT:]),
        (TAG, REST | WEAK, NEW[CUT:]),
        ({"ETag": '"a"'}, REST | {"ETag": '"A"'}, NEW[CUT:]),
        (WEAK | DATE, REST | DATE | {"ETag": 'W/"2"'}, NEW[CUT:]),
        (WEAK | DATE, REST | DATE | WEAK, NEW[CUT:]),
        (WEAK, REST | WEAK, NEW[CUT:]),
        (DATE, REST | DATE, NEW[CUT:]),
        ({"ETag": "1"}, REST | {"ETag": "1"}, NEW[CUT:]),
        ({"ETag": ""}, REST | {"ETag": ""}, NEW[CUT:]),
        ({"X_Goog_Hash": "crc32c=A"}, REST | {"X_Goog_Hash": "crc32c=B"}, NEW[CUT:]),
        (TAG | {"X_Goog_Hash": "a"}, REST | TAG | {"X_Goog_Hash": "b"}, NEW[CUT:]),
        (TAG, TAG | ranged(CUT - 10, LENGTH, LENGTH - CUT + 10), NEW[CUT - 10 :]),
        (TAG, TAG | ranged(CUT + 10, LENGTH, LENGTH - CUT - 10), NEW[CUT + 10 :]),
        (TAG, TAG | ranged(0, LENGTH, LENGTH), NEW),
        (TAG, TAG | ranged(CUT, LENGTH + 9, LENGTH - CUT + 9), NEW[CUT:] + b"n" * 8 + b"."),
        (TAG, TAG | ranged(CUT, LENGTH - 9, LENGTH - CUT - 9), NEW[CUT:-10] + b"."),
        (TAG, TAG | ranged(CUT, "*", LENGTH - CUT), NEW[CUT:]),
        (TAG, TAG | ranged(CUT, "१", LENGTH - CUT), NEW[CUT:]),
        (TAG, TAG | {"Content_Length": LENGTH - CUT}, NEW[CUT:]),
        (TAG, TAG | REST | {"Content_Range": f"{CUT}-{LENGTH - 1}/{LENGTH}"}, NEW[CUT:]),
        (TAG, TAG | REST | {"Content_Range": f"bytes {CUT}-{CUT - 1}/{LENGTH}"}, NEW[CUT:]),
        (TAG, TAG | REST | {"Content_Length": LENGTH}, NEW[CUT:] + bytes(CUT)),
        (TAG, TAG | REST | {"Content_Encoding": "gzip"}, NEW[CUT:]),
        (TAG, TAG | {"Content_Type": "multipart/byteranges; boundary=x"}, b"--x\r\n\r\n" + NEW),
        (TAG, {"status": 200, **TAG, "Content_Length": LENGTH}, NEW),
        (TAG, {"status": 200, **TAG}, NEW),
        (TAG, {"status": 200, "Content_Encoding": "gzip"}, gzip.compress(NEW)),
    ],
)
def test_a_file_that_changed_between_two_attempts_is_never_joined(
    first: dict[str, object],
    rest: dict[str, object],
    body: bytes,
    between_runs: bool,
    server: RawServer,
    fetch: Callable[..., Result],
    folder: Path,
) -> None:
    """The old file is cut; a request for the rest meets `rest`, one for the whole the new file."""
    answers = 0

    def answer(request: str) -> Iterator[bytes]:
        nonlocal answers
        answers += 1
        if answers == 1:
            yield head(200, Content_Length=LENGTH, **first) + OLD[:CUT]
        elif between_runs and answers == 2:
            return
        elif "\nRange:" in request:
            yield head(int(str(rest.get("status", 206))), **rest) + body
        else:
            yield head(200, Content_Length=LENGTH, ETag='"2"') + NEW

    server.answer = answer
    if between_runs:
        refused(fetch("--no-convert", "--retries", "0"))
    done = fetch("--no-convert")
    if done.exit_code == 0:
        assert (folder / "downloads" / NAME).read_bytes() == NEW
    else:
        refused(done)
        assert not (folder / "downloads" / NAME).exists()


def test_more_bytes_than_the_range_announced_are_not_kept(
    server: RawServer, fetch: Callable[..., Result], folder: Path
) -> None:
    def answer(request: str) -> Iterator[bytes]:
        if "\nRange:" in request:
            longer = {**REST, "ETag": '"1"'}
            del longer["Content_Length"]
            body = NEW[CUT:] + b"more."
            yield head(206, Transfer_Encoding="chunked", **longer)
            yield b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        else:
            yield head(200, Content_Length=LENGTH, ETag='"1"') + NEW[:CUT]

    server.answer = answer
    refused(fetch("--no-convert"))
    assert not (folder / "downloads" / NAME).exists()


# ------------------------------------------------------------------ odd answers


@pytest.mark.parametrize(
    "length",
    [
        "²",
        "१",
        "-5",
        "0",
        "1" + "0" * 30,
        "9" * 5000,
        "1e3",
        "1.5",
        "0x10",
        "1_000",
        "+3003",
        "a, b",
    ],
)
def test_a_length_in_strange_digits_is_no_length(
    length: str, server: RawServer, fetch: Callable[..., Result], folder: Path
) -> None:
    server.answer = lambda _request: [head(200, Content_Length=length) + NEW]
    done = fetch("--no-convert")
    if done.exit_code == 0:
        assert (folder / "downloads" / NAME).read_bytes() == NEW
    else:
        refused(done)


@pytest.mark.parametrize(
    "after",
    [
        "²",
        "१",
        "-1",
        "1e999",
        "nan",
        "inf",
        "9" * 400,
        "Fri, 31 Dec 99999 23:59:59 GMT",
        "soon",
        "",
    ],
)
def test_a_wait_in_strange_digits_is_none(
    after: str, server: RawServer, fetch: Callable[..., Result]
) -> None:
    server.answer = lambda _request: [head(503, Retry_After=after)]
    assert "HTTP 503 Service Unavailable, 3 times in a row" in refused(fetch())


@pytest.mark.parametrize(
    "location",
    [
        "http://[bad",
        "http://a]b/",
        "http://[::1%25/",
        "file:///etc/passwd",
        "ftp://127.0.0.1/a.pkl",
        "javascript:alert(1)",
        "data:text/plain,x",
        "http://127.0.0.1:99999/",
        "http://127.0.0.1:-1/",
        "http://127.0.0.1:x/",
        "http://☃.invalid/",
        "http://.invalid/",
        f"http://{'a' * 300}.invalid/",
        "http://a\x00b/",
        "http://xn--/",
        "http:///a.pkl",
        "//",
        "http://",
        "?",
        "%",
        "a.pkl",
        "/" * 30_000,
    ],
)
@pytest.mark.parametrize("status", [301, 308])
def test_a_redirection_that_leads_nowhere_is_refused(
    location: str, status: int, server: RawServer, fetch: Callable[..., Result], folder: Path
) -> None:
    server.answer = lambda _request: [head(status, Location=location, Content_Length=0)]
    refused(fetch("--retries", "0"))
    assert not (folder / "downloads").exists()


@pytest.mark.parametrize("status", [204, 205, 300, 304, 305, 302, 100, 199, 600, 999])
def test_a_status_that_carries_no_file_is_refused(
    status: int, server: RawServer, fetch: Callable[..., Result]
) -> None:
    server.answer = lambda _request: [head(status)]
    refused(fetch("--retries", "0"))


def test_the_body_of_a_redirection_is_not_waited_for(
    server: RawServer, fetch: Callable[..., Result], folder: Path
) -> None:
    def answer(request: str) -> Iterator[bytes]:
        if request.startswith("GET /a.pkl"):
            yield head(302, Location="/b.pkl")
            while True:
                yield bytes(1 << 16)
        yield head(200, Content_Length=LENGTH) + NEW

    server.answer = answer
    done = fetch("--no-convert")
    assert done.exit_code == 0, done.output
    assert (folder / "downloads" / NAME).read_bytes() == NEW


@pytest.mark.parametrize("status", [200, 403, 503])
@pytest.mark.parametrize("quick", [True, False])
def test_a_page_that_never_ends_is_not_read_to_its_end(
    quick: bool, status: int, server: RawServer, fetch: Callable[..., Result]
) -> None:
    def answer(_request: str) -> Iterator[bytes]:
        yield head(status, Content_Type="text/html") + b"<html><title>Endless</title>"
        while True:
            yield b"<title>" * (10_000 if quick else 1)
            time.sleep(0 if quick else 0.05)

    server.answer = answer
    message = refused(fetch("--retries", "0"))
    assert "Endless" in message or "HTTP 503" in message


def test_a_file_that_never_ends_is_given_up_while_there_is_room(
    server: RawServer,
    fetch: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("demotools.fetch.plan._ROOM_TO_CONVERT", 1e9)

    def answer(_request: str) -> Iterator[bytes]:
        yield head(200) + b"\x80\x04"
        while True:
            yield bytes(1 << 20)

    server.answer = answer
    assert "bytes free" in refused(fetch())


def nested(depth: int) -> str:
    return '{"error":' + "[" * depth + "]" * depth + "}"


@pytest.mark.parametrize(
    "page",
    [
        nested(10_000),
        nested(300_000),
        '{"error": {"errors": [[]]}}',
        '{"error": {"errors": 5}}',
        '{"error": {"message": {"a": 1}}}',
        '{"error": "text"}',
        '{"error": {"errors": [{"reason": null}]}}',
        "[" + "9" * 5000 + "]",
        "null",
        "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
        "<title>" * 100_000,
        "<title" * 100_000,
        'uc-error-caption">' * 50_000,
    ],
)
@pytest.mark.parametrize("status", [200, 403])
def test_an_error_page_of_any_shape_is_a_refusal(
    page: str, status: int, server: RawServer, fetch: Callable[..., Result]
) -> None:
    kind = "application/json; charset=klingon"
    server.answer = lambda _request: [head(status, Content_Type=kind) + page.encode()]
    refused(fetch("--retries", "0"))


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"garbage\r\n\r\n",
        b"HTTP/9.9 abc\r\n\r\n",
        b"HTTP/1.1 \xb2\xb9\xb3 x\r\n\r\n",
        b"HTTP/1.1 99999999999 x\r\n\r\n",
        b"HTTP/1.1 200 x\r\nno colon\r\n\r\nx",
        b"HTTP/1.1 200 x\r\n" + b"A: b\r\n" * 5000 + b"\r\n",
        b"HTTP/1.1 200 x\r\nA: " + b"b" * 3_000_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 " + b"x" * 3_000_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 x\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nabc\r\n",
        b"HTTP/1.1 200 x\r\nTransfer-Encoding: chunked\r\n\r\n" + b"f" * 70_000,
        b"HTTP/1.1 200 x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
        b"HTTP/1.1 404 x\r\nContent-Encoding: gzip\r\n\r\nnot gzip at all",
        b"HTTP/1.1 404 x\r\nContent-Encoding: deflate, br, zstd, \xff\r\n\r\nnothing",
        b"HTTP/1.1 200 x\r\nContent-Encoding: \xb2\x1b[31m\r\n\r\n\x80\x04.",
        b"HTTP/1.1 200 x\r\nSet-Cookie: \xff=\x00; expires=Fri, 99 Abc 99999\r\n\r\nx",
        b"HTTP/1.1 206 x\r\nContent-Range: bytes 0-1/" + b"9" * 5000 + b"\r\n\r\nx",
        b"HTTP/1.1 206 x\r\nContent-Range: bytes 5-9/10\r\n\r\nx",
        b"HTTP/1.1 416 x\r\n\r\n",
    ],
)
def test_an_answer_that_is_hardly_http_is_a_refusal(
    answer: bytes, server: RawServer, fetch: Callable[..., Result], folder: Path
) -> None:
    server.answer = lambda _request: [answer]
    refused(fetch("--retries", "1"))
    assert visible(folder) <= {"downloads"}


def test_an_entity_tag_with_strange_letters_can_be_sent_back(
    server: RawServer, fetch: Callable[..., Result], folder: Path
) -> None:
    def answer(request: str) -> Iterator[bytes]:
        tag = {"ETag": '"é☃\x7f\t"'}
        if "\nRange:" in request:
            yield head(206, **REST, **tag) + NEW[CUT:]
        else:
            yield head(200, Content_Length=LENGTH, **tag) + NEW[:CUT]

    server.answer = answer
    done = fetch("--no-convert")
    assert done.exit_code == 0, done.output
    assert (folder / "downloads" / NAME).read_bytes() == NEW


# ------------------------------------------------------------------ odd archives


def member(name: str, content: bytes = b"", **fields: object) -> bytes:
    """Header and content of one member, its fields as they are set last."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    packed = info.tobuf(tarfile.GNU_FORMAT)
    return packed + content + bytes(-len(content) % 512)


def with_size(header: bytes, size: bytes) -> bytes:
    """A header with other bytes in its field of the size, and a checksum that fits."""
    changed = header[:124] + size.ljust(12, b"\0") + header[136:148] + b" " * 8 + header[156:]
    total = b"%06o\0 " % sum(changed[:512])
    return changed[:148] + total + changed[156:]


WANTED = "BabyAI-GoToObj-v0.pkl"
END = bytes(1024)


def pax(records: dict[str, str], content: bytes, size: int | None = None) -> bytes:
    info = tarfile.TarInfo(WANTED)
    info.size = len(content) if size is None else size
    info.pax_headers = records
    return info.tobuf(tarfile.PAX_FORMAT) + content + bytes(-len(content) % 512)


TARBALLS: list[bytes] = [
    b"",
    b"no archive",
    END,
    gzip.compress(member(WANTED, NEW) + END)[:-1500],
    gzip.compress(member("a", NEW * 50) + member(WANTED, NEW) + END)[:60],
    b"\x1f\x8b\x08\xff" + bytes(100),
    b"\x1f\x8b\x08\x04\xff\xff" + bytes(100),
    b"BZh9" + bytes(100),
    b"\xfd7zXZ\0" + bytes(100),
    member(WANTED, type=tarfile.SYMTYPE, linkname="/etc/passwd") + END,
    member(WANTED, type=tarfile.LNKTYPE, linkname="/etc/passwd") + END,
    member(WANTED, type=tarfile.LNKTYPE, linkname=WANTED) + END,
    member(WANTED, type=tarfile.CHRTYPE, devmajor=1, devminor=3) + END,
    member(WANTED, type=tarfile.FIFOTYPE) + END,
    member(WANTED, type=tarfile.DIRTYPE) + END,
    member(WANTED, type=tarfile.CONTTYPE) + END,
    member(WANTED, type=b"\xff") + END,
    member("a/" * 60 + WANTED, type=tarfile.GNUTYPE_SPARSE) + END,
    member(WANTED, b"x", type=tarfile.GNUTYPE_SPARSE) + END,
    with_size(member(WANTED), b"\xff" * 12) + END,
    with_size(member(WANTED), b"\xff" * 11 + b"\x00") + END,
    with_size(member(WANTED), b"\x80" + b"\xff" * 11) + END,
    with_size(member(WANTED), b"77777777777") + END,
    with_size(member(WANTED), b"\xb2\xb9") + END,
    with_size(member("a"), b"\xff" * 12) + member(WANTED, NEW) + END,
    with_size(member("a"), b"\x80" + b"\x7f" * 11) + member(WANTED, NEW) + END,
    with_size(member("a", type=tarfile.GNUTYPE_LONGNAME), b"77777777777") + bytes(1 << 16),
    with_size(member("a", type=tarfile.XHDTYPE), b"77777777777") + bytes(1 << 16),
    member("a", b"5 a=b\n", type=tarfile.XHDTYPE) + END,
    member("a", b"0 a=\n", type=tarfile.XHDTYPE) + END,
    member("a", b"99999999999999999999 a=b\n", type=tarfile.XHDTYPE) + END,
    member("a", b"\xff" * 600, type=tarfile.XHDTYPE) + END,
    member("a", b"\xff" * 600, type=tarfile.GNUTYPE_LONGNAME) + END,
    member("a", NEW, type=tarfile.GNUTYPE_LONGNAME),
    pax({"size": "-5"}, NEW),
    pax({"size": "9" * 400}, NEW),
    pax({"size": "²"}, NEW[:-1]),
    pax({"path": "/etc/passwd"}, NEW),
    pax({"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}, b""),
    pax({"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}, b"x" * 512),
    pax({"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}, b"99999\n1\n"),
    pax({"GNU.sparse.map": "a,b"}, NEW),
    pax({"GNU.sparse.map": "0,10,-5,3", "GNU.sparse.size": "1000000000000"}, NEW),
    pax({"GNU.sparse.size": "x", "GNU.sparse.offset": "y", "GNU.sparse.numbytes": "z"}, NEW),
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tarball", range(len(TARBALLS)))
def test_an_archive_of_any_shape_gives_its_member_or_a_refusal(
    tarball: int,
    packed: bool,
    server: RawServer,
    fetch: Callable[..., Result],
    folder: Path,
    tmp_path: Path,
) -> None:
    content = gzip.compress(TARBALLS[tarball]) if packed else TARBALLS[tarball]
    archived(server, content, tmp_path)
    done = fetch("GoToObj", "--split", "train", "--manifests", str(tmp_path), "--no-convert")
    if done.exit_code == 0:  # what is broken lies beside the member
        assert (folder / "downloads" / WANTED).read_bytes() == NEW
    else:
        refused(done)
        assert visible(folder) <= {"downloads"}


def archived(server: RawServer, content: bytes, manifests: Path) -> None:
    """Serve an archive in the place of the published one."""
    server.answer = lambda _request: [head(200, Content_Length=len(content)) + content]
    (manifests / "archives.toml").write_text(
        f'[copydemos]\nname = "a.tar.gz"\nsources = [{{ https = "{server.url}/a.tar.gz" }}]\n'
    )


@pytest.mark.parametrize(
    "before",
    [
        member(WANTED, type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member(WANTED, type=tarfile.LNKTYPE, linkname="a"),
        member(WANTED, type=tarfile.CHRTYPE),
        member(WANTED, type=tarfile.FIFOTYPE),
        member(f"{WANTED}/", type=tarfile.DIRTYPE),
    ],
)
@pytest.mark.parametrize("place", ["", "/", "../../", "/etc/", "./"])
def test_what_is_no_regular_file_is_passed_over(
    before: bytes,
    place: str,
    server: RawServer,
    fetch: Callable[..., Result],
    folder: Path,
    tmp_path: Path,
) -> None:
    archived(server, gzip.compress(before + member(place + WANTED, NEW) + END), tmp_path)
    done = fetch("GoToObj", "--split", "train", "--manifests", str(tmp_path), "--no-convert")
    assert done.exit_code == 0, done.output
    assert (folder / "downloads" / WANTED).read_bytes() == NEW


# ------------------------------------------------------------------ links of Google Drive

ID = "1U8YWdd3viN2lxOP5BByNUZRPVDKVvDAN"
DRIVE = "https://drive.google.com"


@pytest.mark.parametrize(
    "link",
    [
        f"{DRIVE}/file/d/{ID}/view?usp=sharing",
        f"{DRIVE}/file/d/{ID}",
        f"{DRIVE}/file/d/{ID}/edit#gid=0",
        f"{DRIVE}/file/u/0/d/{ID}/view",
        f"{DRIVE}/a/example.org/file/d/{ID}/preview",
        f"{DRIVE}/open?id={ID}",
        f"{DRIVE}/open?authuser=0&id={ID}&usp=drive_fs",
        f"{DRIVE}/uc?id={ID}&export=download",
        f"{DRIVE}/u/0/uc?export=download&confirm=t&id={ID}",
        f"{DRIVE}/a/example.org/uc?id={ID}",
        f"https://DRIVE.google.com:443/uc?ID={ID}",
        f"http://docs.google.com/uc?export=download&id={ID}",
        f"https://docs.google.com/u/1/uc?id={ID}",
        f"https://docs.google.com/file/d/{ID}/edit",
        f"https://drive.usercontent.google.com/download?id={ID}&export=download&authuser=0",
        f"https://drive.usercontent.google.com/u/0/uc?id={ID}&export=download",
    ],
)
@pytest.mark.parametrize("key", ["", "0-wmfJS1tU9EHPBGFvdX3HwA"])
def test_a_drive_link_in_any_form_is_asked_for_by_its_id_and_key(link: str, key: str) -> None:
    if key:
        before, mark, fragment = link.partition("#")
        link = f"{before}{'&' if '?' in before else '?'}resourcekey={key}{mark}{fragment}"
    place = place_named(link)
    assert str(place) == f"gdrive {ID}"
    assert place.url == f"{DRIVE}/uc?id={ID}" + (f"&resourcekey={key}" if key else "")


@pytest.mark.parametrize(
    ("link", "words"),
    [
        (f"{DRIVE}/drive/folders/{ID}?usp=sharing", "folder"),
        (f"{DRIVE}/drive/u/0/folders/{ID}", "folder"),
        (f"{DRIVE}/drive/mobile/folders/{ID}?resourcekey=0-x", "folder"),
        (f"{DRIVE}/a/example.org/drive/folders/{ID}", "folder"),
        (f"{DRIVE}/folderview?id={ID}", "folder"),
        (f"{DRIVE}/embeddedfolderview?id={ID}#list", "folder"),
        (f"{DRIVE}/open?id={ID}&id={ID[::-1]}", "does not name a file"),
        (f"{DRIVE}/drive/my-drive", "does not name a file"),
        (f"{DRIVE}/file/d/", "does not name a file"),
        (f"{DRIVE}/file/d/short/view", "does not name a file"),
        (f"{DRIVE}/open?id=../../../../etc/passwd", "does not name a file"),
        (f"{DRIVE}/", "does not name a file"),
    ],
)
def test_a_drive_link_that_is_no_file_is_refused_by_name(
    link: str, words: str, folder: Path
) -> None:
    command = ["fetch", "GoToLocal", "--data-dir", str(folder), "--from", link]
    message = refused(CliRunner().invoke(main, command))
    assert words in message
    assert link in message
    assert "the link to the file itself" in message
    assert not folder.exists()


@pytest.mark.parametrize(
    "page",
    [
        "<form id='download-form'></form>",
        "<form id='download-form' action='http://[bad'></form>",
        "<form id='download-form' action='a'><input type='hidden'></form>",
        "<form id='download-form' action='a'><input type='hidden' name='a'></form>",
        '"downloadUrl":"',
        '<p class="uc-error-subcaption"></p>',
        "<" * 50_000,
        "<a>" * 20_000,
    ],
)
def test_whatever_gdown_makes_of_a_page_is_a_refusal(page: str) -> None:
    with pytest.raises(RefusedError):
        url_behind_page(place_named(f"{DRIVE}/uc?id={ID}"), page)


# ------------------------------------------------------------------ pipes where files should be


@pytest.mark.parametrize("place", ["fetched.toml", "part", "part.json", "--from"])
def test_a_pipe_in_place_of_a_file_is_refused_and_never_waited_for(
    place: str, server: RawServer, folder: Path
) -> None:
    server.answer = lambda _request: [head(200, Content_Length=LENGTH) + NEW]
    url = f"{server.url}/a.pkl"
    key = hashlib.sha256(f"https {url}".encode()).hexdigest()[:8]
    downloads = folder / "downloads"
    downloads.mkdir(parents=True)
    pipe = {
        "fetched.toml": folder / "fetched.toml",
        "part": downloads / f".{NAME}.{key}.part",
        "part.json": downloads / f".{NAME}.{key}.part.json",
        "--from": folder / "pipe",
    }[place]
    os.mkfifo(pipe)
    origin = str(pipe) if place == "--from" else url
    command = ["fetch", "GoToLocal", "--from", origin, "--data-dir", str(folder), "--no-convert"]
    program = [sys.executable, "-c", "from demotools.__main__ import run; run()", *command]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stdout
    assert "regular file" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "about",
    [
        b"",
        b"[" * 100_000,
        b'{"validators": {"ETag": 5}, "total": "x"}',
        b'{"validators": {"ETag": "\\n"}, "total": Infinity}',
        b'{"validators": 7, "total": 3003}',
        b'{"validators": {}, "total": -1}',
        b"\xff",
    ],
)
def test_whatever_was_noted_of_a_part_it_ends_in_the_file_or_a_refusal(
    about: bytes, server: RawServer, fetch: Callable[..., Result], folder: Path
) -> None:
    server.answer = lambda _request: [head(503)]
    key = hashlib.sha256(f"https {server.url}/a.pkl".encode()).hexdigest()[:8]
    part = folder / "downloads" / f".{NAME}.{key}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(OLD[:CUT])
    part.with_name(f"{part.name}.json").write_bytes(about)
    refused(fetch("--no-convert"))
    server.answer = lambda _request: [head(200, Content_Length=LENGTH) + NEW]
    done = fetch("--no-convert")
    assert done.exit_code == 0, done.output
    assert (folder / "downloads" / NAME).read_bytes() == NEW
