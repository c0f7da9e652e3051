from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.learning.test_map import play
from trainer.learning.building import build_network
from trainer.learning.networks import steps
from trainer.learning.networks.base import acting
from trainer.learning.networks.maze import MazeNetwork

STEPPED = ("cells", "direction", "masks", "mission")


def batch_of(steps: int, rollouts: int) -> dict[str, torch.Tensor]:
    cells, direction, masks = [], [], []
    for rollout in range(rollouts):
        row: list[dict[str, NDArray[Any]]] = []
        count, seed = 0, 79_000 + 100 * rollout
        while count < steps:
            row.append(play("BossLevel", seed, 40 + 7 * rollout, 0.2))
            count += len(row[-1]["cells"])
            seed += 1
        cells.append(np.concatenate([one["cells"] for one in row])[:steps])
        direction.append(np.concatenate([one["direction"] for one in row])[:steps])
        first = np.concatenate([np.arange(len(one["cells"])) > 0 for one in row])[:steps]
        masks.append(first)
    random = torch.Generator().manual_seed(1)
    return {
        "cells": torch.from_numpy(np.stack(cells, 1).reshape(steps, rollouts, 7, 7)),
        "direction": torch.from_numpy(np.stack(direction, 1)),
        "masks": torch.from_numpy(np.stack(masks, 1).astype(np.uint8)),
        "mission": torch.randint(3, (steps, rollouts), generator=random),
        "mission_tokens": torch.randint(1, 30, (3, 6), generator=random),
    }


def test_a_batch_is_its_steps_one_by_one() -> None:
    torch.manual_seed(0)
    network = build_network("maze", {"features": 32, "memory": 16}, 30)
    assert isinstance(network, MazeNetwork)
    batch = batch_of(90, 5)
    whole = network(batch, network.initial_memory(5))
    memory = network.initial_memory(5)
    for step in range(90):
        one = {**batch, **{name: batch[name][step : step + 1] for name in STEPPED}}
        output = network(one, memory)
        memory = output.memory
        torch.testing.assert_close(output.logits[0], whole.logits[step], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(memory, whole.memory, atol=2e-5, rtol=1e-4)


LITTLE = {"embedding": 8, "features": 16, "memory": 16, "instruction": 8, "channels": 8, "words": 8}


# as it is; without its parts; so few missions that they are forgotten again and again
@pytest.mark.parametrize(
    ("options", "known"),
    [({}, None), ({"words": 0}, None), ({"heads": 0, "search": False}, None), ({}, 3)],
)
def test_prepared_steps_are_those_of_the_network(
    options: dict[str, Any], known: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if known:
        monkeypatch.setattr(steps, "_MOST_MISSIONS", known)
    torch.manual_seed(0)
    network = MazeNetwork(30, **{**LITTLE, "heads": 2, **options})
    batch = batch_of(80, 5)
    random = np.random.default_rng(1)
    tokens = torch.from_numpy(random.integers(1, 31, (9, 12)))
    tokens[torch.arange(12) >= torch.from_numpy(random.integers(1, 13, (9, 1)))] = 0
    begun = np.cumsum(batch["masks"].numpy() == 0, axis=0)
    batch["mission"] = torch.from_numpy((begun * 5 + np.arange(5)) % 9)
    prepared, rows = acting(network), torch.arange(5)
    memory = network.initial_memory(5)
    for time in range(80):
        if time in (50, 65):  # fewer environments, in another order
            rows, memory = rows[[2, 0, 1][: len(rows) - 2]], memory[[2, 0, 1][: len(rows) - 2]]
        row, again = torch.unique(batch["mission"][time, rows], return_inverse=True)
        width = int((tokens[row] != 0).sum(1).max())
        step = {name: batch[name][time : time + 1, rows] for name in STEPPED}
        step |= {"mission": again[None], "mission_tokens": tokens[row, :width]}
        with torch.no_grad():
            expected = network(step, memory)
        output = prepared(step, memory)
        memory = output.memory
        torch.testing.assert_close(output[:3], expected[:3], rtol=1e-5, atol=1e-5)
    assert len(rows) == 1
    assert int((batch["masks"] == 0).sum()) > 8


def test_views_of_no_maze_at_all_raise_nothing() -> None:
    # views that fit no movement, memory that belongs to another place: the map runs off its box
    random = np.random.default_rng(5)
    network = MazeNetwork(40)
    memory = network.initial_memory(16)
    for _ in range(4):
        masks = random.random((60, 16)) > 0.02
        batch = {
            "cells": torch.from_numpy(random.integers(0, 198, (60, 16, 49)).astype(np.uint8)),
            "direction": torch.from_numpy(random.integers(0, 4, (60, 16)).astype(np.uint8)),
            "masks": torch.from_numpy(masks.astype(np.float32)),
            "mission": torch.zeros(60, 16, dtype=torch.int64),
            "mission_tokens": torch.tensor([[1, 2, 3]]),
        }
        with torch.no_grad():
            output = network(batch, memory)
        memory = output.memory
        assert output.logits.isfinite().all()
