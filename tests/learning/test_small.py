from __future__ import annotations

import copy

import pytest
import torch

from tests.learning.definitions import WORDS, random_batch, small_by_steps
from trainer.learning.networks import small, steps
from trainer.learning.networks.base import parameter_count
from trainer.learning.networks.small import SmallNetwork


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
        logits, expected_memory = small_by_steps(reference, batch, expected_memory)
        memory = output.memory
        torch.testing.assert_close(output.logits, logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(memory, expected_memory, rtol=1e-5, atol=1e-5)
        output.logits.square().sum().backward()
        logits.square().sum().backward()  # type: ignore[no-untyped-call]
    for mine, theirs in zip(network.parameters(), reference.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)


# as they are; so few missions, then products, that they are forgotten again and again
@pytest.mark.parametrize(("missions", "products"), [(None, None), (3, None), (None, 12)])
def test_single_steps_equal_the_plain_loop(
    missions: int | None, products: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missions:
        monkeypatch.setattr(steps, "_MOST_MISSIONS", missions)
    if products:
        monkeypatch.setattr(small, "_TABLE_BYTES", products * 49 * 16 * 4)
    torch.manual_seed(0)
    network = SmallNetwork(WORDS, embedding=8, features=16, memory=24, instruction=8)
    batch = random_batch(80, 4, 7)
    batch["cells"] %= 3
    expected, after = small_by_steps(network, batch, network.initial_memory(4))
    prepared, memory = network.acting(), network.initial_memory(4)
    known = 0
    for time in range(80):
        row, again = torch.unique(batch["mission"][time], return_inverse=True)
        step = {name: values[time : time + 1] for name, values in batch.items()}
        step |= {"mission": again[None], "mission_tokens": batch["mission_tokens"][row]}
        output = prepared(step, memory)
        memory, known = output.memory, max(known, prepared.known_products)
        torch.testing.assert_close(output.logits[0], expected[time], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(memory, after, rtol=1e-5, atol=1e-6)
    assert known == 7 * 3 if missions is products else 0 < known < 7 * 3


def test_the_small_network_has_about_six_hundred_thousand_parameters() -> None:
    assert 550_000 < parameter_count(SmallNetwork(WORDS)) < 650_000


def test_weights_keep_the_names_that_checkpoints_have() -> None:
    names = {name.partition(".")[0] for name in SmallNetwork(WORDS).state_dict()}
    assert names == {"instruction", "film", "codes", "view", "cell", "actor", "critic"}
