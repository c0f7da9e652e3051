from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from demotools.babyai.vocabulary import WORDS
from demotools.recording.environment import make_environment, observed_cells
from trainer.acting.collect import Collector, Rollout, minibatches
from trainer.acting.policy import NetworkPolicy
from trainer.acting.vector import EnvironmentKind, VectorEnvironment
from trainer.batch import Batch
from trainer.learning.networks.base import Output
from trainer.learning.networks.small import SmallNetwork
from trainer.settings.models import TeacherForcing

GOTO = EnvironmentKind("GoToLocal", expert=True)
STEP_LIMIT = 64


class Turning(nn.Module):
    """Turns left for ever; its value is the mean of the view, and 1000 a step of the episode."""

    def initial_memory(self, rollouts: int) -> Tensor:
        return torch.zeros(rollouts, 1)

    def forward(self, batch: Batch, memory: Tensor) -> Output:
        values = []
        for cells, mask in zip(batch["cells"], batch["masks"], strict=True):
            memory = memory * mask[:, None] + 1
            values.append(1000 * memory[:, 0] + cells.float().mean((1, 2)))
        logits = torch.zeros(*batch["masks"].shape, 7)
        logits[..., 0] = 50.0
        return Output(logits, torch.stack(values), memory)


def collector(
    vector: VectorEnvironment, network: nn.Module, *, sample: bool = True, **more: Any
) -> Collector:
    policy = NetworkPolicy(network, WORDS, sample=sample)
    return Collector(vector, policy, seed=5, bootstrap=True, **more)


def small() -> SmallNetwork:
    torch.manual_seed(0)
    return SmallNetwork(len(WORDS), embedding=8, features=8, memory=8, instruction=8)


def same(ours: Rollout, theirs: Rollout) -> bool:
    return all(torch.equal(ours.batch[name], theirs.batch[name]) for name in ours.batch)


def test_where_an_episode_is_cut_off_its_own_last_observation_is_valued() -> None:
    with VectorEnvironment(EnvironmentKind("GoToLocal"), 1) as vector:
        here = collector(vector, Turning(), sample=False)
        seed = here.state()["seed"][0]
        batch = here.collect(STEP_LIMIT + 3).batch
    environment = make_environment("GoToLocal")
    environment.reset(seed=seed)
    for _ in range(STEP_LIMIT):
        observation, _, _, truncated, _ = environment.step(0)
    assert truncated
    assert batch["truncated"][:, 0].nonzero().tolist() == [[STEP_LIMIT - 1]]
    mean = observed_cells(observation["image"]).mean()
    cut = batch["next_value"][STEP_LIMIT - 1, 0].item()
    assert cut == pytest.approx(1000 * (STEP_LIMIT + 1) + mean)
    # the next episode begins with the memory of nothing
    assert batch["value"][STEP_LIMIT, 0].item() < 2000
    assert torch.equal(batch["next_value"][:10], batch["value"][1:11])


def test_the_value_after_a_rollout_is_that_of_the_next_rollouts_first_step() -> None:
    with VectorEnvironment(GOTO, 3) as vector:
        here = collector(vector, small())
        first, second = here.collect(5).batch, here.collect(5).batch
    going = ~(first["terminated"] | first["truncated"])[-1]
    assert going.any()
    torch.testing.assert_close(first["next_value"][-1][going], second["value"][0][going])


def test_what_a_rollout_says_of_its_actions_is_what_the_network_says_of_the_batch() -> None:
    network = small()
    with VectorEnvironment(GOTO, 4) as vector:
        here = collector(vector, network)
        here.collect(7)
        for weights in network.parameters():  # as some optimizers write them: unseen by autograd
            weights.data.mul_(1.1)
        rollout = here.collect(9)
    output = network(rollout.batch, rollout.memory)
    log_prob = output.logits.log_softmax(-1).gather(-1, rollout.batch["action"].long()[..., None])
    torch.testing.assert_close(rollout.batch["log_prob"], log_prob.squeeze(-1))
    torch.testing.assert_close(rollout.batch["value"], output.values)


