"""Losses: functions of a network, a batch and the memory before it.

A loss is any callable `(model, batch, memory) -> LossResult`. Ours are built by name; a user's own
is `type = "package.module:Name"`, a class or function that takes the keys beside `type` and gives
such a callable (docs/training.md has one). The loop carries `LossResult.memory` on to the next
batch; it comes without gradient, so back-propagation stops at the border of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from trainer.models import Model
from trainer.rollouts import Batch


class LossResult(NamedTuple):
    """What a loss gives: T x B steps.

    loss      scalar with a gradient, a mean over the steps
    scalars   what the log shows, scalars without gradient
    memory    [B, memory size] after the batch, without gradient
    steps     number of steps that the loss is a mean of
    """

    loss: Tensor
    scalars: dict[str, Tensor]
    memory: Tensor
    steps: int


class Loss(Protocol):
    """The one interface of all losses, off-policy and on-policy."""

    def __call__(self, model: Model, batch: Batch, memory: Tensor) -> LossResult:
        """The loss of a batch; see the module and `Model` for what a batch holds."""


def expert_cross_entropy() -> Loss:
    """Cross-entropy of the policy against the expert's actions, a mean over all steps.

    Takes `action` [T, B] of the batch as the expert's. Scalar: accuracy, the share of steps at
    which the most probable action is the expert's.
    """

    def loss(model: Model, batch: Batch, memory: Tensor) -> LossResult:
        output = model(batch, memory)
        action = batch["action"].long().flatten()
        logits = output.logits.flatten(0, 1)
        accuracy = (logits.detach().argmax(1) == action).float().mean()
        return LossResult(
            loss=nn.functional.cross_entropy(logits, action),
            scalars={"accuracy": accuracy},
            memory=output.memory,
            steps=len(action),
        )

    return loss


LOSSES: dict[str, Callable[..., Loss]] = {"expert_cross_entropy": expert_cross_entropy}
"""The losses that `type` names."""


def merged_losses(results: Mapping[str, LossResult], weights: Mapping[str, float]) -> Tensor:
    """The weighted sum of losses: a scalar."""
    return torch.stack([weights[name] * result.loss for name, result in results.items()]).sum()
