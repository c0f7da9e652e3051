from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from demotools.store.reading import Store
from trainer.data.iterator import ExpertTrajectoryIterator

PAGE = Path(__file__).parents[2] / "docs" / "rollouts.md"


def test_the_example_of_the_page_runs_as_it_stands(
    make_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(lengths=[3, 5, 2, 7] * 3)
    monkeypatch.chdir(store.path.parent)
    [example] = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S)
    names: dict[str, object] = {}
    exec(example, names)
    batches, loss = names["batches"], names["loss"]
    assert isinstance(batches, ExpertTrajectoryIterator)
    assert batches.demo_steps == 8 * 16
    assert isinstance(loss, torch.Tensor)
    assert 0 < loss.item() < 100
