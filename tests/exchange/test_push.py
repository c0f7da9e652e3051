"""`demotools push` against a stand-in for the hub on this machine, and `fetch` back from there."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from demotools.errors import FetchError
from demotools.exchange.hub import push_store
from demotools.store.reading import Store, open_store

pytest.importorskip("huggingface_hub", reason="the extra hf is not installed")

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
        if path == "/api/datasets/me/demos/preupload/main":
            return 200, {"files": [upload_mode(f["path"]) for f in json.loads(body)["files"]]}
        if path == "/datasets/me/demos.git/info/lfs/objects/batch":
            return 200, {"objects": [self.upload_place(o) for o in json.loads(body)["objects"]]}
        if path == "/api/datasets/me/demos/commit/main":
            self.commit([json.loads(line) for line in body.splitlines()])
            url = f"{self.url}/datasets/me/demos/commit/1"
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
    mode = "lfs" if path.endswith(".zip") else "regular"
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
        name = re.sub("^/datasets/me/demos/resolve/(main|1{40})/", "", self.path)
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
        for name, value in {"ETag": '"1"', "X-Repo-Commit": "1" * 40, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_arguments: object) -> None:
        """Quiet."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(hub: Hub, tmp_path: Path) -> Run:
    """`run("push", …)` in a process of its own, since the hub's address is read at import."""
    variables = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hub-home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }

    def start(*arguments: str, token: str | None = TOKEN) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", "from demotools.cli import main; main()", *arguments],
            env=variables | ({"HF_TOKEN": token} if token else {}),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return start


def test_a_store_is_published_with_its_card_and_comes_back_bit_for_bit(
    make_store: Callable[..., Store], hub: Hub, run: Run, tmp_path: Path
) -> None:
    store = make_store(lengths=[3, 2, 4])
    pushed = run("push", str(store.path), "hf:me/demos")
    assert pushed.returncode == 0, pushed.stderr
    assert sorted(hub.files) == ["GoToLocal.zarr.zip", "README.md"]
    assert hub.files["README.md"].decode().startswith("---\npretty_name:")
    assert hub.created[0]["type"] == "dataset"
    assert "/datasets/me/demos/commit/1" in pushed.stdout
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in pushed.stdout + pushed.stderr
    # neither the archive nor anything else is left beside the store
    assert [file.name for file in tmp_path.iterdir() if "push" in file.name] == []

    back = tmp_path / "back"
    origin = "hf:me/demos/GoToLocal.zarr.zip"
    fetched = run("fetch", "GoToLocal", "--from", origin, "--data-dir", str(back))
    assert fetched.returncode == 0, fetched.stderr
    again = open_store(back / "GoToLocal.zarr")
    assert again.attributes.fingerprint == store.attributes.fingerprint
    assert TOKEN not in fetched.stdout + fetched.stderr


def test_a_card_that_is_there_already_is_kept(
    make_store: Callable[..., Store], hub: Hub, run: Run
) -> None:
    hub.files["README.md"] = b"mine"
    pushed = run("push", str(make_store(lengths=[3]).path), "hf:me/demos", "--private")
    assert pushed.returncode == 0, pushed.stderr
    assert hub.files["README.md"] == b"mine"
    assert "published GoToLocal.zarr.zip" in pushed.stdout
    assert hub.created[0].get("private") or hub.created[0].get("visibility") == "private"


def test_a_refusal_is_a_message_without_the_token(
    make_store: Callable[..., Store], hub: Hub, run: Run
) -> None:
    hub.forbidden = True
    store = make_store(lengths=[3])
    pushed = run("push", str(store.path), "hf:me/demos")
    assert pushed.returncode == 1
    assert "error: the Hugging Face hub did not accept it: " in pushed.stderr
    assert "  next:  check OWNER/NAME" in pushed.stderr
    assert "Traceback" not in pushed.stderr
    assert TOKEN not in pushed.stdout + pushed.stderr
    assert open_store(store.path).episodes == 1


def test_without_a_token_it_is_said_how_to_get_one(
    make_store: Callable[..., Store], hub: Hub, run: Run
) -> None:
    pushed = run("push", str(make_store(lengths=[3]).path), "hf:me/demos", token=None)
    assert pushed.returncode == 1
    assert "run `hf auth login`, or set $HF_TOKEN" in pushed.stderr
    assert hub.tokens == set()


def test_a_hub_that_cannot_be_reached_is_a_message(
    make_store: Callable[..., Store], hub: Hub, run: Run
) -> None:
    store = make_store(lengths=[3])
    hub.server_close()
    pushed = run("push", str(store.path), "hf:me/demos")
    assert pushed.returncode == 1
    assert "error: the Hugging Face hub did not accept it: " in pushed.stderr
    assert "Traceback" not in pushed.stderr


@pytest.mark.parametrize("place", ["me/demos", "hf:demos", "hf:me/demos/more", "hf:me/demos:x"])
def test_a_place_that_is_no_dataset_is_refused(
    make_store: Callable[..., Store], place: str
) -> None:
    with pytest.raises(FetchError) as error:
        push_store(make_store(lengths=[3]).path, place)
    assert error.value.fix == "write hf:OWNER/NAME"
