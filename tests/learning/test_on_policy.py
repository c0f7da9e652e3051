from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from demotools.errors import SettingsError
from trainer.batch import Batch
from trainer.learning.building import LOSSES
from trainer.learning.losses import (
    A2C,
    PPO,
    ExpertCrossEntropy,
    clipped_value_loss,
    entropy,
    explained_variance,
    gae_advantages,
    needs_expert,
    normalised,
    ppo_policy_loss,
)
from trainer.learning.networks.base import Output
from trainer.settings.user_code import build

T, B = 6, 3


class Fixed:
    """A network that always says the same."""

    def __init__(self, logits: Tensor, values: Tensor) -> None:
        self._logits, self._values = logits, values

    def __call__(self, batch: Batch, memory: Tensor) -> Output:  # noqa: ARG002
        return Output(self._logits, self._values, memory + 1)

    def initial_memory(self, rollouts: int) -> Tensor:
        return torch.zeros(rollouts, 1)


def drawn(seed: int = 0) -> dict[str, Any]:
    """A batch of everything that the losses take, as numpy arrays."""
    random = np.random.default_rng(seed)
    return {
        "logits": random.normal(size=(T, B, 7)),
        "values": random.normal(size=(T, B)),
        "action": random.integers(0, 7, (T, B)),
        "expert_action": random.integers(-1, 7, (T, B)),
        "log_prob": random.normal(-2.0, 0.3, (T, B)),
        "value": random.normal(size=(T, B)),
        "advantage": random.normal(size=(T, B)),
        "returns": random.normal(size=(T, B)),
        "stage_steps": np.array(250),
    }


def result(loss: Any, arrays: dict[str, Any]) -> Any:
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    model = Fixed(tensors.pop("logits"), tensors.pop("values"))
    return loss(model, tensors, model.initial_memory(B))


def log_softmax(logits: Any) -> Any:
    return logits - np.log(np.exp(logits).sum())


@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=30)
def test_advantages_equal_the_discounted_sum_of_surprises(
    seed: int, gamma: float, gae_lambda: float
) -> None:
    random = np.random.default_rng(seed)
    reward, value, following = random.normal(size=(3, T, B))
    terminated, truncated = random.random((2, T, B)) < 0.3
    expected = np.zeros((T, B))
    for b in range(B):
        for t in range(T):
            weight = 1.0
            for k in range(t, T):
                later = 0.0 if terminated[k, b] else following[k, b]
                expected[t, b] += weight * (reward[k, b] + gamma * later - value[k, b])
                weight *= gamma * gae_lambda
                if terminated[k, b] or truncated[k, b]:
                    break
    tensors = map(torch.from_numpy, (reward, value, following, terminated, truncated))
    ours = gae_advantages(*tensors, gamma=gamma, gae_lambda=gae_lambda)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-9, atol=1e-9)


def test_a_cut_off_episode_is_worth_its_last_observation_and_a_finished_one_nothing() -> None:
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    yes, no = one.bool(), zero.bool()
    cut = gae_advantages(zero, zero, one, no, yes, gamma=0.9, gae_lambda=1.0)
    finished = gae_advantages(zero, zero, one, yes, no, gamma=0.9, gae_lambda=1.0)
    assert cut.item() == pytest.approx(0.9)
    assert finished.item() == 0.0


def test_ppo_equals_a_numpy_loop() -> None:
    a = drawn()
    clip = 0.2 * 0.75  # a quarter of the decay is over
    policy, value, bonus, clipped, kl = 0.0, 0.0, 0.0, 0, 0.0
    for t in range(T):
        for b in range(B):
            log_probs = log_softmax(a["logits"][t, b])
            ratio = np.exp(log_probs[a["action"][t, b]] - a["log_prob"][t, b])
            gain = a["advantage"][t, b]
            policy -= min(ratio * gain, np.clip(ratio, 1 - clip, 1 + clip) * gain)
            v, old, goal = a["values"][t, b], a["value"][t, b], a["returns"][t, b]
            near = old + np.clip(v - old, -clip, clip)
            value += max((v - goal) ** 2, (near - goal) ** 2) / 2
            bonus -= (np.exp(log_probs) * log_probs).sum()
            clipped += abs(ratio - 1) > clip
            kl += ratio - 1 - np.log(ratio)
    n = T * B
    ours = result(PPO(clip=0.2, clip_decay_steps=1000, value_weight=0.7, entropy_weight=0.03), a)
    np.testing.assert_allclose(ours.loss, (policy + 0.7 * value - 0.03 * bonus) / n, rtol=1e-10)
    np.testing.assert_allclose(ours.scalars["policy"], policy / n, rtol=1e-10)
    np.testing.assert_allclose(ours.scalars["value"], value / n, rtol=1e-10)
    np.testing.assert_allclose(ours.scalars["entropy"], bonus / n, rtol=1e-10)
    np.testing.assert_allclose(ours.scalars["clip_fraction"], clipped / n, rtol=1e-6)
    np.testing.assert_allclose(ours.scalars["approximate_kl"], kl / n, rtol=1e-10)
    unexplained = np.var(a["returns"] - a["value"]) / np.var(a["returns"])
    np.testing.assert_allclose(ours.scalars["explained_variance"], 1 - unexplained, rtol=1e-10)
    assert ours.steps == n
    assert ours.memory.tolist() == [[1.0]] * B


