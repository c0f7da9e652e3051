"""What is written without zarr is what zarr writes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec

from demotools.babyai.cells import VIEW_SIZE
from demotools.store.building import group_json, raw_array, write_texts
from demotools.store.format import ArrayMetadata, parsed_metadata
from demotools.store.reading import open_store
from demotools.store.verify import verify_store

PAGE = (Path(__file__).parents[2] / "docs/format.md").read_text("utf-8")


def chunk_bytes(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name != "zarr.json"
    }


def check_equal(ours: Path, theirs: Path, array: str) -> None:
    """The same chunk files, and to zarr the same metadata (each version spells them its way)."""
    assert chunk_bytes(ours) == chunk_bytes(theirs) != {}
    found, expected = (zarr.open_group(folder, mode="r") for folder in (ours, theirs))
    assert found.metadata == expected.metadata
    assert found[array].metadata == expected[array].metadata


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "rows"),
    [
        ("cells", "uint8", (10, VIEW_SIZE, VIEW_SIZE), 4),
        ("image", "uint8", (3, 5, 6, 3), 3),
        ("mask", "uint8", (9,), 3),
        ("episode_offset", "int64", (5,), 5),
        ("episode_mission", "int32", (5,), 5),
        ("mission_tokens", "uint16", (2, 4), 2),
    ],
)
def test_raw_arrays_are_the_bytes_that_zarr_writes(
    tmp_path: Path, name: str, dtype: str, shape: tuple[int, ...], rows: int
) -> None:
    values = np.random.default_rng(0).integers(0, 200, shape).astype(dtype)
    group = zarr.create_group(tmp_path / "zarr", zarr_format=3)
    array = group.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=(rows, *shape[1:]),
        serializer=BytesCodec(),
        compressors=(Crc32cCodec(),),
        config={"write_empty_chunks": True},
    )
    array[:] = values
    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / "zarr.json").write_bytes(group_json({}))
    files = raw_array(ours, name, dtype, shape, rows)
    files.append(values[:2])
    files.append(values[2:])
    files.fill()
    check_equal(ours, tmp_path / "zarr", name)


def test_texts_and_attributes_are_the_bytes_that_zarr_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["go to the red ball", "gehe zur Tür", "🔑", "", "pick up a key"]
    attributes: dict[str, Any] = {"é": [1, None, 2.5, {"words": ["a", "ü"]}], "last": True}
    group = zarr.create_group(tmp_path / "zarr", zarr_format=3)
    array = group.create_array(
        "mission_text",
        shape=(5,),
        dtype=str,
        chunks=(2,),
        compressors=(ZstdCodec(level=3), Crc32cCodec()),
        config={"write_empty_chunks": True},
    )
    array[:] = np.array(texts, dtype=object)
    group.attrs.put(attributes)
    monkeypatch.setattr("demotools.store.building.TEXTS_A_CHUNK", 2)
    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / "zarr.json").write_bytes(group_json({}))
    write_texts(ours, [texts[:2], texts[2:4], texts[4:]], len(texts))
    (ours / "zarr.json").write_bytes(group_json(attributes))
    check_equal(ours, tmp_path / "zarr", "mission_text")
    read = np.asarray(zarr.open_array(ours / "mission_text", mode="r")[:])
    assert read.tolist() == texts


def test_the_program_on_the_page_of_the_format_writes_a_store_that_passes_every_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(import hashlib.*?)```", PAGE, re.DOTALL)
    exec(compile(code, "format.md", "exec"), {})
    checks = verify_store(Path("Mine.zarr"), quiet=True)
    assert [problem for check in checks for problem in check.problems] == []
    store = open_store("Mine.zarr")
    assert [store[1].mission, store[1].actions.tolist()] == ["go to a grey key", [1, 2, 2]]


def described(data_type: str) -> ArrayMetadata:
    return ArrayMetadata.model_construct(shape=(3,), data_type=data_type, chunk_shape=(3,))


def test_what_the_page_says_of_the_metadata_is_what_a_reader_accepts() -> None:
    (shown,) = map(json.loads, re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL))
    ours = described("int64").as_zarr()
    assert shown == {key: ours[key] for key in shown}
    assert ours.keys() - shown.keys() == {"attributes", "storage_transformers"}
    shown |= {"dimension_names": ["episode"], "attributes": {"a": 1}}
    assert parsed_metadata(json.dumps(shown).encode(), Path(), "episode_seed").shape == (3,)
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| `(\[.*\])` \| `([^`]*)`", PAGE, re.MULTILINE)
    told = set()
    for types, codecs, fill in rows:
        for data_type in re.findall(r"\w+", types):
            told.add(data_type)
            ours = described(data_type).as_zarr()
            assert (json.loads(codecs), json.loads(fill)) == (ours["codecs"], ours["fill_value"])
    assert told == {"uint8", "uint16", "int32", "int64", "float32", "string"}
