"""A server on loopback that behaves as Google Drive and as a plain host, and misbehaves on order.

It serves http, and https for any host name with a certificate of its own authority; a CONNECT
proxy leads every https client to it, whatever host the client thinks it speaks to. Each body sent
is counted: `sent` has the range that was asked for and the bytes that went out.
"""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import http.server
import json
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import trustme

DRIVE_HOSTS = ("drive.google.com", "drive.usercontent.google.com", "docs.google.com")
# on one line, as Drive sends it: gdown looks for the form line by line
FORM = (
    "<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head><body>"
    '<p class="uc-warning-caption">Google Drive can\'t scan this file for viruses.</p>'
    '<form id="download-form" action="https://drive.usercontent.google.com/download" method="get">'
    '<input type="submit" value="Download anyway"/><input type="hidden" name="id" value="{id}">'
    '<input type="hidden" name="export" value="download">'
    '<input type="hidden" name="confirm" value="t">'
    '<input type="hidden" name="uuid" value="{uuid}"></form></body></html>'
)
QUOTA = """<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head><body>
<p class="uc-error-caption">Sorry, you can't view or download this file at this time.</p>
<p class="uc-error-subcaption">Too many users have viewed or downloaded this file recently.</p>
</body></html>"""
PERMISSION = """<!DOCTYPE html><html><head><title>Google Drive: Sign-in</title></head><body>
<form action="https://accounts.google.com/signin"></form>You need access</body></html>"""
QUOTA_JSON = json.dumps(
    {"error": {"code": 403, "message": "x", "errors": [{"reason": "downloadQuotaExceeded"}]}}
)


@dataclass
class Served:
    """One file and how it is served; change it while the server runs.

    cuts          bytes of the body after which the connection is cut, one for each answer
    announce      added to the announced length
    stalls        seconds of silence in the middle of the body, one for each answer
    pause         seconds between pieces of `piece` bytes
    """

    content: bytes | Path
    etag: str | None = '"1"'
    modified: float | None = None
    page: str | None = None
    page_status: int = 200
    statuses: list[int] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    content_type: str = "application/octet-stream"
    form: bool = True
    ranges: bool = True
    if_range: bool = True
    announce: int | None = 0
    cuts: list[int] = field(default_factory=list)
    stalls: list[float] = field(default_factory=list)
    pause: float = 0.0
    piece: int = 1 << 18


@dataclass(frozen=True)
class Sent:
    """One body: the path asked for, the first byte sent, the bytes sent."""

    path: str
    start: int
    size: int


