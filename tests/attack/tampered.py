"""Bytes and values changed behind our back: found, or without effect; never a traceback."""

from __future__ import annotations

import functools
import io
import json
import os
import random
import shutil
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tomli_w
import torch

from tests.attack import world
from tests.attack.campaign import Arena, attack, digest, forked, typed

DEEP = 5_000
STRANGE: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**31, 10**40, 0.5, float("nan"), float("inf"), "", "\ud800", "\x1b[2J"),
    *("../x", "a\nb", [], {}, [[]], [1] * 3, {"a": {"b": 1}}, "9" * 5000),
)
"""What may stand where another value belongs."""


def replaced(node: Any, key: Any, put: Callable[[Any], Any], new: Any) -> Any:
    """The whole tree with `new` in the place of one child of `node`."""
    copy = node.copy()
    copy[key] = new
    return put(copy)


def changed_values(tree: Any) -> Iterator[tuple[str, Any]]:
    """The tree with each value in it replaced by each strange one, or gone, one at a time."""

    def visit(node: Any, path: str, put: Callable[[Any], Any]) -> Iterator[tuple[str, Any]]:
        for value in STRANGE:
            yield f"{path} = {str(value)[:20]!r}", put(value)
        if isinstance(node, dict):
            for key in node:
                yield f"{path}.{key} gone", put({k: v for k, v in node.items() if k != key})
        children = list(node.items()) if isinstance(node, dict) else []
        if isinstance(node, list):
            children = list(enumerate(node[:2]))
        for key, child in children:
            yield from visit(child, f"{path}.{key}", functools.partial(replaced, node, key, put))

    yield from visit(tree, "", lambda new: new)


def flipped(content: bytes, place: int, bit: int) -> bytes:
    """With one bit changed."""
    data = bytearray(content)
    data[place] ^= 1 << bit
    return bytes(data)


def sampled(arena: Arena, choices: list[Any]) -> Iterator[Any]:
    """All choices in a random order, as long as there is time."""
    arena.dice.shuffle(choices)
    for choice in choices:
        if not arena.time_left:
            return
        yield choice


@attack("metadata bits", "verify detects every single flipped bit in any zarr.json")
def metadata_bits(arena: Arena) -> None:
    store = world.store(arena.folder / "data", 5)
    files = sorted(store.rglob("zarr.json"))
    places = [
        (file, place, bit)
        for file in files
        for place in range(file.stat().st_size)
        for bit in range(8)
    ]
    for file, place, bit in sampled(arena, places):
        before = file.read_bytes()
        file.write_bytes(flipped(before, place, bit))
        answer = typed("demotools", "verify", store)
        file.write_bytes(before)
        problem = answer.problem or ("" if answer.code == 1 else "verify passes")
        arena.note(f"bit {bit} of byte {place} of {file.relative_to(store)}", problem)


@attack("metadata values", "an invalid value in any zarr.json is refused with a three-part error")
def metadata_values(arena: Arena) -> None:
    data = arena.folder / "data"
    store = world.store(data, 5)
    changes = [
        (file, what, tree)
        for file in sorted(store.rglob("zarr.json"))
        for what, tree in changed_values(json.loads(file.read_text("utf-8")))
    ]
    for file, what, tree in sampled(arena, changes):
        before = file.read_bytes()
        file.write_text(json.dumps(tree), "utf-8")
        where = f"{file.relative_to(store)}{what}"
        answer = typed("demotools", "verify", store)
        arena.note(f"verify, {where}", answer.problem or ("" if answer.code == 1 else "passes"))
        word = arena.dice.choice(["info", "show", "report", "export", "archive", "shrink", "list"])
        options: dict[str, tuple[object, ...]] = {
            "report": (store, "-o", data / "r.html", "--overwrite"),
            "export": (store, "--to", "pickle", "-o", data / "x.pkl", "--overwrite"),
            "archive": (store, "-o", data / "x.zip", "--overwrite"),
            "shrink": (store, "--episodes", 2, "--overwrite"),
            "list": (),
        }
        more = options.get(word, (store,))
        answer = typed("demotools", word, *more, "--data-dir", data)
        file.write_bytes(before)
        arena.note(f"{word}, {where}", answer.problem)


