"""A store as what people take it for: a sequence of episodes, to choose from and to pad."""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import demotools
from demotools.babyai.cells import unpacked_cells
from demotools.errors import SettingsError, StoreError
from demotools.store.episodes import Episode, EpisodeDataset, pad_episodes
from demotools.store.reading import Store
from tests.conftest import MISSIONS, build_store, make_episodes

LENGTHS = [3, 1, 4, 1, 5, 9, 2, 6]

# What somebody wrote down who had never seen the interface, in the order asked for.
GUESSES = (
    """import demotools; store = demotools.open("GoToLocal")""",
    """store = demotools.open("./data/GoToLocal")""",
    """len(store)""",
    """ep = store[0]; store[-1]""",
    """ep.mission""",
    """ep.images.shape  # (T, 7, 7, 3) uint8""",
    """ep.actions""",
    """ep.directions""",
    """ep.seed""",
    """store[:100]; store[[3, 5, 8]]; store.select(range(1000))""",
    """for ep in store: print(ep.mission, len(ep))""",
    """store.level; store.name""",
    """len(ep); store.num_steps; store.lengths""",
    """reds = store.filter(lambda ep: "red" in ep.mission); """
    """store.filter(mission=r"red (ball|key)")""",
    """short = store.filter(lambda ep: len(ep) <= 20); store.filter(max_length=20)""",
    """store.filter(lambda ep: ep.seed in {1, 2, 3}); store.filter(seeds=[1, 2, 3]); """
    """store.by_seed(42)""",
    """from demotools.torch import EpisodeDataset, collate""",
    """batch["image"].shape; batch["mask"].sum(); batch["lengths"]; batch["mission"]""",
    """arrays = store.to_numpy(); arrays["images"], arrays["actions"], arrays["episode_ends"]""",
    """store.vocab; demotools.Vocabulary.from_store(store)""",
    """store.metadata; store.missions; store.seeds; demotools.list_stores()""",
)
CANNOT_WORK = {
    16: "demotools imports no torch: it is `demotools.pad_episodes`, and a store is a dataset",
    17: "a batch has the names of an episode (`images`); `masks` are the memory's, never padding: "
    "`valid` says which steps count",
    19: "the words are a tuple, `store.vocabulary`; `episode.mission_tokens` are their ids",
}


def test_of_21_guesses_18_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_store(tmp_path / "data" / "GoToLocal.zarr", make_episodes([3, 2, 4] * 400))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEMOTOOLS_DATA", "data")
    names: dict[str, Any] = {}
    failed = set()
    for number, guess in enumerate(GUESSES):
        try:
            exec(guess, names)
        except (ImportError, NameError, AttributeError):
            failed.add(number)
    assert failed == set(CANNOT_WORK) and len(GUESSES) - len(failed) == 18
    assert names["arrays"]["episode_ends"][-1] == len(names["arrays"]["images"]) == 3600
    assert len(names["reds"]) == 400 and len(names["short"]) == 1200
    assert demotools.list_stores() == ["GoToLocal"]
    exec("from demotools import *", names)
    assert "open" not in names


def test_stores_are_listed_in_the_order_of_their_names(
    make_store: Callable[..., Store], tmp_path: Path
) -> None:
    for name in ("GoToLocal-small", "GoToLocal"):
        make_store([2], name=name)
    assert demotools.list_stores(tmp_path) == ["GoToLocal", "GoToLocal-small"]


