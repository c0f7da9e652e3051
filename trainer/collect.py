"""Rollouts from environments, collected by a policy and, where so set, by the expert."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from demotools.errors import DemotoolsError
from trainer.augment import batch_missions
from trainer.collected import Rollout
from trainer.envs import EnvironmentStep, VectorEnvironment, seed_streams
from trainer.on_policy import taken_log_prob
from trainer.policy import NetworkPolicy, tokenised
from trainer.rollouts import Batch
from trainer.tally import Tally

# Training environments play seeds of the upper half of the train range, which no store of ours
# reaches, and never those of evaluation.
_FIRST_SEED, _LAST_SEED = 500_000_000, 1_000_000_000
_RECENT_EPISODES = 1000


@dataclass(frozen=True)
class Forcing:
    """Teacher forcing: how probable it is that the expert acts in the policy's place.

    start, stop   the probability at step 0, and from step `steps` on
    """

    start: float
    stop: float
    steps: int

    def probability(self, stage_steps: int) -> float:
        """After so many environment steps of the stage.

        >>> forcing = Forcing(1.0, 0.0, 10_000)
        >>> [forcing.probability(steps) for steps in (0, 2500, 10_000, 99_999)]
        [1.0, 0.75, 0.0, 0.0]
        """
        return self.start + (self.stop - self.start) * min(stage_steps / self.steps, 1.0)


@dataclass
class _Record:
    """What the steps of a rollout leave behind, one entry a step."""

    before: list[EnvironmentStep] = field(default_factory=list)
    after: list[EnvironmentStep] = field(default_factory=list)
    action: list[NDArray[np.uint8]] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    value: list[Tensor] = field(default_factory=list)
    cut_value: list[Tensor] = field(default_factory=list)
    asked: list[float] = field(default_factory=list)
    applied: list[float] = field(default_factory=list)
    episodes: list[NDArray[np.float64]] = field(default_factory=list)


class Collector:
    """A policy in environments that go on from one rollout to the next.

    seed         of the run; environment e's episodes follow from it alone
    first        number of the first environment here among all `everywhere`, which are dealt
                 out to processes that train together
    forcing      the expert acts with a probability, drawn for every environment and step
    bootstrap    whether rollouts hold `next_value`
    """

    def __init__(
        self,
        vector: VectorEnvironment,
        policy: NetworkPolicy,
        words: tuple[str, ...],
        seed: int,
        *,
        first: int = 0,
        everywhere: int | None = None,
        forcing: Forcing | None = None,
        bootstrap: bool = False,
    ) -> None:
        self._vector = vector
        self._policy = policy
        self._words = words
        self._everywhere = everywhere or vector.count
        self._forcing = forcing
        self._bootstrap = bootstrap
        low = _FIRST_SEED + seed * 1_000_003 % (_LAST_SEED - _FIRST_SEED) // 2
        streams = seed_streams(range(low, _LAST_SEED), self._everywhere)
        self._streams = streams[first : first + vector.count]
        self._tally = Tally(vector.count)
        self.recent: deque[bool] = deque(maxlen=_RECENT_EPISODES)
        """Whether the latest episodes succeeded, of those that count."""
        self._step = vector.reset(self._streams)
        policy.reset(vector.count)
        self._whole = self._present_state()

    def collect(self, rollout_len: int, stage_steps: int = 0) -> Rollout:
        """The next `rollout_len` steps of every environment.

        stage_steps      environment steps of the stage so far, everywhere

        DemotoolsError   the environments fail; `state` is then of before this rollout
        """
        random = torch.get_rng_state()
        memory = self._policy.memory
        record = _Record()
        try:
            for number in range(rollout_len):
                self._advance(record, stage_steps + number * self._everywhere)
        except DemotoolsError:
            torch.set_rng_state(random)
            raise
        self._whole = self._present_state()
        forcing = None
        if self._forcing is not None:
            forcing = float(np.mean(record.asked)), float(np.mean(record.applied))
        return Rollout(
            batch=self._batch(record, stage_steps),
            memory=memory,
            episodes=np.concatenate(record.episodes),
            forcing=forcing,
        )

    def _advance(self, record: _Record, stage_steps: int) -> None:
        before, policy = self._step, self._policy
        action = policy.act(before.cells, before.direction, before.missions, before.mask)
        if self._forcing is not None:
            asked = self._forcing.probability(stage_steps)
            if asked > 0:
                # not even episodes count in which nothing was forced: those are the short ones
                self._tally.spoil()
            drawn = torch.rand(len(action)).numpy() < asked
            forced = drawn & (before.expert_action >= 0)
            action = np.where(forced, before.expert_action, action)
            record.asked.append(asked)
            record.applied.append(float(forced.mean()))
        after = self._step = self._vector.step(action)
        record.before.append(before)
        record.after.append(after)
        record.action.append(action.astype(np.uint8))
        record.logits.append(policy.logits)
        record.value.append(policy.values)
        if self._bootstrap:
            record.cut_value.append(self._cut_value(before, after))
        episodes = self._tally.note(after.reward, after.terminated | after.truncated)
        record.episodes.append(episodes)
        self.recent.extend((episodes[:, 0] > 0).tolist())

    def _cut_value(self, before: EnvironmentStep, after: EnvironmentStep) -> Tensor:
        """The critic's value of what episodes showed last when they were cut off, else 0: [B]."""
        value = torch.zeros_like(self._policy.values)
        rows = np.flatnonzero(after.truncated)
        if len(rows):
            output = self._policy.look(
                after.final_cells[rows],
                after.final_direction[rows],
                [before.missions[row] for row in rows.tolist()],
                np.ones(len(rows), dtype=np.uint8),
                self._policy.memory[rows],
            )
            value[rows] = output.values[0]
        return value

    def _batch(self, record: _Record, stage_steps: int) -> Batch:
        before, after, device = record.before, record.after, self._policy.memory.device
        missions = [text for step in before for text in step.missions]
        row, tokens = tokenised(missions, self._words)
        arrays: dict[str, Sequence[NDArray[Any]]] = {
            "cells": [step.cells for step in before],
            "direction": [step.direction for step in before],
            "masks": [step.mask for step in before],
            "action": record.action,
            "expert_action": [step.expert_action for step in before],
            "reward": [step.reward for step in after],
            "terminated": [step.terminated for step in after],
            "truncated": [step.truncated for step in after],
        }
        batch = {name: _stacked(rows).to(device) for name, rows in arrays.items()}
        batch["mission"] = row.reshape(batch["masks"].shape).to(device)
        batch["value"] = torch.stack(record.value)
        batch["log_prob"] = taken_log_prob(torch.stack(record.logits), batch["action"])
        batch["next_value"] = torch.zeros_like(batch["value"])
        batch["stage_steps"] = torch.tensor(stage_steps)
        if self._bootstrap:
            cut = batch["truncated"]
            batch["next_value"] = torch.where(
                cut, torch.stack(record.cut_value), self._following_values(batch["value"])
            )
        return batch_missions(batch, tokens.to(device))

    def _following_values(self, value: Tensor) -> Tensor:
        """The critic's values one step later: [T, B]."""
        step, policy = self._step, self._policy
        last = policy.look(step.cells, step.direction, step.missions, step.mask, policy.memory)
        return torch.cat([value[1:], last.values])

    def state(self) -> dict[str, Any]:
        """Where the environments and the memory stood after the last whole rollout."""
        return self._whole

    def _present_state(self) -> dict[str, Any]:
        return {
            **self._vector.state(),
            "memory": self._policy.memory,
            "tally": self._tally.state(),
            "recent": list(self.recent),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken: every episode is played again up to its present step."""
        streams = [
            range(seed, stream.stop, stream.step)
            for seed, stream in zip(state["seed"], self._streams, strict=True)
        ]
        self._step = self._vector.reset(streams, state["taken"])
        self._policy.memory = torch.as_tensor(state["memory"]).to(self._policy.memory)
        self._tally.load_state(state["tally"])
        self.recent.extend(state["recent"])
        self._whole = self._present_state()


def _stacked(arrays: Sequence[NDArray[Any]]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))
