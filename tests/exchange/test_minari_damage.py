"""A Minari dataset with anything wrong in it is refused, or comes back as far as it is right."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from demotools.babyai.cells import AGENT
from demotools.cli import main
from demotools.exchange.export import export_minari
from demotools.store.reading import Store, open_store
from demotools.store.verify import verify_store
from tests.conftest import build_store, make_episodes

minari = pytest.importorskip("minari")
h5py = pytest.importorskip("h5py")

LENGTHS = [3, 2, 4]
# What stands in the place of a value; as JSON, or in an HDF5 attribute.
OTHERS: list[Any] = [None, True, 7, -1, 1.5, 10**30, "", "x\x1b[2J\n", [], [None], {}, {"a": [1]}]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MINARI_DATASETS_PATH", raising=False)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return build_store(tmp_path / "GoToLocal.zarr", make_episodes(LENGTHS))


@pytest.fixture
def data(store: Store, tmp_path: Path) -> Path:
    """The folder of an exported dataset's files."""
    export_minari(store, root=tmp_path / "datasets", quiet=True)
    return tmp_path / "datasets/babyai/GoToLocal-v0/data"


def imported(data: Path, *options: str) -> Result:
    folder = str(data.parents[3] / "out")
    return CliRunner().invoke(
        main,
        ["import", str(data), "--from", "minari", "--data-dir", folder, "--overwrite", *options],
    )


def refusal(data: Path, *options: str) -> str:
    result = imported(data, *options)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 3
    out = data.parents[3] / "out"
    assert not [path for path in out.glob("*") if path.is_dir()]
    assert not [path for path in out.glob(".*") if path.is_dir()]
    return result.stderr


def episodes_of(store: Store) -> dict[int, tuple[bytes, ...]]:
    """Each episode's bytes under its seed."""
    found = {}
    for row in range(store.episodes):
        one = store.take(np.array([row]))
        columns = (one.view, one.direction, one.action)
        texts = one.mission[0].encode()
        found[int(one.seed[0])] = (texts, *(column.tobytes() for column in columns))
    return found


def held(data: Path, good: Store) -> str:
    """What did not hold after an import of a damaged dataset; empty where all did."""
    shutil.rmtree(data.parents[3] / "out", ignore_errors=True)
    result = imported(data)
    if result.exit_code == 1:
        if not isinstance(result.exception, SystemExit) or result.stderr.count("\n") != 3:
            return f"{result.exception!r} {result.stderr}"
        left = [path for path in (data.parents[3] / "out").glob("*") if path.is_dir()]
        return f"left behind: {left}" if left else ""
    back = open_store(data.parents[3] / "out/GoToLocal.zarr")
    if failed := [check for check in verify_store(back.path, quiet=True) if not check.passed]:
        return f"{failed}"
    right = episodes_of(good)
    # where a seed was taken away, the episode is still the same
    values = list(right.values())
    wrong = [
        seed
        for seed, content in episodes_of(back).items()
        if right.get(seed) != content and not (seed == -1 and content in values)
    ]
    return f"other episodes: {wrong}" if wrong else ""


def without_traces(data: Path, edit: Callable[[], object], good: Store) -> str:
    """`held` with the edit made, and the dataset as before afterwards."""
    kept = {file: file.read_bytes() for file in data.iterdir()}
    edit()
    said = held(data, good)
    for file in data.iterdir():
        file.unlink()
    for file, content in kept.items():
        file.write_bytes(content)
    return said


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in a JSON value something stands, its own root left out."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield (*path, key)
        if isinstance(item, dict | list):
            yield from places(item, (*path, key))


def edited(value: Any, path: tuple[Any, ...], *new: Any) -> Any:
    """A copy of a JSON value with something else at one place, or nothing."""
    copy = json.loads(json.dumps(value))
    holder = copy
    for key in path[:-1]:
        holder = holder[key]
    if new:
        holder[path[-1]] = new[0]
    else:
        del holder[path[-1]]
    return copy


