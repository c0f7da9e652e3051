"""Each thing that can be wrong with a store is found, and named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from numpy.typing import NDArray

from demotools.cli import main
from demotools.errors import StoreError
from demotools.store.verify import verify_store
from tests.conftest import build_store, make_episodes
from tests.store.test_store import edit_attributes, flip_a_byte, sign


def failed_checks(path: Path) -> dict[str, tuple[str, ...]]:
    return {c.name: c.problems for c in verify_store(path, quiet=True) if not c.passed}


def edit_array(path: Path, name: str, edit: Callable[[NDArray[Any]], object]) -> None:
    """Rewrite one array through zarr, checksum and fingerprint included."""
    array = zarr.open_array(path / name, mode="r+")
    values = np.array(array)
    edit(values)
    array[:] = values
    sign(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return build_store(tmp_path / "GoToLocal.zarr", make_episodes([3, 2, 4])).path


def test_a_good_store_passes_every_check(path: Path) -> None:
    assert failed_checks(path) == {}
    assert len(verify_store(path, quiet=True)) == 8


@pytest.mark.parametrize(
    "array", ["cells", "action", "mask", "episode_seed", "mission_text", "mission_tokens"]
)
def test_a_flipped_byte_is_found_in_any_array(path: Path, array: str) -> None:
    file = next(file for file in (path / array / "c").rglob("*") if file.is_file())
    flip_a_byte(file, 1)
    (problem,) = failed_checks(path)["chunk checksums"]
    assert problem == f"{file.relative_to(path)} fails its checksum"


def test_a_missing_chunk_file_is_found(path: Path) -> None:
    (path / "direction/c/0").unlink()
    (problem,) = failed_checks(path)["chunk checksums"]
    assert problem.startswith("direction/c/0 is missing or unreadable")


def set_item(key: Any, value: Any) -> Callable[[NDArray[Any]], object]:
    return lambda values: values.__setitem__(key, value)


@pytest.mark.parametrize(
    ("array", "key", "value", "check", "problem"),
    [
        ("mask", 3, 1, "masks match the episode offsets", "the mask of step 3 is wrong"),
        ("action", 8, 7, "actions, directions and cell codes in range", "the action of step 8"),
        ("direction", 0, 4, "actions, directions and cell codes in range", "direction of step 0"),
        ("cells", (5, 6, 6), 198, "actions, directions and cell codes in range", "view of step 5"),
        ("cells", (5, 6, 6), 180, "actions, directions and cell codes in range", "view of step 5"),
        ("mission_tokens", (0, 0), 9, "missions, words and tokens", "tokens do not match"),
        ("mission_tokens", 2, [1, 2, 12, 14, 23], "missions, words and tokens", "0 and 2 have"),
        ("mission_text", 0, "lick the ball", "missions against the level's grammar", "lick"),
        (
            "episode_seed",
            1,
            1_000_000_000,
            "environment seeds",
            "does not belong to the train split",
        ),
        ("episode_seed", 1, 2, "environment seeds", "1 seeds occur more than once"),
    ],
)
def test_a_wrong_value_is_named(
    path: Path, array: str, key: Any, value: Any, check: str, problem: str
) -> None:
    edit_array(path, array, set_item(key, value))
    assert problem in " ".join(failed_checks(path)[check])


@pytest.mark.parametrize(
    ("array", "key", "value", "problem"),
    [
        ("episode_offset", 1, 5, "episode 1 has 0 steps"),
        ("episode_mission", 2, 3, "episode 2 has mission 3, not below 3"),
    ],
)
def test_a_wrong_value_that_misleads_every_reader_is_refused(
    path: Path, array: str, key: Any, value: Any, problem: str
) -> None:
    edit_array(path, array, set_item(key, value))
    with pytest.raises(StoreError, match=problem):
        verify_store(path, quiet=True)


def check_bits(path: Path, step: int) -> None:
    for file in sorted(path.rglob("zarr.json")):
        good = file.read_bytes()
        for bit in range(0, 8 * len(good), step):
            content = bytearray(good)
            content[bit // 8] ^= 1 << bit % 8
            file.write_bytes(content)
            try:
                wrong = failed_checks(path)
            except StoreError:
                continue
            assert wrong, (file, bit)
        file.write_bytes(good)
    assert failed_checks(path) == {}


def test_a_flipped_bit_in_the_metadata_is_found(path: Path) -> None:
    check_bits(path, 61)


@pytest.mark.slow
def test_every_flipped_bit_in_the_metadata_is_found(path: Path) -> None:
    check_bits(path, 1)


@pytest.mark.parametrize(
    "name", ["foo", "cells/foo", "cells/c/1", "cells/c/0/0/1", "mask/c/00", ".hidden", "c/.x"]
)
@pytest.mark.parametrize("kind", ["file", "folder", "link", "pipe"])
def test_what_does_not_belong_into_a_store_is_found(path: Path, name: str, kind: str) -> None:
    stray = path / name
    stray.parent.mkdir(exist_ok=True)
    if kind == "file":
        stray.write_bytes(b"")
    elif kind == "folder":
        stray.mkdir()
    elif kind == "link":
        stray.symlink_to(path / "zarr.json")
    else:
        os.mkfifo(stray)
    (problem,) = failed_checks(path)["exactly the files of the format"]
    assert name.startswith(problem.split("'")[1])


def test_a_file_that_is_a_link_is_found(path: Path) -> None:
    file = path / "mask/c/0"
    file.rename(path.parent / "mask")
    file.symlink_to(path.parent / "mask")
    assert failed_checks(path) == {
        "exactly the files of the format": ("the link 'mask/c/0' does not belong in a store",)
    }


def test_what_a_desktop_leaves_is_said_and_tolerated(path: Path) -> None:
    (path / ".DS_Store").write_bytes(b"x")
    (path / "cells/Thumbs.db").write_bytes(b"x")
    assert failed_checks(path) == {}
    (check,) = (c for c in verify_store(path, quiet=True) if c.note and "desktop" in c.note)
    assert ".DS_Store, cells/Thumbs.db" in check.note


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("packing", None, "packing is not 'object*18"),
        ("packing", "object + colour", "packing is not 'object*18"),
        ("objects", None, "objects is not ['unseen'"),
        ("objects", ["empty", "unseen"], "objects is not ['unseen'"),
        ("level", "", "the level '' is not a name"),
        ("level", "../GoToLocal", "the level '../GoToLocal' is not a name"),
    ],
)
def test_an_attribute_that_would_mislead_a_reader_is_named(
    path: Path, name: str, value: object, problem: str
) -> None:
    def edit(attributes: dict[str, object]) -> None:
        attributes.pop(name)
        if value is not None:
            attributes[name] = value

    edit_attributes(path, edit)
    assert problem in " ".join(failed_checks(path)["cell encoding and level name"])


def test_the_command_prints_the_checks_and_exits_with_1_on_damage(path: Path) -> None:
    runner = CliRunner()
    good = runner.invoke(main, ["verify", str(path)])
    assert good.exit_code == 0
    assert good.output.count("ok  ") == 8
    flip_a_byte(path / "cells/c/0/0/0", 5)
    bad = runner.invoke(main, ["verify", str(path), "--json"])
    assert bad.exit_code == 1
    assert json.loads(bad.stdout)[0]["passed"] is False
    assert "cells/c/0/0/0 fails its checksum" in bad.stderr
    assert "next:" in bad.stderr


def test_info_shows_what_a_store_is_and_where_it_came_from(path: Path) -> None:
    runner = CliRunner()
    text = runner.invoke(main, ["info", str(path)])
    assert "GoToLocal: 3 episodes, 9 steps, 3 missions" in text.output
    assert "kind: test" in text.output
    found = json.loads(runner.invoke(main, ["info", str(path), "--json"]).output)
    assert found["steps"] == 9
    assert {array["name"]: array["shape"] for array in found["arrays"]}["cells"] == [9, 7, 7]
