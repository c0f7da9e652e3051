"""Whatever somebody writes into a zarr.json: three parts and exit code 1, from every command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from demotools.cli import main
from tests.conftest import build_store, make_episodes

Metadata = dict[str, Any]
READERS = (
    ["info"],
    ["verify"],
    ["show", "--ansi"],
    ["archive"],
    ["shrink", "--episodes", "1"],
    ["card"],
    ["report", "--json"],
    ["export", "--to", "pickle"],
)
NESTED = "[" * 200_000
LONG = "9" * 5000


def put(*keys: str | int) -> Callable[[Any], Callable[[Metadata], None]]:
    """An edit that puts a value at a place of a zarr.json."""

    def edit_with(value: Any) -> Callable[[Metadata], None]:
        def edit(metadata: Any) -> None:
            for key in keys[:-1]:
                metadata = metadata[key]
            metadata[keys[-1]] = value

        return edit

    return edit_with


def without(key: str) -> Callable[[Metadata], None]:
    return lambda metadata: metadata.pop(key)


CODECS: list[Any] = ["x", [], ["bytes", "crc32c"], [{}], None]
ATTRIBUTES: list[Any] = [[], None, "text", 5, {}, [{}]]
CHUNK = ("chunk_grid", "configuration", "chunk_shape")
Edits = list[tuple[str, Callable[[Metadata], None]]]
EDITS: list[tuple[str, Callable[[Metadata], None]]] = [
    *[
        ("cells", put("shape")(shape))
        for shape in (
            [10**15, 7, 7],
            [10**30, 7, 7],
            [9.0, 7, 7],
            [1.5, 7, 7],
            [float("nan"), 7, 7],
            [True, 7, 7],
            [0, 7, 7],
            [-9, 7, 7],
            [8, 7, 7],
            [9, 7],
            [9, 8, 7],
            [],
            9,
            None,
            "9",
            {"0": 9},
        )
    ],
    *[("cells", put(*CHUNK)(chunk)) for chunk in ([0, 7, 7], [1, 7, 7], [9, 7], [10, 7, 7], [], 9)],
    *[("cells", put("data_type")(kind)) for kind in ("int8", "x", {"name": "uint8"}, 8, None)],
    *[("action", put("codecs")(codecs)) for codecs in CODECS],
    *[
        ("cells", without(key))
        for key in (
            "shape",
            "codecs",
            "chunk_grid",
            "data_type",
            "node_type",
            "zarr_format",
            "chunk_key_encoding",
        )
    ],
    ("episode_seed", put("codecs", 0, "configuration", "endian")("big")),
    *[("episode_offset", put("shape")([size])) for size in (0, -1, 1, 3, 10**15)],
    ("episode_offset", put(*CHUNK)([3])),
    ("episode_offset", put("data_type")("float64")),
    ("episode_mission", put("data_type")("float32")),
    ("mission_tokens", put("shape")([3])),
    ("mission_tokens", put("data_type")("uint16")),
    ("mission_text", put("data_type")("uint8")),
    ("mission_text", put("shape")([2])),
    ("mission_text", put("shape")([10**15])),
    ("mission_text", put("codecs", 1, "name")("gzip")),
    ("mission_text", put("codecs")([{"name": "bytes"}, {"name": "crc32c"}])),
    ("mission_text", put("codecs", 1, "configuration")([1])),
    ("mission_text", put("fill_value")([])),
    *[("", put("attributes")(attributes)) for attributes in ATTRIBUTES],
    *[
        ("", put("attributes", name)(value))
        for name, value in (
            ("episodes", -1),
            ("episodes", 4),
            ("episodes", 10**30),
            ("episodes", 3.0),
            ("steps", True),
            ("steps", 8),
            ("missions", "3"),
            ("level", 5),
            ("level", "\ud800"),
            ("vocabulary", "go"),
            ("vocabulary", [1]),
            ("vocabulary", []),
            ("vocabulary", ["go"]),
            ("vocabulary_hash", ""),
            ("source", []),
            ("source", {"kind": "\ud800"}),
            ("source", None),
            ("parent", "GoTo"),
            ("fingerprint", None),
            ("schema", []),
            ("schema_version", "1"),
            ("schema_version", None),
        )
    ],
    ("", without("attributes")),
    ("", put("node_type")([])),
]
TEXTS = ["", "[]", "{", "null", "5", "\x00", NESTED, LONG, '{"a":' + NESTED, '{"shape": ' + LONG]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores")
    build_store(folder / "Other.zarr", make_episodes([2]))
    build_store(folder / "GoToLocal.zarr", make_episodes([3, 2, 4]))
    return folder


@pytest.fixture
def path(stores: Path, tmp_path: Path) -> Path:
    """A store to edit, beside another one."""
    return shutil.copytree(stores, tmp_path / "data") / "GoToLocal.zarr"


def check_readers(path: Path) -> None:
    """Every command says what is wrong; `list` goes on to the other store."""
    runner = CliRunner()
    for command, *options in READERS:
        arguments = [command, "GoToLocal", *options, "--data-dir", str(path.parent)]
        result = runner.invoke(main, arguments)
        assert isinstance(result.exception, SystemExit), (command, result.exception)
        assert result.exit_code == 1, (command, result.output)
        assert "next:" in result.stderr, command
    listed = runner.invoke(main, ["list", "--json", "--data-dir", str(path.parent)])
    assert listed.exit_code == 0, listed.exception
    found = json.loads(listed.output)
    (broken,) = (entry for entry in found["levels"] if entry["level"] == "GoToLocal")
    assert broken["stores"]["train"]["problem"]
    assert found["others"][0]["episodes"] == 1
    here = {file.name for file in path.parent.iterdir() if not file.name.startswith(".")}
    assert here == {"GoToLocal.zarr", "Other.zarr"}


@pytest.mark.parametrize(
    ("array", "edit"), EDITS, ids=[f"{n}-{array or 'group'}" for n, (array, _) in enumerate(EDITS)]
)
def test_a_zarr_json_that_says_something_else_is_refused(
    path: Path, array: str, edit: Callable[[Metadata], None]
) -> None:
    file = path / array / "zarr.json"
    metadata = json.loads(file.read_bytes())
    edit(metadata)
    file.write_text(json.dumps(metadata))
    check_readers(path)


@pytest.mark.parametrize("array", ["", "cells", "mission_text"])
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_a_zarr_json_that_is_none_is_refused(path: Path, array: str, text: str) -> None:
    (path / array / "zarr.json").write_text(text)
    check_readers(path)
    if not array:
        runner = CliRunner()
        removal = runner.invoke(main, ["remove", str(path), "--yes"])
        assert removal.exit_code == 1
        assert "not removed" in removal.stderr


@pytest.mark.parametrize("array", ["cells", "mission_text"])
def test_an_array_too_few_or_too_many_is_refused(path: Path, array: str) -> None:
    (path / array).rename(path / "views")
    check_readers(path)
    (path / "views/zarr.json").unlink()
    check_readers(path)


def test_training_refuses_an_edited_store(path: Path) -> None:
    pytest.importorskip("torch")
    trainer = pytest.importorskip("trainer.cli", exc_type=ImportError)
    file = path / "cells/zarr.json"
    file.write_text(file.read_text().replace("uint8", "int8"))
    arguments = ["run", "bc_small_cpu.toml", "--dry-run", "--data-dir", str(path.parent)]
    arguments += ["--set", 'stages.0.off_policy.store="GoToLocal"']
    result = CliRunner().invoke(trainer.main, arguments)
    assert result.exit_code == 1, result.output
    assert "the store is damaged: cells/zarr.json" in result.stderr
    assert "next:" in result.stderr
