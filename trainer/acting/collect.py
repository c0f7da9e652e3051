"""Lets a network act in environments, and collects rollouts.

Episodes are counted in the order in which they began. In any period, short episodes end first, and
those are mostly successes, so the success rate of the episodes that have ended would be too high.
Therefore an episode counts only once all episodes that began before it have ended, at most a step
limit later; whether it counts does not depend on its outcome.
"""

from __future__ import annotations

from collections import deque
from dataclasses import astuple, dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.acting.policy import NetworkPolicy
from trainer.acting.vector import EnvironmentStep, VectorEnvironment, seed_streams
from trainer.batch import Batch, batch_missions
from trainer.learning.losses import gae_advantages, normalised, taken_log_prob
from trainer.settings.models import TeacherForcing
from trainer.team import ALONE, Team

# Training environments play seeds of the upper half of the train range, which no store of ours
# reaches, and never those of evaluation.
_FIRST_SEED, _LAST_SEED = 500_000_000, 1_000_000_000
_RECENT_EPISODES = 1000


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
        seed: int,
        *,
        first: int = 0,
        everywhere: int | None = None,
        forcing: TeacherForcing | None = None,
        bootstrap: bool = False,
    ) -> None:
        self._vector = vector
        self._policy = policy
        self._everywhere = everywhere or vector.count
        self._forcing = forcing
        self._bootstrap = bootstrap
        low = _FIRST_SEED + seed * 1_000_003 % (_LAST_SEED - _FIRST_SEED) // 2
        streams = seed_streams(range(low, _LAST_SEED), self._everywhere)
        self._streams = streams[first : first + vector.count]
        self._counter = EpisodeCounter(vector.count)
        self.recent: deque[bool] = deque(maxlen=_RECENT_EPISODES)
        """Whether the latest episodes succeeded, of those that count."""
        self._step = vector.reset(self._streams)
        policy.reset(vector.count)

    def collect(self, rollout_len: int, stage_steps: int = 0) -> Rollout:
        """The next `rollout_len` steps of every environment.

        stage_steps      environment steps of the stage so far, everywhere
        """
        self._policy.prepare_anew()
        memory = self._policy.memory
        asked: list[float] = []
        applied: list[float] = []
        episodes: list[NDArray[np.float64]] = []
        missions: list[str] = []
        steps: list[dict[str, Any]] = []
        cut_off: list[_CutOff] = []
        policy = self._policy
        for number in range(rollout_len):
            before = self._step
            action = policy.act(before.cells, before.direction, before.missions, before.mask)
            if self._forcing is not None:
                asked.append(self._forcing.probability(stage_steps + number * self._everywhere))
                action, share = self._forced(action, asked[-1])
                applied.append(share)
            after = self._step = self._vector.step(action)
            steps.append(self._seen(before, action, after))
            if self._bootstrap and after.truncated.any():
                cut_off.append(self._cut_off(number, before, after))
            missions.extend(before.missions)
            episodes.append(self._counter.step(after.reward, after.terminated | after.truncated))
            self.recent.extend((episodes[-1][:, 0] > 0).tolist())
        row, tokens = policy.tokenised(missions)
        batch = {name: _stacked([step[name] for step in steps]) for name in steps[0]}
        batch = {name: values.to(memory.device) for name, values in batch.items()}
        batch["mission"] = row.reshape(batch["masks"].shape).to(memory.device)
        batch["log_prob"] = taken_log_prob(batch.pop("logits"), batch["action"])
        if self._bootstrap:
            batch["next_value"] = self._following_values(batch["value"], cut_off)
        else:
            batch["next_value"] = torch.zeros_like(batch["value"])
        batch["stage_steps"] = torch.tensor(stage_steps)
        return Rollout(
            batch=batch_missions(batch, tokens.to(memory.device)),
            memory=memory,
            episodes=np.concatenate(episodes),
            forcing=(float(np.mean(asked)), float(np.mean(applied))) if asked else None,
        )

    def _forced(
        self, action: NDArray[np.int64], probability: float
    ) -> tuple[NDArray[np.int64], float]:
        """The actions, some of them the expert's, and how many are: a share of them."""
        if probability > 0:
            # not even episodes count in which nothing was forced: those are the short ones
            self._counter.exclude_present()
        drawn = torch.rand(len(action)).numpy() < probability
        forced = drawn & (self._step.expert_action >= 0)
        return np.where(forced, self._step.expert_action, action), float(forced.mean())

    def _seen(
        self, before: EnvironmentStep, action: NDArray[np.int64], after: EnvironmentStep
    ) -> dict[str, Any]:
        """One step of a batch."""
        return {
            "cells": before.cells,
            "direction": before.direction,
            "masks": before.mask,
            "action": action.astype(np.uint8),
            "expert_action": before.expert_action,
            "reward": after.reward,
            "terminated": after.terminated,
            "truncated": after.truncated,
            "logits": self._policy.logits,
            "value": self._policy.values,
        }

    def _cut_off(self, time: int, before: EnvironmentStep, after: EnvironmentStep) -> _CutOff:
        rows = np.flatnonzero(after.truncated)
        return _CutOff(
            time,
            rows,
            after.final_cells[rows],
            after.final_direction[rows],
            [before.missions[row] for row in rows.tolist()],
            self._policy.memory[rows],
        )

    def _following_values(self, value: Tensor, cut_off: list[_CutOff]) -> Tensor:
        """The critic's values one step later, also of what episodes showed last: [T, B]."""
        step, policy = self._step, self._policy
        last = policy.output(step.cells, step.direction, step.missions, step.mask, policy.memory)
        following = torch.cat([value[1:], last.values])
        if cut_off:
            # all in one call: the weights have not changed
            time, rows, cells, direction, missions, memory = zip(*cut_off, strict=True)
            row = np.concatenate(rows)
            shown = policy.output(
                np.concatenate(cells),
                np.concatenate(direction),
                [*chain.from_iterable(missions)],
                np.ones(len(row), dtype=np.uint8),
                torch.cat(memory),
            )
            following[np.repeat(time, list(map(len, rows))), row] = shown.values[0]
        return following

    def state(self) -> dict[str, Any]:
        """Where the environments and the memory stand, after a whole rollout."""
        return {
            **self._vector.state(),
            "memory": self._policy.memory,
            "counter": self._counter.state(),
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
        self._counter.load_state(state["counter"])
        self.recent.extend(state["recent"])


class _CutOff(NamedTuple):
    """Episodes that were cut off at one step of a rollout: their rows, and what they showed last.

    cells, direction, missions   of n observations
    memory                       [n, memory size] before them
    """

    time: int
    rows: NDArray[np.int64]
    cells: NDArray[np.uint8]
    direction: NDArray[np.uint8]
    missions: list[str]
    memory: Tensor


def _stacked(values: list[Any]) -> Tensor:
    """The values of all steps: [T, ...]."""
    if isinstance(values[0], Tensor):
        return torch.stack(values)
    return torch.from_numpy(np.stack(values))


@dataclass(frozen=True)
class Rollout:
    """T steps of B environments.

    batch      as a network takes it (see `trainer.learning.building`), what the losses take
               (`trainer.learning.losses`) but for advantage and returns, `reward` float32 [T, B]
               and `next_value` float32 [T, B], zeros where not asked for
    memory     [B, memory size] before the first step
    episodes   that count now (`trainer.acting.collect`), none in which the expert may have acted:
               float64 [n, 2], reward and length in steps
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


@dataclass
class _Episode:
    """Of environment `row`; its length in steps is 0 as long as it goes on."""

    row: int
    length: int = 0
    reward: float = 0.0
    counts: bool = True


class EpisodeCounter:
    """The episodes of `count` environments that step together, all beginning now."""

    def __init__(self, count: int) -> None:
        self._steps = np.zeros(count, dtype=np.int64)
        self._begun: deque[_Episode] = deque()
        self._present: list[_Episode] = []
        for row in range(count):
            self._present.append(self._begin(row))

    def exclude_present(self) -> None:
        """Let no episode count that is under way: the expert may act in it."""
        for episode in self._present:
            episode.counts = False

    def step(self, reward: NDArray[np.float32], ended: NDArray[np.bool_]) -> NDArray[np.float64]:
        """After a step of every environment: the episodes that are to be counted now.

        reward    [count], of this step
        ended     [count], whether the episode did, and the next one has begun
        returns   float64 [n, 2], reward of the last step and length in steps
        """
        self._steps += 1
        for row in np.flatnonzero(ended).tolist():
            episode = self._present[row]
            episode.length, episode.reward = int(self._steps[row]), float(reward[row])
            self._present[row] = self._begin(row)
        self._steps[ended] = 0
        counted = []
        while self._begun[0].length:
            episode = self._begun.popleft()
            if episode.counts:
                counted.append((episode.reward, episode.length))
        return np.array(counted, dtype=np.float64).reshape(-1, 2)

    def _begin(self, row: int) -> _Episode:
        self._begun.append(episode := _Episode(row))
        return episode

    def state(self) -> dict[str, Any]:
        """What must survive a resume: plain values."""
        return {
            "steps": self._steps.tolist(),
            "begun": [astuple(episode) for episode in self._begun],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._steps = np.array(state["steps"], dtype=np.int64)
        self._begun = deque(_Episode(*values) for values in state["begun"])
        present = {episode.row: episode for episode in self._begun if not episode.length}
        self._present = [present[row] for row in range(len(self._steps))]
