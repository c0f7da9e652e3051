from __future__ import annotations

import copy

import pytest
import torch

from tests.learning.definitions import WORDS, big_by_steps, random_batch
from trainer.learning.building import build_network
from trainer.learning.networks.base import parameter_count
from trainer.learning.networks.big import BigNetwork


def little(*, endpool: bool = False) -> BigNetwork:
    torch.manual_seed(0)
    return BigNetwork(WORDS, memory=24, instruction=16, channels=8, endpool=endpool)


@pytest.mark.parametrize("endpool", [False, True])
def test_the_big_network_equals_the_loop_over_steps_in_two_batches(*, endpool: bool) -> None:
    network = little(endpool=endpool)
    reference = copy.deepcopy(network)
    memory = expected_memory = network.initial_memory(4)
    for number in range(2):
        batch = random_batch(7, 4, 3, seed=number)
        output = network(batch, memory)
        logits, values, expected_memory = big_by_steps(reference, batch, expected_memory)
        memory = output.memory
        torch.testing.assert_close(output.logits, logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output.values, values, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(memory, expected_memory, rtol=1e-5, atol=1e-5)
        (output.logits.square().sum() + output.values.sum()).backward()
        (logits.square().sum() + values.sum()).backward()  # type: ignore[no-untyped-call]
    for mine, theirs in zip(network.parameters(), reference.parameters(), strict=True):
        assert theirs.grad is not None
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_the_words_are_chosen_by_the_memory() -> None:
    network = little()
    batch = random_batch(1, 2, 2) | {"masks": torch.ones(1, 2, dtype=torch.uint8)}
    batch["cells"][:] = 3
    memory = torch.randn(2, 48)
    outputs = [network(batch, memory * factor).logits for factor in (1.0, 9.0)]
    assert not torch.allclose(*outputs)
    without_words = batch | {"mission_tokens": torch.zeros(2, 5, dtype=torch.int64)}
    assert torch.isfinite(network(without_words, memory).logits).all()


@pytest.mark.slow
def test_the_big_network_has_about_20_million_parameters_and_is_named_big() -> None:
    for endpool in (False, True):
        network = build_network("big", {"endpool": endpool}, 60)
        assert 19_500_000 < parameter_count(network) < 21_000_000


def test_with_endpool_every_cell_is_in_sight_up_to_the_last_pooling() -> None:
    cells = random_batch(1, 3, 1)["cells"][0]
    assert little(endpool=True).seen(cells).shape == (3, 8, 7, 7)
    assert little().seen(cells).shape == (3, 8, 2, 2)
