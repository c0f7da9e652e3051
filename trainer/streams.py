"""One stage's batches from a demo store: augmented, with the memory that each loss carries on."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from demotools.store import Store
from trainer.augment import Augmenter
from trainer.config import Settings, StageSettings
from trainer.losses import LOSSES, Loss, LossResult, merged_losses
from trainer.models import Model
from trainer.named import build
from trainer.rollouts import Batch, ExpertTrajectoryIterator


def build_losses(settings: Settings, names: dict[str, float]) -> dict[str, Loss]:
    """The losses of these names; SettingsError where a type does not exist."""
    chosen = {name: settings.losses[name] for name in names}
    return {
        name: build("loss", named.type, named.options, LOSSES) for name, named in chosen.items()
    }


class DemoStream:
    """The off-policy half of a stage, and all that must survive a resume of it."""

    def __init__(
        self,
        settings: Settings,
        stage: StageSettings,
        store: Store,
        words: tuple[str, ...],
        model: nn.Module,
    ) -> None:
        assert stage.off_policy is not None
        self.settings = stage.off_policy
        self._losses = build_losses(settings, stage.off_policy.losses)
        self._iterator = ExpertTrajectoryIterator(
            store,
            rollouts=self.settings.rollouts,
            rollout_len=self.settings.rollout_len,
            seed=settings.run.seed,
            layout="native",
        )
        self._augmenter = Augmenter(
            self.settings.augment, words, rollouts=self.settings.rollouts, seed=settings.run.seed
        )
        initial = cast(Model, model).initial_memory(self.settings.rollouts)
        self._memory = dict.fromkeys(self._losses, initial)

    def batch(self) -> Batch:
        """The next batch, on the device of the network."""
        batch = self._augmenter(next(self._iterator), self._iterator.mission_tokens)
        device = next(iter(self._memory.values())).device
        return {name: values.to(device) for name, values in batch.items()}

    def results(self, model: Model, batch: Batch) -> dict[str, LossResult]:
        """Every loss of a batch; memory is carried on."""
        results = {
            name: loss(model, batch, self._memory[name]) for name, loss in self._losses.items()
        }
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