class DriveServer:
    """The files by path; `drive/ID` stands for a file of Google Drive."""

    def __init__(self, authority: trustme.CA) -> None:
        self.files: dict[str, Served] = {}
        self.sent: list[Sent] = []
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.connects: list[str] = []
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(*DRIVE_HOSTS, "localhost").configure_cert(context)
        self._plain = _Server(("127.0.0.1", 0), _Handler)
        self._secure = _Server(("127.0.0.1", 0), _Handler)
        self._secure.tls = context
        self._plain.world = self._secure.world = self
        self._proxy = _Proxy(("127.0.0.1", 0), _Tunnel)
        self._proxy.target = self._secure.server_address[1]
        self._proxy.connects = self.connects
        self.url = f"http://127.0.0.1:{self._plain.server_address[1]}"
        self.proxy = f"http://127.0.0.1:{self._proxy.server_address[1]}"

    @contextlib.contextmanager
    def running(self) -> Iterator[DriveServer]:
        servers = (self._plain, self._secure, self._proxy)
        threads = [threading.Thread(target=s.serve_forever, args=(0.02,)) for s in servers]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            for server, thread in zip(servers, threads, strict=True):
                server.shutdown()
                server.server_close()
                thread.join()

    def body_bytes(self) -> int:
        """Bytes of all bodies sent."""
        return sum(sent.size for sent in self.sent)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    tls: ssl.SSLContext | None = None
    world: DriveServer

    def finish_request(self, request: Any, client_address: Any) -> None:
        if self.tls is not None:
            # in the thread of the request: a client that never shakes hands holds up nobody else
            with contextlib.suppress(OSError):
                secure = self.tls.wrap_socket(request, server_side=True)
                super().finish_request(secure, client_address)
                secure.close()
            return
        super().finish_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.close_connection = True
        parts = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        name = f"drive/{query['id']}" if "id" in query else parts.path.strip("/")
        self.server.world.requests.append((self.path, dict(self.headers.items())))
        file = self.server.world.files.get(name)
        if file is None:
            self._page(404, "<html><title>Not Found</title></html>")
        elif file.statuses and (status := file.statuses.pop(0)) != 200:
            self._page(status, "", file.headers)
        elif file.page is not None:
            self._page(file.page_status, file.page)
        elif parts.path == "/uc" and file.form:
            self._page(200, FORM.format(id=query["id"], uuid=len(self.server.world.requests)))
        elif parts.path == "/download" and "confirm" not in query:
            self._page(200, PERMISSION)
        else:
            self._file(name, file)

    def _page(self, status: int, page: str, headers: dict[str, str] | None = None) -> None:
        content = page.encode()
        self.send_response(status)
        json_page = page.startswith("{")
        self.send_header("Content-Type", "application/json" if json_page else "text/html")
        self.send_header("Content-Length", str(len(content)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content)

    def _file(self, name: str, file: Served) -> None:
        content = file.content if isinstance(file.content, bytes) else file.content.read_bytes()
        modified = None
        if file.modified is not None:
            stamp = datetime.datetime.fromtimestamp(file.modified, datetime.UTC)
            modified = email.utils.format_datetime(stamp, usegmt=True)
        start = self._start(file, modified, len(content))
        if start is None:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", file.content_type)
        if name.startswith("drive/"):
            self.send_header("Content-Disposition", 'attachment; filename="demos.pkl"')
        if file.etag is not None:
            self.send_header("ETag", file.etag)
        for key, value in file.headers.items():
            self.send_header(key, value)
        if modified is not None:
            self.send_header("Last-Modified", modified)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if file.announce is not None:
            self.send_header("Content-Length", str(len(body) + file.announce))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self._body(name, file, start, body)

    def _start(self, file: Served, modified: str | None, size: int) -> int | None:
        """The first byte to send; None where the range lies outside the file."""
        asked = self.headers.get("Range", "")
        condition = self.headers.get("If-Range")
        same = not file.if_range or condition in (None, file.etag, modified)
        if not (file.ranges and asked.startswith("bytes=") and same):
            return 0
        start = int(asked.removeprefix("bytes=").rstrip("-"))
        return start if start < size else None

    def _body(self, name: str, file: Served, start: int, body: bytes) -> None:
        cut = file.cuts.pop(0) if file.cuts else None
        stall = file.stalls.pop(0) if file.stalls else 0.0
        body = body if cut is None else body[:cut]
        done = 0
        place = len(self.server.world.sent)
        self.server.world.sent.append(Sent(name, start, 0))
        while done < len(body):
            if stall and done >= len(body) // 2:
                time.sleep(stall)
                stall = 0.0
            piece = body[done : done + min(file.piece, max(1, len(body) // 2))]
            try:
                self.wfile.write(piece)
            except OSError:
                return
            done += len(piece)
            self.server.world.sent[place] = Sent(name, start, done)
            if file.pause:
                time.sleep(file.pause)


class _Proxy(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    target = 0
    connects: list[str]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class _Tunnel(socketserver.StreamRequestHandler):
    """CONNECT, then bytes both ways; every host leads to the https server."""

    server: _Proxy

    def handle(self) -> None:
        line = self.rfile.readline().decode("latin-1")
        while self.rfile.readline().strip():
            pass
        self.server.connects.append(line.split()[1])
        if not line.startswith("CONNECT "):
            self.wfile.write(b"HTTP/1.1 405 Only CONNECT\r\n\r\n")
            return
        with socket.create_connection(("127.0.0.1", self.server.target)) as upstream:
            self.wfile.write(b"HTTP/1.1 200 Connected\r\n\r\n")
            back = threading.Thread(target=_pipe, args=(upstream, self.connection), daemon=True)
            back.start()
            _pipe(self.connection, upstream)
            back.join()


def _pipe(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while block := source.recv(1 << 16):
            target.sendall(block)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)
