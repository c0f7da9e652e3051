"""What is exported is read by the programs it is for; what comes back is the same, bit for bit."""

from __future__ import annotations

import enum
import os
import pickle
import re
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import blosc

from demotools.babyai.cells import Encoding
from demotools.cli import main
from demotools.errors import DemotoolsError, FetchError, SettingsError, StoreError
from demotools.exchange import export as exchange
from demotools.exchange import minari_import
from demotools.exchange.export import export_minari, export_pickle
from demotools.exchange.minari_import import import_minari, opened_dataset
from demotools.exchange.parquet import export_parquet
from demotools.pickles.convert import ConvertOptions, convert_files
from demotools.pickles.writer import write_pickle
from demotools.recording.bot import Style
from demotools.recording.environment import make_environment
from demotools.recording.record import generate, planned_recording
from demotools.store.reading import Episodes, Store, open_store
from tests.conftest import build_store, make_episodes

minari = pytest.importorskip("minari")
from minari.data_collector import EpisodeBuffer  # noqa: E402  (only where minari is installed)

EPISODES = 12


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home: Minari writes there unless it is told another folder."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.delenv("MINARI_DATASETS_PATH", raising=False)
    return folder


@pytest.fixture
def recorded(tmp_path: Path) -> Store:
    path = tmp_path / "GoToLocal.zarr"
    generate(planned_recording("GoToLocal", EPISODES), path, workers=1, quiet=True)
    return open_store(path)


def same_steps(one: Store, other: Store) -> bool:
    """Whether all but the seeds is equal, missions and order included."""
    rows = np.arange(one.episodes)
    if other.episodes != one.episodes:
        return False
    a, b = one.take(rows), other.take(rows)
    arrays = all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for name in ("length", "view", "direction", "action")
    )
    return arrays and a.mission == b.mission


# where the one bot gives up, the other fails in its mission
@pytest.mark.parametrize("level", ["GoToImpUnlock", "OpenDoorsOrderN2Debug"])
def test_of_a_noisy_recording_with_failures_minari_gets_the_transitions(
    level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyarrow = pytest.importorskip("pyarrow.parquet")
    style = Style(noise=0.05, failures=True, subgoals=True)
    recording = planned_recording(level, seeds=range(3, 7), style=style)
    generate(recording, tmp_path / "G.zarr", workers=1, quiet=True)
    store = open_store(tmp_path / "G.zarr")
    exported = export_minari(store, root=tmp_path / "datasets", quiet=True)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(exported.path))
    environment = make_environment(level)
    solved, ends = [], []
    for stored, episode in zip(store, minari.load_dataset("babyai/G-v0"), strict=True):
        environment.reset(seed=stored.seed)
        for step, action in enumerate(episode.actions.tolist()):
            observation, reward, terminated, *_ = environment.step(action)
            assert episode.terminations[step] == terminated
            assert episode.rewards[step] == pytest.approx(reward, abs=1e-6)
            if step + 1 < len(stored):
                assert np.array_equal(episode.observations["image"][step + 1], observation["image"])
        solved.append(float(episode.rewards[-1]) > 0)
        ends.append(bool(episode.terminations[-1]))
        assert bool(episode.truncations[-1]) != ends[-1]
    assert True in solved and False in solved and (ends == solved) == (level == "GoToImpUnlock")
    back = import_minari(opened_dataset("babyai/G-v0"), tmp_path / "back.zarr", quiet=True)
    # failures and rewards are there again; the expert's advice and its subgoals are not
    assert back.lost == ("taken", "subgoal") and back.left_out == {}
    assert "the dataset does not have the expert's actions" in back.text()
    assert "the exported store had `subgoal`" in back.text()
    again = open_store(back.path)
    assert set(again.optional) == {"reward", "terminated"}
    for name in ("action", "reward", "terminated"):
        before = store.taken if name == "action" else store.optional[name]
        found = again.action if name == "action" else again.optional[name]
        assert np.array_equal(found.span(0, store.steps), before.span(0, store.steps))
    h5py = pytest.importorskip("h5py")
    with h5py.File(exported.path / "babyai/G-v0/data/main_data.hdf5", "a") as file:
        file["episode_0/terminations"][0] = True
    partly = import_minari(opened_dataset("babyai/G-v0"), tmp_path / "partly.zarr", quiet=True)
    assert partly.left_out == {
        "it is terminated before its last step, or its terminations are malformed": 1
    }
    export_parquet(store, tmp_path / "G.parquet", quiet=True)
    rows = pyarrow.read_table(tmp_path / "G.parquet").to_pylist()
    assert [row["rewards"][-1] > 0 for row in rows] == solved
    assert rows[0]["discrete_actions"] == store[0].actions.tolist()


