"""One stage's batches from a demo store: augmented, with the memory that each loss carries on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from demotools.errors import SettingsError
from demotools.store import Store
from trainer.augment import Augmenter, batch_missions
from trainer.config import Named, Settings, StageSettings
from trainer.distributed import ALONE, Team
from trainer.foreign import memory_of, output_of
from trainer.losses import (
    ForeignLoss,
    Loss,
    LossResult,
    expert_cross_entropy,
    merged_losses,
)
from trainer.named import build
from trainer.on_policy import A2C, PPO, Imitation, masked_cross_entropy
from trainer.rollouts import Batch, ExpertTrajectoryIterator

_HOLD_OUT_ROLLOUTS, _HOLD_OUT_LEN, _HOLD_OUT_STEPS = 128, 40, 65_536
LOSSES: dict[str, Callable[..., Loss]] = {
    "expert_cross_entropy": expert_cross_entropy,
    "ppo": PPO,
    "a2c": A2C,
    "imitation": Imitation,
}
"""The losses that `type` names."""


def build_losses(settings: Settings, names: dict[str, float]) -> dict[str, Loss]:
    """The losses of these names; SettingsError where a type does not exist."""
    chosen = {name: settings.losses[name] for name in names}
    return {name: _built(named) for name, named in chosen.items()}


def _built(named: Named) -> Loss:
    loss = build("loss", named.type, named.options, LOSSES)
    if named.type in LOSSES:
        return loss
    if not callable(loss):
        raise SettingsError(
            f"the loss gives {type(loss).__name__}, which cannot be called with a batch",
            path=f"type = {named.type!r}",
            fix="name what is called with its keys and gives the loss",
        )
    return ForeignLoss(named.type, loss)


class DemoStream:
    """The off-policy half of a stage, and all that must survive a resume of it."""

    def __init__(
        self,
        settings: Settings,
        stage: StageSettings,
        store: Store,
        words: tuple[str, ...],
        model: nn.Module,
        team: Team = ALONE,
    ) -> None:
        assert stage.off_policy is not None
        self.settings = stage.off_policy
        share = team.share(self.settings.rollouts, "off_policy.rollouts")
        self._losses = build_losses(settings, stage.off_policy.losses)
        self._iterator = ExpertTrajectoryIterator(
            store,
            rollouts=self.settings.rollouts,
            rollout_len=self.settings.rollout_len,
            seed=settings.run.seed,
            layout="native",
            rank=team.rank,
            world=team.world,
        )
        self._augmenter = Augmenter(
            self.settings.augment,
            words,
            rollouts=len(share),
            seed=settings.run.seed,
            first_rollout=share.start,
        )
        self._memory = dict.fromkeys(self._losses, memory_of(model, len(share)))

    def batch(self) -> Batch:
        """The next batch, on the device of the network."""
        batch = self._augmenter(next(self._iterator), self._iterator.mission_tokens)
        device = next(iter(self._memory.values())).device
        return {name: values.to(device) for name, values in batch.items()}

    def results(self, step: nn.Module, batch: Batch) -> dict[str, LossResult]:
        """Every loss of a batch, by a `LossStep`; memory is carried on."""
        results: dict[str, LossResult] = step(self._losses, batch, self._memory)
        self._memory = {name: result.memory.detach() for name, result in results.items()}
        return results

    def merged(self, results: dict[str, LossResult]) -> Tensor:
        """The weighted sum of the losses."""
        return merged_losses(results, self.settings.losses)

    def state(self) -> dict[str, Any]:
        """Where the stream stands: plain values and tensors."""
        return {
            "iterator": self._iterator.state(),
            "augmenter": self._augmenter.state(),
            "memory": dict(self._memory),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; CheckpointError where it belongs to another store."""
        self._iterator.load_state(state["iterator"])
        self._augmenter.load_state(state["augmenter"])
        device = next(iter(self._memory.values())).device
        self._memory = {
            name: torch.as_tensor(memory).to(device) for name, memory in state["memory"].items()
        }


class HoldOut:
    """The cross-entropy of a network on a store that it does not learn from.

    Every step of the store counts once; where the store is larger than `_HOLD_OUT_STEPS`, the same
    so many of its steps each time.
    """

    def __init__(self, store: Store, network: nn.Module) -> None:
        rollouts = min(_HOLD_OUT_ROLLOUTS, store.episodes)
        iterator = ExpertTrajectoryIterator(
            store, rollouts=rollouts, rollout_len=_HOLD_OUT_LEN, layout="native"
        )
        left = torch.from_numpy(iterator.epoch_steps(0))  # [B], of every episode once
        most = -(-_HOLD_OUT_STEPS // (rollouts * _HOLD_OUT_LEN))
        self._network = network
        self._memory = memory_of(network, rollouts)
        self._batches: list[Batch] = []
        while left.max() > 0 and len(self._batches) < most:
            batch = batch_missions(next(iterator), iterator.mission_tokens)
            counts = torch.arange(_HOLD_OUT_LEN)[:, None] < left
            # what is not of the first pass is no action to be foretold
            batch["action"] = batch["action"].long().where(counts, -1)
            device = self._memory.device
            self._batches.append({name: values.to(device) for name, values in batch.items()})
            left = left - _HOLD_OUT_LEN

    def cross_entropy(self) -> float:
        """Against the expert's actions, in nats per step."""
        total, steps, memory = 0.0, 0, self._memory
        training = self._network.training
        self._network.eval()
        try:
            with torch.no_grad():
                for batch in self._batches:
                    output = output_of(self._network, batch, memory)
                    loss, valid = masked_cross_entropy(output.logits.float(), batch["action"])
                    total, steps, memory = total + loss.item() * valid, steps + valid, output.memory
        finally:
            self._network.train(training)
        return total / steps
