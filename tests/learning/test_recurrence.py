from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from trainer.learning.networks.base import (
    InstructionEncoder,
    lstm_by_runs,
    lstm_by_steps,
    runs_of,
)


def by_runs(
    cell: nn.LSTMCell, inputs: Tensor, masks: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor]:
    """`lstm_by_runs` in the shapes of `lstm_by_steps`."""
    T, B = masks.shape
    runs = runs_of(masks)
    hidden, after = lstm_by_runs(cell, inputs.reshape(T * B, -1)[runs.order], runs, memory)
    return hidden[runs.inverse].reshape(T, B, -1), after


def random_masks(T: int, B: int, share: float, seed: int) -> Tensor:
    random = np.random.default_rng(seed)
    return torch.from_numpy((random.random((T, B)) >= share).astype(np.uint8))


@given(
    T=st.integers(1, 12),
    B=st.integers(1, 6),
    share=st.sampled_from([0.0, 0.2, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_runs_and_steps_agree_with_memory_carried_over_two_batches(
    T: int, B: int, share: float, seed: int
) -> None:
    torch.manual_seed(seed)
    cell = nn.LSTMCell(3, 4)
    memory_of_runs = memory_of_steps = torch.randn(B, 8)
    for number in range(2):
        masks = random_masks(T, B, share, seed + number)
        inputs = torch.randn(T, B, 3, requires_grad=True)
        weights = torch.randn(T, B, 4)
        found, memory_of_runs = by_runs(cell, inputs, masks, memory_of_runs)
        expected, memory_of_steps = lstm_by_steps(cell, inputs, masks, memory_of_steps)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(memory_of_runs, memory_of_steps, rtol=1e-5, atol=1e-5)
        wanted = [inputs, *cell.parameters()]
        for mine, reference in zip(
            torch.autograd.grad((found * weights).sum(), wanted),
            torch.autograd.grad((expected * weights).sum(), wanted),
            strict=True,
        ):
            torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)


def test_the_backward_pass_is_the_derivative_of_the_forward_pass() -> None:
    torch.manual_seed(1)
    cell = nn.LSTMCell(2, 3).double()
    masks = torch.tensor([[0, 1], [1, 1], [0, 1], [1, 0]])
    inputs = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)
    memory = torch.randn(2, 6, dtype=torch.float64)
    # the derivative by finite differences, in double precision
    assert torch.autograd.gradcheck(lambda x: by_runs(cell, x, masks, memory)[0], (inputs,))


def test_runs_are_the_stretches_between_masks() -> None:
    masks = torch.tensor([[1, 0], [1, 1], [0, 1], [1, 1]])
    runs = runs_of(masks)
    assert runs.sizes == [3, 3, 1, 1]  # lengths 4 (rollout 1), then 2 and 2 (rollout 0)
    assert runs.rollout.tolist() == [1, 0, 0]
    assert runs.carried.tolist() == [False, True, False]
    assert sorted(runs.order.tolist()) == list(range(8))
    assert runs.order[runs.last].tolist() == [6, 7]


def test_memory_comes_without_gradient_so_that_back_propagation_ends_at_the_batch() -> None:
    cell = nn.LSTMCell(2, 3)
    masks = torch.ones(2, 2, dtype=torch.uint8)
    memory = torch.randn(2, 6, requires_grad=True)
    hidden, after = by_runs(cell, torch.randn(2, 2, 2), masks, memory)
    assert not after.requires_grad
    hidden.sum().backward()  # type: ignore[no-untyped-call]
    assert memory.grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_missions_are_read_as_torch_reads_them_up_to_their_last_word(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    encoder = InstructionEncoder(20, 12).to(dtype)
    plain = copy.deepcopy(encoder)
    tokens = torch.randint(1, 20, (9, 7))
    lengths = [7, 3, 3, 1, 0, 5, 6, 2, 3]
    for mission, length in enumerate(lengths):
        tokens[mission, length:] = 0
    states = plain.gru(plain.words(tokens))[0]
    final = states[torch.arange(9), [max(length, 1) - 1 for length in lengths]]
    read = encoder.read(tokens)
    rtol, atol = (0.1, 0.03) if dtype == torch.bfloat16 else (1e-7, 1e-7)
    torch.testing.assert_close(encoder(tokens), final, rtol=rtol, atol=atol)
    for mission, length in enumerate(lengths):
        mine = read.states[read.place[mission, :length]]
        torch.testing.assert_close(mine, states[mission, :length], rtol=rtol, atol=atol)
    (read.states.sum() + encoder(tokens).square().sum()).backward()
    words = [states[mission, : max(length, 1)].sum() for mission, length in enumerate(lengths)]
    (torch.stack(words).sum() + final.square().sum()).backward()
    for mine, theirs in zip(encoder.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=rtol, atol=atol)
