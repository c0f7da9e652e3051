from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from tests.learning.test_networks import WORDS, random_batch
from trainer.batch import Batch
from trainer.learning.networks.base import lstm_by_steps, parameter_count
from trainer.learning.networks.small import SmallNetwork


def by_steps(network: SmallNetwork, batch: Batch, memory: Tensor) -> tuple[Tensor, Tensor]:
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
        logits, expected_memory = by_steps(reference, batch, expected_memory)
        memory = output.memory
        torch.testing.assert_close(output.logits, logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(memory, expected_memory, rtol=1e-5, atol=1e-5)
        output.logits.square().sum().backward()
        logits.square().sum().backward()  # type: ignore[no-untyped-call]
    for mine, theirs in zip(network.parameters(), reference.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_the_small_network_has_about_six_hundred_thousand_parameters() -> None:
    assert 550_000 < parameter_count(SmallNetwork(WORDS)) < 650_000


def test_weights_keep_the_names_that_checkpoints_have() -> None:
    names = {name.partition(".")[0] for name in SmallNetwork(WORDS).state_dict()}
    assert names == {"instruction", "film", "codes", "view", "cell", "actor", "critic"}
