"""Small twins."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from demotools.cli import main
from demotools.errors import StoreError
from demotools.store.reading import Episodes, open_store
from demotools.store.reshape import sampled
from demotools.store.shrink import shrink_store, shrink_stores
from demotools.store.verify import verify_store
from tests.conftest import build_store, make_episodes, set_aside
from tests.store.test_building import folder_bytes


def test_a_twin_holds_whole_episodes_of_its_parent_and_says_so(tmp_path: Path) -> None:
    parent = build_store(tmp_path / "GoToLocal.zarr", make_episodes([3, 1, 4, 1, 5, 9, 2, 6] * 20))
    result = shrink_store(parent.path, episodes=50, seed=7)
    twin = open_store(result.path)
    assert twin.name == "GoToLocal-small"
    assert twin.episodes == 50
    assert all(check.passed for check in verify_store(twin.path, quiet=True))
    assert twin.attributes.source == parent.attributes.source
    assert twin.attributes.parent == {
        "name": "GoToLocal",
        "fingerprint": parent.attributes.fingerprint,
        "episodes": 160,
        "seed": 7,
    }
    for row in range(50):
        theirs = int(twin.episode_seed[row])  # make_episodes numbers the seeds
        a, b = twin.take(np.array([row])), parent.take(np.array([theirs]))
        assert np.array_equal(a.view, b.view)
        assert np.array_equal(a.action, b.action)
        assert a.mission == b.mission


def test_stores_that_lie_aside_are_shrunk_and_kept_like_others(tmp_path: Path) -> None:
    parent = build_store(tmp_path / "GoToLocal.zarr", make_episodes([3, 1, 4]))
    set_aside(parent)
    (made,) = shrink_stores([], tmp_path, episodes=2, seed=0)
    set_aside(open_store(made.path))
    (kept,) = shrink_stores([], tmp_path, episodes=2, seed=0)
    assert kept.skipped == "the same copy already exists"


def test_one_seed_gives_one_twin_and_a_smaller_one_is_a_part_of_it() -> None:
    large, small = sampled(1000, 100, 3), sampled(1000, 10, 3)
    assert np.array_equal(large, sampled(1000, 100, 3))
    assert set(small) <= set(large)
    assert len(set(large)) == 100
    assert not np.array_equal(large, sampled(1000, 100, 4))


def test_twins_are_the_same_bit_for_bit(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        build_store(tmp_path / folder / "GoToLocal.zarr", make_episodes([3, 1, 4] * 20))
        shrink_stores([], tmp_path / folder, episodes=30, seed=0)
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")


def test_without_a_name_only_full_training_stores_are_shrunk(tmp_path: Path) -> None:
    build_store(tmp_path / "GoToLocal.zarr", make_episodes([3] * 30))
    build_store(tmp_path / "Open.zarr", make_episodes([3] * 5))
    build_store(tmp_path / "GoToLocal-valid.zarr", make_episodes([3] * 30), split="valid")
    runner = CliRunner()
    arguments = ["shrink", "--episodes", "10", "--data-dir", str(tmp_path)]
    first = runner.invoke(main, arguments)
    assert first.exit_code == 0
    assert "made" in first.output
    assert "10 episodes of GoToLocal" in first.output
    assert "skipped Open: it has 5 episodes, but 10 were requested" in first.output
    assert sorted(path.name for path in tmp_path.glob("*.zarr")) == [
        "GoToLocal-small.zarr",
        "GoToLocal-valid.zarr",
        "GoToLocal.zarr",
        "Open.zarr",
    ]
    second = runner.invoke(main, arguments)
    assert "skipped GoToLocal: the same copy already exists" in second.output
    third = runner.invoke(main, [*arguments[:2], "9", *arguments[3:]])
    assert "skipped GoToLocal: the store already exists; add --overwrite" in third.output


def test_one_twin_may_have_a_name_of_its_own(tmp_path: Path) -> None:
    build_store(tmp_path / "GoToLocal.zarr", make_episodes([3] * 30))
    arguments = ["--name", "few", "--episodes", "10", "--data-dir", str(tmp_path)]
    made = CliRunner().invoke(main, ["shrink", "GoToLocal", *arguments])
    assert made.exit_code == 0, made.output
    assert open_store(tmp_path / "few.zarr").episodes == 10
    assert not (tmp_path / "GoToLocal-small.zarr").exists()
    for stores in ([], ["GoToLocal", "few"]):
        wrong = CliRunner().invoke(main, ["shrink", *stores, *arguments])
        assert wrong.exit_code == 2
        assert "--name names one copy" in wrong.output
    itself = [*arguments[:1], "GoToLocal", *arguments[2:], "--overwrite"]
    assert CliRunner().invoke(main, ["shrink", "GoToLocal", *itself]).exit_code == 1
    assert open_store(tmp_path / "GoToLocal.zarr").episodes == 30


def test_nothing_to_shrink_is_said(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no full training store"):
        shrink_stores([], tmp_path, episodes=1, seed=0)


REPLACE = """
import sys
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from tests.conftest import build_store, make_episodes
from tests.store.test_shrink import parent_episodes
for round in range(30):
    build_store(Path(sys.argv[1]), parent_episodes(round % 2))
"""


def parent_episodes(kind: int) -> Episodes:
    """Two stores of the same shape: the missions of one belong to its own actions alone."""
    episodes = make_episodes([3] * 60, seed=kind)
    mission = [f"go to the {('red', 'blue')[kind]} {('ball', 'box')[row % 2]}" for row in range(60)]
    return replace(episodes, mission=mission, action=np.full(180, kind, np.uint8))


@pytest.mark.slow
def test_a_store_replaced_while_it_is_shrunk_gives_a_twin_of_one_of_them(tmp_path: Path) -> None:
    path = tmp_path / "GoToLocal.zarr"
    build_store(path, parent_episodes(0))
    writer = subprocess.Popen([sys.executable, "-c", REPLACE, str(path)])
    try:
        while writer.poll() is None:
            twin = open_store(shrink_store(path, episodes=20, seed=0, overwrite=True).path)
            kinds = {int(action) for action in twin.action.span(0, 60)}
            words = {text.split()[3] for text in twin.mission_text}
            assert (kinds, words) in (({0}, {"red"}), ({1}, {"blue"}))
    finally:
        writer.kill()
        writer.wait()
    assert writer.returncode == 0
