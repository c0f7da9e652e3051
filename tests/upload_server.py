"""A stand-in for the Hugging Face hub to which files are sent, and programs that go to it."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

TOKEN = "hf_a_token_that_nobody_may_see"


class Hub(ThreadingHTTPServer):
    """The hub's endpoints that a commit of large and small files passes through."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}
        self.created: list[dict[str, Any]] = []
        self.tokens: set[str | None] = set()
        self.forbidden = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON for one POST."""
        if self.forbidden:
            return 403, {"error": f"the token {TOKEN} may not write to me/demos"}
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            return 200, {"url": f"{self.url}/datasets/me/demos"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if re.fullmatch("/api/(datasets/me/demos|models/me/policy)/preupload/main", path):
            return 200, {"files": [upload_mode(f["path"]) for f in json.loads(body)["files"]]}
        if re.fullmatch("(/datasets/me/demos|/me/policy).git/info/lfs/objects/batch", path):
            return 200, {"objects": [self.upload_place(o) for o in json.loads(body)["objects"]]}
        if found := re.fullmatch("/api/(datasets/me/demos|models/me/policy)/commit/main", path):
            self.commit([json.loads(line) for line in body.splitlines()])
            url = f"{self.url}/{found[1].removeprefix('models/')}/commit/1"
            return 200, {"success": True, "commitOid": "1" * 40, "commitUrl": url}
        return 404, {"error": f"no such endpoint: {path}"}

    def upload_place(self, wanted: dict[str, Any]) -> dict[str, Any]:
        return {**wanted, "actions": {"upload": {"href": f"{self.url}/large/{wanted['oid']}"}}}

    def commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.large[value["oid"]]


def upload_mode(path: str) -> dict[str, Any]:
    mode = "lfs" if path.endswith((".zip", ".safetensors", ".gif", ".png")) else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False}


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        self.server.tokens.add(self.headers["Authorization"])
        status, content = self.server.answer(self.path.partition("?")[0], self.body())
        self.reply(status, json.dumps(content).encode(), "application/json")

    def do_PUT(self) -> None:
        self.server.large[self.path.removeprefix("/large/")] = self.body()
        self.reply(200, b"", "text/plain")

    def do_GET(self) -> None:
        name = re.sub("^(/datasets/me/demos|/me/policy)/resolve/(main|1{40})/", "", self.path)
        if name in self.server.files:
            self.reply(200, self.server.files[name], "application/octet-stream")
        else:
            self.reply(404, b"", "text/plain", {"X-Error-Code": "EntryNotFound"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def reply(
        self, status: int, content: bytes, kind: str, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": "1" * 40,
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_arguments: object) -> None:
        """Quiet."""


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers."""
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


Run = Callable[..., subprocess.CompletedProcess[str]]


def runner(hub: Hub, home: Path, program: str) -> Run:
    """`run("push", …)` in a process of its own, since the hub's address is read at import."""
    variables = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }

    def start(*arguments: str, token: str | None = TOKEN) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", f"from {program}.cli import main; main()", *arguments],
            env=variables | ({"HF_TOKEN": token} if token else {}),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return start