@attack("store bytes", "verify detects every changed, added, missing or truncated file of a store")
def store_bytes(arena: Arena) -> None:
    store = world.store(arena.folder / "data", 5)
    files = sorted(path for path in store.rglob("*") if path.is_file())
    while arena.time_left:
        file = arena.dice.choice(files)
        before = file.read_bytes()
        act = arena.dice.choice(["flip", "cut", "longer", "gone", "stray", "link"])
        stray = file.with_name(arena.dice.choice(["1", "x", ".hidden", "zarr.json~"]))
        if act == "flip":
            place, bit = arena.dice.randrange(len(before)), arena.dice.randrange(8)
            file.write_bytes(flipped(before, place, bit))
        elif act == "cut":
            file.write_bytes(before[: arena.dice.randrange(len(before))])
        elif act == "longer":
            file.write_bytes(before + b"\0")
        elif act in ("gone", "link"):
            file.unlink()
            if act == "link":
                file.symlink_to("/dev/zero")
        else:
            stray.write_bytes(b"x")
        answer = typed("demotools", "verify", store)
        stray.unlink(missing_ok=True)
        file.unlink(missing_ok=True)
        file.write_bytes(before)
        problem = answer.problem or ("" if answer.code == 1 else "verify passes")
        arena.note(f"{act} {file.relative_to(store)}", problem)


@attack("archive bytes", "unarchive refuses a changed archive, or restores exactly the same store")
def archive_bytes(arena: Arena) -> None:
    data = arena.folder / "data"
    store = world.store(data, 5)
    file = world.archive(data)
    content, wanted = file.read_bytes(), digest(store)
    with zipfile.ZipFile(file) as opened:
        directory = opened.start_dir
    places = [(p, b) for p in range(directory, len(content)) for b in range(8)]
    places += [(arena.dice.randrange(directory), arena.dice.randrange(8)) for _ in range(4000)]
    changed = arena.folder / "changed.zarr.zip"
    for place, bit in sampled(arena, places):
        changed.write_bytes(flipped(content, place, bit))
        answer = typed(
            *("demotools", "unarchive", changed, "--name", "back"),
            *("--data-dir", data, "--overwrite"),
        )
        problem = answer.problem
        if not answer.code and digest(data / "back.zarr") != wanted:
            problem = problem or "it restores another store"
        arena.note(f"bit {bit} of byte {place}", problem)


@attack("parts of a job", "a changed part of an interrupted job is detected and rebuilt")
def parts_of_a_job(arena: Arena) -> None:
    source = arena.folder / "source"
    world.store(source, 30)
    file = world.legacy_pickle(source)
    wanted_data = arena.folder / "wanted"
    command = ("demotools", "convert", file, "--on-error", "skip", "--workers", 1)
    typed(*command, "--data-dir", wanted_data)
    wanted = digest(wanted_data / f"{world.LEVEL}.zarr")
    while arena.time_left:
        data = arena.folder / "data"
        shutil.rmtree(data, ignore_errors=True)
        # a job that dies when its store is whole, before that gets its name
        forked(*command, "--data-dir", data, preparation=_die_at_a_rename)
        building = data / f".{world.LEVEL}.zarr.building"
        files = sorted(path for path in building.rglob("*") if path.is_file())
        if not files:
            arena.note("an interrupted job", "it left nothing to change")
            return
        changed = arena.dice.choice(files)
        content = changed.read_bytes()
        place = arena.dice.randrange(max(len(content), 1))
        if arena.dice.random() < 0.7 and content:
            changed.write_bytes(flipped(content, place, arena.dice.randrange(8)))
        else:
            changed.write_bytes(content[:place])
        answer = typed(*command, "--data-dir", data)
        problem = answer.problem or (answer.text[-200:] if answer.code else "")
        if digest(data / f"{world.LEVEL}.zarr") != wanted:
            problem = problem or "other bytes than undisturbed"
        arena.note(f"byte {place} of {changed.name}", problem)


def _die_at_a_rename() -> None:
    Path.rename = lambda *_: os._exit(9)  # type: ignore[method-assign]