@pytest.mark.parametrize("others", [[7], pytest.param(OTHERS, marks=pytest.mark.slow)])
def test_every_key_of_the_metadata_missing_or_of_another_type_is_refused_or_does_not_matter(
    others: list[Any], data: Path, store: Store
) -> None:
    file = data / "metadata.json"
    good = json.loads(file.read_text())
    spaces = {name: json.loads(good[name]) for name in ("observation_space", "action_space")}
    cases: list[tuple[str, Any]] = []
    for path in places(good):
        cases.append((f"{path} missing", edited(good, path)))
        cases += [(f"{path} {other!r}", edited(good, path, other)) for other in others]
    for name, space in spaces.items():
        # the bounds of a box are thousands of numbers: the first of each is enough
        found = [path for path in places(space) if not any(key != 0 for key in path[4:])]
        for path in found:
            edits = [edited(space, path), *(edited(space, path, other) for other in others[:6])]
            cases += [(f"{name} {path}", {**good, name: json.dumps(edit)}) for edit in edits]
    failed = {
        told: said
        for told, content in cases
        if (said := without_traces(data, partial(file.write_text, json.dumps(content)), store))
    }
    assert len(cases) > 40 * len(others)
    assert not failed, f"{len(failed)} of {len(cases)}: {failed}"


