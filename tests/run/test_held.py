"""Losses that hold something, and schedules with the user's functions: trained and resumed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import trainer
from demotools.errors import CheckpointError, SettingsError
from demotools.recording.bot import Style
from demotools.recording.record import generate, planned_recording
from demotools.store.reading import open_store
from trainer.batch import Batch
from trainer.learning.losses import ExpertCrossEntropy, LossResult
from trainer.learning.networks.base import Model, Output
from trainer.learning.networks.small import SmallNetwork
from trainer.run.checkpoint import read_checkpoint
from trainer.run.log import read_log
from trainer.run.success import measured_success

PAGE = Path(__file__).parents[2] / "docs/own_parts.md"
EXACT = ("run.deterministic=true", "run.device=cpu", "evaluation=", "on_policy=", "run.keep=99")
SAVED = "run.save_every_demo_steps=64"
BUDGET = "stages.0.max_demo_steps=1280"
BOTH = "stages.0.off_policy.losses={expert_ce = 1.0, ahead = 0.5}"
LAMBDA = "type='torch.optim.lr_scheduler:LambdaLR', lr_lambda='tests.run.test_held:halved'"

pytestmark = pytest.mark.usefixtures("one_thread")


class Moving:
    """Cross-entropy weighted by a moving mean of itself, which is no tensor."""

    def __init__(self, mean: Any = 1.0) -> None:
        self.mean = mean
        self._loss = ExpertCrossEntropy()

    def __call__(self, model: Model, batch: Batch, memory: Tensor) -> LossResult:
        result = self._loss(model, batch, memory)
        self.mean = 0.9 * self.mean + 0.1 * result.loss.item()
        scalars = {**result.scalars, "mean": self.mean, "count": np.int64(3)}
        return result._replace(loss=result.loss * self.mean, scalars=scalars)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "kind": {"of": ["moving", None]}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = state["mean"]


class Silent(SmallNetwork):
    """A network without features."""

    def forward(self, batch: Batch, memory: Tensor) -> Output:
        return super().forward(batch, memory)._replace(features=None)


def of_numpy() -> Moving:
    return Moving(np.float64(1.0))


def halved(count: int) -> float:
    return float(0.5**count)


def failing(count: int) -> float:
    return 1.0 / (3 - count)


@pytest.fixture
def run(
    bot_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[dict[str, Any]]]:
    """`run("a", "run.seed=3")` clones into the folder a; the lines of its log."""
    for code in re.findall(r"```python\n(# \w+\.py\n.*?)```", PAGE.read_text("utf-8"), re.S):
        (tmp_path / code.split()[1]).write_text(code, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)

    def trained(folder: str, *overrides: str, **more: Any) -> list[dict[str, Any]]:
        common: dict[str, Any] = {"data_dir": bot_data, "workers": 1, "quiet": True, "tiny": True}
        more = {"output": tmp_path / folder, "overrides": (*EXACT, *overrides), **common, **more}
        return read_log(trainer.train(more.pop("recipe", "bc_small_cpu"), **more))

    return trained


def of(lines: list[dict[str, Any]], key: str) -> list[float]:
    return [line[key] for line in lines if key in line]


def content(folder: Path) -> dict[str, Any]:
    saved = read_checkpoint(folder, trust=True)
    progress = {**saved.training["progress"], "minutes": 0}
    return {"model": saved.model, **saved.training, "progress": progress, "log_bytes": 0}


def assert_same(one: Any, other: Any, place: str = "") -> None:
    """That two checkpoints hold the same, bit for bit."""
    assert type(one) is type(other), place
    if isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            assert_same(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), place
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{place}.{number}")
    else:
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other, place


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(("losses.ahead.type=ahead:Ahead", BOTH), id="a head"),
        pytest.param(("losses.ahead.type=tests.run.test_held:Moving", BOTH), id="numbers"),
        pytest.param((f"optimizer.schedule={{{LAMBDA}, every_demo_steps=96}}",), id="a function"),
        pytest.param(("run.ema=0.5",), id="averages"),
    ],
)
def test_a_run_that_holds_something_ends_the_same_wherever_it_was_cut(
    settings: tuple[str, ...], run: Callable[..., Any], tmp_path: Path
) -> None:
    line = (*settings, SAVED, "stages.0.max_demo_steps=256")
    run("whole", *line)
    copies = sorted((tmp_path / "whole").glob("after-*.pt"))
    assert len(copies) == 4
    (tmp_path / "cut").mkdir()
    shutil.copy(copies[1], tmp_path / "cut/last.pt")
    run("cut", *line, resume=True)
    assert_same(content(tmp_path / "whole"), content(tmp_path / "cut"))


def test_the_head_on_the_page_learns_beside_the_network(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    lines = run("a", "losses.ahead.type=ahead:Ahead", BOTH, BUDGET, SAVED)
    losses, accuracy = of(lines, "ahead/loss"), of(lines, "ahead/accuracy")
    assert sum(losses[-5:]) < 0.4 * sum(losses[:5])
    assert accuracy[0] < 0.5 and sum(accuracy[-5:]) > 5 * 0.75
    copies = sorted((tmp_path / "a").glob("after-*.pt"))
    ends = (copies[0], copies[-1])
    first, last = (content(one)["processes"][0]["losses"]["ahead"] for one in ends)
    assert not torch.equal(first["head.weight"], last["head.weight"])
    # without it the network is another one: the head's gradient reaches it
    run("alone", BUDGET)
    weights = [content(tmp_path / name)["model"]["cell.weight_hh"] for name in ("a", "alone")]
    assert not torch.equal(*weights)


@pytest.fixture(scope="module")
def subgoal_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store of the bot's first 40 episodes on GoToLocal, with its subgoals."""
    folder = tmp_path_factory.mktemp("data")
    recording = planned_recording("GoToLocal", 40, style=Style(subgoals=True))
    generate(recording, folder / "GoToLocal.zarr", workers=1, quiet=True)
    return folder


