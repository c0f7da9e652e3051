from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from demotools.errors import SettingsError
from trainer.config import Named, OptimizerSettings
from trainer.optimize import build_optimizer, build_schedule, clip_gradients


def rates(schedule: dict[str, Any], updates: int) -> list[float]:
    """The learning rate before every update, and after the last."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = build_schedule(Named.model_validate(schedule), optimizer, updates)
    seen = [scheduler.get_last_lr()[0]]
    for _ in range(updates):
        optimizer.step()
        scheduler.step()
        seen.append(scheduler.get_last_lr()[0])
    return [float(rate) for rate in seen]


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


def test_any_torch_scheduler_is_found_by_name() -> None:
    name = "torch.optim.lr_scheduler:StepLR"
    assert rates({"type": name, "step_size": 2, "gamma": 0.5}, 4) == [2.0, 2.0, 1.0, 1.0, 0.5]


def test_an_optimizer_takes_its_own_keys_and_refuses_others() -> None:
    model = nn.Linear(1, 1)
    settings = OptimizerSettings.model_validate({"type": "adam", "lr": 0.1, "betas": [0.5, 0.6]})
    assert build_optimizer(settings, model).defaults["betas"] == (0.5, 0.6)
    wrong = OptimizerSettings.model_validate({"type": "adam", "lr": 0.1, "beta": 1})
    with pytest.raises(SettingsError, match="unknown key `beta`") as refusal:
        build_optimizer(wrong, model)
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