def test_files_cut_anywhere_are_refused_or_whole_enough(data: Path, store: Store) -> None:
    failed = {}
    for name in ("metadata.json", "main_data.hdf5"):
        whole = (data / name).read_bytes()
        for part in range(16):
            cut = whole[: len(whole) * part // 16]
            if said := without_traces(data, partial((data / name).write_bytes, cut), store):
                failed[name, len(cut)] = said
    assert not failed


def replaced(episode: Any, name: str, values: Any, **kind: Any) -> None:
    del episode[name]
    episode.create_dataset(name, data=values, **kind)


TEXT = h5py.string_dtype("utf-8")
COLUMNS: dict[str, list[Any]] = {
    "observations/image": [
        np.zeros((5, 7, 7, 3), np.float32) + 1.5,
        np.zeros((5, 7, 7, 3), np.int64) - 1,
        np.zeros((5, 7, 7, 3), np.int64) + 256,
        np.zeros((5, 7, 7), np.uint8),
        np.zeros((5, 7, 8, 3), np.uint8),
        np.zeros((2, 7, 7, 3), np.uint8),
        np.zeros((0, 7, 7, 3), np.uint8),
    ],
    "observations/direction": [
        *([0, 1, 2, 3, 7], [0, 1, 2, 3, -1], [0, 300, 0, 0, 0], [0, 1, 2], [0, 1, 2, 3, 0, 1]),
        *(np.full(5, 1.5), [[0], [1], [2], [3], [0]], 3, [], np.full(5, np.nan), [True] * 5),
        np.full(5, 2**64 - 1, np.uint64),
    ],
    "observations/mission": [
        *(["go to the \x1b[2Jred ball"] * 5, ["go to\nthe red ball"] * 5, [""] * 5),
        *(["  , "] * 5, ["go to the red ball"] * 2, ["go to the red ball"] * 9, [7] * 5),
        *(["go to the red ball", *["go to the blue ball"] * 4], "go to the red ball", []),
        *(["go to the red ball" * 99] * 5, [b"\xff\xfe"] * 5, ["go to \u202ethe red ball"] * 5),
    ],
    "actions": [
        *([0, 1, 2, 7], [0, 1, 2, -1], [0, 1, 2, 300], np.full(4, 1.5), [0, 1], [0] * 9, 3),
        *([], [[0], [1], [2], [3]], np.full(4, np.nan), [True] * 4, ["left"] * 4),
    ],
    "rewards": [
        *([0, 0, 0, np.nan], [0, 0, 0, np.inf], [0, 0, 1], [], 1.0, ["a"] * 4, [[0.0, 1.0]] * 4),
    ],
    "terminations": [[], 1, ["x"] * 4],
    "truncations": [[], 1, ["x"] * 4],
}


@pytest.mark.parametrize("name", COLUMNS)
def test_every_column_of_an_episode_missing_or_wrong_costs_at_most_this_episode(
    name: str, data: Path, store: Store
) -> None:
    def edit(values: Any) -> None:
        with h5py.File(data / "main_data.hdf5", "a") as file:
            texts = name.endswith("mission") and np.asarray(values).dtype.kind in "US"
            replaced(file["episode_2"], name, values, **({"dtype": TEXT} if texts else {}))

    def remove() -> None:
        with h5py.File(data / "main_data.hdf5", "a") as file:
            del file["episode_2"][name]

    def make_a_group() -> None:
        remove()
        with h5py.File(data / "main_data.hdf5", "a") as file:
            file["episode_2"].create_group(name)

    edits: list[Callable[[], object]] = [remove, make_a_group]
    edits += [partial(edit, values) for values in COLUMNS[name]]
    failed = {
        number: said
        for number, one in enumerate(edits)
        if (said := without_traces(data, one, store))
    }
    assert not failed


def test_an_episode_with_too_few_directions_shifts_no_other(data: Path, store: Store) -> None:
    with h5py.File(data / "main_data.hdf5", "a") as file:
        replaced(file["episode_0"], "observations/direction", [0, 1])
    result = imported(data)
    assert (
        "2 episodes\n  left out 1: its observations and actions differ in number" in result.stdout
    )
    right, back = (
        episodes_of(store),
        episodes_of(open_store(data.parents[3] / "out/GoToLocal.zarr")),
    )
    assert back == {seed: content for seed, content in right.items() if seed != 0}


@pytest.mark.parametrize("seed", [True, *OTHERS[3:], 2.5, 77.5, 2**63, -5, 0, 1, np.zeros(3), "1"])
def test_seeds_of_any_kind_are_refused_left_out_or_unknown(
    seed: Any, data: Path, store: Store
) -> None:
    def edit() -> None:
        with h5py.File(data / "main_data.hdf5", "a") as file:
            try:
                file["episode_2"].attrs["seed"] = seed
            except (OverflowError, TypeError, ValueError):
                pytest.skip("HDF5 has no place for it")

    assert not without_traces(data, edit, store)


def told(content: bytes | str) -> Callable[[Path], object]:
    def edit(data: Path) -> None:
        raw = content.encode() if isinstance(content, str) else content
        (data / "metadata.json").write_bytes(raw)

    return edit


def changed(**values: Any) -> Callable[[Path], object]:
    def edit(data: Path) -> None:
        file = data / "metadata.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return edit


def hdf5_damage(content: bytes) -> Callable[[Path], object]:
    return lambda data: (data / "main_data.hdf5").write_bytes(content)


def oversized(data: Path) -> None:
    with h5py.File(data / "main_data.hdf5", "a") as file:
        del file["episode_1"]["actions"]
        file["episode_1"].create_dataset("actions", (10**12,), np.uint8, chunks=(1000,))


def a_pipe(name: str) -> Callable[[Path], object]:
    def edit(data: Path) -> None:
        (data / name).unlink(missing_ok=True)
        os.mkfifo(data / name)

    return edit


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: (data / "metadata.json").unlink(), "it has no metadata.json"),
        (
            lambda data: os.truncate(data / "metadata.json", (1 << 26) + 1),
            "the dataset's metadata are far too large",
        ),
        (told(""), "metadata are invalid"),
        (told("{"), "metadata are invalid"),
        (told("[]"), "metadata are invalid at its top level: it must be an object as in `{"),
        (told(b"\xff\xfe{}"), "metadata are invalid"),
        (told("[" * 10_000 + "]" * 10_000), "metadata are invalid"),
        (told('{"a":' * 10_000 + "1" + "}" * 10_000), "metadata are invalid"),
        (told('{"dataset_id": "\\ud800"}'), "metadata are invalid"),
        (changed(minari_version="99.0"), "is of Minari 99.0, which the installed Minari"),
        (changed(total_episodes=4), "announce 4 episodes, but it has 3"),
        (changed(total_episodes=2), "announce 2 episodes, but it has 3"),
        (changed(total_episodes=10**15), "announce 1,000,000,000,000,000 episodes"),
        (changed(total_episodes="3"), "invalid at total_episodes"),
        (
            changed(data_format="arrow", total_episodes=0),
            "the package pyarrow.dataset is not installed",
        ),
        (changed(data_format="zarr", total_episodes=0), "format is 'zarr', not hdf5, arrow, parq"),
        (lambda data: (data / "main_data.hdf5").unlink(), "HDF5 file is missing"),
        (hdf5_damage(b""), "HDF5 file is broken"),
        (hdf5_damage(b"no HDF5"), "HDF5 file is broken"),
        (oversized, "episode 1 of the dataset needs"),
        (a_pipe("metadata.json"), "not a regular file"),
        (a_pipe("main_data.hdf5"), "not a regular file"),
    ],
)
def test_every_cause_has_its_own_message(
    damage: Callable[[Path], object],
    said: str,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("pyarrow", "pyarrow.dataset"):
        monkeypatch.setitem(sys.modules, name, None)  # what Python does for a missing package
    damage(data)
    assert said in refusal(data)


def test_a_dataset_whose_download_was_interrupted_is_not_one_that_is_not_there(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(data.parents[2]))

    def said() -> str:
        named = CliRunner().invoke(main, ["import", "babyai/GoToLocal-v0"])
        assert named.exit_code == 1
        assert "no Minari dataset" not in named.stderr
        return named.stderr

    (data / "metadata.json").unlink()
    assert "it has no metadata.json, it has only main_data.hdf5; was its download" in said()
    (data / "main_data.hdf5").unlink()
    assert "it is empty; was its download interrupted?" in said()
    data.rmdir()
    assert "the Minari dataset is incomplete" in said()


ARROW_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no data file": (
        lambda data: next((data / "1").glob("*.parquet")).unlink(),
        "episode 1 of the dataset has no parquet file; was its download interrupted?",
    ),
    "no metadata": (
        lambda data: (data / "2" / "metadata.json").unlink(),
        "episode 2 of the dataset has no metadata.json; was its download interrupted?",
    ),
    "no episode": (
        lambda data: shutil.rmtree(data / "0"),
        "announce 3 episodes, but it has 2",
    ),
    "cut": (
        lambda data: os.truncate(next((data / "1").glob("*.parquet")), 100),
        "Minari cannot read this dataset: ",
    ),
    "empty": (
        lambda data: os.truncate(next((data / "1").glob("*.parquet")), 0),
        "Minari cannot read this dataset: ",
    ),
    "bad metadata": (
        lambda data: (data / "1" / "metadata.json").write_text("{"),
        "Minari cannot read this dataset: JSONDecodeError",
    ),
}


