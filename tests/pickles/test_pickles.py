from __future__ import annotations

import enum
import pickle
import pickletools
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numcodecs import blosc

from demotools.babyai.cells import Encoding, unpacked_cells
from demotools.errors import PickleError
from demotools.pickles.images import CELL_VIEW, ViewKind, decoded_part
from demotools.pickles.reader import PickleReader
from demotools.pickles.writer import write_pickle
from demotools.store.reading import Episodes
from tests.conftest import make_episodes

TODAY = ViewKind(CELL_VIEW, Encoding.TODAY)


class MiniGridEnv:
    """Stands for gym_minigrid's environment: the pickles name it and its actions."""

    class Actions(enum.IntEnum):
        left, right, forward, pickup, drop, toggle, done = range(7)


for _class in (MiniGridEnv, MiniGridEnv.Actions):
    _class.__module__ = "gym_minigrid.minigrid"
MiniGridEnv.__qualname__ = "MiniGridEnv"
MiniGridEnv.Actions.__qualname__ = "MiniGridEnv.Actions"


def gym_minigrid_modules() -> dict[str, types.ModuleType]:
    """A package of that name, for `sys.modules`."""
    package, module = types.ModuleType("gym_minigrid"), types.ModuleType("gym_minigrid.minigrid")
    vars(module)["MiniGridEnv"] = MiniGridEnv
    return {each.__name__: each for each in (package, module)}


@pytest.fixture
def gym_minigrid(monkeypatch: pytest.MonkeyPatch) -> type[MiniGridEnv]:
    """A package of that name that can be imported."""
    for name, module in gym_minigrid_modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    return MiniGridEnv


def read(path: Path, kind: ViewKind = TODAY) -> list[Episodes]:
    parts = []
    for part in PickleReader(path):
        episodes, skipped = decoded_part(path, part, kind)
        assert skipped == []
        parts.append(episodes)
    return parts


def joined(parts: list[Episodes], column: str) -> Any:
    return np.concatenate([getattr(part, column) for part in parts])


def assert_same(parts: list[Episodes], expected: list[Episodes]) -> None:
    for column in ("length", "view", "direction", "action"):
        np.testing.assert_array_equal(joined(parts, column), joined(expected, column))
    texts = [text for part in parts for text in part.mission]
    assert texts == [text for part in expected for text in part.mission]


def demos_of(episodes: Episodes, actions: type[enum.IntEnum] | type[int] = int) -> list[Any]:
    """The episodes as the legacy list, by numpy and numcodecs alone."""
    demos: list[Any] = []
    for number, mission in enumerate(episodes.mission):
        steps = slice(episodes.offset[number], episodes.offset[number + 1])
        images = unpacked_cells(episodes.view[steps])
        frame = blosc.compress(pickle.dumps(images, 4), b"blosclz", 9, blosc.SHUFFLE)
        action = [actions(value) for value in episodes.action[steps].tolist()]
        demos.append((str(mission), frame, episodes.direction[steps].tolist(), action))
    return demos


@pytest.mark.parametrize("enum_actions", [True, False])
def test_what_is_written_is_read_back(tmp_path: Path, enum_actions: bool) -> None:
    blocks = [make_episodes([1, 2, 3, 1200, 1001, 1000, 999]), make_episodes([5] * 3000, seed=1)]
    path = tmp_path / "demos.pkl"
    write_pickle(path, blocks, enum_actions=enum_actions)
    assert_same(read(path), blocks)


def test_the_loader_of_babyai_reads_what_is_written(
    tmp_path: Path, gym_minigrid: type[MiniGridEnv]
) -> None:
    episodes = make_episodes([3, 1, 40])
    write_pickle(tmp_path / "demos.pkl", [episodes])
    demos = pickle.loads((tmp_path / "demos.pkl").read_bytes())
    assert type(demos) is list
    assert {type(demo) for demo in demos} == {tuple}
    assert type(demos[0][3][0]) is gym_minigrid.Actions
    for number, (mission, packed, directions, actions) in enumerate(demos):
        steps = slice(episodes.offset[number], episodes.offset[number + 1])
        images = pickle.loads(blosc.decompress(packed))  # what blosc.unpack_array does
        np.testing.assert_array_equal(images, unpacked_cells(episodes.view[steps]))
        assert mission == episodes.mission[number]
        assert directions == episodes.direction[steps].tolist()
        assert actions == episodes.action[steps].tolist()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.usefixtures("gym_minigrid")