# --- pickle


def test_a_reader_as_in_babyai_reads_the_exported_pickle(
    recorded: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Actions(enum.IntEnum):
        left, right, forward, pickup, drop, toggle, done = range(7)

    module = types.ModuleType("gym_minigrid.minigrid")
    vars(module)["MiniGridEnv"] = types.SimpleNamespace(Actions=Actions)
    monkeypatch.setitem(sys.modules, "gym_minigrid", types.ModuleType("gym_minigrid"))
    monkeypatch.setitem(sys.modules, "gym_minigrid.minigrid", module)
    demos = pickle.loads(
        export_pickle(recorded, tmp_path / "demos.pkl", quiet=True).path.read_bytes()
    )

    assert len(demos) == recorded.episodes
    for number, (mission, frame, directions, actions) in enumerate(demos):
        start, stop = recorded.episode_offset[number : number + 2].tolist()
        images = pickle.loads(blosc.decompress(frame))  # blosc.unpack_array does these two
        assert np.array_equal(images, recorded.images(start, stop))
        assert directions == recorded.direction.span(start, stop).tolist()
        assert actions == recorded.action.span(start, stop).tolist()
        assert all(isinstance(action, Actions) for action in actions)
        assert mission == recorded.mission_text[recorded.episode_mission[number]]
        # numpy 1 knows no numpy._core, numpy 2 still knows numpy.core
        assert b"numpy._core" not in blosc.decompress(frame)


@settings(max_examples=8)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30), seed=st.integers(0, 99))
def test_a_store_survives_the_way_through_a_pickle(
    lengths: list[int], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("pickle")
    store = build_store(folder / "GoToLocal.zarr", make_episodes(lengths, seed))
    file = export_pickle(store, folder / "BabyAI-GoToLocal-v0_agent.pkl", quiet=True).path
    # random cells are no evidence of an encoding
    options = ConvertOptions(encoding=Encoding.TODAY, name="back", workers=1, quiet=True)
    back = open_store(convert_files([file], folder, options).path)
    assert same_steps(store, back)
    assert (np.asarray(back.episode_seed) == -1).all()


def test_the_file_is_named_so_that_convert_knows_level_and_split(tmp_path: Path) -> None:
    path = tmp_path / "GoToLocal-valid.zarr"
    generate(planned_recording("GoToLocal", 60, split="valid"), path, workers=1, quiet=True)
    result = CliRunner().invoke(main, ["export", str(path), "--to", "pickle"])
    assert result.exit_code == 0, result.output
    file = tmp_path / "BabyAI-GoToLocal-v0_agent_valid.pkl"
    size = f"{file.stat().st_size / 1000:.1f} kB"
    assert result.stdout == f"exported {file}: 60 episodes, {size}; this format has no seeds\n"
    converted = convert_files([file], tmp_path, ConvertOptions(name="back", workers=1, quiet=True))
    back = open_store(converted.path)
    assert (back.attributes.level, back.attributes.split) == ("GoToLocal", "valid")
    assert same_steps(open_store(path), back)


def test_an_existing_pickle_is_not_replaced_unasked(recorded: Store, tmp_path: Path) -> None:
    file = tmp_path / "precious.pkl"
    file.write_text("precious")
    with pytest.raises(DemotoolsError, match="already exists"):
        export_pickle(recorded, file, quiet=True)
    assert file.read_text() == "precious"
    export_pickle(recorded, file, overwrite=True, quiet=True)
    assert file.read_bytes()[:2] == b"\x80\x03"


# --- Minari


@pytest.mark.parametrize("data_format", ["hdf5", "arrow", "parquet"])
def test_a_store_comes_back_from_minari_bit_for_bit(
    data_format: str, recorded: Store, tmp_path: Path, home: Path
) -> None:
    if data_format != "hdf5":
        pytest.importorskip("pyarrow")
    exported = export_minari(
        recorded, root=tmp_path / "datasets", data_format=data_format, quiet=True
    )
    assert exported.last_observations == {"replayed": EPISODES}
    files = [path for path in (tmp_path / "datasets/babyai/GoToLocal-v0").rglob("*.*")]
    assert exported.size_bytes == sum(path.stat().st_size for path in files)
    assert f" as {data_format}\n" in exported.text()
    dataset = opened_dataset(str(tmp_path / "datasets" / str(exported.dataset_id)))
    import_minari(dataset, tmp_path / "back.zarr", quiet=True)
    back = open_store(tmp_path / "back.zarr")
    # the fingerprint covers every byte of every array: seeds and missions in their order, too
    assert back.attributes.fingerprint == recorded.attributes.fingerprint
    through = {"dataset": "babyai/GoToLocal-v0", "minari": minari.__version__}
    assert back.attributes.source == {**recorded.attributes.source, "imported": through}
    for name in ("level", "split", "environment_id", "licence", "citation"):
        assert getattr(back.attributes, name) == getattr(recorded.attributes, name)
    assert not list(home.iterdir())


@pytest.mark.parametrize("data_format", ["arrow", "parquet"])
def test_minari_itself_reads_its_other_formats(
    data_format: str, recorded: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow")
    exported = export_minari(
        recorded, root=tmp_path / "datasets", data_format=data_format, quiet=True
    )
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(exported.path))
    dataset = minari.load_dataset("babyai/GoToLocal-v0")
    assert (dataset.total_episodes, dataset.total_steps) == (recorded.episodes, recorded.steps)
    assert dataset.storage.metadata["dataset_size"] == dataset.storage.get_size()
    for number, episode in enumerate(dataset.iterate_episodes()):
        start, stop = recorded.bounds(number)
        images = episode.observations["image"]
        assert np.array_equal(images[:-1], recorded.images(start, stop))
        assert np.array_equal(episode.actions, recorded.action.span(start, stop))
        assert len(images) == stop - start + 1
        assert episode.rewards[-1] > 0


def test_minari_itself_loads_lists_splits_filters_and_combines_it(
    recorded: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_minari(recorded, root=tmp_path / "datasets", quiet=True)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    assert list(minari.list_local_datasets(compatible_minari_version=True)) == [
        "babyai/GoToLocal-v0"
    ]
    dataset = minari.load_dataset("babyai/GoToLocal-v0")
    assert (dataset.total_episodes, dataset.total_steps) == (recorded.episodes, recorded.steps)
    assert len(dataset.sample_episodes(3)) == 3
    assert len(dataset.filter_episodes(lambda episode: bool(episode.terminations[-1]))) == EPISODES
    one, two = minari.split_dataset(dataset, sizes=[5, 7], seed=1)
    assert (len(one), len(two)) == (5, 7)
    assert len(minari.combine_datasets([dataset, dataset], "babyai/twice-v0")) == 2 * EPISODES
    environment = dataset.recover_environment()
    assert environment.spec is not None
    assert environment.spec.id == "BabyAI-GoToLocal-v0"
    assert "episodes=" not in repr(dataset[0])  # its own text of an episode can be made


def test_every_episode_has_one_observation_more_inside_the_spaces(
    recorded: Store, tmp_path: Path
) -> None:
    export_minari(recorded, root=tmp_path, quiet=True)
    dataset = minari.MinariDataset(tmp_path / "babyai/GoToLocal-v0/data")
    metadata = list(dataset.storage.get_episode_metadata(range(EPISODES)))
    environment = make_environment("GoToLocal")
    for episode, about in zip(dataset, metadata, strict=True):
        steps = len(episode.actions)
        assert about["seed"] == recorded.episode_seed[episode.id]
        assert len(episode.rewards) == len(episode.truncations) == steps
        assert episode.terminations.tolist() == [False] * (steps - 1) + [True]
        observation, _ = environment.reset(seed=about["seed"])
        for step in range(steps + 1):
            stored = {key: value[step] for key, value in episode.observations.items()}
            assert dataset.observation_space.contains(stored)
            assert np.array_equal(stored["image"], observation["image"])
            assert stored["direction"] == observation["direction"]
            assert stored["mission"] == observation["mission"]
            if step < steps:
                assert dataset.action_space.contains(episode.actions[step])
                observation, reward, *_ = environment.step(int(episode.actions[step]))
                assert episode.rewards[step] == reward
        assert episode.rewards[-1] > 0


def test_where_a_replay_is_not_possible_the_last_observation_is_repeated_and_said_so(
    make_store: Callable[..., Store], tmp_path: Path
) -> None:
    store = make_store(lengths=[3, 2, 4])  # random cells: no environment plays them
    exported = export_minari(store, root=tmp_path / "datasets", quiet=True)
    assert exported.last_observations == {"repeated": 3}
    dataset = minari.MinariDataset(tmp_path / "datasets/babyai/GoToLocal-v0/data")
    assert dataset.storage.metadata["last_observations"] == {"repeated": 3}
    for about in dataset.storage.get_episode_metadata(range(3)):
        assert about["last_observation"] == "repeated"
    images = dataset[1].observations["image"]
    assert np.array_equal(images[:2], store.images(3, 5))
    assert np.array_equal(images[2], images[1])


@pytest.mark.parametrize("shape", [(40, 40, 3), (7, 7, 3), (5, 9, 3)])
def test_images_come_back_without_loss(shape: tuple[int, ...], tmp_path: Path) -> None:
    episodes = make_episodes([3, 2, 4])
    images = np.random.default_rng(1).integers(0, 256, (9, *shape), dtype=np.uint8)
    store = build_store(tmp_path / "GoToLocal.zarr", replace(episodes, view=images))
    export_minari(store, root=tmp_path / "datasets", quiet=True)
    dataset = opened_dataset(str(tmp_path / "datasets/babyai/GoToLocal-v0"))
    import_minari(dataset, tmp_path / "back.zarr", quiet=True)
    back = open_store(tmp_path / "back.zarr")
    assert not back.packed
    assert back.attributes.fingerprint == store.attributes.fingerprint


def test_a_level_without_an_environment_comes_back_too(tmp_path: Path) -> None:
    mission = ["put the red ball next to the green key"] * 2
    seed = np.full(2, -1, dtype=np.int64)
    episodes = replace(make_episodes([3, 2]), mission=mission, seed=seed)
    store = build_store(tmp_path / "PutNext.zarr", episodes, level="PutNext")
    export_minari(store, root=tmp_path / "datasets", quiet=True)
    dataset = opened_dataset(str(tmp_path / "datasets/babyai/PutNext-v0"))
    assert dataset.minari.env_spec is None
    import_minari(dataset, tmp_path / "back.zarr", quiet=True)
    back = open_store(tmp_path / "back.zarr")
    assert back.attributes.fingerprint == store.attributes.fingerprint
    assert back.attributes.level == "PutNext"


def test_views_of_which_only_some_pack_are_all_kept_as_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(minari_import, "_EPISODES_A_PART", 2)
    episodes = make_episodes([3, 2, 4, 1, 2])
    images = np.zeros((12, 7, 7, 3), dtype=np.uint8)
    images[6] = 200  # in the third episode
    store = build_store(tmp_path / "GoToLocal.zarr", replace(episodes, view=images))
    export_minari(store, root=tmp_path / "datasets", quiet=True)
    dataset = opened_dataset(str(tmp_path / "datasets/babyai/GoToLocal-v0"))
    import_minari(dataset, tmp_path / "back.zarr", quiet=True)
    back = open_store(tmp_path / "back.zarr")
    assert back.attributes.fingerprint == store.attributes.fingerprint


def test_batches_hold_every_episode_once(
    make_store: Callable[..., Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "_STEPS_A_BATCH", 5)
    monkeypatch.setattr(exchange, "_EPISODES_A_BATCH", 3)
    store = make_store(lengths=[3, 2, 9, 1, 1, 1, 1, 1, 7])
    export_minari(store, root=tmp_path / "datasets", quiet=True)
    dataset = opened_dataset(str(tmp_path / "datasets/babyai/GoToLocal-v0"))
    import_minari(dataset, tmp_path / "back.zarr", quiet=True)
    back = open_store(tmp_path / "back.zarr")
    assert back.attributes.fingerprint == store.attributes.fingerprint


def test_an_existing_dataset_is_replaced_only_when_asked(
    make_store: Callable[..., Store], tmp_path: Path
) -> None:
    root = tmp_path / "datasets"
    export_minari(make_store(lengths=[3, 2]), root=root, quiet=True)
    other = make_store(lengths=[1, 1, 1])
    with pytest.raises(StoreError, match="this dataset already exists"):
        export_minari(other, root=root, quiet=True)
    data = root / "babyai/GoToLocal-v0/data"
    assert len(minari.MinariDataset(data)) == 2
    export_minari(other, root=root, overwrite=True, quiet=True)
    assert len(minari.MinariDataset(data)) == 3
    assert [path.name for path in root.iterdir()] == ["babyai"]


def test_an_export_that_fails_leaves_what_was_there(recorded: Store, tmp_path: Path) -> None:
    root = tmp_path / "datasets"
    root.mkdir()
    chunk = next((recorded.path / "mission_text/c").iterdir())
    chunk.write_bytes(chunk.read_bytes()[:-9] + bytes(9))
    with pytest.raises(StoreError, match="checksum"):
        export_minari(recorded, root=root, quiet=True)
    assert not list(root.iterdir())


def test_without_minari_the_command_says_how_to_install_it(
    recorded: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)  # what Python does for a missing package
    result = CliRunner().invoke(main, ["export", str(recorded.path), "--to", "minari"])
    assert result.exit_code == 1
    assert "pip install -c constraints.txt '.[minari]'" in result.stderr


@pytest.mark.parametrize("dataset_id", ["GoToLocal", "../up-v0", "babyai/a.b-v0"])
def test_a_malformed_id_is_refused(recorded: Store, tmp_path: Path, dataset_id: str) -> None:
    with pytest.raises(SettingsError, match="is not a valid id of a Minari dataset"):
        export_minari(recorded, root=tmp_path / "x", dataset_id=dataset_id, quiet=True)
    assert not (tmp_path / "x").exists()


# --- foreign datasets


def foreign(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    buffers: list[EpisodeBuffer],
    space: spaces.Space[Any] | None = None,
) -> str:
    """A dataset that somebody else made, below `root`; its folder."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Minari asks for a permalink and the like
        minari.create_dataset_from_buffers(
            "foreign-v0",
            buffers,
            observation_space=space or OBSERVATION_SPACE,
            action_space=spaces.Discrete(7),
            author="Somebody",
        )
    return str(root / "foreign-v0")


OBSERVATION_SPACE = spaces.Dict(
    {
        "image": spaces.Box(0, 255, (7, 7, 3), np.uint8),
        "direction": spaces.Discrete(4),
        "mission": spaces.Text(100),
    }
)


def buffer(seed: int | None, reward: float = 0.9, steps: int = 2) -> EpisodeBuffer:
    return EpisodeBuffer(
        seed=seed,
        observations={
            "image": np.full((steps + 1, 7, 7, 3), 1, np.uint8),
            "direction": np.arange(steps + 1) % 4,
            "mission": ["go to the red ball"] * (steps + 1),
        },
        actions=np.full(steps, 2),
        rewards=[0.0] * (steps - 1) + [reward],
        terminations=[False] * (steps - 1) + [True],
        truncations=[False] * steps,
        infos={},
    )


def test_of_a_foreign_dataset_the_successes_of_the_split_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffers = [
        *(buffer(7), buffer(8, reward=0.0), buffer(1_000_000_007)),
        *(buffer(2_000_000_001), buffer(None, steps=3)),
    ]
    name = foreign(tmp_path / "datasets", monkeypatch, buffers)
    imported = import_minari(
        opened_dataset(name, level="GoToLocal"), tmp_path / "train.zarr", quiet=True
    )
    assert imported.left_out == {
        "its seed is reserved for evaluation": 1,
        "its seed belongs to the other split": 1,
        "it is not solved: its last reward is not above 0": 1,
    }
    store = open_store(tmp_path / "train.zarr")
    assert store.episode_seed.tolist() == [7, -1]
    assert store.direction.span(0, 5).tolist() == [0, 1, 0, 1, 2]
    assert store.attributes.source["kind"] == "minari"
    assert store.attributes.source["author"] == ["Somebody"]
    valid = opened_dataset("foreign-v0", level="GoToLocal", split="valid")
    import_minari(valid, tmp_path / "valid.zarr", quiet=True)
    assert open_store(tmp_path / "valid.zarr").episode_seed.tolist() == [1_000_000_007, -1]


def test_a_dataset_without_a_success_leaves_no_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = foreign(tmp_path / "datasets", monkeypatch, [buffer(1, reward=0.0)])
    with pytest.raises(StoreError, match="no episode can be kept: it is not solved"):
        import_minari(opened_dataset(name, level="GoTo"), tmp_path / "x.zarr", quiet=True)
    assert not [path for path in tmp_path.iterdir() if "x.zarr" in path.name and path.is_dir()]


def test_a_dataset_that_does_not_say_its_level_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = foreign(tmp_path / "datasets", monkeypatch, [buffer(1)])
    with pytest.raises(SettingsError, match="does not say its level") as caught:
        opened_dataset(name)
    assert caught.value.fix == "add --level"


def test_other_observations_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [replace(buffer(1), observations=buffer(1).observations["image"])]
    name = foreign(tmp_path / "datasets", monkeypatch, images, OBSERVATION_SPACE["image"])
    with pytest.raises(StoreError, match="not an image, a direction and a text mission"):
        opened_dataset(name, level="GoToLocal")


def test_a_dataset_that_is_not_here_is_refused_with_the_command_that_downloads_it(
    tmp_path: Path,
) -> None:
    result = CliRunner().invoke(
        main, ["import", "minigrid/BabyAI-Pickup/optimal-v0", "--from", "minari"]
    )
    assert result.exit_code == 1
    assert "minari download minigrid/BabyAI-Pickup/optimal-v0" in result.stderr
    with pytest.raises(FetchError, match="there is no Minari dataset"):
        opened_dataset(str(tmp_path))


# --- docs


def python_blocks(page: str) -> list[str]:
    text = (Path(__file__).parents[2] / "docs" / page).read_text("utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.S)


@pytest.mark.slow  # importing torchrl takes seconds
@pytest.mark.filterwarnings("ignore")  # torchrl's own
def test_the_ten_lines_for_torchrl_run_as_they_stand(
    make_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchrl")
    store = make_store(lengths=[5, 9, 4, 2, 30], name="GoToLocal")
    monkeypatch.chdir(store.path.parent)
    names: dict[str, Any] = {}
    (code,) = (block for block in python_blocks("exchange.md") if "torchrl" in block)
    exec(code, names)
    batch = names["batch"]
    assert batch["view"].shape == (64, 4, 7, 7)
    first = batch["index"][:, 0, 0]
    for row, start in zip(batch, first.tolist(), strict=True):
        assert np.array_equal(row["view"].numpy(), store.view.span(start, start + 4))
        assert np.array_equal(row["action"].numpy(), store.action.span(start, start + 4))
        (episode,) = set(row["episode"].tolist())
        tokens = store.mission_tokens[store.episode_mission[episode]]
        assert (row["mission"].numpy() == tokens).all()


EXPORT = """
import sys
from pathlib import Path
from demotools.exchange.export import export_minari
from demotools.store.reading import open_store
export_minari(open_store(sys.argv[1]), root=Path(sys.argv[2]), overwrite=True, quiet=True)
"""


def test_what_a_killed_export_leaves_is_cleaned_by_the_next_and_the_old_dataset_is_kept(
    make_store: Callable[..., Store], tmp_path: Path
) -> None:
    root = tmp_path / "datasets"
    export_minari(make_store(lengths=[3, 2]), root=root, quiet=True)
    long = make_store(lengths=[1] * 5000, name="Long")
    small = make_store(lengths=[1, 1, 1])
    working = root / ".export.babyai.GoToLocal-v0"
    code = EXPORT.replace("overwrite", "dataset_id='babyai/GoToLocal-v0', overwrite")
    with subprocess.Popen([sys.executable, "-c", code, str(long.path), str(root)]) as process:
        while not list(working.glob("babyai/*/data/*.hdf5")):
            assert process.poll() is None
        with pytest.raises(StoreError, match="another process"):
            export_minari(small, root=root, overwrite=True, quiet=True)
        process.kill()
    assert working.is_dir()
    data = root / "babyai/GoToLocal-v0/data"
    assert len(minari.MinariDataset(data)) == 2
    export_minari(small, root=root, overwrite=True, quiet=True)
    assert len(minari.MinariDataset(data)) == 3
    assert [path.name for path in root.iterdir()] == ["babyai"]


def test_a_dataset_that_a_killed_export_had_moved_aside_comes_back(
    make_store: Callable[..., Store], tmp_path: Path
) -> None:
    root = tmp_path / "datasets"
    export_minari(make_store(lengths=[3, 2]), root=root, quiet=True)
    final = root / "babyai/GoToLocal-v0"
    final.rename(root / ".export.babyai.GoToLocal-v0.old")
    broken = make_store(lengths=[1, 1, 1])
    chunk = next((broken.path / "mission_text/c").iterdir())
    chunk.write_bytes(chunk.read_bytes()[:-9] + bytes(9))
    with pytest.raises(StoreError, match="checksum"):
        export_minari(broken, root=root, overwrite=True, quiet=True)
    assert len(minari.MinariDataset(final / "data")) == 2
    assert [path.name for path in root.iterdir()] == ["babyai"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
@pytest.mark.parametrize(
    "words",
    [
        ["export", "--to", "pickle", "-o"],
        ["card", "-o"],
        ["report", "-o"],
        ["show", "--gif"],
        ["show", "--png"],
        ["archive", "-o"],
        ["export", "--to", "minari", "-o"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("linked", [False, True])
def test_an_output_that_is_no_regular_file_is_left_as_it_is(
    words: list[str], overwrite: list[str], linked: bool, recorded: Store, tmp_path: Path
) -> None:
    place = named = tmp_path / "X.zarr.zip"
    os.mkfifo(place)
    if linked:
        named = tmp_path / "link.zarr.zip"
        named.symlink_to(place)
    options = [] if words[0] == "archive" else overwrite
    result = CliRunner().invoke(main, [*words, str(named), *options, str(recorded.path)])
    assert result.exit_code in (1, 2)
    assert result.stderr
    assert place.is_fifo()
    assert named.is_symlink() == linked


def test_two_exports_to_one_pickle_leave_one_whole_file(recorded: Store, tmp_path: Path) -> None:
    file, written = tmp_path / "demos.pkl", tmp_path / "other.pkl"
    export_pickle(recorded, written, quiet=True)
    rows = np.arange(recorded.episodes)

    def blocks() -> Iterator[Episodes]:
        yield recorded.take(rows[:6])
        export_pickle(recorded, file, quiet=True)  # another one, begun and ended meanwhile
        assert file.read_bytes() == written.read_bytes()
        yield recorded.take(rows[6:])

    write_pickle(file, blocks())
    assert file.read_bytes() == written.read_bytes()
    assert sorted(path.name for path in tmp_path.glob("*.pkl*")) == ["demos.pkl", "other.pkl"]
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("name", ["GoToLocal.pkl", "GoToLocal.zarr.zip", "notes.md"])
def test_a_file_that_is_no_dataset_is_told_what_reads_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    result = CliRunner().invoke(main, ["import", str(tmp_path / name)])
    assert (
        result.exit_code == 1
        and "this is a file, but a Minari dataset is a folder" in result.stderr
    )
    assert "`demotools convert` for pickles" in result.stderr


def test_a_store_is_not_imported_but_used(make_store: Callable[..., Store]) -> None:
    store = make_store([3])
    result = CliRunner().invoke(main, ["import", str(store.path), "-o", "copy"])
    assert result.exit_code == 1 and "this is already a demo store" in result.stderr


def test_an_id_made_of_a_name_that_minari_cannot_have_asks_for_an_id(
    make_store: Callable[..., Store],
) -> None:
    store = make_store([3], name="über all")
    result = CliRunner().invoke(main, ["export", str(store.path), "--to", "minari"])
    assert result.exit_code == 1 and "next:  use an --id without spaces, such as" in result.stderr


@pytest.mark.parametrize("kind", ["minari", "parquet"])
def test_a_level_outside_babyai_comes_back(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "DoorKey.zarr"
    recording = planned_recording("MiniGrid-DoorKey-5x5-v0", 4)
    generate(recording, path, workers=1, quiet=True)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    place = tmp_path if kind == "minari" else tmp_path / "d.parquet"
    line = ["export", str(path), "--to", kind, "-o", str(place)]
    assert CliRunner().invoke(main, line).exit_code == 0
    source = "babyai/DoorKey-v0" if kind == "minari" else str(place)
    line = ["import", source, "--name", "back", "--data-dir", str(tmp_path)]
    result = CliRunner().invoke(main, line)
    assert result.exit_code == 0, result.output
    back, store = open_store(tmp_path / "back.zarr"), open_store(path)
    assert back.level == "MiniGrid-DoorKey-5x5-v0"
    assert back.steps == store.steps
    for array in ("view", "action"):
        one, other = (getattr(each, array).span(0, store.steps) for each in (back, store))
        assert np.array_equal(one, other)
