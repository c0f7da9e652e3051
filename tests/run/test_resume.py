"""Runs whose plan grows when they are resumed: a larger budget of the last stage, more stages."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import trainer
from demotools.babyai.vocabulary import WORDS
from demotools.errors import CheckpointError
from demotools.store.reading import open_store
from trainer.run.checkpoint import read_checkpoint
from trainer.run.log import read_log
from trainer.run.resume import restore
from trainer.run.state import new_run

EXACT = ("run.deterministic=true", "run.device=cpu", "model.type=small", "evaluation=")
CONSTANT = "optimizer.schedule={type='constant'}"
PPO_STAGE = {
    "on_policy": {"environments": 4, "rollout_len": 8},
    "ppo": {"type": "ppo"},
    "stage": {"max_env_steps": 96, "losses": ["ppo"], "minibatches": 2},
}
SLOW = pytest.mark.slow

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(bot_data: Path, tmp_path: Path) -> Callable[..., str]:
    """`run("ppo", "a", "run.seed=3")` trains into the folder a; what it said."""

    def trained(recipe: Any, folder: str, *overrides: str, **more: Any) -> str:
        said: list[str] = []
        small: dict[str, Any] = (
            {} if isinstance(recipe, dict) else {"overrides": overrides, "tiny": True}
        )
        common: dict[str, Any] = {"output": tmp_path / folder, "data_dir": bot_data, "workers": 1}
        trainer.train(recipe, say=said.append, **common, **small, **more)
        return "\n".join(said)

    return trained


def training(folder: Path) -> dict[str, Any]:
    return read_checkpoint(folder).training


def same_weights(one: Path, other: Path) -> bool:
    first, second = (read_checkpoint(folder).model for folder in (one, other))
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("recipe", "setting", "shorter", "longer"),
    [
        # the shorter budgets end within a cycle of 2 batches of 32 demo steps, at a cycle's end,
        # and with a rollout of 32 environment steps
        pytest.param("bc_small_cpu", "0.max_demo_steps", 96, 250, id="within a cycle"),
        pytest.param("bc_small_cpu", "0.max_demo_steps", 128, 250, marks=SLOW, id="at its end"),
        pytest.param("bc_and_ppo", "0.max_env_steps", 40, 128, id="both halves"),
        pytest.param("dagger_then_ppo", "1.max_env_steps", 32, 96, marks=SLOW, id="second stage"),
    ],
)
def test_a_run_whose_last_budget_grew_ends_as_one_that_was_planned_so_long(
    recipe: str,
    setting: str,
    shorter: int,
    longer: int,
    run: Callable[..., str],
    tmp_path: Path,
) -> None:
    line = (*EXACT, CONSTANT) if recipe == "bc_small_cpu" else EXACT
    more = f"stages.{setting}={longer}"
    run(recipe, "whole", *line, more)
    run(recipe, "grown", *line, f"stages.{setting}={shorter}")
    ended = training(tmp_path / "grown")["progress"]
    said = run(recipe, "grown", *line, more, resume=True)
    assert f"the budget of stage {int(setting[0]) + 1} grows from {shorter} to {longer} " in said
    assert "longer plan" not in said
    assert same_weights(tmp_path / "whole", tmp_path / "grown")
    whole, grown = (training(tmp_path / name)["progress"] for name in ("whole", "grown"))
    assert whole | {"minutes": 0} == grown | {"minutes": 0}
    assert whole["updates"] > ended["updates"]


def test_a_schedule_over_the_whole_run_follows_the_longer_plan_and_that_is_said(
    run: Callable[..., str], bot_data: Path, tmp_path: Path
) -> None:
    line = (*EXACT, "optimizer.schedule={type='linear'}", "on_policy=")
    shorter, longer = (f"stages.0.max_demo_steps={budget}" for budget in (128, 256))
    run("bc_small_cpu", "whole", *line, longer)
    run("bc_small_cpu", "grown", *line, shorter)
    shortened = read_checkpoint(tmp_path / "grown")
    said = run("bc_small_cpu", "grown", *line, longer, resume=True)
    assert "the schedule linear spans the whole run, which is now longer" in said
    assert not same_weights(tmp_path / "whole", tmp_path / "grown")
    rates = [
        [one["lr"] for one in read_log(tmp_path / name) if one["group"] == "train"]
        for name in ("whole", "grown")
    ]
    assert rates[0][2:] == rates[1][2:] and rates[1][1] == 0
    # nor is the first update by the rate at the end of the shorter plan, which is 0
    store = {"GoToLocal": open_store(bot_data / "GoToLocal.zarr")}
    going_on = new_run(read_checkpoint(tmp_path / "grown").parsed(), store, WORDS, tmp_path)
    restore(going_on, shortened)
    assert going_on.optimizer.param_groups[0]["lr"] == rates[0][1]


def test_a_stage_that_comes_after_a_finished_run_goes_on_as_in_one_plan(
    run: Callable[..., str], tmp_path: Path
) -> None:
    run("bc_small_cpu", "grown", *EXACT, CONSTANT, "on_policy=")
    cloning = tomllib.loads((tmp_path / "grown/settings.toml").read_text("utf-8"))
    both = {
        **cloning,
        "on_policy": PPO_STAGE["on_policy"],
        "losses": {**cloning["losses"], "ppo": PPO_STAGE["ppo"]},
        "stages": [*cloning["stages"], PPO_STAGE["stage"]],
    }
    run(both, "whole")
    said = run(both, "grown", resume=True)
    assert "new: 1 stage after stage 1" in said
    assert same_weights(tmp_path / "whole", tmp_path / "grown")
    assert training(tmp_path / "grown")["progress"]["env_steps"] == 96


def test_what_else_changes_in_a_plan_is_refused_by_name(
    run: Callable[..., str], tmp_path: Path
) -> None:
    line = (*EXACT, CONSTANT, "stages.0.max_demo_steps=128")
    run("bc_small_cpu", "a", *line, "on_policy=")
    before = (tmp_path / "a/last.pt").read_bytes()
    for changes, key in (
        (("on_policy=", "stages.0.max_demo_steps=64"), "stages.0.max_demo_steps"),
        (("on_policy=", "stages.0.off_policy.updates=3"), "stages.0.off_policy.updates"),
        (("on_policy=", "losses.other={type='a2c'}"), "losses.other.type"),
        # the stage itself would get a rollout before each of its cycles
        (("stages.0.max_demo_steps=256",), "on_policy.environments"),
    ):
        with pytest.raises(CheckpointError) as refused:
            run("bc_small_cpu", "a", *line, *changes, resume=True, force_settings=True)
        assert f"`{key}`" in refused.value.what
        assert "budget may grow" in refused.value.fix
    assert (tmp_path / "a/last.pt").read_bytes() == before


def test_precision_is_chosen_aloud_and_a_resumed_run_keeps_its_own(
    run: Callable[..., str], tmp_path: Path
) -> None:
    said = run("bc_small_cpu", "a", *EXACT, "run.precision=auto")
    line = next(line for line in said.splitlines() if line.startswith("precision: "))
    chosen = read_checkpoint(tmp_path / "a").parsed().run.precision
    assert chosen in ("float32", "bfloat16")
    assert line.startswith(f"precision: {chosen}, because bfloat16 multiplies at ")
    # not what this machine would choose
    kept = "float32" if chosen == "bfloat16" else "bfloat16"
    run("bc_small_cpu", "b", *EXACT, f"run.precision={kept}")
    run("bc_small_cpu", "b", *EXACT, "run.precision=auto", resume=True)
    assert read_checkpoint(tmp_path / "b").parsed().run.precision == kept