def test_an_episode_is_the_steps_of_the_store(make_store: Callable[..., Store]) -> None:
    store, whole = make_store(LENGTHS), make_episodes(LENGTHS)
    for number, episode in enumerate(store):
        steps = slice(*whole.offset[number : number + 2].tolist())
        assert len(episode) == LENGTHS[number]
        assert (episode.mission, episode.seed) == (whole.mission[number], number)
        assert np.array_equal(episode.cells, whole.view[steps])
        assert np.array_equal(episode.images, unpacked_cells(whole.view[steps]))
        assert np.array_equal(episode["action"], whole.action[steps])
        assert np.array_equal(episode["directions"], whole.direction[steps])
        assert episode.masks.tolist() == [0] + [1] * (len(episode) - 1)
        words = [store.vocabulary[token - 1] for token in episode.mission_tokens if token]
        assert " ".join(words) == episode.mission
    assert set(dict(store[0])) == {"mission", "seed", "images", "directions", "actions", "masks"}
    # views of the map, which nobody may write to
    assert store[2].cells.base is not None and not store[2].actions.flags.writeable
    with pytest.raises(KeyError):
        store[0]["nothing"]
    with pytest.raises(IndexError):
        store[len(LENGTHS)]


@given(data=st.data())
def test_choosing_is_what_a_list_of_the_episodes_would_give(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    store = _shared_store(tmp_path_factory)
    numbers = list(range(len(store)))
    chosen: Any = store
    for _ in range(data.draw(st.integers(1, 3))):
        index = data.draw(
            st.slices(len(numbers))
            | st.lists(st.integers(-len(numbers), len(numbers) - 1) if numbers else st.nothing())
            | st.lists(st.booleans(), min_size=len(numbers), max_size=len(numbers)).map(
                lambda which: np.array(which, dtype=np.bool_)
            )
        )
        if isinstance(index, slice):
            numbers = numbers[index]
        elif isinstance(index, np.ndarray):
            numbers = [number for number, wanted in zip(numbers, index, strict=True) if wanted]
        else:
            numbers = [numbers[place] for place in index]
        chosen = chosen[index]
    assert [episode.number for episode in chosen] == numbers
    assert chosen.lengths.tolist() == [LENGTHS[number] for number in numbers]
    assert chosen.missions == [MISSIONS[number % 3] for number in numbers]


_stores: list[Store] = []


def _shared_store(folders: pytest.TempPathFactory) -> Store:
    if not _stores:
        _stores.append(build_store(folders.mktemp("s") / "A.zarr", make_episodes(LENGTHS)))
    return _stores[0]


def test_filters_are_taken_together_and_an_empty_choice_is_one(
    make_store: Callable[..., Store],
) -> None:
    store = make_store(LENGTHS)
    chosen = store.filter(mission="red|grey", min_length=2, max_length=5, seeds=range(1, 99))
    assert [one.number for one in chosen] == [2, 6]
    odd = store.filter(lambda episode: episode.seed % 2 == 1, min_length=6)
    assert odd.numbers.tolist() == [5, 7]
    assert odd.filter(mission=lambda text: "grey" in text)[0].number == 5
    assert len(store.filter(mission="purple")) == 0 == len(store.filter(seeds=[]))
    assert store.by_seed(4).number == 4
    with pytest.raises(KeyError):
        store.by_seed(99)
    with pytest.raises(SettingsError, match="not a regular expression"):
        store.filter(mission="(")
    for wrong in ([8], [0.5], [[1]], [True] * 3):
        with pytest.raises(IndexError):
            store.select(np.array(wrong))


def test_a_batch_is_padded_and_says_where(tmp_path: Path) -> None:
    store = build_store(tmp_path / "A.zarr", make_episodes(LENGTHS))
    longer = replace(
        make_episodes([2, 7], 1), mission=["open a door", "put the ball next to a box"]
    )
    other = build_store(tmp_path / "B.zarr", longer)
    episodes = [store[5], other[1], store[1]]
    batch = pad_episodes(episodes, ("cells", "images", "actions", "masks"))
    assert batch["mission"] == [one.mission for one in episodes]
    assert np.asarray(batch["lengths"]).tolist() == [9, 7, 1]
    assert batch["images"].shape == (3, 9, 7, 7, 3)
    for row, episode in enumerate(episodes):
        count = len(episode)
        assert np.asarray(batch["valid"])[row].tolist() == [True] * count + [False] * (9 - count)
        for name in ("cells", "images", "actions", "masks"):
            padded = np.asarray(batch[name])[row]
            assert np.array_equal(padded[:count], episode[name])
            assert not padded[count:].any()
        tokens = np.asarray(batch["mission_tokens"])[row]
        assert np.array_equal(
            tokens[tokens > 0], episode.mission_tokens[episode.mission_tokens > 0]
        )
    assert EpisodeDataset.collate(store[:2])["lengths"].tolist() == [3, 1]


def test_without_torch_a_batch_is_of_numpy_and_torch_stays_unimported(
    make_store: Callable[..., Store],
) -> None:
    program = (
        "import sys, demotools\n"
        "batch = demotools.pad_episodes(demotools.open(sys.argv[1])[:3])\n"
        "assert type(batch['actions']).__name__ == 'ndarray', type(batch['actions'])\n"
        "assert 'torch' not in sys.modules\n"
    )
    path = str(make_store(LENGTHS).path)
    subprocess.run([sys.executable, "-c", program, path], check=True, env=os.environ)


def test_a_choice_travels_by_the_path_of_its_store(make_store: Callable[..., Store]) -> None:
    chosen = make_store(LENGTHS)[[4, 2]]
    content = pickle.dumps(chosen)
    assert len(content) < 2000
    assert [episode.number for episode in pickle.loads(content)] == [4, 2]


def test_images_of_other_sizes_come_as_they_are_and_have_no_cells(tmp_path: Path) -> None:
    random = np.random.default_rng(0).integers(0, 256, (6, 8, 9, 3), dtype=np.uint8)
    store = build_store(tmp_path / "RGB.zarr", replace(make_episodes([4, 2]), view=random))
    assert np.array_equal(store[1].images, random[4:])
    assert pad_episodes(store[:])["images"].shape == (2, 4, 8, 9, 3)
    for wrong in (lambda: store[0].cells, lambda: pad_episodes(store[:], ("cells",))):
        with pytest.raises(StoreError, match="holds images"):
            wrong()


def test_a_value_out_of_range_is_found_where_it_is_read(make_store: Callable[..., Store]) -> None:
    store = make_store(LENGTHS)
    [chunk] = (store.path / "action" / "c").iterdir()
    content = bytearray(chunk.read_bytes())
    content[0] = 9
    chunk.write_bytes(content)
    episode: Episode = store[0]
    with pytest.raises(StoreError, match="a value of action is 9"):
        _ = episode.actions


def test_everything_that_a_notebook_shows_is_a_line(make_store: Callable[..., Store]) -> None:
    store = make_store(LENGTHS)
    assert repr(store) == "<store GoToLocal: 8 episodes, 31 steps of GoToLocal>"
    assert repr(store.action) == "<step array: uint8 [31]>"
    assert repr(store.take(np.arange(2))) == "<2 episodes in columns: 4 steps>"
    others = (store[:3], store[0], store.view, store.optional, store.attributes, store.episode_seed)
    for shown in map(repr, (store, *others)):
        assert "\n" not in shown


@pytest.mark.parametrize("package", ["demotools", "trainer"])
def test_the_tab_key_finds_what_is_public_and_nothing_else(package: str) -> None:
    if package == "trainer":
        pytest.importorskip("torch")
    module = importlib.import_module(package)
    found = {name for name in dir(module) if not name.startswith("__")}
    assert found - {"open"} == set(module.__all__)
    assert all(hasattr(module, name) for name in found)


def test_a_loader_without_a_collate_function_pads_as_pad_episodes_does(
    make_store: Callable[..., Store],
) -> None:
    torch = pytest.importorskip("torch")
    store = make_store(LENGTHS)
    (batch,) = torch.utils.data.DataLoader(store[:4], 4)
    expected = pad_episodes([store[number] for number in range(4)])
    assert batch.keys() == expected.keys() and batch["mission"] == expected["mission"]
    assert all(torch.equal(batch[name], expected[name]) for name in batch if name != "mission")