@attack("checkpoint bytes", "a changed checkpoint is refused, or holds exactly the same policy")
def checkpoint_bytes(arena: Arena) -> None:
    data = arena.folder / "data"
    world.store(data, 60)
    run = world.trained(data, arena.folder / "run")
    content = (run / "last.pt").read_bytes()
    wanted = _evaluated(run / "last.pt")
    changed = arena.folder / "changed.pt"
    while arena.time_left:
        place, bit = arena.dice.randrange(len(content)), arena.dice.randrange(8)
        cut = arena.dice.random() < 0.1
        changed.write_bytes(content[:place] if cut else flipped(content, place, bit))
        answer = typed(*("trainer", "evaluate", changed, "--episodes", 2, "--json", "-m", 1, "-q"))
        problem = answer.problem
        if not answer.code and answer.text != wanted:
            problem = problem or "another policy"
        arena.note(f"{'cut at' if cut else f'bit {bit} of'} byte {place}", problem)


def _evaluated(checkpoint: Path) -> str:
    answer = typed("trainer", "evaluate", checkpoint, "--episodes", 2, "--json", "-m", 1, "-q")
    return answer.text


@attack("checkpoint values", "an invalid value in a checkpoint is refused with a three-part error")
def checkpoint_values(arena: Arena) -> None:
    data = arena.folder / "data"
    world.store(data, 60)
    run = world.trained(data, arena.folder / "run")
    content = torch.load(run / "last.pt", weights_only=True)
    changes = list(_changed_checkpoints(content, arena.dice))
    changed = arena.folder / "changed"
    for what, tree in sampled(arena, changes):
        shutil.rmtree(changed, ignore_errors=True)
        shutil.copytree(run, changed)
        buffer = io.BytesIO()
        torch.save(tree, buffer)
        (changed / "last.pt").write_bytes(buffer.getvalue())
        answer = typed("trainer", "evaluate", changed, "--episodes", 1, "-m", 1, "-q")
        arena.note(f"evaluate, {what}", answer.problem)
        resumed = typed(*world.tiny_run(data, changed), "--resume")
        arena.note(f"resume, {what}", resumed.problem)


def _changed_checkpoints(content: Any, dice: random.Random) -> Iterator[tuple[str, Any]]:
    plain = {key: value for key, value in content.items() if key != "settings"}
    for what, tree in changed_values(plain):
        if isinstance(tree, dict):
            yield what, {**tree, "settings": content["settings"]}
    for value in STRANGE:
        yield f"settings = {str(value)[:20]!r}", {**content, "settings": value}
    for what, tree in changed_values(tomllib.loads(content["settings"])):
        try:
            text = tomli_w.dumps(tree)
        except (TypeError, ValueError, AttributeError, UnicodeError):
            continue  # TOML cannot say it
        yield f"settings{what}", {**content, "settings": text}
    names = list(content["model"])
    for name in names:
        tensor = content["model"][name]
        for other in (tensor[..., :0], tensor.double(), tensor.to(torch.int8), tensor * torch.nan):
            yield f"model.{name} of {tuple(other.shape)}", _with(content, name, other)
        yield f"model.{name} gone", _with(content, name, None)
        yield f"model.{name} huge", _with(content, name, torch.zeros(1).expand(10**9, 50))
    dice.shuffle(names)


def _with(content: Any, name: str, tensor: torch.Tensor | None) -> Any:
    model = {key: value for key, value in content["model"].items() if key != name}
    return {**content, "model": model if tensor is None else {**model, name: tensor}}


