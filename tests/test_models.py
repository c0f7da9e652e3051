from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from demotools.errors import SettingsError
from trainer.models import SmallNetwork, build_network, parameter_count
from trainer.recurrence import lstm_by_steps
from trainer.rollouts import Batch

WORDS = 20


def random_batch(T: int, B: int, missions: int, seed: int = 0) -> Batch:
    random = np.random.default_rng(seed)
    tokens = random.integers(1, WORDS + 1, (missions, 5))
    tokens[0, 3:] = 0
    return {
        "cells": torch.from_numpy(random.integers(0, 198, (T, B, 7, 7), dtype=np.uint8)),
        "direction": torch.zeros(T, B, dtype=torch.uint8),
        "masks": torch.from_numpy((random.random((T, B)) > 0.3).astype(np.uint8)),
        "mission": torch.from_numpy(random.integers(0, missions, (T, B))),
        "mission_tokens": torch.from_numpy(tokens),
        "action": torch.from_numpy(random.integers(0, 7, (T, B), dtype=np.uint8)),
    }


def plain_forward(network: SmallNetwork, batch: Batch, memory: Tensor) -> tuple[Tensor, Tensor]:
    """The network as its docstring says it: every step on its own, nothing shared or sorted."""
    features = []
    for cells, missions in zip(batch["cells"], batch["mission"], strict=True):
        instruction = network.instruction(batch["mission_tokens"][missions])
        scale, shift = network.film(instruction).chunk(2, dim=1)
        embedded = network.codes(cells.flatten(1).long())
        seen = torch.relu(embedded * (1 + scale[:, None]) + shift[:, None])
        features.append(torch.relu(network.view(seen.flatten(1))))
    hidden, after = lstm_by_steps(network.cell, torch.stack(features), batch["masks"], memory)
    return network.actor(hidden), after


# many missions take the plain product, few the table: see SmallNetwork._summed_cells
@pytest.mark.parametrize(("missions", "codes"), [(30, 198), (2, 5)])
def test_the_small_network_equals_the_plain_loop_over_two_batches(
    missions: int, codes: int
) -> None:
    torch.manual_seed(0)
    network = SmallNetwork(WORDS)
    reference = copy.deepcopy(network)
    memory = expected_memory = network.initial_memory(4)
    for number in range(2):
        batch = random_batch(6, 4, missions, seed=number)
        batch["cells"] %= codes
        output = network(batch, memory)
        logits, expected_memory = plain_forward(reference, batch, expected_memory)
        memory = output.memory
        torch.testing.assert_close(output.logits, logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(memory, expected_memory, rtol=1e-5, atol=1e-5)
        output.logits.square().sum().backward()
        logits.square().sum().backward()  # type: ignore[no-untyped-call]
    for mine, theirs in zip(network.parameters(), reference.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_padding_after_the_last_word_changes_nothing() -> None:
    network = SmallNetwork(WORDS)
    short = torch.tensor([[3, 4, 5], [6, 0, 0]])
    long = torch.cat([short, torch.zeros(2, 4, dtype=torch.int64)], dim=1)
    torch.testing.assert_close(network.instruction(short), network.instruction(long))


def test_the_small_network_has_about_six_hundred_thousand_parameters() -> None:
    assert 550_000 < parameter_count(SmallNetwork(WORDS)) < 650_000


class Custom(nn.Module):
    """A user's own network."""

    def __init__(self, vocabulary_size: int, *, width: int = 3) -> None:
        super().__init__()
        self.layer = nn.Linear(vocabulary_size, width)

    def initial_memory(self, rollouts: int) -> torch.Tensor:
        return torch.zeros(rollouts, 1)


def test_a_network_of_the_users_own_is_built_with_its_options() -> None:
    network = build_network(f"{__name__}:Custom", {"width": 9}, WORDS)
    assert parameter_count(network) == 9 * (WORDS + 1)


@pytest.mark.parametrize(
    ("name", "options", "what"),
    [
        ("smal", {}, "did you mean small"),
        ("small", {"memmory": 3}, "did you mean memory"),
        ("nowhere.at.all:Name", {}, "cannot be imported"),
        (f"{__name__}:Missing", {}, "cannot be imported"),
        ("small", {"embedding": "wide"}, "refuses its settings"),
    ],
)
def test_a_network_that_cannot_be_built_is_refused_with_the_reason(
    name: str, options: dict[str, object], what: str
) -> None:
    with pytest.raises(SettingsError, match=what):
        build_network(name, options, WORDS)
