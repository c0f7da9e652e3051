from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import numpy as np
import torch

from demotools.grid import UNPACKING_TABLE
from demotools.store import Store
from trainer.order import permutation
from trainer.rollouts import ExpertTrajectoryIterator

LENGTHS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


def reference_queue(store: Store, rollout: int, rollouts: int, seed: int) -> Iterator[int]:
    """Steps of the store as one rollout plays them, for ever: DESIGN section 4, word for word."""
    epoch = 0
    while True:
        order = permutation(seed, epoch, store.episodes).tolist()
        for episode in order[rollout::rollouts]:
            yield from range(store.episode_offset[episode], store.episode_offset[episode + 1])
        epoch += 1


def test_three_epochs_equal_a_plain_queue_for_each_rollout(
    make_store: Callable[..., Store],
) -> None:
    store = make_store(lengths=LENGTHS)
    B, T, seed = 4, 5, 3
    queues = [reference_queue(store, b, B, seed) for b in range(B)]
    native = ExpertTrajectoryIterator(store, rollouts=B, rollout_len=T, seed=seed, layout="native")
    tutorial = ExpertTrajectoryIterator(store, rollouts=B, rollout_len=T, seed=seed)
    cells, action = store.view.chunks[0], store.action.chunks[0]
    while native.epoch < 3:
        ours, theirs = next(native), next(tutorial)
        for b in range(B):
            for t in range(T):
                step = next(queues[b])
                episode = int(np.searchsorted(store.episode_offset, step, side="right")) - 1
                mission = store.episode_mission[episode]
                begins = step == store.episode_offset[episode]
                assert ours["cells"][t, b].numpy().tolist() == cells[step].tolist()
                assert ours["action"][t, b] == theirs["expert_action"][t, b] == action[step]
                assert ours["direction"][t, b] == store.direction.chunks[0][step]
                assert ours["mission"][t, b] == mission
                assert ours["masks"][t, b] == theirs["masks"][t, b, 0] == (0 if begins else 1)
                image = theirs["minigrid_ego_image"][t, b].numpy()
                assert (image == UNPACKING_TABLE[cells[step]]).all()
                words = theirs["minigrid_mission"][t, b].tolist()
                assert words == store.mission_tokens[mission].tolist()
    assert native.demo_steps >= 3 * store.steps


def test_the_layouts_have_the_shapes_and_types_of_the_contract(
    make_store: Callable[..., Store],
) -> None:
    store = make_store(lengths=LENGTHS)
    expected = {
        "tutorial": {
            "minigrid_ego_image": ((2, 3, 7, 7, 3), torch.uint8),
            "minigrid_mission": ((2, 3, 5), torch.int64),
            "expert_action": ((2, 3), torch.int64),
            "masks": ((2, 3, 1), torch.float32),
        },
        "native": {
            "cells": ((2, 3, 7, 7), torch.uint8),
            "mission": ((2, 3), torch.int32),
            "action": ((2, 3), torch.uint8),
            "masks": ((2, 3), torch.uint8),
            "direction": ((2, 3), torch.uint8),
        },
    }
    for layout, arrays in expected.items():
        batches = ExpertTrajectoryIterator(store, rollouts=3, rollout_len=2, layout=layout)  # type: ignore[arg-type]
        got = {name: (tuple(a.shape), a.dtype) for name, a in next(batches).items()}
        assert got == arrays


def test_a_resumed_stream_is_bit_identical_in_the_middle_of_an_epoch(
    make_store: Callable[..., Store],
) -> None:
    store = make_store(lengths=LENGTHS)
    first = ExpertTrajectoryIterator(store, rollouts=4, rollout_len=3, seed=7)
    for _ in range(5):
        next(first)
    state = json.loads(json.dumps(first.state()))
    second = ExpertTrajectoryIterator(store, rollouts=4, rollout_len=3, seed=7)
    second.load_state(state)
    for _ in range(9):
        expected, got = next(first), next(second)
        assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert first.state() == second.state()