SUBGOAL = (
    "losses.subgoal.type=subgoal_cross_entropy",
    "stages.0.off_policy.losses={expert_ce = 1.0, subgoal = 0.5}",
)


def test_subgoals_are_learnt_beside_the_actions_by_a_head_that_acting_does_without(
    run: Callable[..., Any], subgoal_data: Path, tmp_path: Path
) -> None:
    keys = {"losses": ["subgoal"], "augment": [], "rollouts": 16, "rollout_len": 16, "updates": 16}
    keyed = [f"stages.0.off_policy.{key}={value}" for key, value in keys.items()]
    fast = ("optimizer.lr=4e-3", "optimizer.schedule.warmup=0.0", "stages.0.max_demo_steps=16384")
    lines = run("a", SUBGOAL[0], *keyed, *fast, data_dir=subgoal_data)
    losses, accuracy = of(lines, "subgoal/loss"), of(lines, "subgoal/accuracy")
    # what the codes alone tell is left behind: the head's gradient reaches the network
    store = open_store(subgoal_data / "GoToLocal.zarr")
    code = store.optional["subgoal"].span(0, store.steps)
    share = np.unique(code, return_counts=True)[1] / store.steps
    assert losses[-1] < 0.7 * -sum(share * np.log(share))
    assert accuracy[-1] > 0.5 > accuracy[0]
    assert not any("head" in name for name in content(tmp_path / "a")["model"])
    result, _ = measured_success(tmp_path / "a", None, None, 4, workers=1)
    assert result.episodes == 4


def test_a_run_that_learns_subgoals_ends_the_same_wherever_it_was_cut(
    run: Callable[..., Any], subgoal_data: Path, tmp_path: Path
) -> None:
    line = (*SUBGOAL, SAVED, "stages.0.max_demo_steps=256")
    run("whole", *line, data_dir=subgoal_data)
    copies = sorted((tmp_path / "whole").glob("after-*.pt"))
    (tmp_path / "cut").mkdir()
    shutil.copy(copies[1], tmp_path / "cut/last.pt")
    run("cut", *line, data_dir=subgoal_data, resume=True)
    assert_same(content(tmp_path / "whole"), content(tmp_path / "cut"))


def test_subgoals_are_refused_where_a_store_or_a_rollout_has_none_and_a_network_no_features(
    run: Callable[..., Any], bot_data: Path, subgoal_data: Path, tmp_path: Path
) -> None:
    def refused(*overrides: str, data: Path = subgoal_data) -> str:
        with pytest.raises(SettingsError) as error:
            run("a", *overrides, data_dir=data)
        assert not (tmp_path / "a").exists()
        return str(error.value)

    told = refused(*SUBGOAL, data=bot_data)
    assert "the loss `subgoal` learns the bot's subgoals, but this store has none" in told
    assert str(bot_data / "GoToLocal.zarr") in told and "generate LEVEL --subgoals" in told
    rollouts = ("on_policy={environments = 4, rollout_len = 4}", "stages.0.losses=['subgoal']")
    told = refused(SUBGOAL[0], *rollouts)
    assert "learns from stores: list it in stages.0.off_policy.losses" in told
    told = refused(*SUBGOAL, "model={type = 'tests.run.test_held:Silent'}")
    assert "the network does not return the input of actor and critic" in told
    assert "add `features` to its output" in told


def test_numbers_are_scalars_of_the_log(run: Callable[..., Any]) -> None:
    lines = run("a", "losses.expert_ce.type=tests.run.test_held:Moving")
    assert of(lines, "expert_ce/count") and set(of(lines, "expert_ce/count")) == {3.0}
    means = of(lines, "expert_ce/mean")
    assert len(means) == len(of(lines, "expert_ce/accuracy")) and means[0] != means[-1]


