"""Rollouts from environments: what the policy did, and how its episodes ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.augment import batch_missions
from trainer.envs import EnvironmentStep, VectorEnvironment, seed_streams
from trainer.policy import NetworkPolicy, tokenised
from trainer.rollouts import Batch

# Training environments play seeds of the upper half of the train range, which no store of ours
# reaches, and never those of evaluation.
_FIRST_SEED, _LAST_SEED = 500_000_000, 1_000_000_000


@dataclass(frozen=True)
class Rollout:
    """T steps of B environments.

    batch      as a network takes it (see `trainer.models`), and `action` uint8 [T, B], which the
               policy took, `reward` float32 [T, B], `terminated` and `truncated` bool [T, B]
    memory     [B, memory size] before the first step
    episodes   how the episodes that ended did: reward and length in steps, float64 [n]
    """

    batch: Batch
    memory: Tensor
    reward: NDArray[np.float64]
    length: NDArray[np.float64]

    def scalars(self) -> dict[str, float]:
        """Success, reward and length of the episodes that ended; empty where none did."""
        if not len(self.reward):
            return {}
        return {
            "success": float((self.reward > 0).mean()),
            "reward": float(self.reward.mean()),
            "episode_length": float(self.length.mean()),
            "episodes": len(self.reward),
        }


class Collector:
    """A policy in environments that go on from one rollout to the next.

    seed   of the run; environment e's episodes follow from it alone
    """

    def __init__(
        self, vector: VectorEnvironment, policy: NetworkPolicy, words: tuple[str, ...], seed: int
    ) -> None:
        self._vector = vector
        self._policy = policy
        self._words = words
        first = _FIRST_SEED + seed * 1_000_003 % (_LAST_SEED - _FIRST_SEED) // 2
        self._step = vector.reset(seed_streams(range(first, _LAST_SEED), vector.count))
        self._length = np.zeros(vector.count, dtype=np.int64)
        self._ended_once = np.zeros(vector.count, dtype=np.bool_)
        policy.reset(vector.count)

    def collect(self, rollout_len: int) -> Rollout:
        """The next `rollout_len` steps of every environment."""
        memory = self._policy.memory
        before: list[EnvironmentStep] = []
        after: list[EnvironmentStep] = []
        actions: list[NDArray[np.uint8]] = []
        rewards: list[NDArray[Any]] = [np.zeros(0)]
        lengths: list[NDArray[Any]] = [np.zeros(0)]
        for _ in range(rollout_len):
            step = self._step
            action = self._policy.act(step.cells, step.direction, step.missions, step.mask)
            self._step = self._vector.step(action)
            before.append(step)
            after.append(self._step)
            actions.append(action.astype(np.uint8))
            self._length += 1
            ended = self._step.terminated | self._step.truncated
            # short episodes end first, and those are successes: until every environment has
            # ended one, the ended ones are no fair picture
            if self._ended_once.all():
                rewards.append(self._step.reward[ended])
                lengths.append(self._length[ended])
            self._ended_once |= ended
            self._length[ended] = 0
        missions = [text for step in before for text in step.missions]
        row, tokens = tokenised(missions, self._words)
        batch = {
            "cells": _stacked([step.cells for step in before]),
            "direction": _stacked([step.direction for step in before]),
            "masks": _stacked([step.mask for step in before]),
            "mission": row.reshape(rollout_len, self._vector.count),
            "action": _stacked(actions),
            "reward": _stacked([step.reward for step in after]),
            "terminated": _stacked([step.terminated for step in after]),
            "truncated": _stacked([step.truncated for step in after]),
        }
        return Rollout(
            batch=batch_missions(batch, tokens),
            memory=memory,
            reward=np.concatenate(rewards),
            length=np.concatenate(lengths),
        )


def minibatches(rollout: Rollout, count: int) -> list[tuple[Batch, Tensor]]:
    """The rollout's environments dealt at random into `count` batches, with their memory.

    Whole rows stay together, because memory runs along them.
    """
    environments = rollout.batch["masks"].shape[1]
    result = []
    for rows in torch.randperm(environments).chunk(count):
        batch = {
            name: values if name == "mission_tokens" else values[:, rows]
            for name, values in rollout.batch.items()
        }
        result.append((batch, rollout.memory[rows]))
    return result


def _stacked(arrays: Sequence[NDArray[Any]]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))
