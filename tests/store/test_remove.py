"""`demotools remove` asks, removes stores, and nothing else."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from demotools.cli import main
from demotools.errors import DemotoolsError, StoreError
from demotools.output import acquired_lock
from demotools.store.reading import Store
from demotools.store.remove import planned_removals, remove_store
from tests.conftest import build_store, make_episodes, without_root
from tests.store.test_store import edit_attributes, flip_a_byte


def remove(*arguments: str, answer: str | None = None) -> Result:
    return CliRunner().invoke(main, ["remove", *arguments], input=answer)


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_a_store_is_removed_once_the_question_is_answered(
    make_store: Callable[..., Store], tmp_path: Path
) -> None:
    make_store(lengths=[3, 2])
    make_store(lengths=[3], name="Other")
    kept = remove("GoToLocal", "--data-dir", str(tmp_path), answer="n\n")
    assert kept.exit_code == 0
    assert "GoToLocal.zarr (2 episodes, " in kept.output
    assert visible(tmp_path) == ["GoToLocal.zarr", "Other.zarr"]
    assert remove("GoToLocal", "--data-dir", str(tmp_path), answer="y\n").exit_code == 0
    assert visible(tmp_path) == ["Other.zarr"]
    assert not list(tmp_path.glob("*removing*"))


def test_without_an_answer_nothing_is_removed(
    make_store: Callable[..., Store], tmp_path: Path
) -> None:
    make_store(lengths=[3])
    result = remove("GoToLocal", "--data-dir", str(tmp_path), answer="")
    assert result.exit_code == 1
    assert "error: the question was not answered, so nothing was removed" in result.stderr
    assert "next:  add --yes" in result.stderr
    assert visible(tmp_path) == ["GoToLocal.zarr"]


def test_several_stores_are_removed_unasked_with_yes(
    make_store: Callable[..., Store], tmp_path: Path
) -> None:
    one, other = make_store(lengths=[3]), make_store(lengths=[2], name="Other")
    assert remove(str(one.path), str(other.path), str(one.path), "--yes").exit_code == 0
    assert visible(tmp_path) == []


def test_where_one_is_not_a_demo_store_none_is_removed(
    make_store: Callable[..., Store], tmp_path: Path
) -> None:
    store = make_store(lengths=[3])
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    (photographs / "one.png").write_bytes(b"x")
    result = remove(str(store.path), str(photographs), "--yes")
    assert result.exit_code == 1
    assert "this is not a demo store, so it was not removed" in result.output
    assert visible(tmp_path) == ["GoToLocal.zarr", "photographs"]
    assert visible(photographs) == ["one.png"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"attributes": {"schema": "other"}}'])
def test_a_zarr_group_of_another_kind_is_left_alone(tmp_path: Path, content: str) -> None:
    group = tmp_path / "group.zarr"
    group.mkdir()
    (group / "zarr.json").write_text(content)
    with pytest.raises(StoreError, match="not removed"):
        planned_removals([group])


def test_a_file_and_a_missing_store_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file.zarr").write_bytes(b"x")
    with pytest.raises(StoreError, match="not removed"):
        planned_removals([tmp_path / "file.zarr"])
    with pytest.raises(StoreError, match="there is no such demo store"):
        planned_removals([tmp_path / "no.zarr"])


def test_a_link_to_a_store_is_refused_and_the_store_stays(
    make_store: Callable[..., Store], tmp_path: Path
) -> None:
    store = make_store(lengths=[3])
    link = tmp_path / "link.zarr"
    link.symlink_to(store.path, target_is_directory=True)
    with pytest.raises(StoreError, match="this is a link"):
        planned_removals([link])
    assert store.path.is_dir()


def test_links_inside_a_store_are_removed_and_what_they_point_to_stays(
    make_store: Callable[..., Store], tmp_path: Path
) -> None:
    store = make_store(lengths=[3])
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes(b"x")
    (store.path / "cells" / "linked").symlink_to(outside, target_is_directory=True)
    (store.path / "linked").symlink_to(outside / "precious")
    (removal,) = planned_removals([store.path])
    remove_store(removal)
    assert visible(tmp_path) == ["outside"]
    assert visible(outside) == ["precious"]


def test_a_damaged_store_can_be_removed(make_store: Callable[..., Store]) -> None:
    store = make_store(lengths=[3])
    flip_a_byte(store.path / "action/c/0", 1)
    edit_attributes(store.path, lambda attributes: attributes.pop("episodes"))
    (removal,) = planned_removals([store.path])
    assert "damaged" in removal.text()
    remove_store(removal)
    assert not store.path.exists()


def test_a_store_that_another_process_makes_is_not_removed(
    make_store: Callable[..., Store],
) -> None:
    store = make_store(lengths=[3])
    (removal,) = planned_removals([store.path])
    lock = acquired_lock(store.path)
    try:
        with pytest.raises(DemotoolsError, match="another process"):
            remove_store(removal)
    finally:
        lock.release()
    assert store.path.is_dir()


@pytest.mark.parametrize("command", ["generate", "remove"])
def test_a_folder_that_cannot_be_written_is_said_of_the_store_that_was_named(command: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = build_store(Path(folder) / "Open.zarr", make_episodes([3]), level="Open").path
        options = ["--yes"] if command == "remove" else ["-n", "1", "--overwrite", "-m", "1"]
        arguments = [command, "Open", "--data-dir", folder, *options]
        for name in ("commands.get", "commands.shape", "recording.record", "store.remove"):
            importlib.import_module(f"demotools.{name}")  # what nobody may not read
        Path(folder).chmod(0o555)
        with without_root():
            done = CliRunner().invoke(main, arguments)
        Path(folder).chmod(0o755)
        assert done.exit_code == 1 and "error: permission denied" in done.stderr
        assert f"where: {store}\n" in done.stderr
        assert ("--data-dir" in done.stderr) == (command == "generate")
        assert store.is_dir()
