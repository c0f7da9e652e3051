"""The symmetries, checked against environments that are transformed in the same way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from demotools.bot import Expert
from demotools.environment import Environment, make_environment, observed_cells
from demotools.grid import COLOURS
from demotools.store import Store
from demotools.vocabulary import WORDS, mission_tokens, mission_words
from trainer.augment import (
    MIRRORED_ACTION,
    PERMUTATIONS,
    Augmenter,
    Symmetry,
    batch_missions,
    exchanged_words,
    recoloured_codes,
)
from trainer.rollouts import Batch, ExpertTrajectoryIterator

RECOLOURED = recoloured_codes().numpy()
EXCHANGED = exchanged_words(WORDS).numpy()


def recolour(environment: Environment, permutation: NDArray[np.int64]) -> None:
    """Give everything that can be moved or opened its new colour, the instruction too."""
    level = environment.unwrapped
    for thing in level.grid.grid:  # type: ignore[attr-defined]
        if thing is not None and thing.type in ("door", "key", "ball", "box"):
            thing.color = COLOURS[permutation[COLOURS.index(thing.color)]]
    description = level.instrs.desc  # type: ignore[attr-defined]
    if description.color is not None:
        description.color = COLOURS[permutation[COLOURS.index(description.color)]]


def mirror(environment: Environment) -> None:
    """Exchange left and right in the grid, and turn the agent accordingly."""
    level = environment.unwrapped
    grid, width = level.grid, level.grid.width  # type: ignore[attr-defined]
    cells = [
        [grid.get(width - 1 - column, row) for row in range(grid.height)] for column in range(width)
    ]
    for column in range(width):
        for row in range(grid.height):
            grid.set(column, row, cells[column][row])
            if cells[column][row] is not None and cells[column][row].type != "wall":
                cells[column][row].cur_pos = cells[column][row].init_pos = (column, row)
    column, row = level.agent_pos  # type: ignore[attr-defined]
    level.agent_pos = np.array([width - 1 - column, row])  # type: ignore[attr-defined]
    level.agent_dir = [2, 1, 0, 3][level.agent_dir]  # type: ignore[attr-defined]


def replayed(
    level: str, seed: int, transform: Callable[[Environment], None], actions: Sequence[int]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], float]:
    """Views and directions of a transformed environment under these actions; the last reward."""
    # minigrid's own views: the fast ones would not see what is changed behind their back
    environment = make_environment(level, stock=True)
    environment.reset(seed=seed)
    transform(environment)
    instruction = environment.unwrapped.instrs  # type: ignore[attr-defined]
    instruction.reset_verifier(environment.unwrapped)
    cells, directions, reward = [], [], 0.0
    for action in actions:
        observation = environment.unwrapped.gen_obs()  # type: ignore[attr-defined]
        cells.append(observed_cells(observation["image"]))
        directions.append(observation["direction"])
        reward = float(environment.step(action)[1])
    return np.stack(cells), np.array(directions, dtype=np.uint8), reward


def recorded(level: str, seed: int) -> tuple[Batch, str]:
    """The bot's episode as a native batch of one rollout, and its mission."""
    environment = make_environment(level)
    observation, _ = environment.reset(seed=seed)
    expert, action = Expert(environment), None
    cells, directions, actions, done = [], [], [], False
    while not done:
        action = expert.action(action)
        cells.append(observed_cells(observation["image"]))
        directions.append(observation["direction"])
        actions.append(action)
        mission = str(observation["mission"])
        observation, _, terminated, truncated, _ = environment.step(action)
        done = terminated or truncated
    masks = np.ones((len(actions), 1), dtype=np.uint8)
    masks[0] = 0
    return {
        "cells": torch.from_numpy(np.stack(cells)[:, None]),
        "direction": torch.tensor(directions, dtype=torch.uint8)[:, None],
        "action": torch.tensor(actions, dtype=torch.uint8)[:, None],
        "masks": torch.from_numpy(masks),
        "mission": torch.zeros(len(actions), 1, dtype=torch.int32),
    }, mission


def text(tokens: NDArray[np.int64]) -> list[str]:
    return [WORDS[token - 1] for token in tokens if token]


def augmented(batch: Batch, mission: str, symmetries: Sequence[Symmetry], seed: int) -> Batch:
    tokens = torch.from_numpy(mission_tokens([mission]).astype(np.int64))
    augmenter = Augmenter(symmetries, WORDS, rollouts=1, seed=seed)
    return augmenter(batch, tokens)


