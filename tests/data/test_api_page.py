"""The examples of docs/api.md, run as they stand."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader

import demotools
from demotools.store.reading import Store

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
NUMPY, TORCH, TORCHRL = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S)
LENGTHS = [3, 9, 25, 12, 1, 17]


@pytest.fixture
def store(make_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch) -> Store:
    store = make_store(LENGTHS * 20)
    monkeypatch.setenv("DEMOTOOLS_DATA", str(store.path.parent))
    return store


def names_of(example: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(example, names)
    return names


def test_the_example_of_numpy(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    names = names_of(NUMPY)
    assert len(names["images"]) == len(names["actions"]) <= 20
    counts = capsys.readouterr().out.splitlines()[1]
    assert sum(map(int, re.findall(r"\d+", counts))) == len(store)


@pytest.mark.usefixtures("store")
def test_the_example_of_torch_is_short_and_counts_the_steps_of_the_episodes() -> None:
    assert len(TORCH.strip().splitlines()) <= 8
    names = names_of(TORCH)
    steps = sum(int(batch["valid"].sum()) for batch in names["loader"])
    assert steps == 20 * sum(length for length in LENGTHS if length <= 20)
    assert names["images"].shape[:2] == names["actions"].shape == names["valid"].shape
    assert names["actions"].dtype == torch.int64


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("store")
def test_the_example_of_torchrl() -> None:
    pytest.importorskip("torchrl")
    batch = names_of(TORCHRL)["batch"]
    assert batch["image"].shape[1:] == (7, 7, 3) and 0 < len(batch) <= 64


def test_a_loader_with_workers_and_of_several_stores_gives_each_episode_once(
    store: Store, make_store: Callable[..., Store]
) -> None:
    other = make_store([2, 6] * 10, seed=1, name="Other")
    both: ConcatDataset[Any] = ConcatDataset([store, other[:10]])  # type: ignore[list-item]
    loader = DataLoader(
        both, batch_size=7, shuffle=True, num_workers=1, collate_fn=demotools.pad_episodes
    )
    lengths = sorted(length for batch in loader for length in batch["lengths"].tolist())
    assert lengths == sorted([*LENGTHS * 20, *[2, 6] * 5])