def test_files_of_every_protocol_are_read(tmp_path: Path, protocol: int) -> None:
    episodes = make_episodes([4, 1, 700, 12] * 20)
    path = tmp_path / "demos.pkl"
    path.write_bytes(pickle.dumps(demos_of(episodes, MiniGridEnv.Actions), protocol))
    assert_same(read(path), [episodes])


@pytest.mark.usefixtures("gym_minigrid")
def test_a_pickle_without_unused_memo_slots_is_read(tmp_path: Path) -> None:
    episodes = make_episodes([4, 1, 7])
    path = tmp_path / "demos.pkl"
    for protocol in (3, 4):
        demos = pickle.dumps(demos_of(episodes, MiniGridEnv.Actions), protocol)
        path.write_bytes(pickletools.optimize(demos))
        assert_same(read(path), [episodes])


@pytest.mark.parametrize("protocol", [3, 4])
def test_objects_that_episodes_share_are_read(tmp_path: Path, protocol: int) -> None:
    episodes = make_episodes([4, 2, 6])
    demos = demos_of(episodes)
    mission, frame, directions, actions = demos[1]
    demos += [
        demos[0],
        (mission, frame, directions, actions),
        (demos[2][0], frame, directions, actions),
    ]
    demos = demos * 3
    path = tmp_path / "demos.pkl"
    path.write_bytes(pickle.dumps(demos, protocol))
    found = read(path)
    assert [text for part in found for text in part.mission] == [demo[0] for demo in demos]
    assert joined(found, "action").tolist() == [value for demo in demos for value in demo[3]]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_directions_as_numpy_integers_are_read(tmp_path: Path, protocol: int) -> None:
    episodes = make_episodes([4, 1, 7])
    demos = [
        (mission, frame, list(np.array(directions)), actions)
        for mission, frame, directions, actions in demos_of(episodes)
    ]
    path = tmp_path / "demos.pkl"
    path.write_bytes(pickle.dumps(demos, protocol))
    assert_same(read(path), [episodes])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("steps", [1, 3, 300, 1000])
def test_images_pickled_under_every_protocol_are_read(
    tmp_path: Path, protocol: int, steps: int
) -> None:
    images = np.random.default_rng(steps).integers(0, 3, (steps, 7, 7, 3), dtype=np.uint8)
    for array in (images, np.asfortranarray(images)):
        frame = blosc.compress(pickle.dumps(array, protocol), b"blosclz", 9, blosc.SHUFFLE)
        path = tmp_path / "demos.pkl"
        path.write_bytes(pickle.dumps([("go", frame, [0] * steps, [1] * steps)]))
        (found,) = read(path)
        np.testing.assert_array_equal(unpacked_cells(found.view), images)


@pytest.mark.parametrize("with_seed", [True, False])
def test_the_layouts_of_summer_2018_are_read(tmp_path: Path, with_seed: bool) -> None:
    images = np.random.default_rng(0).integers(0, 3, (5, 7, 7, 3), dtype=np.uint8)
    steps = [
        ({"image": image, "direction": 2, "mission": "go to a door"}, number % 7, 0.5, False)
        for number, image in enumerate(images)
    ]
    episodes: list[Any] = [steps[:2], steps[2:]]
    path = tmp_path / "demos.pkl"
    path.write_bytes(pickle.dumps([(each, 17) for each in episodes] if with_seed else episodes, 3))
    (found,) = read(path)
    np.testing.assert_array_equal(unpacked_cells(found.view), images)
    assert found.length.tolist() == [2, 3]
    assert found.mission == ["go to a door"] * 2
    assert found.action.tolist() == [0, 1, 2, 3, 4]


def test_an_old_layout_without_images_says_so(tmp_path: Path) -> None:
    path = tmp_path / "demos.pkl"
    path.write_bytes(pickle.dumps([[({"mission": "go"}, 1, 0.0, True)]], 3))
    (part,) = PickleReader(path)
    assert part.skipped == [(0, "its observations hold no images to convert")]


