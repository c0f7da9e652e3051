"""The reader: open, map, slice; and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import google_crc32c
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from hypothesis import given
from numcodecs.zstd import Zstd

from demotools.cli import main
from demotools.errors import SettingsError, StoreError
from demotools.look.info import store_info
from demotools.output import data_folder
from demotools.store import building as chunks
from demotools.store.building import group_json
from demotools.store.episodes import spans
from demotools.store.format import NO_HASH, metadata_hash, present_folder
from demotools.store.reading import (
    Store,
    episode_mask,
    fingerprint,
    new_store_path,
    open_store,
    store_path,
)
from tests.conftest import MISSIONS, build_store, make_episodes, set_aside

MakeStore = Callable[..., Store]


def test_plain_zarr_reads_the_same_arrays(make_store: MakeStore) -> None:
    store = make_store(lengths=[3, 2, 4])
    group = zarr.open_group(store.path, mode="r")
    episodes = make_episodes([3, 2, 4])
    assert np.array_equal(np.asarray(group["cells"]), episodes.view)
    assert np.array_equal(np.asarray(group["direction"]), episodes.direction)
    assert np.array_equal(np.asarray(group["action"]), episodes.action)
    assert np.asarray(group["mask"]).tolist() == [0, 1, 1, 0, 1, 0, 1, 1, 1]
    assert np.asarray(group["episode_offset"]).tolist() == [0, 3, 5, 9]
    assert np.asarray(group["episode_mission"]).tolist() == [0, 1, 2]
    assert np.asarray(group["episode_seed"]).tolist() == [0, 1, 2]
    assert list(np.asarray(group["mission_text"])) == list(MISSIONS) == store.mission_text
    for name in ("episode_offset", "episode_mission", "episode_seed", "mission_tokens"):
        assert np.array_equal(np.asarray(group[name]), getattr(store, name))


def test_a_chunk_file_is_the_raw_array_and_a_checksum(make_store: MakeStore) -> None:
    store = make_store(lengths=[3, 2, 4])
    mapped = np.memmap(store.path / "cells/c/0/0/0", np.uint8, "r", shape=(9, 7, 7))
    assert np.array_equal(mapped, make_episodes([3, 2, 4]).view)


def test_plain_zarr_refuses_a_flipped_byte(make_store: MakeStore) -> None:
    store = make_store(lengths=[3, 2, 4])
    flip_a_byte(store.path / "cells/c/0/0/0", 100)
    with pytest.raises(ValueError, match="checksum"):
        np.asarray(zarr.open_group(store.path, mode="r")["cells"])


def test_a_flipped_byte_in_the_mission_texts_is_said_in_three_parts(
    make_store: MakeStore,
) -> None:
    store = make_store(lengths=[3, 2, 4])
    flip_a_byte(store.path / "mission_text/c/0", 3)
    with pytest.raises(StoreError, match="mission_text cannot be read"):
        _ = open_store(store.path).mission_text


def flip_a_byte(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 0x10
    file.write_bytes(content)


def test_slices_and_gathers_cross_chunk_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "_CHUNK_STEPS", 4096)
    episodes = make_episodes([7] * 2000)
    store = build_store(tmp_path / "X.zarr", episodes)
    assert len(store.view.chunks) == 4
    assert store.view.shape == (14_000, 7, 7)
    random = np.random.default_rng(1)
    for start, stop in [(0, 14_000), (4095, 4097), (4096, 4096), (8000, 13_000), (13_999, 14_000)]:
        assert np.array_equal(store.view.span(start, stop), episodes.view[start:stop])
    index = random.integers(0, 14_000, (5, 300))
    assert np.array_equal(store.view.take(index), episodes.view[index])
    chosen = random.permutation(2000)[:50]
    assert np.array_equal(
        store.take(chosen).view, episodes.view.reshape(2000, 7, 7, 7)[chosen].reshape(-1, 7, 7)
    )


@given(st.lists(st.integers(1, 5), min_size=1, max_size=20), st.data())
def test_the_mask_is_zero_exactly_where_an_episode_begins(
    lengths: list[int], data: st.DataObject
) -> None:
    offset = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    start = data.draw(st.integers(0, int(offset[-1])))
    stop = data.draw(st.integers(start, int(offset[-1])))
    expected = [0 if step in offset.tolist() else 1 for step in range(start, stop)]
    assert episode_mask(offset, start, stop).tolist() == expected


@given(hnp.arrays(np.int64, st.integers(0, 9), elements=st.integers(0, 50)), st.data())
def test_spans_are_ranges_one_after_another(
    start: np.ndarray[tuple[int], np.dtype[np.int64]], data: st.DataObject
) -> None:
    length = data.draw(hnp.arrays(np.int64, start.shape, elements=st.integers(0, 6)))
    expected = [i for a, n in zip(start, length, strict=True) for i in range(a, a + n)]
    assert spans(start, length).tolist() == expected


def test_a_store_is_opened_by_its_name_in_the_data_folder_or_by_its_path(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(lengths=[3, 2])
    monkeypatch.setenv("DEMOTOOLS_DATA", str(store.path.parent))
    for name in ("GoToLocal", str(store.path), store.path):
        assert open_store(name).path == store.path
    monkeypatch.chdir(store.path.parent)
    assert open_store("GoToLocal.zarr").steps == 5


def test_importing_the_reader_pulls_in_neither_torch_nor_click_nor_minigrid() -> None:
    code = "import sys, demotools.store; print({'torch', 'click', 'minigrid'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_missing_store_says_which_commands_make_it(tmp_path: Path) -> None:
    with pytest.raises(StoreError) as refused:
        open_store(tmp_path / "GoToLocal-small.zarr")
    for command in ("fetch GoToLocal", "convert", "generate GoToLocal"):
        assert command in refused.value.fix


def test_a_store_left_unfinished_is_refused(make_store: MakeStore) -> None:
    store = make_store(lengths=[3])
    unfinished = group_json({"schema": "babyai-demos", "unfinished": True})
    (store.path / "zarr.json").write_bytes(unfinished)
    with pytest.raises(StoreError) as refused:
        open_store(store.path)
    assert refused.value.what == "this store was left unfinished"
    assert refused.value.fix.startswith("remove the folder")


@pytest.mark.parametrize(
    "kind", ["v2 group", "v2 array", "v3 group", "v3 array", "empty", "photos"]
)
def test_what_others_made_is_never_told_to_be_removed(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "Other.zarr"
    format_: Literal[2, 3] = 2 if "v2" in kind else 3
    if "group" in kind:
        zarr.create_group(path, zarr_format=format_)
    elif "array" in kind:
        zarr.create_array(path, shape=(3,), dtype="uint8", zarr_format=format_)
    else:
        path.mkdir()
        if kind == "photos":
            (path / "one.png").write_bytes(b"x")
    before = sorted(tmp_path.rglob("*"))
    commands = [
        ["info"],
        ["verify"],
        ["shrink", "--episodes", "1"],
        ["archive"],
        ["remove", "--yes"],
    ]
    commands += [["export", "--to", "pickle"], ["show"], ["card"]]
    for command, *options in commands:
        result = CliRunner().invoke(main, [command, str(path), *options])
        assert result.exit_code == 1, (command, result.exception)
        assert "this is not a demo store" in result.stderr
        assert "remove the folder" not in result.stderr
    listed = CliRunner().invoke(main, ["list", "--data-dir", str(tmp_path)])
    assert "this is not a demo store" in listed.output
    with pytest.raises(StoreError, match="not a demo store"):
        build_store(path, make_episodes([3]))
    visible = [file for file in sorted(tmp_path.rglob("*")) if not file.name.startswith(".Other")]
    assert visible == before


def other_store(name: str, store: Store) -> Path:
    """A folder that replaces the store: the same counts, other missions."""
    other = make_episodes([3, 2, 4], seed=1)
    renamed = replace(other, mission=["go to the blue key", "go to a red box", "go to a red ball"])
    return build_store(store.path.with_name(name), renamed).path


def test_an_open_store_gives_what_was_opened_whatever_takes_its_place(
    make_store: MakeStore,
) -> None:
    store = make_store(lengths=[3, 2, 4])
    other = other_store("Other.zarr", store)
    store.path.rename(store.path.with_name("moved"))
    other.rename(store.path)
    assert store.mission_text == list(MISSIONS)
    assert store.texts([2, 0]) == [MISSIONS[2], MISSIONS[0]]
    assert np.array_equal(store.take(np.array([0, 1, 2])).view, make_episodes([3, 2, 4]).view)
    store.check_unchanged()


def test_an_open_store_that_is_written_to_is_found_out(make_store: MakeStore) -> None:
    store = make_store(lengths=[3, 2, 4])
    other = other_store("Other.zarr", store)
    for name in ("mission_text/c/0", "cells/c/0/0/0"):
        with (store.path / name).open("r+b") as stream:
            stream.write((other / name).read_bytes()[: (store.path / name).stat().st_size])
    with pytest.raises(StoreError, match="replaced"):
        store.check_unchanged()


def put_texts(path: Path, content: bytes, level: int = 1) -> None:
    """Put other bytes in the place of the mission texts, with right checksums."""
    packed = bytes(Zstd(level=level).encode(content)) if level else content
    crc = google_crc32c.value(packed).to_bytes(4, "little")
    (path / "mission_text/c/0").write_bytes(packed + crc)
    sign(path)


def vlen(*texts: bytes, count: int | None = None) -> bytes:
    number = len(texts) if count is None else count
    parts = [len(text).to_bytes(4, "little") + text for text in texts]
    return b"".join([number.to_bytes(4, "little"), *parts])


MAGIC = b"\x28\xb5\x2f\xfd"
GOOD = [text.encode() for text in MISSIONS]
HOSTILE_TEXTS: dict[str, tuple[bytes, int]] = {
    "2^31 texts": (vlen(*GOOD, count=1 << 31), 1),
    "no text": (vlen(), 1),
    "one text too many": (vlen(*GOOD, b"go"), 1),
    "a text longer than the rest": (vlen(*GOOD[:2]) + (1 << 31).to_bytes(4, "little") + b"go", 1),
    "a negative length": (vlen(*GOOD[:2]) + b"\xff\xff\xff\xff" + b"go", 1),
    "bytes behind the last": (vlen(*GOOD) + b"x", 1),
    "no UTF-8": (vlen(*GOOD[:2], b"\xff\xfe"), 1),
    "half a character": (vlen(*GOOD[:2], b"\xed\xa0\x80"), 1),
    "a bomb": (bytes(1 << 29), 1),
    "no frame": (b"x" * 40, 0),
    "an announced size of 2^60": (
        b"\x28\xb5\x2f\xfd\xe0" + (1 << 60).to_bytes(8, "little") + b"x",
        0,
    ),
    "an announced size that is wrong": (b"\x28\xb5\x2f\xfd\x20\x90" + b"\x01\x00\x00", 0),
    "no announced size": (b"\x28\xb5\x2f\xfd\x00\x58" + b"\x01\x00\x00", 0),
}


@pytest.mark.parametrize("level", [1, 19])
def test_mission_texts_may_be_compressed_at_any_level(level: int, make_store: MakeStore) -> None:
    store = make_store(lengths=[3, 2, 4])
    put_texts(store.path, vlen(*GOOD), level)
    assert tuple(open_store(store.path).mission_text) == MISSIONS


@pytest.mark.parametrize("what", HOSTILE_TEXTS)
def test_mission_texts_are_not_believed(what: str, make_store: MakeStore) -> None:
    store = make_store(lengths=[3, 2, 4])
    put_texts(store.path, *HOSTILE_TEXTS[what])
    with pytest.raises(StoreError, match="mission_text cannot be read"):
        _ = open_store(store.path).mission_text
    for command in READERS:
        result = CliRunner().invoke(main, [command[0], str(store.path), *command[1:]])
        assert result.exit_code == 1, (command, result.exception)
        assert isinstance(result.exception, SystemExit), (command, result.exception)


READERS = (
    ["verify"],
    ["show", "--mission", "red"],
    ["shrink", "--episodes", "3"],
    ["report", "--json"],
    ["export", "--to", "pickle"],
)


@pytest.mark.parametrize(
    ("array", "key", "value", "unnoticed"),
    [
        ("episode_offset", 1, 10**12, ()),
        ("episode_offset", 0, -5, ()),
        ("episode_offset", 3, 10**12, ()),
        ("episode_offset", 2, 2, ()),
        ("episode_mission", 1, 2**31 - 1, ()),
        ("episode_mission", 1, -1, ()),
        ("cells", (0, 0, 0), 255, ()),
        ("action", 0, 255, ()),
        ("direction", 0, 255, ("report",)),
        ("mission_tokens", (0, 0), 255, ("show", "shrink", "export")),
        ("mask", 0, 255, ("show", "shrink", "report", "export")),
    ],
)
def test_arrays_are_not_believed_because_their_checksums_are_right(
    array: str, key: Any, value: int, unnoticed: tuple[str, ...], make_store: MakeStore
) -> None:
    store = make_store(lengths=[3, 2, 4])
    make_store(lengths=[2], name="Other")
    opened = zarr.open_array(store.path / array, mode="r+")
    opened[key] = value
    sign(store.path)
    for command, *options in [*READERS, ["show", "--png", str(store.path.parent / "a.png")]]:
        result = CliRunner().invoke(
            main, [command, "GoToLocal", *options, "--data-dir", str(store.path.parent)]
        )
        if command in unnoticed:
            # what it reads is not what was changed
            assert result.exit_code == 0 or isinstance(result.exception, SystemExit), command
            continue
        assert result.exit_code == 1, (command, result.exception, result.output)
        assert isinstance(result.exception, SystemExit), (command, result.exception)


@pytest.mark.parametrize("aside", [False, True])
@pytest.mark.parametrize("name", ["v1.pt", "x.pkl", "GoTo.v2"])
def test_a_store_named_like_a_file_is_told_from_it_by_what_lies_there(
    name: str, aside: bool, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(lengths=[3, 2], name=name)
    folder = store.path.parent
    (folder / "here").mkdir()
    monkeypatch.chdir(folder / "here")
    Path(name).write_bytes(b"a file of the same name")
    if aside:
        set_aside(store)
    assert store_path(name, folder) == store.path
    about = CliRunner().invoke(main, ["info", name, "--json", "--data-dir", str(folder)])
    shown = json.loads(about.stdout)
    assert (shown["episodes"], shown["files"] > 10, shown["size_bytes"] > 500) == (2, True, True)
    shutil.rmtree(present_folder(store.path))
    refused = CliRunner().invoke(main, ["info", name, "--data-dir", str(folder)])
    assert "error: this is a file, and a demo store is a folder" in refused.stderr
    assert f"where: {name}\n" in refused.stderr


def test_a_store_may_be_named_by_its_path_without_the_suffix(make_store: MakeStore) -> None:
    store = make_store(lengths=[3, 2])
    path = store.path.with_suffix("")
    assert store_info(path) == store_info(store.path)
    for command in ("verify", "archive", "remove --yes"):
        done = CliRunner().invoke(main, [*command.split(), str(path)])
        assert done.exit_code == 0, done.output
    assert not store.path.exists()


@pytest.mark.parametrize("name", [".", "./", "./.", "../GoToLocal.zarr", "../GoToLocal.zarr/"])
def test_a_store_may_be_named_by_where_one_stands(
    name: str, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(lengths=[3, 2, 4])
    monkeypatch.chdir(store.path)
    commands = [
        ["info"],
        ["verify"],
        ["archive"],
        ["shrink", "--episodes", "1"],
        ["card"],
        ["show"],
    ]
    commands += [["export", "--to", "pickle", "-o", "../a.pkl"], ["remove", "--yes"]]
    for command, *options in commands:
        result = CliRunner().invoke(main, [command, name, *options])
        assert result.exit_code == 0, (command, result.output, result.exception)
    folder = store.path.parent
    visible = {file.name for file in folder.iterdir() if not file.name.startswith(".")}
    assert visible == {"GoToLocal-small.zarr", "GoToLocal.zarr.zip", "a.pkl"}


@pytest.mark.parametrize("name", ["..", "/", ""])
def test_what_is_no_store_may_be_named_any_way(name: str, tmp_path: Path) -> None:
    for command in ("info", "verify", "archive", "remove", "card"):
        result = CliRunner().invoke(main, [command, name, "--data-dir", str(tmp_path)])
        assert result.exit_code == 1, (command, result.exception)
        assert isinstance(result.exception, SystemExit)


@pytest.mark.slow
def test_a_folder_whose_name_is_no_utf8_is_served(make_store: MakeStore) -> None:
    store = make_store(lengths=[3, 2, 4])
    path = store.path.with_name(os.fsdecode(b"caf\xe9.zarr"))
    store.path.rename(path)
    commands = [["info"], ["info", "--json"], ["verify"], ["archive"], ["unarchive"]]
    commands += [["shrink", "--episodes", "1"], ["card"], ["show", "--ansi"], ["list"]]
    commands += [["report", "--json"], ["export", "--to", "pickle"], ["remove", "--yes"]]
    for command, *options in commands:
        named = [] if command == "list" else [path]
        if command == "unarchive":
            named = [path.with_name(path.name + ".zip")]
            options = ["--name", "Back"]
        arguments: list[str | Path] = [*named, *options, "--data-dir", path.parent]
        done = subprocess.run(
            [sys.executable, "-m", "demotools", command, *arguments],
            capture_output=True,
            cwd=path.parent,
            check=False,
            env={**os.environ, "PYTHONIOENCODING": "utf-8", "PYTHONPATH": str(Path.cwd())},
        )
        assert done.returncode == 0, (command, done.stderr)


@pytest.mark.parametrize(
    "file",
    [
        "zarr.json",
        *(
            pytest.param(file, marks=pytest.mark.slow)
            for file in ("cells/zarr.json", "cells/c/0/0/0", "mission_text/c/0")
        ),
    ],
)
def test_a_pipe_inside_a_store_makes_nobody_wait(file: str, make_store: MakeStore) -> None:
    store = make_store(lengths=[3, 2, 4])
    make_store(lengths=[2], name="Other")
    folder = store.path.parent
    (store.path / file).unlink()
    os.mkfifo(store.path / file)
    commands = [*READERS, ["info"], ["archive"], ["card"], ["remove", "--yes"], ["list"]]
    for command, *options in commands:
        named = [] if command == "list" else ["GoToLocal"]
        done = subprocess.run(
            [sys.executable, "-m", "demotools", command, *named, *options, "--data-dir", folder],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        good = command == "list" or (command == "remove" and file != "zarr.json")
        assert done.returncode == (0 if good else 1), (command, done.stderr)
        assert "Traceback" not in done.stderr


def test_a_replaced_store_is_never_missing_nor_half(make_store: MakeStore) -> None:
    store = make_store(lengths=[3, 2, 4])
    writer = subprocess.Popen([sys.executable, "-c", REPLACE, str(store.path)])
    seen = set()
    try:
        while writer.poll() is None:
            found = open_store(store.path)
            seen.add((found.steps, tuple(found.mission_text)))
    finally:
        writer.kill()
        writer.wait()
    assert writer.returncode == 0
    assert len(seen) > 1
    assert seen <= {(9, MISSIONS), (8, MISSIONS), (7, MISSIONS)}


def test_a_store_that_is_moved_away_while_it_is_opened_is_only_ever_missing(
    make_store: MakeStore,
) -> None:
    store = make_store(lengths=[3, 2, 4])
    mover = subprocess.Popen([sys.executable, "-c", MOVE, str(store.path)])
    outcomes = set()
    try:
        while mover.poll() is None:
            try:
                outcomes.add(open_store(store.path).steps)
            except StoreError:
                outcomes.add(0)
    finally:
        mover.kill()
        mover.wait()
    assert mover.returncode == 0
    assert outcomes == {0, 9}


MOVE = """
import os, sys
for round in range(100_000):
    os.rename(sys.argv[1], sys.argv[1] + "-away")
    os.rename(sys.argv[1] + "-away", sys.argv[1])