@pytest.mark.parametrize("level", ["GoToLocal", "PickupLoc", "UnblockPickup", "GoToObjMaze"])
@pytest.mark.parametrize("seed", [3, 4, 5])
def test_a_recoloured_episode_succeeds_in_the_recoloured_environment(level: str, seed: int) -> None:
    batch, mission = recorded(level, seed)
    changed = augmented(batch, mission, ["recolor"], seed)
    # colours that no view shows may have gone anywhere: any permutation that fits will do
    before, after = batch["cells"].numpy(), changed["cells"].numpy()
    fitting = [n for n in range(len(PERMUTATIONS)) if (RECOLOURED[n][before] == after).all()]
    permutation = PERMUTATIONS[fitting[0]]
    actions = changed["action"][:, 0].tolist()
    cells, directions, reward = replayed(
        level, seed, lambda environment: recolour(environment, permutation), actions
    )
    np.testing.assert_array_equal(cells, changed["cells"][:, 0].numpy())
    np.testing.assert_array_equal(directions, changed["direction"][:, 0].numpy())
    assert reward > 0
    words = text(changed["mission_tokens"][changed["mission"][0, 0]].numpy())
    for old, new in zip(mission_words(mission), words, strict=True):
        recoloured = (
            {COLOURS[PERMUTATIONS[n][COLOURS.index(old)]] for n in fitting}
            if old in COLOURS
            else {old}
        )
        assert new in recoloured


@pytest.mark.parametrize("level", ["GoToLocal", "PickupLoc", "UnblockPickup", "Unlock"])
def test_a_mirrored_episode_succeeds_in_the_mirrored_environment(level: str) -> None:
    mirrored = 0
    for seed in range(8):
        batch, mission = recorded(level, seed)
        changed = augmented(batch, mission, ["mirror"], seed)
        if torch.equal(changed["cells"], batch["cells"]):
            continue  # this seed's draw leaves the episode as it is
        mirrored += 1
        actions = changed["action"][:, 0].tolist()
        assert actions == MIRRORED_ACTION[batch["action"][:, 0].int()].tolist()
        cells, directions, reward = replayed(level, seed, mirror, actions)
        np.testing.assert_array_equal(cells, changed["cells"][:, 0].numpy())
        np.testing.assert_array_equal(directions, changed["direction"][:, 0].numpy())
        assert reward > 0
    assert mirrored > 1


def test_left_and_right_are_exchanged_in_mirrored_missions_and_only_there() -> None:
    tokens = mission_tokens(["pick up the key on your left", "go to a door on your right"])
    identity = 0
    assert [text(EXCHANGED[identity * 2 + 1][row])[-1] for row in tokens] == ["right", "left"]
    assert [text(EXCHANGED[identity * 2][row])[-1] for row in tokens] == ["left", "right"]


def test_walls_and_what_has_no_colour_keep_their_codes() -> None:
    for code in (0, 18, 2 * 18 + 5 * 3):  # unseen, empty, a grey wall
        assert set(RECOLOURED[:, code]) == {code}


def test_no_two_cells_become_one() -> None:
    assert all(len(set(row)) == 256 for row in RECOLOURED[::37].tolist())


def test_an_episode_keeps_its_draw_across_batches_and_a_resumed_stream_draws_the_same(
    make_store: Callable[..., Store],
) -> None:
    store = make_store(lengths=[5, 9, 4, 12, 7, 3])
    words = store.attributes.vocabulary

    def batches(rollout_len: int, count: int, resume_at: int | None = None) -> torch.Tensor:
        stream = ExpertTrajectoryIterator(
            store, rollouts=2, rollout_len=rollout_len, layout="native"
        )
        augmenter = Augmenter(["recolor", "mirror"], words, rollouts=2, seed=7)
        cells = []
        for number in range(count):
            if number == resume_at:
                state = augmenter.state()
                augmenter = Augmenter(["recolor", "mirror"], words, rollouts=2, seed=7)
                augmenter.load_state(state)
            cells.append(augmenter(next(stream), stream.mission_tokens)["cells"].clone())
        return torch.cat(cells)

    whole = batches(rollout_len=60, count=1)
    assert torch.equal(batches(rollout_len=4, count=15), whole)
    assert torch.equal(batches(rollout_len=4, count=15, resume_at=6), whole)


def test_rollouts_shared_out_to_two_processes_draw_what_one_would() -> None:
    masks = np.zeros((5, 4), dtype=np.uint8)
    whole = Augmenter(["recolor", "mirror"], WORDS, rollouts=4, seed=1)._draws(masks)
    second = Augmenter(["recolor", "mirror"], WORDS, rollouts=2, seed=1, first_rollout=2)
    np.testing.assert_array_equal(second._draws(masks[:, 2:]), whole[:, 2:])
    assert len(np.unique(whole)) > 15


def test_every_permutation_is_drawn_about_equally_often() -> None:
    masks = np.zeros((720, 200), dtype=np.uint8)
    draws = Augmenter(["recolor"], WORDS, rollouts=200, seed=3)._draws(masks)
    counts = np.bincount(draws.reshape(-1) // 2, minlength=720)
    assert set(draws.reshape(-1) % 2) == {0}
    assert counts.min() > 140 and counts.max() < 270  # mean 200, standard deviation 14


def test_the_missions_of_a_batch_are_listed_once() -> None:
    tokens = torch.tensor([[1, 2], [3, 0], [1, 2], [4, 4]])
    batch = batch_missions({"mission": torch.tensor([[0, 2], [1, 0]])}, tokens)
    assert batch["mission_tokens"].tolist() == [[1, 2], [3, 0]]
    assert batch["mission"].tolist() == [[0, 0], [1, 0]]
