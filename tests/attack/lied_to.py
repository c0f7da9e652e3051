"""Input that is made to deceive: hostile files, odd servers, pipes, forged lines on a terminal."""

from __future__ import annotations

import http.server
import json
import shutil
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import tomli_w
import torch

from tests.attack import world
from tests.attack.campaign import Arena, attack, digest, ended, forked, special_file, started, typed
from tests.attack.tampered import DEEP, sampled
from tests.hostile import HOSTILE


@attack("hostile pickles", "nothing that a pickle names is executed, and the error shows the name")
def hostile_pickles(arena: Arena) -> None:
    for name, (content, _word) in HOSTILE.items():
        folder = arena.folder / str(arena.tried)
        folder.mkdir()
        file = folder / f"BabyAI-{world.LEVEL}-v0.pkl"
        file.write_bytes(content)
        command = ("demotools", "convert", file, "--data-dir", folder / "data", "-q")
        answer = ended(started(*command))
        problem = answer.problem or ("" if answer.code == 1 else f"exit code {answer.code}")
        if Path("hostile").exists() or (
            (folder / "data").exists() and any((folder / "data").glob("*.zarr"))
        ):
            problem = problem or "something was run, or a store was made"
        arena.note(name, problem)


HARMFUL = (
    *("os:system", "os:spawnvp", "subprocess:getoutput", "builtins:exec", "canary:Name"),
    *("canary.deeper:Name", "torch.hub:load", "torch.utils.cpp_extension:load", "runpy:run_path"),
    *("importlib:import_module", "demotools.__main__:run", "trainer.cli:main", "pydoc:locate"),
)
NAMING = (
    *("model.type", "on_policy.environment", "run.level", "optimizer.type"),
    *("optimizer.schedule.type", "losses.bc.type", "losses.other.type"),
)


@attack("hostile checkpoints", "nothing that a checkpoint names is imported or run without --trust")
def hostile_checkpoints(arena: Arena) -> None:
    data = arena.folder / "data"
    world.store(data, 60)
    run = world.trained(data, arena.folder / "run")
    content = torch.load(run / "last.pt", weights_only=True)
    here = arena.folder / "here"
    (here / "canary").mkdir(parents=True)
    sign = arena.folder / "imported"
    (here / "canary" / "__init__.py").write_text(f"open({str(sign)!r}, 'w')\nName = print\n")
    (here / "canary" / "deeper.py").write_text("Name = print\n")
    choices = [(key, name) for key in NAMING for name in HARMFUL]
    for key, name in sampled(arena, choices):
        settings = tomllib.loads(content["settings"])
        level = f"touch {sign}" if name.startswith(("os", "subprocess")) else world.LEVEL
        settings["run"]["level"] = level
        settings.setdefault("on_policy", {"environments": 2, "rollout_len": 4})
        place: Any = settings
        *parents, last = key.split(".")
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = name
        if key.startswith("optimizer.schedule"):
            settings["optimizer"]["schedule"] = {"type": name}
        folder = arena.folder / "hostile"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(run, folder)
        torch.save({**content, "settings": tomli_w.dumps(settings)}, folder / "last.pt")
        (folder / "settings.toml").write_text(tomli_w.dumps(settings), "utf-8")
        for command in (
            ("evaluate", folder / "last.pt", "--episodes", 1, "-m", 1, "-q"),
            ("evaluate", folder, "--level", world.LEVEL, "--episodes", 1, "-m", 1, "-q"),
            ("watch", folder, "--episodes", 1, "--json", "-q"),
        ):
            answer = forked("trainer", *command, preparation=lambda: sys.path.insert(0, str(here)))
            ran = sign.exists()
            sign.unlink(missing_ok=True)
            arena.note(f"{command[0]}, {key} = {name}", "it was run" if ran else answer.problem)


