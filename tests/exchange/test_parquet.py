"""JAT's parquet files, read against a decoding of plain loops, with every kind of damage."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from demotools.cli import main
from demotools.errors import DemotoolsError, SettingsError, StoreError
from demotools.exchange.export import export_minari
from demotools.exchange.parquet import (
    FAILURE,
    export_parquet,
    import_parquet,
    level_in_name,
    opened_parquet,
)
from demotools.store.reading import Store, open_store
from tests.conftest import build_store, make_episodes
from tests.jat_files import Row, jat_rows, write_rows

pytest.importorskip("pyarrow", reason="the extra hf is not installed")


@pytest.fixture
def bot(bot_data: Path) -> Store:
    return open_store(bot_data / "GoToLocal.zarr")


def imported(path: Path, **settings: Any) -> tuple[Store, dict[str, int]]:
    files = opened_parquet(path, **{"level": "GoToLocal", **settings})
    done = import_parquet(files, path.parent / "Imported.zarr", overwrite=True, quiet=True)
    return open_store(done.path), done.left_out


def plainly_decoded(row: Row) -> tuple[list[list[list[int]]], list[int]]:
    """Cells [T][column][row] and directions, by counting through the flat list."""
    cells, directions = [], []
    for numbers in row["discrete_observations"]:
        assert len(numbers) == 148
        directions.append(numbers[0])
        columns = []
        for column in range(7):
            places = [1 + (column * 7 + line) * 3 for line in range(7)]
            columns.append([numbers[p] * 18 + numbers[p + 1] * 3 + numbers[p + 2] for p in places])
        cells.append(columns)
    return cells, directions


@pytest.mark.parametrize("kind", ["int64", "int32", "fixed", "text_dictionary"])
def test_cells_equal_an_independent_decoding(kind: str, bot: Store, tmp_path: Path) -> None:
    rows = jat_rows(bot)
    rows[7]["rewards"][-1] = 0.0
    write_rows(tmp_path / "jat.parquet", rows, kind=kind, rows_in_group=16)
    store, left_out = imported(tmp_path / "jat.parquet")
    kept = [row for place, row in enumerate(rows) if place != 7]
    assert left_out == {FAILURE: 1}
    assert store.episodes == len(kept) == 59
    for episode, row in enumerate(kept):
        start, stop = store.bounds(episode)
        cells, directions = plainly_decoded(row)
        assert store.view.span(start, stop).tolist() == cells
        assert store.direction.span(start, stop).tolist() == directions
        assert store.action.span(start, stop).tolist() == row["discrete_actions"]
        mission = store.mission_text[store.episode_mission[episode]]
        assert row["text_observations"] == [mission] * (stop - start)
    assert set(store.episode_seed.tolist()) == {-1}
    assert store.attributes.source["kind"] == "parquet"
    assert store.attributes.source["left_out"] == left_out


def first_view_set(row: Row, place: int, value: int) -> None:
    row["discrete_observations"][0][place] = value


DAMAGE: dict[str, tuple[str, Callable[[Row], object]]] = {
    "no column": ("a missing value", lambda row: row.update(discrete_actions=None)),
    "no text": ("a missing value", lambda row: row["text_observations"].__setitem__(0, None)),
    "no view": ("a missing value", lambda row: row["discrete_observations"].__setitem__(1, None)),
    "no number": (
        "a missing value",
        lambda row: row["discrete_observations"][0].__setitem__(5, None),
    ),
    "no action": ("a missing value", lambda row: row["discrete_actions"].__setitem__(0, None)),
    "no reward": ("a missing value", lambda row: row["rewards"].__setitem__(0, None)),
    "short": ("columns of different lengths", lambda row: row["discrete_actions"].pop()),
    "one more": (
        "columns of different lengths",
        lambda row: row["text_observations"].append(row["text_observations"][0]),
    ),
    "empty": ("no steps", lambda row: [values.clear() for values in row.values()]),
    "147": ("a view that is not 148 numbers", lambda row: row["discrete_observations"][0].pop()),
    "149": (
        "a view that is not 148 numbers",
        lambda row: row["discrete_observations"][-1].append(0),
    ),
    "failure": (FAILURE, lambda row: row["rewards"].__setitem__(-1, 0.0)),
    "negative reward": (FAILURE, lambda row: row["rewards"].__setitem__(-1, -1.0)),
    "nan": (
        "a reward that is not a finite number",
        lambda row: row["rewards"].__setitem__(-1, float("nan")),
    ),
    "infinite": (
        "a reward that is not a finite number",
        lambda row: row["rewards"].__setitem__(0, 1e39),
    ),
    "other mission": (
        "a mission that GoToLocal does not have",
        lambda row: row.update(text_observations=["open the door"] * len(row["rewards"])),
    ),
    "changing mission": (
        "a mission that changes, or has no words",
        lambda row: row["text_observations"].append(row["text_observations"].pop() + " then"),
    ),
    "no words": (
        "a mission that changes, or has no words",
        lambda row: row.update(text_observations=["\x1b["] * len(row["rewards"])),
    ),
    **{
        f"observation {value} at {place}": (
            "a view or a direction outside today's object encoding",
            partial(first_view_set, place=place, value=value),
        )
        for place, value in [
            (0, 4),
            (0, -1),
            (0, 256),
            (1, 11),
            (2, 6),
            (3, 3),
            (1, -255),
            (1, 258),
        ]
    },
    "agent": (
        "views that show the agent, so they are of the whole room",
        lambda row: row["discrete_observations"][0].__setitem__(1, 10),
    ),
    "action 7": (
        "an action other than the seven of BabyAI",
        lambda row: row["discrete_actions"].__setitem__(0, 7),
    ),
    "action -1": (
        "an action other than the seven of BabyAI",
        lambda row: row["discrete_actions"].__setitem__(-1, -1),
    ),
    "action 256": (
        "an action other than the seven of BabyAI",
        lambda row: row["discrete_actions"].__setitem__(0, 256),
    ),
}


@pytest.mark.parametrize("kind", ["int64", "int32"])
def test_each_kind_of_damage_costs_its_row_alone_and_is_counted(
    kind: str, bot: Store, tmp_path: Path
) -> None:
    whole = jat_rows(bot)
    place = next(row for row in range(60) if len(whole[row]["rewards"]) > 2)
    for name, (reason, damage) in DAMAGE.items():
        rows = jat_rows(bot)
        damage(rows[place])
        write_rows(tmp_path / "jat.parquet", rows, kind=kind)
        store, left_out = imported(tmp_path / "jat.parquet")
        assert left_out == {reason: 1}, name
        others = np.delete(np.arange(60), place)
        kept, were = store.take(np.arange(59)), bot.take(others)
        for column in ("length", "view", "direction", "action", "mission"):
            assert np.array_equal(getattr(kept, column), getattr(were, column)), name


def test_all_damage_at_once_leaves_the_others(bot: Store, tmp_path: Path) -> None:
    rows, reasons = jat_rows(bot), set()
    for place, (reason, damage) in zip(range(0, 60, 2), DAMAGE.values(), strict=False):
        if len(rows[place]["rewards"]) > 1:
            damage(rows[place])
            reasons.add(reason)
    write_rows(tmp_path / "jat.parquet", rows, rows_in_group=7)
    store, left_out = imported(tmp_path / "jat.parquet")
    assert set(left_out) == reasons
    assert store.episodes + sum(left_out.values()) == 60


def test_a_mission_that_is_no_text_costs_its_row_alone(bot: Store, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_rows(tmp_path / "jat.parquet", jat_rows(bot))
    table = pq.read_table(tmp_path / "jat.parquet")
    texts = table["text_observations"].combine_chunks()
    raw = [text.encode() for text in texts.flatten().to_pylist()]
    raw[: bot.bounds(0)[1]] = [b"go to \xff"] * bot.bounds(0)[1]
    lists = pa.ListArray.from_arrays(texts.offsets, pa.array(raw, pa.binary()).view(pa.string()))
    pq.write_table(table.set_column(0, "text_observations", lists), tmp_path / "jat.parquet")
    store, left_out = imported(tmp_path / "jat.parquet")
    assert left_out == {"a mission that changes, or has no words": 1}
    assert store.episodes == 59


def test_shards_are_joined_in_their_order_and_the_test_split_is_valid(
    bot: Store, tmp_path: Path
) -> None:
    rows, folder = jat_rows(bot), tmp_path / "babyai-go-to-local"
    folder.mkdir()
    for shard in range(12):  # shard 10 follows shard 9
        name = f"test-{shard:05d}-of-00012-00ff.parquet"
        write_rows(folder / name, rows[shard * 5 : shard * 5 + 5])
    files = opened_parquet(folder)
    assert (files.level, files.split) == ("GoToLocal", "valid")
    assert len(files.paths) == 12
    store, _ = imported(folder)
    assert store.attributes.split == "valid"
    assert np.array_equal(store.view.span(0, store.steps), bot.view.span(0, bot.steps))

    write_rows(folder / "train-00000-of-00001.parquet", rows[:5])
    with pytest.raises(SettingsError, match="several splits"):
        opened_parquet(folder)
    assert len(opened_parquet(folder, split="train").paths) == 1
    (folder / "test-00003-of-00012-00ff.parquet").unlink()
    with pytest.raises(StoreError, match="shards are incomplete"):
        opened_parquet(folder, split="valid")


def test_what_is_no_such_file_is_refused_for_what_it_is(bot: Store, tmp_path: Path) -> None:
    file, rows = tmp_path / "jat.parquet", jat_rows(bot)
    write_rows(file, rows)
    content = file.read_bytes()
    cases = {
        "not a parquet file": b"",
        "this is not a parquet file": b"<html>quota</html>",
        "not a parquet file: ": content[: len(content) // 2],
        "is damaged": content[:4] + bytes(3000) + content[3004:],
    }
    for words, bytes_there in cases.items():
        file.write_bytes(bytes_there)
        with pytest.raises(StoreError, match=words):
            imported(file)
    write_rows(file, rows, rename={"rewards": "reward"})
    with pytest.raises(StoreError, match="no column rewards"):
        imported(file)
    write_rows(file, [{**row, "discrete_observations": row["discrete_actions"]} for row in rows])
    with pytest.raises(StoreError, match="the column discrete_observations is list"):
        imported(file)
    write_rows(file, rows)
    with pytest.raises(SettingsError, match="nor its name gives the level"):
        opened_parquet(file)
    with pytest.raises(DemotoolsError):
        opened_parquet(tmp_path / "nothing.parquet")


def test_another_level_leaves_no_store(bot: Store, tmp_path: Path) -> None:
    write_rows(tmp_path / "jat.parquet", jat_rows(bot))
    with pytest.raises(StoreError, match="no episode can be kept: a mission that Open"):
        imported(tmp_path / "jat.parquet", level="Open")
    assert not (tmp_path / "Imported.zarr").exists()


def test_views_of_an_older_encoding_are_refused(bot: Store, tmp_path: Path) -> None:
    rows = jat_rows(bot)
    for row in rows:
        for numbers in row["discrete_observations"]:
            # before 2018-11-16: empty 0, wall 1, key 5 as today
            numbers[1::3] = [max(number - 1, 0) for number in numbers[1::3]]
    write_rows(tmp_path / "jat.parquet", rows)
    with pytest.raises(StoreError, match="do not use today's object encoding"):
        imported(tmp_path / "jat.parquet")
    assert not (tmp_path / "Imported.zarr").exists()


def test_an_export_has_jats_schema_and_comes_back_but_for_the_seeds(
    bot: Store, tmp_path: Path
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    exported = export_parquet(bot, tmp_path / "out.parquet", quiet=True)
    assert exported.size_bytes == (tmp_path / "out.parquet").stat().st_size
    table = pq.read_table(exported.path)
    fields = {
        "text_observations": pa.list_(pa.string()),
        "discrete_observations": pa.list_(pa.list_(pa.int64())),
        "discrete_actions": pa.list_(pa.int64()),
        "rewards": pa.list_(pa.float32()),
    }
    assert table.schema.equals(pa.schema(list(fields.items())))
    assert table.to_pylist() == jat_rows(bot)
    back, left_out = imported(exported.path)
    assert left_out == {}
    for name in ("view", "direction", "action", "mask"):
        ours, theirs = getattr(back, name), getattr(bot, name)
        assert np.array_equal(ours.span(0, back.steps), theirs.span(0, bot.steps))
    assert back.mission_text == bot.mission_text
    for name in ("level", "split", "licence", "citation"):
        assert getattr(back.attributes, name) == getattr(bot.attributes, name)
    assert back.attributes.source["kind"] == "bot"


def test_in_a_folder_an_export_is_named_as_a_shard_of_its_split(tmp_path: Path) -> None:
    for split, name in (("train", "train"), ("valid", "test")):
        store = build_store(tmp_path / f"{split}.zarr", make_episodes([3, 2]), split=split)
        done = export_parquet(store, tmp_path, quiet=True)
        assert done.path == tmp_path / f"{name}-00000-of-00001.parquet"
        with pytest.raises(DemotoolsError, match="the file already exists"):
            export_parquet(store, tmp_path, quiet=True)


def test_a_minari_dataset_in_a_folder_named_like_a_parquet_file_is_imported(
    bot: Store, tmp_path: Path
) -> None:
    export_minari(bot, root=tmp_path, dataset_id="babyai/GoToLocal-v0", quiet=True)
    (tmp_path / "babyai/GoToLocal-v0").rename(tmp_path / "mine.parquet")
    done = run("import", tmp_path / "mine.parquet", "--data-dir", tmp_path)
    assert done.exit_code == 0, done.output


def test_an_export_of_several_levels_comes_back_level_by_level(bot: Store, tmp_path: Path) -> None:
    # the same episodes, as of another level whose grammar has their missions
    other = build_store(tmp_path / "Doors.zarr", bot.take(np.arange(20)), level="GoToObjDoor")
    merged = ["merge", bot.path, other.path, "-o", "merged", "--data-dir", tmp_path]
    assert run(*merged).exit_code == 0
    for kind, place in (("parquet", "merged.parquet"), ("minari", "babyai/merged-v0")):
        options = ["-o", tmp_path] if kind == "minari" else []
        assert run("export", tmp_path / "merged.zarr", "--to", kind, *options).exit_code == 0
        done = run("import", tmp_path / place, "--data-dir", tmp_path)
        assert done.exit_code == 1
        assert "exported from a store of several levels" in done.stderr
        assert "`demotools select STORE --level LEVEL`" in done.stderr


def test_views_that_are_images_have_no_place_in_the_schema(tmp_path: Path) -> None:
    episodes = make_episodes([3])
    images = np.full((3, 7, 7, 3), 200, np.uint8)
    store = build_store(tmp_path / "Images.zarr", replace(episodes, view=images))
    with pytest.raises(StoreError, match="not minigrid's 7 x 7 cells"):
        export_parquet(store, tmp_path / "out.parquet", quiet=True)
    assert not (tmp_path / "out.parquet").exists()


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(each) for each in arguments])


def test_the_commands_find_format_level_and_split_by_themselves(bot: Store, tmp_path: Path) -> None:
    done = run("export", bot.path, "--to", "parquet", "-o", tmp_path / "mine.parquet")
    assert done.exit_code == 0, done.output
    assert "60 episodes" in done.output and "kB" in done.output
    told = run("import", tmp_path / "mine.parquet", "--data-dir", tmp_path)
    assert told.exit_code == 0, told.output
    assert open_store(tmp_path / "GoToLocal.zarr").episodes == 60

    rows = jat_rows(bot)
    rows[0]["rewards"][-1] = 0.0
    write_rows(tmp_path / "other.parquet", rows)
    options = ["--level", "GoToLocal", "--split", "valid", "--data-dir", tmp_path]
    told = run("import", tmp_path / "other.parquet", *options, "--json")
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["left_out"] == {FAILURE: 1}
    assert open_store(tmp_path / "GoToLocal-valid.zarr").episodes == 59


def test_without_pyarrow_the_extra_is_named(
    bot: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "jat.parquet", jat_rows(bot))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for command in (["import", tmp_path / "jat.parquet"], ["export", bot.path, "--to", "parquet"]):
        done = run(*command, "--data-dir", tmp_path)
        assert done.exit_code == 1
        assert "pip install -c constraints.txt '.[hf]'" in done.stderr


@pytest.mark.parametrize(
    ("name", "level"),
    [
        ("babyai-go-to-local/train-00000-of-00002.parquet", "GoToLocal"),
        ("babyai-move-two-across-s8n9/test-00000-of-00001.parquet", "MoveTwoAcrossS8N9"),
        ("babyai-put-next/a.parquet", "PutNextS7N4"),
        ("GoToObjDoor.parquet", "GoToObjDoor"),
        ("BabyAI-Synth-v0.parquet", "Synth"),
        ("my-demos/a.parquet", None),
    ],
)
def test_a_level_is_read_from_the_names_of_file_and_folder(name: str, level: str | None) -> None:
    assert level_in_name(Path("/data") / name) == level