def test_values_explain_all_variance_or_none_and_returns_without_any_count_as_none() -> None:
    returns = torch.tensor([1.0, 2.0, 4.0])
    assert explained_variance(returns + 3, returns).item() == 1.0
    assert explained_variance(torch.ones(3), returns).item() == 0.0
    assert explained_variance(-returns, returns).item() == pytest.approx(-3.0)
    assert explained_variance(returns, torch.ones(3)).item() == 0.0


@pytest.mark.parametrize("target", [0, -1.0, "much"])
def test_a_target_of_the_kl_that_is_not_above_0_is_refused(target: Any) -> None:
    with pytest.raises(SettingsError, match="rejects its settings"):
        build("losses.ppo.type", "ppo", {"target_kl": target}, LOSSES)


def test_a2c_equals_a_numpy_loop() -> None:
    a = drawn(1)
    total = 0.0
    for t in range(T):
        for b in range(B):
            log_probs = log_softmax(a["logits"][t, b])
            total -= log_probs[a["action"][t, b]] * a["advantage"][t, b]
            total += 0.5 * 0.5 * (a["values"][t, b] - a["returns"][t, b]) ** 2
            total += 0.01 * (np.exp(log_probs) * log_probs).sum()
    np.testing.assert_allclose(result(A2C(), a).loss, total / (T * B), rtol=1e-10)


def test_expert_cross_entropy_equals_a_numpy_loop_over_the_steps_with_advice() -> None:
    a = drawn(2)
    total, hits, valid = 0.0, 0, 0
    for t in range(T):
        for b in range(B):
            expert = a["expert_action"][t, b]
            if expert >= 0:
                total -= log_softmax(a["logits"][t, b])[expert]
                hits += int(np.argmax(a["logits"][t, b]) == expert)
                valid += 1
    ours = result(ExpertCrossEntropy(), a)
    assert 0 < valid < T * B
    np.testing.assert_allclose(ours.loss, total / valid, rtol=1e-10)
    np.testing.assert_allclose(ours.scalars["accuracy"], hits / valid, rtol=1e-6)
    assert ours.steps == valid


def test_an_expert_without_any_advice_costs_nothing_and_teaches_nothing() -> None:
    a = drawn(3) | {"expert_action": np.full((T, B), -1)}
    logits = torch.from_numpy(a["logits"]).requires_grad_()
    model = Fixed(logits, logits[..., 0])
    batch = {"expert_action": torch.from_numpy(a["expert_action"])}
    ours = ExpertCrossEntropy()(model, batch, model.initial_memory(B))
    ours.loss.backward()  # type: ignore[no-untyped-call]
    assert ours.loss.item() == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_a_gain_beyond_the_clip_pulls_no_further() -> None:
    log_prob = torch.tensor([0.5], requires_grad=True)
    loss = ppo_policy_loss(log_prob, torch.zeros(1), torch.ones(1), 0.1)
    loss.backward()  # type: ignore[no-untyped-call]
    assert log_prob.grad is not None
    assert log_prob.grad.item() == 0.0
    assert loss.item() == pytest.approx(-1.1)


def test_a_value_far_from_the_old_one_is_clipped_only_for_the_worse() -> None:
    old, returns = torch.zeros(1), torch.ones(1)
    assert clipped_value_loss(torch.ones(1), old, returns, 0.1).item() == pytest.approx(0.405)
    assert clipped_value_loss(-torch.ones(1), old, returns, 0.1).item() == pytest.approx(2.0)


def test_normalised_advantages_have_mean_0_and_deviation_1() -> None:
    values = normalised(torch.from_numpy(drawn()["advantage"]) * 5 + 3)
    assert values.mean().item() == pytest.approx(0.0, abs=1e-9)
    assert values.std(unbiased=False).item() == pytest.approx(1.0, abs=1e-4)


def test_a_sure_policy_has_no_entropy() -> None:
    assert entropy(torch.tensor([[[1000.0, 0.0, 0.0]]])).item() == 0.0


def test_only_cross_entropy_against_the_expert_asks_for_the_expert() -> None:
    assert needs_expert(ExpertCrossEntropy())
    assert not needs_expert(PPO())
    assert not needs_expert(A2C())
