"""What `demotools diff` says of two stores."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from demotools.cli import main
from demotools.look.diff import common, store_difference
from demotools.store.reading import Store
from demotools.store.shrink import shrink_stores
from tests.conftest import MISSIONS, build_store, make_episodes


def test_a_store_and_its_copy_differ_in_nothing(make_store: Callable[..., Store]) -> None:
    one, other = make_store(lengths=[3, 2]), make_store(lengths=[3, 2], name="Copy")
    found = store_difference(one.path, other.path, quiet=True)
    # the test's own stores name themselves nowhere
    assert found.attributes == {}
    assert (found.episodes.both, found.episodes.only_first, found.episodes.only_second) == (2, 0, 0)
    assert found.same_order
    assert found.text() == (
        "attributes: all the same\nmissions: 2 in both\nepisodes: 2 in both\n  in the same order"
    )


def test_a_small_twin_is_a_part_of_its_parent(
    make_store: Callable[..., Store], tmp_path: Path
) -> None:
    parent = make_store(lengths=[3, 2, 4, 1, 6, 2])
    (made,) = shrink_stores([parent.path], tmp_path, episodes=4, seed=0, quiet=True)
    found = store_difference(parent.path, made.path, quiet=True)
    assert (found.episodes.both, found.episodes.only_first, found.episodes.only_second) == (4, 2, 0)
    assert "parent" in found.attributes
    assert not found.same_order


def test_episodes_in_another_order_are_the_same_and_it_is_said(tmp_path: Path) -> None:
    one = build_store(tmp_path / "a.zarr", make_episodes([3, 2]))
    other = build_store(tmp_path / "b.zarr", one.select(np.array([1, 0])))
    found = store_difference(one.path, other.path, quiet=True)
    assert found.episodes.both == 2
    assert "in another order" in found.text()


def test_what_is_in_one_store_only_is_shown_with_its_mission(tmp_path: Path) -> None:
    one = build_store(tmp_path / "a.zarr", make_episodes([3, 2]))
    changed = replace(make_episodes([3, 2]), mission=[MISSIONS[0], "go to the lamp"])
    other = build_store(tmp_path / "b.zarr", changed, split="valid")
    found = store_difference(one.path, other.path, quiet=True)
    assert found.attributes["split"] == ("train", "valid")
    assert found.missions.examples_second == ["go to the lamp"]
    assert found.episodes.examples_first == [f"1: {MISSIONS[1]}"]
    assert found.episodes.examples_second == ["1: go to the lamp"]
    lines = [line.split() for line in found.text().splitlines()]
    assert ["split", "train", "valid"] in lines
    assert ["1", "only", "in", "b"] in lines


@given(st.lists(st.integers(0, 5), min_size=1), st.lists(st.integers(0, 5), min_size=1))
def test_repeated_episodes_are_counted_as_a_multiset_counts_them(
    first: list[int], second: list[int]
) -> None:
    found = common(np.array(first, dtype=np.uint64), np.array(second, dtype=np.uint64))
    assert found == (Counter(first) & Counter(second)).total()


def test_json_tells_the_same(make_store: Callable[..., Store]) -> None:
    one, other = make_store(lengths=[3, 2]), make_store(lengths=[3, 4], seed=1, name="Other")
    arguments = ["diff", str(one.path), str(other.path), "--json", "-q"]
    found = json.loads(CliRunner().invoke(main, arguments).output)
    assert found["stores"] == ["GoToLocal", "Other"]
    assert found["episodes"]["only_first"] == 2
    assert found["missions"]["both"] == 2


def test_a_missing_store_is_a_message(make_store: Callable[..., Store], tmp_path: Path) -> None:
    store = make_store(lengths=[3])
    result = CliRunner().invoke(main, ["diff", str(store.path), str(tmp_path / "no.zarr")])
    assert result.exit_code == 1
    assert "there is no such demo store" in result.output