def test_an_object_fetched_again_from_far_back_is_refused_clearly(tmp_path: Path) -> None:
    demos = [(f"go to door {number}", b"x" * 20, [0], [1]) for number in range(60_000)]
    demos.append(demos[50_000])
    path = tmp_path / "demos.pkl"
    path.write_bytes(pickle.dumps(demos, 3))
    with pytest.raises(PickleError, match=r"is fetched again .* to bound the memory"):
        list(PickleReader(path))


def test_a_file_that_changes_while_it_is_converted_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "demos.pkl"
    write_pickle(path, [make_episodes([3, 2])])
    whole = path.read_bytes()
    (part,) = PickleReader(path)
    size_at = part.start[1] + 4
    path.write_bytes(whole[:size_at] + bytes(4) + whole[size_at + 4 :])
    (announcing_less,) = PickleReader(path)
    path.write_bytes(whole)
    with pytest.raises(PickleError, match="episode 1 changed while it was read"):
        decoded_part(path, announcing_less, TODAY)


@given(st.data())
def test_a_file_cut_anywhere_is_refused_or_salvaged(data: st.DataObject) -> None:
    episodes = make_episodes([3, 1, 12, 2])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "demos.pkl"
        write_pickle(path, [episodes])
        whole = path.read_bytes()
        cut = data.draw(st.integers(3, len(whole) - 1))
        path.write_bytes(whole[:cut])
        with pytest.raises(PickleError, match=f"it ends at byte {cut}"):
            list(PickleReader(path))
        reader = PickleReader(path, salvage=True)
        try:
            parts = list(reader)
        except PickleError:
            return
        missions = [text for part in parts for text in part.mission]
        assert missions == episodes.mission[: len(missions)]
        assert reader.broken_at == cut


def other_python(version: str) -> str:
    """An interpreter of that version, on the path or among pyenv's; skips where there is none."""
    found = [shutil.which(f"python{version}")]
    if pyenv := shutil.which("pyenv"):
        root = subprocess.run([pyenv, "root"], capture_output=True, text=True, check=True).stdout
        found += map(str, Path(root.strip()).glob(f"versions/{version}.*/bin/python"))
    for python in found:
        # a shim of pyenv's is there for versions that are not in use, and does not start
        if python and not subprocess.run([python, "-c", ""], check=False).returncode:
            return python
    pytest.skip(f"there is no Python {version} on this machine")


@pytest.mark.parametrize("version", ["3.6", "3.7", "3.8", "3.10", "3.12", "3.13"])
def test_files_of_other_pythons_are_read(tmp_path: Path, version: str) -> None:
    python = other_python(version)
    path = tmp_path / "demos.pkl"
    program = """
import enum, pickle, sys, types
class MiniGridEnv:
    class Actions(enum.IntEnum):
        left = 0; right = 1; forward = 2; pickup = 3; drop = 4; toggle = 5; done = 6
module = types.ModuleType("gym_minigrid.minigrid")
module.MiniGridEnv = MiniGridEnv
MiniGridEnv.__module__ = MiniGridEnv.Actions.__module__ = module.__name__
sys.modules["gym_minigrid"] = types.ModuleType("gym_minigrid")
sys.modules[module.__name__] = module
actions = [MiniGridEnv.Actions(number) for number in range(7)]
frame = bytes(16) + bytes(range(48))  # announces views of no size
frames = [frame[:16] + frame[n % 64:] for n in range(3000)]
demos = [("go to door %d" % n, frames[n], [n % 4] * 7, actions) for n in range(3000)]
pickle.dump(demos, open(sys.argv[1], "wb"), *map(int, sys.argv[2:]))
"""
    for protocol in ([], ["2"], ["3"], ["4"]):
        subprocess.run([python, "-c", program, str(path), *protocol], check=True)
        parts = list(PickleReader(path))
        missions = [text for part in parts for text in part.mission]
        assert missions == [f"go to door {number}" for number in range(3000)]
        assert {action for part in parts for action in part.action} == {bytes(range(7))}