def test_every_damage_of_a_dataset_in_many_files_has_its_own_message(
    store: Store, tmp_path: Path
) -> None:
    pytest.importorskip("pyarrow")
    export_minari(store, root=tmp_path / "whole", data_format="parquet", quiet=True)
    for name, (damage, said) in ARROW_DAMAGE.items():
        root = tmp_path / "datasets"
        shutil.copytree(tmp_path / "whole", root)
        data = root / "babyai/GoToLocal-v0/data"
        damage(data)
        assert said in refusal(data), name
        shutil.rmtree(root)


def test_the_folder_of_a_dataset_that_is_not_there_leads_to_those_that_are(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(data.parents[2]))
    result = CliRunner().invoke(main, ["import", "babyai/GoToLokal-v0", "--from", "minari"])
    assert result.exit_code == 1
    assert "there is no Minari dataset of this name" in result.stderr
    assert "; similar names: babyai/GoToLocal-v0\n" in result.stderr
    for name, said in (
        ("gone.pkl", "error: there is no such file or folder"),
        ("babyai/GoToLokal", "error: there is no such folder, and no Minari dataset of this name"),
    ):
        result = CliRunner().invoke(main, ["import", name])
        assert result.stderr.startswith(said) and "minari download" not in result.stderr
    assert "; similar names: babyai/GoToLocal-v0\n" in result.stderr


def test_no_environment_that_the_metadata_name_is_made(data: Path, tmp_path: Path) -> None:
    file, witness = data / "metadata.json", tmp_path / "witness"
    content = json.loads(file.read_text())
    del content["observation_space"], content["action_space"]
    spec = json.loads(content["env_spec"])
    spec.update(entry_point="subprocess:getoutput", kwargs={"cmd": f"touch {witness}"})
    file.write_text(json.dumps({**content, "env_spec": json.dumps(spec)}))
    assert "invalid at observation_space" in refusal(data)
    assert not witness.exists()


def test_a_seed_that_occurs_twice_is_taken_once(data: Path) -> None:
    with h5py.File(data / "main_data.hdf5", "a") as file:
        file["episode_2"].attrs["seed"] = 1
    result = imported(data)
    assert "  left out 1: an earlier episode has the same seed\n" in result.stdout


def test_views_of_the_whole_room_are_not_taken_for_what_the_agent_sees(tmp_path: Path) -> None:
    episodes = make_episodes(LENGTHS)
    images = np.full((9, 7, 7, 3), 1, np.uint8)
    images[:, 2, 3] = (AGENT, 0, 0)
    images[0, 0, 0, 0] = 255  # so that the store that is exported keeps them as images
    store = build_store(tmp_path / "GoToLocal.zarr", replace(episodes, view=images))
    export_minari(store, root=tmp_path / "datasets", quiet=True)
    data = tmp_path / "datasets/babyai/GoToLocal-v0/data"
    with h5py.File(data / "main_data.hdf5", "a") as file:
        file["episode_0/observations/image"][0, 0, 0, 0] = 1
    assert "its views show the whole room" in refusal(data)