def test_advantages_and_returns_fit_together() -> None:
    with VectorEnvironment(GOTO, 4) as vector:
        rollout = collector(vector, small()).collect(20)
    plain = rollout.with_advantages(0.99, 0.95, normalise=False).batch
    torch.testing.assert_close(plain["returns"], plain["advantage"] + plain["value"])
    normal = rollout.with_advantages(0.99, 0.95, normalise=True).batch
    assert normal["advantage"].mean().item() == pytest.approx(0.0, abs=1e-5)
    assert torch.equal(normal["returns"], plain["returns"])


def forcing(start: float, stop: float, steps: int) -> TeacherForcing:
    return TeacherForcing.model_validate({"from": start, "to": stop, "steps": steps})


def test_a_forced_policy_does_what_the_expert_does() -> None:
    with VectorEnvironment(GOTO, 3) as vector:
        rollout = collector(vector, Turning(), forcing=forcing(1.0, 1.0, 1)).collect(60)
    assert torch.equal(rollout.batch["action"].long(), rollout.batch["expert_action"])
    assert rollout.forcing == (1.0, 1.0)
    # successes that were the expert's are not counted as the policy's
    assert (rollout.batch["reward"] > 0).any()
    assert "success" not in rollout.scalars()


def test_forcing_fades_with_the_steps_of_all_environments() -> None:
    with VectorEnvironment(GOTO, 8) as vector:
        here = collector(vector, Turning(), sample=False, forcing=forcing(1.0, 0.0, 800))
        first, later = here.collect(50, 0), here.collect(50, 400)
        last = here.collect(50, 800)
    assert first.forcing is not None and later.forcing is not None
    asked, applied = first.forcing
    assert asked == pytest.approx(1 - 8 * 24.5 / 800)
    assert applied == pytest.approx(asked, abs=0.1)  # 400 draws: a deviation of 0.02
    assert later.forcing[0] == pytest.approx(asked - 0.5)
    assert last.forcing == (0.0, 0.0)


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_collector_goes_on_bit_for_bit_from_its_state(processes: int) -> None:
    network = small()
    fading = forcing(0.5, 0.0, 400)
    with VectorEnvironment(GOTO, 3) as vector:
        here = collector(vector, network, forcing=fading)
        here.collect(70)
        state, random = here.state(), torch.get_rng_state()
        expected = [here.collect(30, 210), here.collect(30, 300)]
    with VectorEnvironment(GOTO, 3, processes=processes) as vector:
        here = collector(vector, network, forcing=fading)
        here.load_state(state)
        torch.set_rng_state(random)
        ours = [here.collect(30, 210), here.collect(30, 300)]
    assert all(map(same, ours, expected))
    assert [rollout.scalars() for rollout in ours] == [rollout.scalars() for rollout in expected]


def test_two_halves_play_what_the_whole_plays() -> None:
    with VectorEnvironment(GOTO, 4) as vector:
        whole = collector(vector, Turning(), sample=False).collect(80).batch
    halves = []
    for first in (0, 2):
        with VectorEnvironment(GOTO, 2) as vector:
            half = collector(vector, Turning(), sample=False, first=first, everywhere=4)
            halves.append(half.collect(80).batch)
    for name in ("cells", "direction", "masks", "expert_action", "reward"):
        joined = torch.cat([half[name] for half in halves], dim=1)
        assert torch.equal(whole[name], joined), name


def test_minibatches_are_all_rows_once_with_their_memory() -> None:
    with VectorEnvironment(GOTO, 5) as vector:
        here = collector(vector, small())
        here.collect(4)
        rollout = here.collect(4)
    parts = minibatches(rollout, 2)
    assert [batch["masks"].shape[1] for batch, _ in parts] == [3, 2]
    rows = torch.cat([memory for _, memory in parts])
    values = torch.cat([batch["value"] for batch, _ in parts], dim=1)
    order = [int((rollout.memory == row).all(1).nonzero()[0]) for row in rows]
    assert sorted(order) == list(range(5))
    assert torch.equal(values, rollout.batch["value"][:, order])
    assert np.prod(parts[0][0]["stage_steps"].shape) == 1
