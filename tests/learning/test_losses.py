from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trainer.batch import Batch
from trainer.learning.losses import ExpertCrossEntropy, LossResult, weighted_sum
from trainer.learning.networks.base import Output


class Fixed:
    """A network that always says the same logits."""

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits

    def __call__(self, batch: Batch, memory: Tensor) -> Output:  # noqa: ARG002
        return Output(self._logits, self._logits[..., 0], memory + 1)

    def initial_memory(self, rollouts: int) -> Tensor:
        return torch.zeros(rollouts, 1)


def test_expert_cross_entropy_equals_a_numpy_loop() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(size=(3, 2, 7))
    action = random.integers(0, 7, (3, 2), dtype=np.uint8)
    total, hits = 0.0, 0
    for t in range(3):
        for b in range(2):
            exponents = np.exp(logits[t, b])
            total -= np.log(exponents[action[t, b]] / exponents.sum())
            hits += int(np.argmax(logits[t, b]) == action[t, b])
    model = Fixed(torch.from_numpy(logits))
    result = ExpertCrossEntropy()(
        model, {"expert_action": torch.from_numpy(action)}, model.initial_memory(2)
    )
    np.testing.assert_allclose(result.loss.item(), total / 6, rtol=1e-12)
    np.testing.assert_allclose(float(result.scalars["accuracy"]), hits / 6, rtol=1e-6)
    assert result.steps == 6
    assert result.memory.tolist() == [[1.0], [1.0]]
    exponents = np.exp(logits)
    share = exponents / exponents.sum(-1, keepdims=True)
    bonus = -(share * np.log(share)).sum() / 6
    surer = ExpertCrossEntropy(entropy_weight=0.5)(
        model, {"expert_action": torch.from_numpy(action)}, model.initial_memory(2)
    )
    np.testing.assert_allclose(surer.loss.item(), total / 6 - 0.5 * bonus, rtol=1e-12)


def test_losses_are_added_by_their_weights() -> None:
    def result(value: float) -> LossResult:
        return LossResult(torch.tensor(value), {}, torch.zeros(0), 1)

    merged = weighted_sum({"a": result(2.0), "b": result(10.0)}, {"a": 0.5, "b": 3.0})
    assert merged.item() == 31.0