@attack("special files", "a pipe, device or folder in place of a file is refused immediately")
def special_files(arena: Arena) -> None:
    data = arena.folder / "data"
    store = world.store(data, 60)
    pickle, zipped = world.legacy_pickle(data), world.archive(data)
    run = world.trained(data, arena.folder / "run")
    recipe = arena.folder / "recipe.toml"
    recipe.write_bytes((run / "settings.toml").read_bytes())
    trials: list[tuple[Path, tuple[object, ...]]] = [
        (pickle, ("demotools", "convert", pickle, "--data-dir", arena.folder / "to")),
        (zipped, ("demotools", "unarchive", zipped, "--data-dir", arena.folder / "to")),
        (zipped, ("demotools", "fetch", "GoToObj", "--from", zipped, "--data-dir", arena.folder)),
        (recipe, ("trainer", "run", recipe, "-o", arena.folder / "new", "--dry-run")),
        (run / "last.pt", ("trainer", "evaluate", run, "--episodes", 1)),
        (run / "last.pt", ("trainer", "watch", run, "--episodes", 1)),
        (run / "last.pt", (*world.tiny_run(data, run), "--resume")),
        (run / "log.jsonl", ("trainer", "plot", run, "-o", arena.folder / "c.png", "--overwrite")),
        (run / "log.jsonl", ("trainer", "report", run, "-o", arena.folder / "r.html")),
        (run / "settings.toml", ("trainer", "report", run, "-o", arena.folder / "r.html")),
    ]
    for file in sorted(path for path in store.rglob("*") if path.is_file()):
        for word in ("info", "verify", "show", "shrink"):
            more = ("--episodes", 2, "--name", "t") if word == "shrink" else ()
            trials.append((file, ("demotools", word, store, *more, "--data-dir", data)))
    for kind in ("pipe", "device", "folder"):
        for file, command in trials:
            before = file.read_bytes()
            special_file(file, kind)
            answer = typed(*command, seconds=10)
            if file.is_dir() and not file.is_symlink():
                shutil.rmtree(file)
            else:
                file.unlink(missing_ok=True)
            file.write_bytes(before)
            words = " ".join(str(word) for word in command[:2])
            arena.note(f"{words}, {kind} at {file.name}", answer.problem)
            if not arena.time_left:
                return


@attack("special outputs", "if the output path is a pipe or device, it is left untouched")
def special_outputs(arena: Arena) -> None:
    data = arena.folder / "data"
    store = world.store(data, 60)
    run = world.trained(data, arena.folder / "run")
    target = arena.folder / "target"
    for kind in ("pipe", "device", "folder"):
        for command in (
            ("demotools", "archive", store, "-o", target),
            ("demotools", "export", store, "--to", "pickle", "-o", target),
            ("demotools", "report", store, "-o", target),
            ("demotools", "card", store, "-o", target),
            ("demotools", "show", store, "--gif", target),
            ("demotools", "show", store, "--png", target),
            ("trainer", "plot", run, "-o", target),
            ("trainer", "report", run, "-o", target),
            ("trainer", "watch", run, "--episodes", 1, "--gif", target),
            ("trainer", "recipes", "copy", "ppo.toml", "-o", target),
        ):
            for force in ((), ("--overwrite",)):
                special_file(target, kind)
                before = target.lstat()
                answer = typed(*command, *force, seconds=30)
                problem = answer.problem
                if not target.exists() or target.lstat().st_ino != before.st_ino:
                    problem = problem or "it is gone"
                if kind != "folder" and answer.code == 0:
                    problem = problem or "it says that it wrote"
                if target.is_dir() and not target.is_symlink():
                    shutil.rmtree(target)
                else:
                    target.unlink(missing_ok=True)
                arena.note(f"{command[1]} {' '.join(force)} to a {kind}", problem)


FORGED = (
    *("\x1b[2J\x1b[H", "\x1b]0;title\x07", "a\nerror: forged\n  next: run rm", "a\rb", "\x9b31m"),
    *("\u202etxt", "\u2028x", "\x00", "\x7f", "\u2066x\u2069", "x" * 100_000),
)


@attack(
    "forged lines", "text from files cannot move the terminal's cursor, start a line or set colours"
)
def forged_lines(arena: Arena) -> None:
    data = arena.folder / "data"
    store = world.store(data, 5)
    root = store / "zarr.json"
    before = root.read_bytes()
    tree = json.loads(before)
    keys = [key for key, value in tree["attributes"].items() if isinstance(value, str)]
    for key, text in sampled(arena, [(key, text) for key in keys for text in FORGED]):
        tree = json.loads(before)
        tree["attributes"][key] = text
        root.write_text(json.dumps(tree), "utf-8")
        for word in ("info", "list", "show", "verify", "card", "report"):
            more: tuple[object, ...] = () if word == "list" else (store,)
            if word == "report":
                more = (store, "-o", arena.folder / "r.html", "--overwrite")
            answer = typed("demotools", word, *more, "--data-dir", data)
            arena.note(f"{word}, {key} = {text[:12]!r}", answer.problem or _forged(answer.text))
    root.write_bytes(before)