@attack("logs", "plot and report read a damaged log, or refuse it with a three-part error")
def logs(arena: Arena) -> None:
    data = arena.folder / "data"
    world.store(data, 60)
    run = world.trained(data, arena.folder / "run")
    log = run / "log.jsonl"
    lines = log.read_text("utf-8").splitlines()
    before = log.read_bytes()
    changes: list[tuple[str, bytes]] = []
    for number in range(len(lines)):
        for what, tree in changed_values(json.loads(lines[number])):
            text = json.dumps(tree).encode()
            rest = [line.encode() for line in lines[:number]] + [text]
            rest += [line.encode() for line in lines[number + 1 :]]
            changes.append((f"line {number}{what}", b"\n".join(rest) + b"\n"))
    deep = b"[" * DEEP + b"]" * DEEP
    for text in (b"", b"\xff\xfe", b"not json", deep, b"{}", b"1", b'{"a":', b"\0" * 100):
        changes.append((f"the line {text[:12]!r}", before + text + b"\n"))
        changes.append((f"only {text[:12]!r}", text))
    for what, content in sampled(arena, changes):
        log.write_bytes(content)
        for command in (
            ("plot", run, "-o", arena.folder / "c.png", "--overwrite"),
            ("report", run, "-o", arena.folder / "r.html", "--overwrite"),
        ):
            answer = typed("trainer", *command, "-q")
            arena.note(f"{command[0]}, {what}", answer.problem)
    log.write_bytes(before)


@attack(
    "Minari", "a tampered Minari dataset is refused with a three-part error, or its store is valid"
)
def minari(arena: Arena) -> None:
    data = arena.folder / "data"
    store = world.store(data, 6)
    good = arena.folder / "good"
    typed("demotools", "export", store, "--to", "minari", "-o", good, "--id", "babyai/x-v0", "-q")
    metadata = next(good.rglob("metadata.json"))
    changes: list[tuple[str, bytes]] = [
        (what, json.dumps(tree).encode())
        for what, tree in changed_values(json.loads(metadata.read_text("utf-8")))
    ]
    deep = b"[" * DEEP + b"]" * DEEP
    changes += [(f"{text[:9]!r}", text) for text in (b"", b"{", b"\xff", deep, b"\0" * 9)]
    before = metadata.read_bytes()
    for what, content in sampled(arena, changes):
        metadata.write_bytes(content)
        arena.note(f"metadata{what}", _imported(arena, metadata.parents[1]))
    metadata.write_bytes(before)
    hdf5 = next(good.rglob("*.hdf5"))
    content = hdf5.read_bytes()
    for _ in range(300):
        if not arena.time_left:
            return
        place, bit = arena.dice.randrange(len(content)), arena.dice.randrange(8)
        hdf5.write_bytes(flipped(content, place, bit))
        arena.note(f"bit {bit} of byte {place} of the HDF5 file", _imported(arena, hdf5.parents[1]))
    hdf5.write_bytes(content)


def _imported(arena: Arena, folder: Path) -> str:
    data = arena.folder / "imported"
    shutil.rmtree(data, ignore_errors=True)
    answer = typed(
        *("demotools", "import", folder, "--from", "minari", "--level", world.LEVEL),
        *("--name", "x", "--data-dir", data, "-q"),
    )
    if answer.problem or answer.code:
        return answer.problem
    verified = typed("demotools", "verify", "x", "--data-dir", data)
    return verified.problem or (f"verify refuses: {verified.text[-200:]}" if verified.code else "")


@attack(
    "pickle bytes",
    "a changed pickle is refused, or its store is valid, or verify detects the change",
)
def pickle_bytes(arena: Arena) -> None:
    source = arena.folder / "source"
    world.store(source, 12)
    content = world.legacy_pickle(source).read_bytes()
    changed = arena.folder / f"BabyAI-{world.LEVEL}-v0.pkl"
    data = arena.folder / "data"
    while arena.time_left:
        place, bit = arena.dice.randrange(len(content)), arena.dice.randrange(8)
        cut = arena.dice.random() < 0.1
        changed.write_bytes(content[:place] if cut else flipped(content, place, bit))
        answer = typed(
            *("demotools", "convert", changed, "--workers", 1, "--overwrite"),
            *("--data-dir", data, *(("--on-error", "skip") if bit % 2 else ()), "-q"),
        )
        problem = answer.problem
        if not problem and not answer.code:
            verified = typed("demotools", "verify", world.LEVEL, "--data-dir", data)
            # another letter in a mission is text like any other: verify knows the level's grammar
            found_out = "1 of 8 checks failed: not a mission of" in verified.text
            wrong = verified.text[-200:] if verified.code and not found_out else ""
            problem = verified.problem or wrong
        arena.note(f"{'cut at' if cut else f'bit {bit} of'} byte {place}", problem)
