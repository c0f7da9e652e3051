"""Losses: functions of a network, a batch and the memory before it.

A loss is any callable `(model, batch, memory) -> LossResult`. Ours are built by name; a user's own
is `type = "package.module:Name"`, a class or function that takes the keys beside `type` and gives
such a callable (docs/training.md has one). The loop carries `LossResult.memory` on to the next
batch; it comes without gradient, so back-propagation stops at the border of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from demotools.errors import DemotoolsError, SettingsError
from trainer.distributed import ALONE, Team
from trainer.foreign import output_of
from trainer.named import FOREIGN, demand, told
from trainer.networks import Model, Output
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


@dataclass(frozen=True)
class ForeignLoss:
    """A user's own loss; where it fails, or gives what is no result, that is a SettingsError.

    type   by which the settings name it
    """

    type: str
    loss: Loss

    @property
    def needs_expert(self) -> bool:
        """Whether it takes `expert_action` from rollouts."""
        return bool(getattr(self.loss, "needs_expert", False))

    def __call__(self, model: Model, batch: Batch, memory: Tensor) -> LossResult:
        """The result of the user's loss."""
        try:
            result = self.loss(model, batch, memory)
        except DemotoolsError:
            raise
        except FOREIGN as error:
            raise self._wrong(f"fails: {told(error)}") from error
        demand("loss", self.type, result, LossResult)
        for name, tensor in {"loss": result.loss, **result.scalars}.items():
            if not isinstance(tensor, Tensor) or tensor.numel() != 1:
                raise self._wrong(f"gives a `{name}` that is not a tensor of one number")
        if torch.is_grad_enabled() and not result.loss.requires_grad:
            raise self._wrong("gives a value without a gradient")
        if not isinstance(result.memory, Tensor) or result.memory.shape != memory.shape:
            raise self._wrong("gives a memory that is not like the one it was given")
        return result

    def _wrong(self, what: str) -> SettingsError:
        return SettingsError(
            f"the loss {what}", path=f"type = {self.type!r}", fix="correct that function"
        )


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


def merged_losses(
    results: Mapping[str, LossResult], weights: Mapping[str, float], team: Team = ALONE
) -> Tensor:
    """The weighted sum of losses: a scalar.

    Its mean over a team is that of means over the steps of all, however unequally these lie.
    """
    losses = [weights[name] * result.loss for name, result in results.items()]
    if team.world > 1:
        steps = losses[0].new_tensor([result.steps for result in results.values()])
        shares = steps * team.world / team.total(steps).clamp(min=1)
        losses = [loss * share for loss, share in zip(losses, shares, strict=True)]
    return torch.stack(losses).sum()


class LossStep(nn.Module):
    """All losses of a batch in one call: what processes that train together wrap.

    Seen from outside, only weights that a loss really uses are used. Losses that ask for the same
    batch after the same memory share one pass through the network.

    bfloat16   whether the network computes in bfloat16 where that is safe; losses never do
    """

    def __init__(self, network: nn.Module, *, bfloat16: bool = False) -> None:
        super().__init__()
        self.network = network
        self._bfloat16 = bfloat16

    def forward(
        self, losses: Mapping[str, Loss], batch: Batch, memories: Mapping[str, Tensor]
    ) -> dict[str, LossResult]:
        """The result of each loss, by its name; `memories` before the batch by the same names."""
        model = cast(Model, _Once(self.network, self._bfloat16))
        return {name: loss(model, batch, memories[name]) for name, loss in losses.items()}


class _Once:
    """A network that computes the same thing once; in all else it is the network."""

    def __init__(self, network: nn.Module, bfloat16: bool) -> None:
        self._network = network
        self._bfloat16 = bfloat16
        self._asked: tuple[Batch, Tensor] | None = None

    def __call__(self, batch: Batch, memory: Tensor) -> Output:
        if self._asked is None or self._asked[0] is not batch or self._asked[1] is not memory:
            self._asked = (batch, memory)
            with torch.autocast(memory.device.type, torch.bfloat16, enabled=self._bfloat16):
                logits, values, after = output_of(self._network, batch, memory)
            dtype = memory.dtype
            self._output = Output(logits.to(dtype), values.to(dtype), after.to(dtype))
        return self._output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)