def _forged(text: str) -> str:
    allowed = {"\n", "\t"}
    for sign in text:
        if (ord(sign) < 32 or 127 <= ord(sign) < 160 or sign in "\u2028\u2029\u202e\u2066") and (
            sign not in allowed
        ):
            return f"{sign!r} reaches the terminal"
    if any(line.startswith("error: forged") for line in text.splitlines()):
        return "a forged line reaches the terminal"
    return "" if len(text) < 50_000 else "text without end reaches the terminal"


class _Odd(http.server.BaseHTTPRequestHandler):
    answers: ClassVar[dict[str, bytes]] = {}

    def do_GET(self) -> None:
        # a redirection may lead to any path
        self.wfile.write(self.answers.get(self.path.split("?")[0], b""))
        self.close_connection = True

    do_HEAD = do_GET  # noqa: N815  # the name that http.server looks for

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the answers are odd on purpose."""


@contextmanager
def _odd_server(answers: dict[str, bytes]) -> Iterator[str]:
    handler = type("Handler", (_Odd,), {"answers": answers})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def odd_answers(body: bytes) -> dict[str, bytes]:
    """What no server should say, raw, by a name."""
    length = f"Content-Length: {len(body)}".encode()
    heads: dict[str, bytes] = {}
    digits = ("-1", "1e3", "\u00b2", "\u0967", "9" * 40, "", " ", "0x10", "5, 5", "nan")
    for text in digits:
        word = text.encode("utf-8")
        heads[f"Content-Length {text!r}"] = b"200 OK\r\nContent-Length: " + word
        heads[f"Retry-After {text!r}"] = b"503 Busy\r\nRetry-After: " + word
        heads[f"Content-Range {text!r}"] = b"206 Partial\r\nContent-Range: bytes " + word
    for text in (
        *("//", "http://[", "http://127.0.0.1:99999/", "file:///etc/passwd", "ftp://x/", "\xff"),
        *("http://" + "a" * 70_000, "javascript:1", "http://exa\u2028mple/", "?" * 20),
    ):
        heads[f"Location {text[:20]!r}"] = b"302 Found\r\nLocation: " + text.encode()
    heads["ETag without end"] = b"200 OK\r\nETag: " + b'"' + b"x" * 60_000 + b"\r\n" + length
    heads["a status that is none"] = b"999 \xff\xfe\r\n" + length
    heads["no status"] = b"\r\n"
    heads["date of no year"] = b"200 OK\r\nLast-Modified: Mon, 99 Foo 99999 99:99:99\r\n" + length
    heads["gzip that is none"] = b"200 OK\r\nContent-Encoding: gzip\r\n" + length
    heads["chunks that are none"] = b"200 OK\r\nTransfer-Encoding: chunked\r\n"
    end = b"\r\n\r\n" + body
    answers = {f"/{n}": b"HTTP/1.1 " + head + end for n, head in enumerate(heads.values())}
    deep = b"[" * DEEP + b"]" * DEEP
    for content, kind in ((deep, b"application/json"), (b"<html><title>\x1b[2J", b"text/html")):
        head = b"HTTP/1.1 403 No\r\nContent-Type: " + kind + b"\r\n\r\n"
        answers[f"/{len(answers)}"] = head + content
    return answers


@attack(
    "odd servers", "whatever the server sends, the download is complete and verified, or refused"
)
def odd_servers(arena: Arena) -> None:
    source = arena.folder / "source"
    world.store(source, 10)
    body = world.legacy_pickle(source).read_bytes()
    answers = odd_answers(body)
    with _odd_server(answers) as url:
        for path in sampled(arena, list(answers)):
            data = arena.folder / "data"
            shutil.rmtree(data, ignore_errors=True)
            # not again: a server may ask to be left alone for up to a minute, which is granted
            answer = typed(
                *("demotools", "fetch", world.LEVEL, "--from", f"{url}{path}", "--data-dir", data),
                *("--retries", 0, "--timeout", 2, "-q"),
                seconds=60,
            )
            problem = answer.problem
            if not problem and not answer.code:
                verified = typed("demotools", "verify", world.LEVEL, "--data-dir", data)
                problem = verified.problem or (verified.text[-200:] if verified.code else "")
            first = answers[path].partition(b"\r\n\r\n")[0][9:80]
            arena.note(f"{first!r}", problem or _forged(answer.text))
    assert digest(source)
