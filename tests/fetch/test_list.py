from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from demotools.cli import main
from demotools.fetch.job import write_record
from demotools.fetch.plan import FetchedRecord
from tests.conftest import build_store, make_episodes


def listed(folder: Path, *options: str) -> str:
    done = CliRunner().invoke(main, ["list", "--data-dir", str(folder), *options])
    assert done.exit_code == 0, done.output
    return done.output


def line_of(level: str, text: str) -> str:
    (line,) = [line for line in text.splitlines() if line.split()[:1] == [level]]
    return line


def test_what_is_not_here_is_named_once_by_where_it_can_be_had(tmp_path: Path) -> None:
    text = listed(tmp_path / "nothing")
    assert len(text.splitlines()) == 8 and text.splitlines()[1] == "  none yet"
    more = "22 more levels can be fetched from data sets: ActionObjDoor, BlockedUnlockPickup, "
    assert text.splitlines()[-2].startswith(more)
    line = "can be fetched from Google Drive or the archive of all levels or the JAT data set: "
    assert f"{line}BossLevel, GoTo, GoToLocal\n" in text
    assert text.count("GoToObjMaze") == 1
    for command in ("`demotools fetch LEVEL`", "`demotools generate LEVEL --episodes 1000`"):
        assert command in text.splitlines()[-1]
    assert not (tmp_path / "nothing").exists()


def test_stores_are_listed_with_what_they_hold(tmp_path: Path) -> None:
    build_store(tmp_path / "GoToLocal.zarr", make_episodes([3, 2, 4]))
    build_store(tmp_path / "GoToLocal-valid.zarr", make_episodes([3]), split="valid")
    build_store(tmp_path / "GoToLocal-small.zarr", make_episodes([3]))
    build_store(tmp_path / "mine.zarr", make_episodes([7]), split="valid")
    build_store(tmp_path / "a-name-longer-than-any-level.zarr", make_episodes([7]))
    text = listed(tmp_path)
    assert [line.split()[0] for line in text.splitlines()[1:4]] == [
        *("GoToLocal", "a-name-longer-than-any-level", "mine")
    ]
    line = line_of("GoToLocal", text)
    assert "train 3 episodes, 9 steps," in line
    assert "valid 1 episode, 3 steps," in line
    assert "small 1 episode, 3 steps," in line
    mine = line_of("mine", text)
    longer = line_of("a-name-longer-than-any-level", text)
    assert "valid 1 episode, 7 steps," in mine
    assert mine.index("valid") == longer.index("train") == line.index("train")


def test_every_kind_of_source_has_a_name_for_people(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "Mine.toml").write_text(
        'level = "Mine"\nno_environment = "of old"\nmission_pattern = ".*"\n'
        '[files.train]\nname = "a.pkl"\n'
        'sources = [{ https = "https://host/a.pkl" }, { hf = "me/demos/a.pkl" }, '
        '{ gdrive = "1U8YWdd3viN2lxOP5BBy" }, { archive = "copydemos" }]\n'
    )
    monkeypatch.setenv("DEMOTOOLS_MANIFESTS", str(tmp_path))
    said = "from a web address or Hugging Face or Google Drive or the archive of all levels"
    assert f"can be fetched {said}: Mine\n" in listed(tmp_path)


def test_json_says_the_same_for_machines(tmp_path: Path) -> None:
    build_store(tmp_path / "GoToLocal.zarr", make_episodes([3, 2, 4]))
    found = json.loads(listed(tmp_path, "--json"))
    (entry,) = [entry for entry in found["levels"] if entry["level"] == "GoToLocal"]
    store = entry["stores"]["train"]
    assert (store["episodes"], store["steps"], store["kind"]) == (3, 9, "test")
    files = (path for path in (tmp_path / "GoToLocal.zarr").rglob("*") if path.is_file())
    assert store["size_bytes"] == sum(path.stat().st_size for path in files)
    assert entry["sources"]["valid"][-2:] == ["archive copydemos", "jat babyai-go-to-local"]


def test_the_size_of_everything_is_said(tmp_path: Path) -> None:
    for name in ("GoToLocal", "GoToLocal-small", "mine"):
        build_store(tmp_path / f"{name}.zarr", make_episodes([3, 2, 4]))
    (tmp_path / "downloads").mkdir()
    unfinished = tmp_path / "downloads" / ".BabyAI-GoToLocal-v0.pkl.abc.part"
    unfinished.write_bytes(bytes(5000))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    assert json.loads(listed(tmp_path, "--json"))["size_bytes"] == size
    assert listed(tmp_path).startswith(f"stores in {tmp_path}, {size / 1000:.1f} kB with downloads")


def test_what_was_fetched_and_what_is_half_there_is_said(tmp_path: Path) -> None:
    record = FetchedRecord(
        level="GoTo", split="train", size_bytes=5, sha256="0", source="gdrive x", day="2026-01-02"
    )
    write_record(tmp_path, "BabyAI-GoTo-v0.pkl", record)
    (tmp_path / ".GoTo-valid.zarr.building").mkdir()
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads/BabyAI-GoTo-v0.pkl").write_bytes(b"12345")
    (tmp_path / "downloads/.BabyAI-GoTo-v0_valid.pkl.0123.part").write_bytes(bytes(2000))
    line = line_of("GoTo", listed(tmp_path))
    for said in ("train fetched 2026-01-02", "valid unfinished", "download 5 B"):
        assert said in line
    assert "unfinished download 2.0 kB" in line


@pytest.mark.parametrize("damage", ["empty", "no folder", "cut", "no metadata", "strange metadata"])
def test_a_store_that_cannot_be_opened_is_listed_with_the_reason(
    damage: str, tmp_path: Path
) -> None:
    path = tmp_path / "GoTo.zarr"
    if damage == "empty":
        path.mkdir()
    elif damage == "no folder":
        path.write_bytes(b"x")
    else:
        build_store(path, make_episodes([3]))
        target = path / ("action/c/0" if damage == "cut" else "action/zarr.json")
        if damage == "no metadata":
            target.unlink()
        else:
            target.write_bytes(b"{}" if damage == "strange metadata" else b"x")
    build_store(tmp_path / "Open.zarr", make_episodes([3]), level="Open")
    (tmp_path / "mine.zarr").mkdir()
    text = listed(tmp_path)
    assert "train cannot be opened: " in line_of("GoTo", text)
    assert "train 1 episode" in line_of("Open", text)
    assert "it cannot be opened: " in line_of("mine", text)
    entries = json.loads(listed(tmp_path, "--json"))["levels"]
    assert any(entry["stores"].get("train", {}).get("problem") for entry in entries)


def test_records_and_manifests_that_do_not_parse_are_listed_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fetched.toml").write_text("[")
    ours = tmp_path / "manifests"
    ours.mkdir()
    (ours / "GoTo.toml").write_text("level = 7")
    monkeypatch.setenv("DEMOTOOLS_MANIFESTS", str(ours))
    text = listed(tmp_path)
    assert "problem: the records of earlier fetches cannot be read" in text
    assert "problem: the manifest is invalid" in line_of("GoTo", text)
