"""The reader: open, map, slice; and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import zarr
from hypothesis import given

from demotools import chunks
from demotools.errors import SettingsError, StoreError
from demotools.store import Store, data_folder, episode_mask, new_store_path, open_store, spans
from tests.conftest import MISSIONS, build_store, make_episodes

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
        store.select(chosen).view, episodes.view.reshape(2000, 7, 7, 7)[chosen].reshape(-1, 7, 7)
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
    edit_attributes(store.path, lambda attributes: attributes.clear())
    with pytest.raises(StoreError, match="unfinished"):
        open_store(store.path)


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


def edit_attributes(path: Path, edit: Callable[[dict[str, object]], object]) -> None:
    metadata = json.loads((path / "zarr.json").read_text())
    edit(metadata["attributes"])
    (path / "zarr.json").write_text(json.dumps(metadata))


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
    with pytest.raises(SettingsError, match="cannot be the name"):
        new_store_path(name, Path("data"))


def test_a_new_store_may_be_named_with_or_without_its_suffix() -> None:
    assert new_store_path("Mine-1.2", Path("data")) == Path("data/Mine-1.2.zarr")
    assert new_store_path("Mine.zarr", Path("data")) == Path("data/Mine.zarr")
