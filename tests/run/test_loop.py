"""Every recipe from end to end, in its tiny version."""

from __future__ import annotations

import itertools
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from demotools.babyai.levels import EVALUATION_SEED
from demotools.babyai.vocabulary import WORDS
from demotools.errors import DemotoolsError
from demotools.recording.environment import Environment, make_environment
from demotools.store.reading import Store, open_store
from trainer.acting.collect import Rollout, minibatches
from trainer.batch import Batch
from trainer.cli import main
from trainer.data.iterator import ExpertTrajectoryIterator
from trainer.learning.building import LOSSES
from trainer.learning.losses import PPO, LossResult
from trainer.learning.networks.base import Model, Output
from trainer.learning.networks.small import SmallNetwork
from trainer.run.checkpoint import read_checkpoint
from trainer.run.cost import expected_cost
from trainer.run.log import read_log
from trainer.run.loop import run_stages
from trainer.run.state import (
    HoldOut,
    check_minibatches,
    latest,
    new_run,
    rollout_updates,
    stage_plan,
)
from trainer.settings.models import Settings, parsed_settings, read_settings, shipped_recipes
from trainer.team import StopRequest, Team

ON_POLICY = ("ppo", "dagger_then_ppo", "bc_and_ppo", "dagger_then_ppo_cpu")
EXACT = ("--tiny", "--set", "run.deterministic=true", "--set", "evaluation=", "-m", "1", "-q")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(bot_data: Path, tmp_path: Path) -> Callable[..., Result]:
    """`run("ppo", "a")` trains into the folder a of the test's own."""

    def trainer_run(recipe: str, folder: str, *arguments: str) -> Result:
        line = [
            "run",
            recipe,
            "-o",
            str(tmp_path / folder),
            "--data-dir",
            str(bot_data),
            *arguments,
        ]
        return CliRunner().invoke(main, line)

    return trainer_run


def weights(folder: Path) -> dict[str, Tensor]:
    return read_checkpoint(folder, trust=True).model


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def of_group(folder: Path, group: str) -> list[dict[str, Any]]:
    return [line for line in read_log(folder) if line["group"] == group]


def failure_of(result: Result) -> str:
    """What the command line says of a failure: the user's own error with its notes, or ours."""
    error = result.exception
    if isinstance(error, SystemExit):
        error = error.__cause__
    return "\n".join(map(str, [error, *getattr(error, "__notes__", [])]))


@pytest.mark.parametrize("recipe", shipped_recipes())
def test_every_recipe_runs_from_end_to_end_in_its_tiny_version(
    recipe: str, run: Callable[..., Result], tmp_path: Path
) -> None:
    demos, here = read_settings(recipe).stages[0].off_policy, []
    if (
        demos is not None and demos.store[0].name != "auto"
    ):  # the fixture has a store of GoToLocal only
        here = ["--set", "run.level=GoToLocal", "--set", "stages.0.off_policy.store=GoToLocal"]
    result = run(recipe, "a", "--tiny", "-m", "1", "--set", "evaluation.episodes=2", *here)
    assert result.exit_code == 0, result.output
    folder = tmp_path / "a"
    assert "2 episodes" in result.output
    groups = {line["group"] for line in read_log(folder)}
    assert {"train", "evaluation"} <= groups
    assert ("onpolicy" in groups) == (recipe.removesuffix(".toml") in ON_POLICY)
    assert (folder / "curve.png").is_file()
    assert len(list(folder.glob("after-*.pt"))) == (2 if "onpolicy" in groups else 0)


