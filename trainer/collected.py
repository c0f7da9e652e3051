"""What was collected in environments: a rollout to learn from, and how its episodes ended."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.distributed import ALONE, Team
from trainer.on_policy import gae_advantages, normalised
from trainer.rollouts import Batch


@dataclass(frozen=True)
class Rollout:
    """T steps of B environments.

    batch      as a network takes it (see `trainer.networks`), what the losses take
               (`trainer.on_policy`) but for advantage and returns, `reward` float32 [T, B] and
               `next_value` float32 [T, B], zeros where not asked for
    memory     [B, memory size] before the first step
    episodes   that count now (`trainer.tally`), none in which the expert may have acted: float64
               [n, 2], reward and length in steps
    forcing    teacher forcing as asked and as applied, shares of the steps; None: not in use
    """

    batch: Batch
    memory: Tensor
    episodes: NDArray[np.float64]
    forcing: tuple[float, float] | None = None

    def scalars(self) -> dict[str, float]:
        """Success, reward and length of the episodes; teacher forcing."""
        scalars: dict[str, float] = {}
        if self.forcing is not None:
            asked, applied = self.forcing
            scalars |= {"forcing_asked": asked, "forcing_applied": applied}
        if len(self.episodes):
            reward, length = self.episodes.T
            scalars |= {
                "success": float((reward > 0).mean()),
                "reward": float(reward.mean()),
                "episode_length": float(length.mean()),
                "episodes": len(reward),
            }
        return scalars

    def with_advantages(
        self, gamma: float, gae_lambda: float, *, normalise: bool, team: Team = ALONE
    ) -> Rollout:
        """The same with `advantage`, normalised over the team's rollout, and `returns`."""
        batch = self.batch
        advantage = gae_advantages(
            batch["reward"],
            batch["value"],
            batch["next_value"],
            batch["terminated"],
            batch["truncated"],
            gamma=gamma,
            gae_lambda=gae_lambda,
        )
        more = {
            "returns": advantage + batch["value"],
            "advantage": normalised(advantage, team) if normalise else advantage,
        }
        return replace(self, batch={**batch, **more})


def minibatches(rollout: Rollout, count: int) -> list[tuple[Batch, Tensor]]:
    """The rollout's environments dealt at random into `count` batches, with their memory.

    Whole rows stay together, because memory runs along them; the batches differ by at most one.

    count   at most the number of environments, so that no batch is empty
    """
    environments = rollout.batch["masks"].shape[1]
    whole = ("mission_tokens", "stage_steps")
    result = []
    for rows in torch.randperm(environments).tensor_split(count):
        batch = {
            name: values if name in whole else values[:, rows]
            for name, values in rollout.batch.items()
        }
        result.append((batch, rollout.memory[rows]))
    return result
