from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, nn

from demotools.errors import SettingsError
from tests.learning.definitions import WORDS, random_batch
from trainer.batch import Batch
from trainer.learning.building import build_network
from trainer.learning.losses import ExpertCrossEntropy, LossStep
from trainer.learning.networks.base import Model, Output, acting, parameter_count

LITTLE: dict[str, dict[str, object]] = {
    "small": {"embedding": 8, "features": 16, "memory": 24, "instruction": 16},
    "film": {"channels": 16, "memory": 24, "instruction": 16},
    "big": {"channels": 8, "memory": 24, "instruction": 16},
}


@pytest.fixture(params=LITTLE, ids=str)
def network(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return build_network(request.param, LITTLE[request.param], WORDS)


def asked(network: nn.Module, batch: Batch, memory: Tensor | None = None) -> Output:
    """The output of a network, from empty memory if none is given."""
    model = cast(Model, network)
    rollouts = batch["masks"].shape[1]
    return model(batch, model.initial_memory(rollouts) if memory is None else memory)


def part_of(batch: Batch, steps: slice, rollouts: slice) -> Batch:
    """Some steps of some rollouts; the missions' tokens are for all."""
    return {
        name: values if name == "mission_tokens" else values[steps, rollouts]
        for name, values in batch.items()
    }


ALL = slice(None)


@pytest.mark.parametrize("prepared", [False, True])
def test_acting_step_by_step_gives_what_the_whole_batch_gives(
    network: nn.Module, prepared: bool
) -> None:
    batch = random_batch(5, 3, 4)
    whole = asked(network, batch)
    memory = cast(Model, network).initial_memory(3)
    output_of_step = acting(network) if prepared else network
    for step in range(5):
        output = output_of_step(part_of(batch, slice(step, step + 1), ALL), memory)
        memory = output.memory
        torch.testing.assert_close(output.logits[0], whole.logits[step], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output.values[0], whole.values[step], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(memory, whole.memory, rtol=1e-5, atol=1e-5)


def test_a_rollout_does_not_depend_on_the_others_beside_it(network: nn.Module) -> None:
    batch = random_batch(5, 3, 4)
    alone = asked(network, part_of(batch, ALL, slice(1, 2)))
    torch.testing.assert_close(
        alone.logits[:, 0], asked(network, batch).logits[:, 1], rtol=1e-5, atol=1e-5
    )


def test_where_a_mask_is_zero_nothing_before_it_counts(network: nn.Module) -> None:
    batch = random_batch(5, 3, 4)
    batch["masks"][2] = 0
    after = asked(network, part_of(batch, slice(2, None), ALL))
    memory = torch.randn_like(after.memory)
    torch.testing.assert_close(
        asked(network, batch, memory).logits[2:], after.logits, rtol=1e-5, atol=1e-5
    )


def test_memory_before_the_batch_counts_where_the_mask_is_one(network: nn.Module) -> None:
    batch = random_batch(2, 3, 4)
    batch["masks"][:] = 1
    empty = asked(network, batch)
    filled = asked(network, batch, torch.randn_like(empty.memory))
    assert not torch.allclose(empty.logits[0], filled.logits[0])


def test_padding_after_the_last_word_changes_nothing(network: nn.Module) -> None:
    batch = random_batch(3, 2, 4)
    longer = nn.functional.pad(batch["mission_tokens"], (0, 3))
    padded = asked(network, {**batch, "mission_tokens": longer})
    torch.testing.assert_close(asked(network, batch).logits, padded.logits)


def test_the_mission_changes_what_is_done(network: nn.Module) -> None:
    batch = random_batch(1, 2, 4)
    batch["mission"][:] = torch.tensor([0, 1])
    other = {**batch, "mission": torch.tensor([[0, 2]])}
    first, second = asked(network, batch).logits[0], asked(network, other).logits[0]
    torch.testing.assert_close(first[0], second[0])
    assert not torch.allclose(first[1], second[1])


def test_bfloat16_gives_nearly_the_same_loss_and_gradients(network: nn.Module) -> None:
    batch = random_batch(6, 4, 3)
    losses, gradients = [], []
    for bfloat16 in (False, True):
        network.zero_grad()
        step = LossStep(network, bfloat16=bfloat16)
        memory = cast(Model, network).initial_memory(4)
        result = step({"ce": ExpertCrossEntropy()}, batch, {"ce": memory})["ce"]
        result.loss.backward()  # type: ignore[no-untyped-call]
        assert result.memory.dtype == torch.float32
        losses.append(result.loss.detach())
        given = (p.grad.flatten() for p in network.parameters() if p.grad is not None)
        gradients.append(torch.cat(list(given)))
    # bfloat16 has 8 bits of mantissa
    torch.testing.assert_close(*losses, rtol=0.02, atol=0.0)
    assert nn.functional.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.98


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
        ("small", {"embedding": "wide"}, "rejects its settings"),
    ],
)
def test_a_network_that_cannot_be_built_is_refused_with_the_reason(
    name: str, options: dict[str, object], what: str
) -> None:
    with pytest.raises(SettingsError, match=what):
        build_network(name, options, WORDS)