def test_a_recipe_can_shuffle_a_store_larger_than_memory_in_windows(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # so that the small store of the test has many windows
    monkeypatch.setattr("trainer.data.sources._WINDOW_BYTES", 5_000)
    exact = ("--tiny", "-m", "1", "--set", "evaluation=", "--set", "run.deterministic=true")
    for name in ("full", "windowed"):
        shuffle = f"stages.0.off_policy.shuffle={name}"
        result = run("bc_offpolicy", name, *exact, "--set", shuffle)
        assert result.exit_code == 0, result.output
        assert run("bc_offpolicy", f"{name}-again", *exact, "--set", shuffle).exit_code == 0
        assert same_weights(tmp_path / name, tmp_path / f"{name}-again")
    assert not same_weights(tmp_path / "full", tmp_path / "windowed")
    refused = run("bc_offpolicy", "c", *exact, "--set", "stages.0.off_policy.shuffle=fully")
    assert refused.exit_code == 1 and "shuffle" in refused.output


def test_teacher_forcing_is_logged_as_asked_and_as_applied_and_fades(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    assert run("dagger_then_ppo", "a", *EXACT).exit_code == 0
    lines = of_group(tmp_path / "a", "environment")
    forced = [line for line in lines if "forcing_asked" in line]
    assert [line["env_steps"] for line in forced] == [32, 64, 96]
    assert [line["forcing_asked"] for line in forced] == pytest.approx(
        [1 - (first + 14) / 96 for first in (0, 32, 64)]
    )
    assert forced[0]["forcing_applied"] > forced[-1]["forcing_applied"]
    # the stage of PPO forces nothing
    assert all(line["env_steps"] <= 96 for line in forced)


def test_the_clip_and_the_learning_rate_decay_by_environment_steps(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    decay = ("--set", "optimizer.schedule.env_steps=256")
    assert run("ppo", "a", *EXACT, *decay).exit_code == 0
    rates = [line["lr"] for line in of_group(tmp_path / "a", "train")]
    assert rates == pytest.approx([2.5e-4 * (1 - steps / 256) for steps in (32, 64, 96, 128)])


@pytest.mark.parametrize("recipe", ON_POLICY)
def test_a_run_taken_up_from_its_last_checkpoint_ends_with_the_same_weights(
    recipe: str, run: Callable[..., Result], tmp_path: Path
) -> None:
    # the checkpoint of an interval lies in the middle, as after a kill
    assert run(recipe, "whole", *EXACT, "--set", "run.keep=9").exit_code == 0
    copies = sorted((tmp_path / "whole").glob("after-*.pt"))
    assert len(copies) >= 2
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/last.pt").write_bytes(copies[0].read_bytes())
    resumed = run(recipe, "cut", *EXACT, "--set", "run.keep=9", "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert same_weights(tmp_path / "whole", tmp_path / "cut")


def killed(line: list[str], folder: Path, how: int, wait: float) -> bool:
    """Start a run and end it by a signal while it trains; whether it was still running."""
    settings = folder / "settings.toml"
    before = settings.stat().st_mtime_ns if settings.exists() else 0
    process = subprocess.Popen(line, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 60
    # it is written again when all is prepared and the first step is near
    while process.poll() is None and not (
        settings.exists() and settings.stat().st_mtime_ns > before and (folder / "last.pt").exists()
    ):
        assert time.monotonic() < limit
        time.sleep(0.01)
    time.sleep(wait)
    going = process.poll() is None
    process.send_signal(how)
    assert process.wait(60) in (-how, 128 + how, 0)
    return going


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ON_POLICY)
def test_a_run_killed_at_random_moments_ends_with_the_same_weights(
    recipe: str, bot_data: Path, tmp_path: Path
) -> None:
    longer = {
        "ppo": ["stages.0.max_env_steps=8000"],
        "dagger_then_ppo": ["stages.0.max_env_steps=3000", "stages.1.max_env_steps=3000"],
        "bc_and_ppo": ["stages.0.max_env_steps=6000"],
        "dagger_then_ppo_cpu": ["stages.0.max_env_steps=3000", "stages.1.max_env_steps=3000"],
    }[recipe]
    line = [sys.executable, "-m", "trainer", "run", recipe, "--data-dir", str(bot_data), *EXACT]
    for setting in longer:
        line += ["--set", setting]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run([*line, "-o", str(whole)], env=ENVIRONMENT, check=True)
    moments, going = random.Random(recipe), 0
    for how in [signal.SIGTERM, signal.SIGKILL, signal.SIGINT] * 3 + [signal.SIGKILL]:
        here = [*line, "-o", str(cut)] + (["--resume"] if cut.exists() else [])
        going += killed(here, cut, how, moments.uniform(0.0, 0.8))
    assert going == 10
    subprocess.run([*line, "-o", str(cut), "--resume"], env=ENVIRONMENT, check=True)
    assert same_weights(whole, cut)
    assert [line["env_steps"] for line in of_group(whole, "environment")] == [
        line["env_steps"] for line in of_group(cut, "environment")
    ]


def test_a_stage_ends_early_when_enough_episodes_succeed(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    rule = ("--set", "stages.0.early_stopping={success=0.01, episodes=3}")
    result = run(*("ppo", "a", *EXACT[:-1], *rule, "--set", "stages.0.max_env_steps=100000"))
    assert result.exit_code == 0
    assert "of the last 3 training episodes succeeded" in result.output
    progress = read_checkpoint(tmp_path / "a", trust=True).training["progress"]
    assert progress["env_steps"] < 5000
    assert progress["stage_over"]


def test_a_stage_ends_early_when_the_hold_out_store_gets_no_better(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    rule = ("--set", 'stages.0.early_stopping={patience=2, hold_out="GoToLocal"}')
    still = ("--set", "optimizer.lr=1e-30", "--set", "stages.0.max_demo_steps=10000")
    assert run("bc_small_cpu", "a", *EXACT, *rule, *still).exit_code == 0
    lines = of_group(tmp_path / "a", "offpolicy")
    assert len(lines) == 3 and all(line["hold_out_loss"] > 0 for line in lines)


@pytest.mark.parametrize("ema", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_best_weights_by_the_hold_out_store_stay_and_are_those_evaluated(
    ema: bool, run: Callable[..., Result], bot_data: Path, tmp_path: Path
) -> None:
    rule = ("--set", 'stages.0.early_stopping={patience=3, hold_out="GoToLocal"}')
    rule = (*rule, *(("--set", "run.ema=0.5") if ema else ()))
    worse = ("--set", "optimizer.lr=0.3", "--set", "stages.0.max_demo_steps=10000")
    result = run(
        "bc_small_cpu", "a", "--tiny", "-m", "1", "--set", "evaluation.episodes=2", *rule, *worse
    )
    assert result.exit_code == 0, result.output
    seen = [line["hold_out_loss"] for line in of_group(tmp_path / "a", "offpolicy")]
    assert min(seen) == min(seen[:-3]) < seen[-1]
    board = EventAccumulator(str(tmp_path / "a/tensorboard")).Reload()
    drawn = [point.value for point in board.Scalars("offpolicy/hold_out_loss")]
    assert drawn == pytest.approx(seen)
    best = read_checkpoint(tmp_path / "a/best.pt", trust=True)
    store = open_store(bot_data / "GoToLocal.zarr")
    assert HoldOut(store, best.network()).cross_entropy() == pytest.approx(min(seen), rel=1e-5)
    assert f"the hold-out loss on GoToLocal has not fallen below {min(seen):.4f} for 3 cycles" in (
        result.output
    )
    assert f"with the best weights, best.pt: hold-out loss {min(seen):.4f}" in result.output
    # the last weights are what a run goes on from
    last = read_checkpoint(tmp_path / "a", trust=True)
    assert HoldOut(store, last.network()).cross_entropy() == pytest.approx(seen[-1], rel=1e-5)
    (tmp_path / "a/best.pt").write_bytes(b"no more")
    again = run(
        *("bc_small_cpu", "a", "--tiny", "-m", "1", "--set", "evaluation.episodes=2"),
        *(*rule, *worse, "--resume"),
    )
    assert again.exit_code == 0, again.output
    assert "measured with the last weights, not the best: this is not a checkpoint" in again.output


def test_the_hold_out_loss_is_that_of_every_step_of_the_store_once(
    make_store: Callable[..., Store],
) -> None:
    random = np.random.default_rng(0)
    store = make_store(lengths=random.integers(1, 90, 150).tolist())
    torch.manual_seed(0)
    network = torch.nn.Module.train(SmallNetwork(len(WORDS)))
    found = HoldOut(store, network).cross_entropy()
    assert network.training
    assert HoldOut(store, network).cross_entropy() == found
    tokens = ExpertTrajectoryIterator(store, rollouts=1, rollout_len=1).mission_tokens
    total = 0.0
    network.eval()
    for number in range(store.episodes):
        start, stop = map(int, store.episode_offset[number : number + 2])
        count = stop - start
        batch = {
            "cells": torch.from_numpy(store.view.span(start, stop).copy())[:, None],
            "direction": torch.from_numpy(store.direction.span(start, stop).copy())[:, None],
            "masks": (torch.arange(count) > 0).to(torch.uint8)[:, None],
            "mission": torch.zeros(count, 1, dtype=torch.int64),
            "mission_tokens": tokens[int(store.episode_mission[number])][None],
        }
        with torch.no_grad():
            logits = network(batch, network.initial_memory(1)).logits[:, 0].double()
        actions = store.action.span(start, stop).astype(int)
        total -= float(logits.log_softmax(1).numpy()[np.arange(count), actions].sum())
    assert found == pytest.approx(total / store.steps, rel=1e-4)


class Counting(torch.nn.Module):
    """Notes how many steps it is asked about, and says nothing of them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def initial_memory(self, rollouts: int) -> Tensor:
        return torch.zeros(rollouts, 1)

    def forward(self, batch: Batch, memory: Tensor) -> Output:
        self.seen.append(int((batch["expert_action"] >= 0).sum()))
        return Output(torch.zeros(*batch["masks"].shape, 7), batch["masks"].float(), memory)


def test_all_of_a_large_hold_out_store_is_judged_or_so_many_steps_of_it(
    make_store: Callable[..., Store],
) -> None:
    store, network = make_store(lengths=[200] * 400), Counting()
    every, some = HoldOut(store, network), HoldOut(store, network, 1000)
    for hold_out, least, most in ((every, 80_000, 80_000), (some, 1000, 1000 + 128 * 40)):
        for _ in range(2):
            network.seen.clear()
            assert hold_out.cross_entropy() == pytest.approx(np.log(7))
            assert least <= sum(network.seen) <= most


# Ends the process in place of the K-th renaming: after one file of a run, before the next.
KILLED_BETWEEN = """
import os, signal, sys
import trainer.run.resume

trainer.run.resume._FEW_EPISODES = 1
replace, left = os.replace, [int(sys.argv.pop(1))]


def killing(source, target, **more):
    if str(target).endswith((".pt",)):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return replace(source, target, **more)


os.replace = killing
from trainer.cli import main

main()
"""


SLOW = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.parametrize("moment", [2, 3, 4])
def test_the_best_checkpoint_is_there_when_the_last_one_says_so_wherever_a_kill_falls(
    moment: int, bot_data: Path, tmp_path: Path
) -> None:
    settings = [
        *("run", "ppo", *EXACT, "--set", "on_policy.rollout_len=50", "--set", "run.keep=1"),
        *("--set", "stages.0.max_env_steps=800", "--set", "run.save_every_env_steps=200"),
        *("--data-dir", str(bot_data)),
    ]

    def ended(folder: str, kill: int, *more: str) -> int:
        line = [sys.executable, "-c", KILLED_BETWEEN, str(kill), *settings, *more]
        return subprocess.run(
            [*line, "-o", str(tmp_path / folder)], env=ENVIRONMENT, timeout=100, check=False
        ).returncode

    assert ended("whole", 0) == 0
    assert ended("cut", moment) == -signal.SIGKILL
    if (tmp_path / "cut/last.pt").exists():
        claimed = read_checkpoint(tmp_path / "cut", trust=True).training["progress"]["best_success"]
        if claimed:
            best = read_checkpoint(tmp_path / "cut/best.pt", trust=True).training["progress"]
            assert best["best_success"] >= claimed
    more = ["--resume"] if (tmp_path / "cut/last.pt").exists() else ["--overwrite"]
    assert ended("cut", 0, *more) == 0
    for name in ("best.pt", "last.pt"):
        assert same_weights(tmp_path / "whole" / name, tmp_path / "cut" / name)


@pytest.mark.slow
def test_memory_that_is_not_enough_is_told_with_the_settings_that_lower_it(
    bot_data: Path, tmp_path: Path
) -> None:
    limited = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30)); "
        "from trainer.cli import main; main()"
    )
    settings = [
        *("run", "bc_small_cpu", *EXACT, "--set", "on_policy=", "-o", str(tmp_path / "a")),
        *("--set", "stages.0.off_policy.rollouts=60", "--data-dir", str(bot_data)),
        *("--set", "stages.0.off_policy.rollout_len=20000", "--set", "run.device=cpu"),
    ]
    line = [sys.executable, "-c", limited, *settings]
    result = subprocess.run(
        line, env=ENVIRONMENT, capture_output=True, text=True, timeout=100, check=False
    )
    assert result.returncode == 1, result.stderr
    assert "error: out of memory: " in result.stderr
    assert (
        "\n  next:  reduce off_policy.rollouts, on_policy.environments or their rollout_len"
        in result.stderr
    )
    assert "Traceback" not in result.stderr


def test_a_run_whose_reader_has_gone_goes_on_to_its_end(bot_data: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "trainer", "run", "bc_small_cpu", "--tiny", "-m", "1"]
    line += ["-o", str(tmp_path / "a"), "--data-dir", str(bot_data)]
    with subprocess.Popen(
        line, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()  # as `| head` does
        told = process.stderr.read()
    assert process.returncode == 0, told
    assert "nothing reads the output any more; the run continues" in told
    assert of_group(tmp_path / "a", "evaluation")
    assert (tmp_path / "a/curve.png").is_file()


@pytest.mark.parametrize(
    ("variables", "drawn"),
    [
        ({"MPLBACKEND": "module://no_such_notebook"}, True),
        pytest.param({"MPLBACKEND": "no such backend"}, True, marks=SLOW),
        ({"PATH": "", "MATPLOTLIBRC": "with_tex"}, False),  # TeX is asked for, and not there
    ],
)
def test_a_picture_depends_on_no_window_and_where_it_fails_no_run_does(
    variables: dict[str, str], drawn: bool, bot_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "with_tex").write_text("text.usetex: True", "utf-8")
    program = [sys.executable, "-m", "trainer"]
    data = ["--data-dir", str(bot_data)]
    root = str(Path(__file__).parents[2])

    def ended(*arguments: str) -> Any:
        return subprocess.run(
            [*program, *arguments],
            env={**ENVIRONMENT, **variables, "PYTHONPATH": root},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    result = ended("run", "bc_small_cpu", "--tiny", "-m", "1", "-o", "a", *data)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    said = "learning curve: a/curve.png" if drawn else "no learning curve was drawn: the curves"
    assert said in result.stdout
    for command, output in (("plot", "b.png"), ("report", "b.html")):
        other = ended(command, "a", "-o", output)
        if drawn:
            assert other.returncode == 0, other.stderr
        elif other.returncode:  # text of a page is no TeX
            assert "error: the curves cannot be drawn" in other.stderr
            assert "Traceback" not in other.stderr


@given(st.lists(st.lists(st.booleans(), max_size=9), min_size=1, max_size=4), st.integers(1, 12))
def test_the_latest_episodes_are_those_of_all_processes_alike(
    by_rank: list[list[bool]], count: int
) -> None:
    taken = latest(by_rank)
    assert sorted(taken) == sorted(success for of_rank in by_rank for success in of_rank)
    # so many turns, in which each process had its own latest ones
    shares = [of_rank[::-1][:count] for of_rank in by_rank]
    fair = [success for share in shares for success in share]
    assert sorted(taken[: len(fair)]) == sorted(fair)


class Widths(SmallNetwork):
    """Notes how many rollouts or environments it is asked about at once."""

    asked: ClassVar[set[int]] = set()

    def forward(self, batch: Batch, memory: Tensor) -> Output:
        self.asked.add(batch["masks"].shape[1])
        return super().forward(batch, memory)


@pytest.mark.parametrize(("world", "widths"), [(1, {16, 12}), (4, {4, 3})])
def test_the_cost_is_measured_on_the_share_of_this_process(
    world: int, widths: set[int], bot_data: Path, tmp_path: Path
) -> None:
    settings = read_settings(
        "bc_and_ppo",
        [
            *("run.device=cpu", "model.type=small", "stages.0.off_policy.store=GoToLocal"),
            *("on_policy.environments=12", "stages.0.off_policy.rollouts=16", "stages.0.losses=[]"),
        ],
        tiny=True,
    )
    store = open_store(bot_data / "GoToLocal.zarr")
    Widths.asked.clear()
    run = new_run(settings, {"GoToLocal": store}, WORDS, tmp_path, Team(world - 1, 1))
    run.network, run.team = Widths(len(WORDS)), Team(world - 1, world)
    expected_cost(run)
    assert Widths.asked == widths


def test_the_best_checkpoint_by_success_is_kept(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.run.resume._FEW_EPISODES", 1)
    longer = ("--set", "stages.0.max_env_steps=2000", "--set", "on_policy.rollout_len=50")
    assert run("ppo", "a", *EXACT, *longer).exit_code == 0
    best = read_checkpoint(tmp_path / "a/best.pt", trust=True).training["progress"]
    last = read_checkpoint(tmp_path / "a", trust=True).training["progress"]
    assert 0 < best["best_success"] == last["best_success"]


def not_a_number() -> Any:
    """A loss that is not a number from its third batch on."""
    calls: list[int] = []

    def loss(model: Model, batch: Batch, memory: Tensor) -> LossResult:
        output = model(batch, memory)
        calls.append(1)
        factor = float("nan") if len(calls) > 2 else 1.0
        return LossResult(output.logits.mean() * factor, {}, output.memory, 1)

    return loss


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_what_it_was(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    loss = ("--set", "losses.ppo={type='tests.run.test_loop:not_a_number'}")
    result = run("ppo", "a", *EXACT, *loss)
    assert result.exit_code == 1
    assert "the loss ppo became nan at update 2 (env step 32" in result.output
    assert "the weights before it are finite" in result.output
    # there is no last.pt yet; and with another learning rate no run is resumed
    assert "start over" in result.output and "--resume" not in result.output
    saved = read_checkpoint(tmp_path / "a/failed.pt", trust=True).training
    assert saved["batch"]["cells"].shape[1] == 2
    assert saved["progress"]["updates"] == 2


def test_where_the_environments_fail_the_checkpoint_is_written_first(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    fragile = ("--set", "on_policy.environment=tests.acting.test_vector:make_fragile")
    never = ("--set", "run.save_every_env_steps=")
    result = run("ppo", "a", "--tiny", "-q", "-m", "2", *fragile, *never)
    assert result.exit_code == 1
    assert "exit code 3" in result.output and "at seed 5" in result.output
    assert read_checkpoint(tmp_path / "a", trust=True).training["processes"][0]["stage"][
        "collector"
    ]


class Breaking(SmallNetwork):
    """A network that fails at its fourth batch with a gradient, while BREAK is 1."""

    batches = 0

    def forward(self, batch: Batch, memory: Tensor) -> Output:
        training = torch.is_grad_enabled() and batch["masks"].shape[0] == 8
        Breaking.batches += training
        if training and Breaking.batches == 4 and os.environ.get("BREAK") == "1":
            raise ZeroDivisionError("nothing is left")
        return super().forward(batch, memory)


def make_breaking(level: str) -> Environment:
    """An environment that fails at its 40th step, after the estimate, while BREAK is 1."""
    environment = make_environment(level)
    step, steps = environment.step, itertools.count(1)

    def breaking_step(action: int) -> Any:
        if next(steps) == 40 and os.environ.get("BREAK") == "1":
            raise ZeroDivisionError("nothing is left")
        return step(action)

    environment.step = breaking_step  # type: ignore[method-assign]
    return environment


@pytest.mark.parametrize(
    ("part", "what"),
    [
        ("model.type=tests.run.test_loop:Breaking", "nothing is left"),
        (
            "on_policy.environment=tests.run.test_loop:make_breaking",
            "in the episode of seed 5005",
        ),
    ],
)
def test_where_a_part_of_the_users_fails_the_run_is_saved_and_goes_on_once_it_is_mended(
    part: str,
    what: str,
    run: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    longer = ("--set", "run.save_every_env_steps=", "--set", "stages.0.max_env_steps=256")
    line = (*EXACT, "--set", part, *longer)
    monkeypatch.setattr(Breaking, "batches", 0)
    monkeypatch.setenv("BREAK", "1")
    result = run("ppo", "a", *line)
    assert result.exit_code == 1
    failure = failure_of(result)
    assert what in failure and "--resume continues it" in failure
    setting, _, name = part.partition("=")
    assert f"named by the setting {setting.removeprefix('on_policy.')} = {name!r}" in failure
    progress = read_checkpoint(tmp_path / "a", trust=True).training["progress"]
    assert progress["env_steps"] < 256
    monkeypatch.setenv("BREAK", "0")
    resumed = run("ppo", "a", *line, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert read_checkpoint(tmp_path / "a", trust=True).training["progress"]["env_steps"] == 256


class Failing:
    """A part of the user's that fails when its FAIL-th call comes, and always once mended."""

    calls = 0

    @classmethod
    def call(cls, part: str) -> None:
        if os.environ.get("FAIL_IN") != part:
            return
        cls.calls += 1
        if cls.calls == int(os.environ["FAIL_AT"]):
            raise ZeroDivisionError("nothing is left")


class _FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:  # noqa: ARG004 - torch's names
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004
        Failing.call("backward")
        return gradients[0]


class FailingNetwork(SmallNetwork):
    """Draws at random in every pass, as dropout does, and counts them in a buffer."""

    def __init__(self, words: int) -> None:
        super().__init__(words)
        self.register_buffer("passes", torch.zeros(1))

    def forward(self, batch: Batch, memory: Tensor) -> Output:
        output = super().forward(batch, memory)
        if not torch.is_grad_enabled():
            return output
        self.get_buffer("passes").add_(1)
        noise = torch.rand_like(output.logits) / 10
        Failing.call("network")
        logits = _FailingBackward.apply(output.logits + noise)  # type: ignore[no-untyped-call]
        return output._replace(logits=logits)


class FailingAdam(torch.optim.Adam):
    """Fails when half of the weights have moved."""

    def step(self, closure: Any = None) -> Any:
        whole = self.param_groups[0]["params"]
        self.param_groups[0]["params"] = whole[: len(whole) // 2]
        super().step(closure)
        try:
            Failing.call("optimizer")
        finally:
            self.param_groups[0]["params"] = whole
        self.param_groups[0]["params"] = whole[len(whole) // 2 :]
        super().step(closure)
        self.param_groups[0]["params"] = whole
        return None


def failing_loss(kind: str) -> Any:
    known = LOSSES[kind]()

    def loss(model: Model, batch: Batch, memory: Tensor) -> LossResult:
        result = known(model, batch, memory)
        Failing.call("loss")
        not_finite = os.environ.get("FAIL_IN") == "nan" and torch.is_grad_enabled()
        if not_finite:
            Failing.calls += 1
            if Failing.calls == int(os.environ["FAIL_AT"]):
                return result._replace(loss=result.loss * float("nan"))
        return result

    return loss


def make_failing(level: str) -> Environment:
    environment = make_environment(level)
    step = environment.step

    def failing_step(action: int) -> Any:
        Failing.call("environment")
        return step(action)

    environment.step = failing_step  # type: ignore[method-assign]
    return environment


MENDED = (
    *("--set", "model.type=tests.run.test_loop:FailingNetwork"),
    *("--set", "optimizer.type=tests.run.test_loop:FailingAdam"),
)
LINES = {
    "cloning": (
        *("bc_small_cpu", *EXACT, *MENDED, "--set", "on_policy="),
        *("--set", "losses.expert_ce.type=tests.run.test_loop:failing_loss"),
        *("--set", "losses.expert_ce.kind=expert_cross_entropy"),
        *("--set", "stages.0.off_policy.updates=4", "--set", "stages.0.max_demo_steps=384"),
    ),
    "reinforced": (
        *("bc_and_ppo", *EXACT, *MENDED, "--set", "run.save_every_env_steps=32"),
        *("--set", "losses.ppo={type='tests.run.test_loop:failing_loss', kind='ppo'}"),
        *("--set", "on_policy.environment=tests.run.test_loop:make_failing"),
    ),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, bot_data: Path) -> dict[str, Path]:
    """The folders of runs in which nothing failed, only to be read."""
    folders = {}
    for name, (recipe, *settings) in LINES.items():
        folder = folders[name] = tmp_path_factory.mktemp("undisturbed") / name
        line = ["run", recipe, *settings, "-o", str(folder), "--data-dir", str(bot_data)]
        result = CliRunner().invoke(main, line)
        assert result.exit_code == 0, result.output
    return folders


@pytest.mark.parametrize("part", ["network", "loss", "backward", "optimizer", "nan", "environment"])
@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("cloning", 9),  # update 6, after the estimate of the cost
        ("cloning", 13),
        ("reinforced", 17),  # the third update on the second rollout
        ("reinforced", 24),  # the second update from the store, after that rollout
    ],
)
def test_a_run_that_a_part_of_the_users_ended_goes_on_as_if_it_had_not(
    part: str,
    name: str,
    calls: int,
    run: Callable[..., Result],
    undisturbed: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if part == "environment":
        if name == "cloning":
            pytest.skip("it has none")
        calls = 138 + calls  # the estimate steps them 128 times, a cycle 32 times
    recipe, *settings = LINES[name]
    monkeypatch.setattr(Failing, "calls", 0)
    monkeypatch.setenv("FAIL_IN", part)
    monkeypatch.setenv("FAIL_AT", str(calls))
    failed = run(recipe, "cut", *settings)
    assert failed.exit_code == 1, failed.output
    failure = failure_of(failed)
    assert ("became nan" if part == "nan" else "nothing is left") in failure
    assert part == "nan" or "--resume continues it" in failure
    monkeypatch.delenv("FAIL_IN")
    resumed = run(recipe, "cut", *settings, "--resume")
    assert resumed.exit_code == 0, resumed.output
    folders = undisturbed[name], tmp_path / "cut"
    assert same_weights(*folders)
    progress = [read_checkpoint(folder, trust=True).training["progress"] for folder in folders]
    assert progress[0] | {"minutes": 0} == progress[1] | {"minutes": 0}
    shown = ("group", "env_steps", "demo_steps", "loss", "success")
    series = [[[line.get(key) for key in shown] for line in read_log(one)] for one in folders]
    assert series[0] == series[1]


def changed(*overrides: str) -> Settings:
    return read_settings("ppo", ["run.device=cpu", "model.type=small", *overrides], tiny=True)


@given(
    rows=st.integers(1, 7),
    minibatches_=st.integers(1, 7),
    repeats=st.integers(1, 3),
    rollout_len=st.integers(1, 4),
    budget=st.integers(1, 60),
)
@example(rows=5, minibatches_=4, repeats=1, rollout_len=2, budget=20)
@hypothesis_settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_as_many_updates_are_made_as_planned_and_the_rate_ends_where_it_should(
    tmp_path: Path, rows: int, minibatches_: int, repeats: int, rollout_len: int, budget: int
) -> None:
    settings = changed(
        f"on_policy.environments={max(rows, minibatches_)}",
        f"on_policy.rollout_len={rollout_len}",
        f"stages.0.minibatches={minibatches_}",
        f"stages.0.repeats={repeats}",
        f"stages.0.max_env_steps={budget}",
        "optimizer.schedule={type='linear', to=0.25}",
        "optimizer.max_grad_norm=",
        "run.save_every_env_steps=",
    )
    run = new_run(settings, {}, WORDS, tmp_path)
    run_stages(run, StopRequest())
    rate = run.schedule.rate()
    assert run.progress.updates == stage_plan(settings.stages[0], settings.on_policy).updates
    assert rate == pytest.approx(0.25 * settings.optimizer.lr)


@given(
    share=st.integers(1, 6),
    world=st.integers(1, 4),
    minibatches_=st.integers(1, 12),
    repeats=st.integers(1, 3),
)
def test_every_process_has_whole_environments_for_each_minibatch_or_the_run_is_refused(
    share: int, world: int, minibatches_: int, repeats: int
) -> None:
    stage = {
        "max_env_steps": 64,
        "losses": ["ppo"],
        "minibatches": minibatches_,
        "repeats": repeats,
    }
    tree = {
        "run": {"name": "a", "level": "GoToLocal"},
        "optimizer": {"lr": 0.1},
        "on_policy": {"environments": share * world, "rollout_len": 4},
        "losses": {"ppo": {"type": "ppo"}},
        "stages": [stage],
    }
    team = Team(world - 1, world)
    try:
        settings = parsed_settings(tree, "a.toml")
        check_minibatches(settings, team)
    except DemotoolsError as refused:
        assert minibatches_ > share
        assert "minibatches" in str(refused)
        return
    batch = {"masks": torch.zeros(4, share), "stage_steps": torch.tensor(0)}
    rollout = Rollout(batch, torch.zeros(share, 3), np.zeros((0, 2)))
    dealt = [minibatches(rollout, minibatches_) for _ in range(repeats)]
    assert sum(map(len, dealt)) == rollout_updates(settings.stages[0])
    for one in dealt:
        widths = [memory.shape[0] for _batch, memory in one]
        assert sum(widths) == share and min(widths) >= 1 and max(widths) - min(widths) <= 1


def test_an_update_that_goes_too_far_is_the_last_of_its_rollout_and_the_rate_still_ends(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    settings = (
        *EXACT,
        "--set",
        "stages.0.repeats=4",
        "--set",
        "optimizer.lr=0.01",
        "--set",
        "optimizer.schedule={type='linear', to=0.5}",
    )
    assert run("ppo", "free", *settings).exit_code == 0
    assert run("ppo", "held", *settings, "--set", "losses.ppo.target_kl=0.0001").exit_code == 0
    free, held = (
        read_checkpoint(tmp_path / name, trust=True).training for name in ("free", "held")
    )
    lines = of_group(tmp_path / "held", "onpolicy")
    assert held["progress"]["env_steps"] == free["progress"]["env_steps"] == 128
    assert held["progress"]["updates"] == sum(line["updates"] for line in lines)
    assert held["progress"]["updates"] < free["progress"]["updates"]
    # one update of a rollout at least, and the first is by the policy that acted
    assert all(line["updates"] >= 2 for line in lines)
    assert "updates" not in of_group(tmp_path / "free", "onpolicy")[0]
    for name in ("free", "held"):
        assert of_group(tmp_path / name, "train")[-1]["lr"] == pytest.approx(0.005)


def test_changed_settings_are_refused_by_name_and_harmless_ones_forced(
    run: Callable[..., Result],
) -> None:
    assert run("ppo", "a", *EXACT).exit_code == 0
    grave = run("ppo", "a", *EXACT, "--resume", "--set", "optimizer.lr=0.1", "--force-settings")
    assert grave.exit_code == 1 and "different settings: `optimizer.lr`\n" in grave.output
    harmless = ("--resume", "--set", "run.keep=5")
    refused = run("ppo", "a", *EXACT, *harmless)
    assert refused.exit_code == 1 and "add --force-settings" in refused.output
    assert run("ppo", "a", *EXACT, *harmless, "--force-settings").exit_code == 0


@pytest.mark.parametrize(
    ("recipe", "arguments", "what"),
    [
        ("ppo", ["stages.0.max_demo_steps=5"], "exactly one of max_env_steps and max_demo"),
        ("ppo", ["stages.0.max_env_steps="], "exactly one of max_env_steps and max_demo"),
        ("ppo", ["stages.0.losses=['pppo']"], "did you mean ppo"),
        ("bc_small_cpu", ["losses.expert_ce.type=a2c"], "list it in stages.0.losses"),
        ("ppo", ["run.level=GoToNowhere"], "GoToNowhere"),
        ("ppo", ["run.level=PutNext"], "cannot be played"),
        ("ppo", ["on_policy.environment=no.such:make"], "the environment cannot be imported"),
        ("ppo", ["on_policy.environment=gymnasium:make"], "no environment for the level"),
        ("ppo", ["stages.0.minibatches=5"], "at most on_policy.environments (4)"),
        ("ppo", ["stages.0.early_stopping={}"], "exactly one of success and patience"),
        *(
            ("ppo", [f"optimizer={{type='{name}', lr=0.1}}"], f"rejects its settings: {why}")
            for name, why in (
                ("torch.optim:LBFGS", "TypeError: LBFGS.step() missing"),
                ("torch.optim:SparseAdam", "RuntimeError: SparseAdam does not support dense"),
            )
        ),
        *(
            (
                "ppo",
                [f"optimizer.schedule={{type='{name}'{keys}}}"],
                f"the schedule rejects its settings: {why}",
            )
            for name, keys, why in (
                ("torch.optim.lr_scheduler:ReduceLROnPlateau", "", "TypeError: ReduceLROnPlat"),
                (
                    "torch.optim.lr_scheduler:OneCycleLR",
                    ", max_lr=0.1, total_steps=3",
                    "Tried to step",
                ),
                (
                    "torch.optim.lr_scheduler:ExponentialLR",
                    ", gamma=1e200",
                    "the learning rate becomes inf",
                ),
            )
        ),
        ("ppo", ["run.wandb=project"], "Weights & Biases is not installed"),
        (
            "dagger_then_ppo",
            ["on_policy.environment=gymnasium:make", "run.level=MiniGrid-GoToDoor-5x5-v0"],
            "cross-entropy against the expert needs an expert",
        ),
        (
            "ppo",
            [
                "on_policy.environment=gymnasium:make",
                "run.level=MiniGrid-GoToDoor-5x5-v0",
                "stages.0.teacher_forcing={steps=9}",
            ],
            "teacher forcing needs an expert",
        ),
    ],
)
def test_wrong_settings_are_refused_in_three_parts_before_anything_is_written(
    recipe: str, arguments: list[str], what: str, run: Callable[..., Result], tmp_path: Path
) -> None:
    line = [part for setting in arguments for part in ("--set", setting)]
    result = run(recipe, "a", "--tiny", "-m", "1", *line)
    assert result.exit_code == 1, result.output
    assert what in result.output
    assert "\n  where: " in result.output and "\n  next:  " in result.output
    assert not (tmp_path / "a/last.pt").exists()


def test_of_more_processes_than_environments_as_many_start_as_there_are_environments(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    assert run("ppo", "a", *EXACT, "-m", "5").exit_code == 0
    assert run("ppo", "b", *EXACT).exit_code == 0
    assert same_weights(tmp_path / "a", tmp_path / "b")


def test_a_checkpoint_of_another_vocabulary_is_refused_with_the_word(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    assert run("ppo", "a", *EXACT).exit_code == 0
    file = tmp_path / "a/last.pt"
    content = torch.load(file, weights_only=True)
    content["words"][3] = "giraffe"
    torch.save(content, file)
    result = run("ppo", "a", *EXACT, "--resume")
    assert result.exit_code == 1
    assert "different vocabulary" in result.output


def test_an_environment_that_is_not_babyais_trains_with_the_same_settings(
    run: Callable[..., Result],
) -> None:
    other = (
        *("--set", "on_policy.environment=gymnasium:make"),
        *("--set", "run.level=MiniGrid-KeyCorridorS3R1-v0"),
    )
    result = run("ppo", "a", "--tiny", "-m", "1", *other)
    assert result.exit_code == 0, result.output
    assert "MiniGrid-KeyCorridorS3R1-v0: success" in result.output


def test_the_documented_module_trains_on_another_search_task(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Path(__file__).parents[2] / "docs/pipelines.md"
    (code,) = re.findall(r"```python\n(# searches\.py\n.*?)```", page.read_text("utf-8"), re.S)
    (tmp_path / "searches.py").write_text(code, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    task = ("run.level=MiniGrid-Fetch-5x5-N2-v0", "on_policy.environment=searches:make")
    result = run("ppo", "a", "--tiny", "-m", "1", "--set", task[0], "--set", task[1])
    assert result.exit_code == 0, result.output
    # every mission of the task is in words that the network knows, as one kind
    assert re.search(r"\n  pick up (ball|key) ", result.output)


@pytest.mark.parametrize("setting", ["run.precision=bfloat16", "model.type=big"])
def test_other_ways_to_compute_run_as_well(
    setting: str, run: Callable[..., Result], tmp_path: Path
) -> None:
    little = () if "big" not in setting else ("--set", "model.memory=32")
    assert run("bc_and_ppo", "a", *EXACT, "--set", setting, *little).exit_code == 0
    assert all(weight.dtype == torch.float32 for weight in weights(tmp_path / "a").values())


def stopping_ppo() -> Any:
    """PPO, and a wish that the run end at its first batch."""
    ppo = PPO()
    calls: list[int] = []

    def loss(model: Model, batch: Batch, memory: Tensor) -> LossResult:
        training = batch["masks"].shape[0] == 8  # not the estimate of the cost before it
        if training and not calls and os.environ.get("STOP") == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        calls.append(1)
        return ppo(model, batch, memory)

    return loss


def test_a_run_told_to_end_between_rollout_and_store_ends_with_the_same_weights(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = (*EXACT, "--set", "losses.ppo={type='tests.run.test_loop:stopping_ppo'}")
    assert run("bc_and_ppo", "whole", *line).exit_code == 0
    monkeypatch.setenv("STOP", "1")
    # the last of them in the last cycle, whose budget of environment steps is spent by then
    for more in ([], ["--resume"], ["--resume"], ["--resume"]):
        assert run("bc_and_ppo", "cut", *line, *more).exit_code == 128 + signal.SIGTERM
        progress = read_checkpoint(tmp_path / "cut", trust=True).training["progress"]
        assert progress["in_cycle"] and progress["cycle_updates"] == 0
    monkeypatch.setenv("STOP", "0")
    assert run("bc_and_ppo", "cut", *line, "--resume").exit_code == 0
    assert same_weights(tmp_path / "whole", tmp_path / "cut")
    # a cycle that was stopped has one line of each group, as of one that was not
    assert untimed_lines(tmp_path / "cut") == untimed_lines(tmp_path / "whole")


def untimed_lines(folder: Path) -> list[dict[str, Any]]:
    timed = ("minutes", "share_", "_per_second", "resident_mib")
    return [
        {name: value for name, value in line.items() if not any(one in name for one in timed)}
        for line in read_log(folder)
    ]


class _ToldToEnd(gymnasium.Wrapper[Any, int, Any, int]):
    """Its process is told to end when the third of all episodes of evaluation begins."""

    begun: ClassVar[list[int]] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        if seed is not None and seed >= EVALUATION_SEED:
            self.begun.append(seed)
            if len(self.begun) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
        return self.env.reset(seed=seed, options=options)


def told_to_end(level: str) -> Environment:
    return _ToldToEnd(make_environment(level))


def test_a_run_told_to_end_while_it_measures_ends_without_waiting(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    measured = ("--set", "evaluation.every=32", "--set", "evaluation.episodes=40")
    environment = ("--set", "on_policy.environment=tests.run.test_loop:told_to_end")
    line = ("--tiny", "-m", "1", "-q", *measured, *environment)
    assert run("ppo", "a", *line).exit_code == 128 + signal.SIGTERM
    assert len(_ToldToEnd.begun) == 3
    assert of_group(tmp_path / "a", "evaluation") == []
    assert read_checkpoint(tmp_path / "a", trust=True).training["progress"]["env_steps"] > 0