"""

REPLACE = """
import sys
from pathlib import Path
from tests.conftest import build_store, make_episodes
for round in range(40):
    build_store(Path(sys.argv[1]), make_episodes([3, 1 + round % 2, 4]))
"""


def test_a_store_of_a_newer_schema_version_is_refused(make_store: MakeStore) -> None:
    store = make_store(lengths=[3])
    edit_attributes(store.path, lambda attributes: attributes.update(schema_version=2))
    with pytest.raises(StoreError, match="schema version 2") as refused:
        open_store(store.path)
    assert "newer demotools" in refused.value.fix


def test_a_folder_that_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="not a demo store"):
        open_store(tmp_path)
    zarr.create_group(tmp_path / "other.zarr", attributes={"schema": "something else"})
    with pytest.raises(StoreError, match="not a demo store"):
        open_store(tmp_path / "other.zarr")


def test_attributes_of_the_wrong_type_are_named(make_store: MakeStore) -> None:
    store = make_store(lengths=[3])
    edit_attributes(store.path, lambda attributes: attributes.update(episodes="many"))
    with pytest.raises(StoreError, match="episodes"):
        open_store(store.path)


def sign(path: Path) -> None:
    """Give a store that was edited the hashes of what it holds now."""
    metadata = json.loads((path / "zarr.json").read_text())
    metadata["attributes"] |= {"fingerprint": fingerprint(path), "metadata_hash": NO_HASH}
    root = json.dumps(metadata)
    arrays = {file.parent.name: file.read_bytes() for file in path.glob("*/zarr.json")}
    found = metadata_hash(root.encode(), arrays)
    (path / "zarr.json").write_text(root.replace(NO_HASH, found))


def edit_attributes(path: Path, edit: Callable[[dict[str, object]], object]) -> None:
    metadata = json.loads((path / "zarr.json").read_text())
    edit(metadata["attributes"])
    (path / "zarr.json").write_text(json.dumps(metadata))
    sign(path)


@pytest.mark.parametrize("damage", ["missing", "short", "rewritten"])
def test_a_chunk_file_that_is_not_the_one_written_is_refused(
    make_store: MakeStore, damage: str
) -> None:
    store = make_store(lengths=[3, 4])
    file = store.path / "action/c/0"
    if damage == "missing":
        file.unlink()
    elif damage == "short":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        other = make_store(lengths=[3, 4], seed=1, name="Other")
        shutil.copy(other.path / "action/c/0", file)
    with pytest.raises(StoreError, match=r"damaged.*(missing|long|checksums)"):
        open_store(store.path)


def test_the_data_folder_is_the_option_then_the_variable_then_the_platform(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DEMOTOOLS_DATA", str(tmp_path / "variable"))
    assert data_folder(tmp_path / "option") == tmp_path / "option"
    assert data_folder() == tmp_path / "variable"
    monkeypatch.delenv("DEMOTOOLS_DATA")
    assert data_folder().name == "demotools"


def test_a_misspelt_store_is_answered_with_the_nearest_one(make_store: MakeStore) -> None:
    store = make_store(lengths=[3])
    with pytest.raises(StoreError) as refused:
        open_store(store.path.with_name("gotolocl.zarr"))
    assert refused.value.fix.startswith("did you mean GoToLocal?")


@pytest.mark.parametrize("name", ["a/b", "../b", ".hidden", "", "a\nb", "/etc"])
def test_a_new_store_cannot_lie_outside_the_data_folder_or_hide(name: str) -> None:
    with pytest.raises(SettingsError, match="not a valid store name"):
        new_store_path(name, Path("data"))


def test_a_new_store_may_be_named_with_or_without_its_suffix() -> None:
    assert new_store_path("Mine-1.2", Path("data")) == Path("data/Mine-1.2.zarr")
    assert new_store_path("Mine.zarr", Path("data")) == Path("data/Mine.zarr")


def test_what_is_no_level_is_not_offered_for_download(make_store: MakeStore) -> None:
    folder = make_store(lengths=[3]).path.parent
    for name, level in (("merged", "LEVEL"), ("Pickup-valid", "Pickup")):
        with pytest.raises(StoreError) as refused:
            open_store(folder / f"{name}.zarr")
        assert f"`demotools fetch {level}`" in refused.value.fix
