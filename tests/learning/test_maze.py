from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.learning.test_map import play
from trainer.learning.building import build_network
from trainer.learning.networks.maze import MazeNetwork


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
    stepped = ("cells", "direction", "masks", "mission")
    for step in range(90):
        one = {**batch, **{name: batch[name][step : step + 1] for name in stepped}}
        output = network(one, memory)
        memory = output.memory
        torch.testing.assert_close(output.logits[0], whole.logits[step], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(memory, whole.memory, atol=2e-5, rtol=1e-4)


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