def test_a_loss_that_comes_with_a_new_stage_brings_its_weights_to_the_optimizer(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    constant = "optimizer.schedule={type='constant'}"
    run("grown", constant, SAVED)
    settings = read_checkpoint(tmp_path / "grown").parsed().model_dump(by_alias=True, mode="json")
    stage = settings["stages"][0]
    later = {**stage, "off_policy": {**stage["off_policy"], "losses": {"ahead": 1.0}}}
    both = {
        **settings,
        "losses": {**settings["losses"], "ahead": {"type": "ahead:Ahead"}},
        "stages": [stage, later],
    }
    for folder, resume in (("whole", False), ("grown", True)):
        run(folder, recipe=both, overrides=(), tiny=False, resume=resume)
    assert_same(content(tmp_path / "whole"), content(tmp_path / "grown"))


def test_state_that_no_checkpoint_can_hold_is_refused_before_the_first_step(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=r"state\['mean'\] is float64") as refused:
        run("a", "losses.expert_ce.type=tests.run.test_held:of_numpy")
    assert refused.value.path == "losses.expert_ce" and not (tmp_path / "a").exists()


def test_state_of_another_loss_is_refused_by_its_name(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    line = ("losses.ahead.type=ahead:Ahead", BOTH)
    run("a", *line)
    saved = torch.load(tmp_path / "a/last.pt", weights_only=True)
    del saved["training"]["processes"][0]["losses"]["ahead"]["head.bias"]
    torch.save(saved, tmp_path / "a/last.pt")
    with pytest.raises(CheckpointError, match="saved state of the loss `ahead` does not fit it"):
        run("a", *line, resume=True)


def test_a_schedule_counts_what_it_is_told_to_count(run: Callable[..., Any]) -> None:
    # a cycle of two updates shows 64 demo steps
    for keys, rates in (
        (f"{LAMBDA}", [0.25, 0.0625, 0.015625, 0.00390625]),
        (f"{LAMBDA}, every_demo_steps=96", [1.0, 0.5, 0.25, 0.25]),
        ("type='linear', demo_steps=512", [0.875, 0.75, 0.625, 0.5]),
        (
            "type='torch.optim.lr_scheduler:StepLR', step_size=2, gamma=0.5, every_demo_steps=64",
            [1.0, 0.5, 0.5, 0.25],
        ),
    ):
        lines = run("a", f"optimizer.schedule={{{keys}}}", "optimizer.lr=1.0", overwrite=True)
        assert of(lines, "lr") == rates, keys


@pytest.mark.parametrize(
    ("schedule", "what"),
    [
        (f"{LAMBDA}, every_demo_steps=0", "demo_steps must be a number of steps"),
        (f"{LAMBDA}, every_demo_steps=5, every_env_steps=5", "not both"),
        ("type='linear', demo_steps=5, env_steps=5", "not both"),
        ("type='linear', every_demo_steps=5", "unknown key `optimizer.schedule.every_demo_steps`"),
        (LAMBDA.replace("test_held:halved", "test_held:none"), "the lr_lambda cannot be imported"),
    ],
)
def test_schedules_that_say_nothing_clear_are_refused(
    schedule: str, what: str, run: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(SettingsError) as refused:
        run("a", f"optimizer.schedule={{{schedule}}}")
    assert what in str(refused.value) and not (tmp_path / "a").exists()


def test_a_function_of_a_schedule_that_fails_keeps_its_traceback(run: Callable[..., Any]) -> None:
    failing_one = LAMBDA.replace("halved", "failing")
    with pytest.raises(ZeroDivisionError) as failure:
        run("a", f"optimizer.schedule={{{failing_one}}}")
    (note,) = failure.value.__notes__
    assert "optimizer.schedule.lr_lambda = 'tests.run.test_held:failing'" in note


def test_the_checkpoint_acts_with_the_averages_of_the_weights(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    line = ("run.ema=0.6", SAVED, "stages.0.off_policy.updates=1", "stages.0.max_demo_steps=256")
    run("a", *line)
    copies = [content(path) for path in sorted((tmp_path / "a").glob("after-*.pt"))]
    # saved after every second update; the one between is not seen
    run("b", *line, "run.save_every_demo_steps=32")
    steps = [content(path) for path in sorted((tmp_path / "b").glob("after-*.pt"))]
    assert len(copies) == 4 and len(steps) == 8
    assert_same(copies[-1]["weights"], steps[-1]["weights"])
    averages = steps[0]["model"]
    for number, step in enumerate(steps[1:], start=2):
        past = min(0.6, (1 + number) / (10 + number))
        for name, values in step["weights"].items():
            averages[name] = past * averages[name] + (1 - past) * values
            torch.testing.assert_close(averages[name], step["model"][name])
    assert not torch.equal(steps[-1]["model"]["actor.0.bias"], steps[-1]["weights"]["actor.0.bias"])
    # training itself is what it is without
    run("c", *line[1:])
    assert_same(content(tmp_path / "c")["model"], dict(steps[-1]["weights"]))
