"""A stand-in for the Hugging Face hub that gives data sets away: a folder of files at each commit.

`python -m tests.hub_server FOLDER OWNER/NAME` serves one; `$HF_ENDPOINT` is what it prints.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class HubServer(ThreadingHTTPServer):
    """One data set; change it while the server runs.

    commits    commit -> folder; the last is what `main` stands for
    corrupt    paths whose bodies are not what the listing says
    sent       paths of the bodies that went out
    """

    def __init__(self, repository: str, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repository = repository
        self.commits = {"1" * 40: folder}
        self.corrupt: set[str] = set()
        self.sent: list[str] = []
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @contextlib.contextmanager
    def running(self) -> Iterator[HubServer]:
        thread = threading.Thread(target=self.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        for prefix, answer in (
            (f"/api/datasets/{self.server.repository}/revision/", self._about),
            (f"/api/datasets/{self.server.repository}/tree/", self._listing),
            (f"/datasets/{self.server.repository}/resolve/", self._file),
        ):
            if path.startswith(prefix):
                revision, _, rest = path.removeprefix(prefix).partition("/")
                commit = list(self.server.commits)[-1] if revision == "main" else revision
                if commit in self.server.commits:
                    return answer(commit, rest)
                return self._reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
        return self._reply(404, b"", {"X-Error-Code": "RepoNotFound"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def _about(self, commit: str, _rest: str) -> None:
        self._json({"id": self.server.repository, "sha": commit})

    def _listing(self, commit: str, rest: str) -> None:
        folder = self.server.commits[commit]
        if not (folder / rest).is_dir():
            return self._reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        entries: list[dict[str, Any]] = []
        for file in sorted((folder / rest).iterdir()):
            sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
            size = file.stat().st_size
            entry = {"type": "file", "oid": "0" * 40, "path": f"{rest}/{file.name}", "size": size}
            lfs = {"oid": sha256, "size": size, "pointerSize": 130}
            entries.append({**entry, "lfs": lfs} if file.suffix == ".parquet" else entry)
        return self._json(entries)

    def _file(self, commit: str, rest: str) -> None:
        file = self.server.commits[commit] / rest
        if not file.is_file():
            return self._reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        content = file.read_bytes()
        if rest in self.server.corrupt:
            content = content[:-9] + b"corrupted"
        if self.command == "GET":
            self.server.sent.append(rest)
        etag = hashlib.sha256(content).hexdigest()
        return self._reply(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})

    def _json(self, content: Any) -> None:
        self._reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _reply(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        start = 0
        if asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send_response(206 if start else status)
        for name, value in {**headers, "Content-Length": str(len(content) - start)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[start:])

    def log_message(self, *_arguments: object) -> None:
        """Quiet."""


if __name__ == "__main__":
    server = HubServer(sys.argv[2], Path(sys.argv[1]))
    sys.stdout.write(f"{server.url}\n")
    sys.stdout.flush()
    server.serve_forever()
