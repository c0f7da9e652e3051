from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from demotools.errors import SettingsError
from trainer.learning.building import build_optimizer, build_schedule, clip_gradients, try_optimizer
from trainer.settings.models import Named, OptimizerSettings


def rates(schedule: dict[str, Any], updates: int) -> list[float]:
    """The learning rate before every update, and after the last."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = build_schedule(Named.model_validate(schedule), optimizer, {"updates": updates})
    seen = [scheduler.rate()]
    for _ in range(updates):
        optimizer.step()
        scheduler.step()
        seen.append(scheduler.rate())
    return seen


def test_schedules_end_where_they_should() -> None:
    assert rates({"type": "constant"}, 3) == [2.0] * 4
    assert rates({"type": "linear"}, 4) == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.0])
    assert rates({"type": "linear", "to": 0.5}, 2) == pytest.approx([2.0, 1.5, 1.0])
    half = 2 * (1 + math.cos(math.pi / 4)) / 2
    assert rates({"type": "cosine"}, 4)[:3] == pytest.approx([2.0, half, 1.0])


def test_warmup_rises_to_the_full_rate_and_never_begins_at_zero() -> None:
    seen = rates({"type": "linear", "warmup": 0.4}, 10)
    assert seen[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert seen[-1] == pytest.approx(0.0)


@given(
    shape=st.sampled_from(["linear", "cosine"]),
    warmup=st.floats(0, 1, exclude_max=True),
    to=st.floats(0, 1),
    updates=st.integers(0, 40),
    steps=st.none() | st.integers(1, 200),
    stride=st.integers(1, 60),
)
@settings(max_examples=200)
def test_the_rate_never_exceeds_its_peak_and_ends_where_it_should(
    shape: str, warmup: float, to: float, updates: int, steps: int | None, stride: int
) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    done = [0]  # environment steps go on by many an update
    named = {"type": shape, "warmup": warmup, "to": to} | ({"env_steps": steps} if steps else {})
    schedule = build_schedule(
        Named.model_validate(named), optimizer, {"updates": updates}, lambda _unit: done[0]
    )
    seen = [optimizer.param_groups[0]["lr"]]
    for _ in range(updates):
        done[0] += stride
        optimizer.step()
        schedule.step()
        seen.append(optimizer.param_groups[0]["lr"])
    assert all(0 <= rate <= 2.0 for rate in seen)
    top = seen.index(max(seen))
    assert seen[:top] == sorted(seen[:top])
    assert seen[top:] == sorted(seen[top:], reverse=True)
    if updates and (steps is None or done[0] >= steps):
        assert seen[-1] == pytest.approx(2.0 * to)


def test_trying_an_optimizer_leaves_weights_gradients_and_chance_alone() -> None:
    model = nn.Linear(3, 3)
    before, chance = model.weight.detach().clone(), torch.get_rng_state()
    named = OptimizerSettings.model_validate({"type": "adam", "lr": 0.1, "weight_decay": 0.5})
    try_optimizer(named, model.parameters(), {"updates": 5})
    assert torch.equal(model.weight, before) and model.weight.grad is None
    assert torch.equal(torch.get_rng_state(), chance)


def test_a_schedule_is_tried_for_as_many_updates_as_the_run_makes() -> None:
    one_cycle = {"type": "torch.optim.lr_scheduler:OneCycleLR", "max_lr": 0.1}

    def tried(updates: int, total_steps: int) -> None:
        schedule = {**one_cycle, "total_steps": total_steps}
        named = OptimizerSettings.model_validate({"lr": 0.1, "schedule": schedule})
        try_optimizer(named, nn.Linear(1, 1).parameters(), {"updates": updates})

    for updates in (3, 1000, 100_000):
        tried(updates, updates)
        with pytest.raises(SettingsError, match="the schedule rejects its settings"):
            tried(updates, updates - 1)


def test_any_torch_scheduler_is_found_by_name() -> None:
    name = "torch.optim.lr_scheduler:StepLR"
    assert rates({"type": name, "step_size": 2, "gamma": 0.5}, 4) == [2.0, 2.0, 1.0, 1.0, 0.5]


def test_an_optimizer_takes_its_own_keys_and_refuses_others() -> None:
    model = nn.Linear(1, 1)
    settings = OptimizerSettings.model_validate({"type": "adam", "lr": 0.1, "betas": [0.5, 0.6]})
    assert build_optimizer(settings, model.parameters()).defaults["betas"] == (0.5, 0.6)
    wrong = OptimizerSettings.model_validate({"type": "adam", "lr": 0.1, "beta": 1})
    with pytest.raises(SettingsError, match="unknown key `beta`") as refusal:
        build_optimizer(wrong, model.parameters())
    assert "did you mean betas" in refusal.value.fix


def test_gradients_are_scaled_down_to_the_norm_and_never_up() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert clip_gradients([parameter], None).item() == pytest.approx(5.0)
    assert parameter.grad.tolist() == [3.0, 4.0]
    assert clip_gradients([parameter], 1.0).item() == pytest.approx(5.0)
    assert parameter.grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-5)
    clip_gradients([parameter], 10.0)
    assert parameter.grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-5)
