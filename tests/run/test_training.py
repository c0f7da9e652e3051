"""The `trainer` commands, end to end on tiny real runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import trainer
from demotools.babyai.vocabulary import WORDS
from demotools.errors import SettingsError
from demotools.store.reading import Store, open_store
from demotools.store.reshape import merge_stores
from tests.conftest import build_store, make_episodes
from trainer.batch import Batch
from trainer.cli import main
from trainer.learning.losses import ExpertCrossEntropy, Loss, LossResult
from trainer.learning.networks.base import Model, Output
from trainer.report import plot
from trainer.report.plot import Experiment, curves, run_lines
from trainer.run.checkpoint import read_checkpoint
from trainer.run.cost import expected_cost
from trainer.run.log import read_log
from trainer.run.session import other_levels, resolved
from trainer.run.state import new_run, open_stage
from trainer.settings.models import Settings, read_settings

BARE = (
    *("--set", "stages.0.off_policy.rollouts=8", "--set", "stages.0.off_policy.rollout_len=10"),
    *("--set", "stages.0.off_policy.updates=2", "--set", "stages.0.max_demo_steps=800"),
    *("--set", "run.save_every_demo_steps=160", "-m", "1"),
    *("--set", "on_policy=", "--set", "evaluation="),
)
TINY = (*BARE[:-4], "--set", "evaluation.episodes=4", "--set", "on_policy.environments=2")
BABYAI_ID = "BabyAI-GoToLocal-v0"
NO_WANDB = ("--set", "run.wandb=project")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
OWN_PARTS = Path(__file__).parents[2] / "docs" / "own_parts.md"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(bot_data: Path, tmp_path: Path) -> Callable[..., Result]:
    """`run("bc_small_cpu", "-o", "a")` trains; relative folders are under the test's own."""

    def trainer_run(*arguments: str) -> Result:
        here = Path.cwd()
        os.chdir(tmp_path)
        try:
            return CliRunner().invoke(main, ["run", *arguments, "--data-dir", str(bot_data)])
        finally:
            os.chdir(here)

    return trainer_run


@pytest.fixture(scope="module")
def finished(bot_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished run, only to be read, and what the run said."""
    folder = tmp_path_factory.mktemp("finished") / "a"
    arguments = ["run", "bc_small_cpu", "-o", str(folder), *TINY, "--data-dir", str(bot_data)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return folder, result.output


def weights(folder: Path) -> dict[str, Any]:
    return read_checkpoint(folder).model


def test_a_run_leaves_settings_checkpoint_log_curves_and_its_success(
    finished: tuple[Path, str],
) -> None:
    folder, output = finished
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    lines = read_log(folder)
    groups = [line["group"] for line in lines]
    assert groups.count("offpolicy") == 5 and groups.count("evaluation") == 1
    last = [line for line in lines if line["group"] == "offpolicy"][-1]
    assert last["demo_steps"] == 800 and last["env_steps"] == 5 * 2 * 16
    assert last["loss"] == last["expert_ce/loss"] > 0
    assert 0 <= last["expert_ce/accuracy"] <= 1
    train = next(line for line in lines if line["group"] == "train")
    shares = {name: value for name, value in train.items() if name.startswith("share_")}
    assert set(shares) == {
        f"share_{name}" for name in ("data", "environment", "forward", "backward")
    }
    assert 0.5 < sum(shares.values()) <= 1
    if Path("/proc/self/statm").is_file():
        assert 50 < train["resident_mib"] < 5000
    for said in ("expected:", "passes over the store", "success", "95% interval", "curve.png"):
        assert said in output
    assert list((folder / "tensorboard").glob("events*"))


def test_tensorboard_has_the_same_numbers_as_the_lines(finished: tuple[Path, str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = finished
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    points = board.Scalars("offpolicy/loss")
    lines = [line for line in read_log(folder) if line["group"] == "offpolicy"]
    assert [point.step for point in points] == [line["demo_steps"] for line in lines]
    assert [point.value for point in points] == pytest.approx([line["loss"] for line in lines])
    groups = {tag.partition("/")[0] for tag in board.Tags()["scalars"]}
    assert groups <= {"offpolicy", "train", "environment", "evaluation"}
    assert {"offpolicy", "train", "evaluation"} <= groups


def test_the_loss_falls_on_the_bots_episodes(run: Callable[..., Result], tmp_path: Path) -> None:
    arguments = ("--set", "stages.0.max_demo_steps=8000", "--set", "evaluation=")
    assert run("bc_small_cpu", "-o", "a", *TINY, *arguments).exit_code == 0
    losses = [line["loss"] for line in read_log(tmp_path / "a") if line["group"] == "offpolicy"]
    assert losses[-1] < 0.7 * losses[0]


def test_a_dry_run_prints_a_file_that_gives_the_same_weights_and_writes_nothing(
    run: Callable[..., Result], finished: tuple[Path, str], tmp_path: Path
) -> None:
    dry = run("bc_small_cpu", "-o", "a", "--dry-run", *TINY)
    assert dry.exit_code == 0, dry.output
    assert "parameters" in dry.output and "expected:" in dry.output
    assert not list(tmp_path.iterdir())
    (tmp_path / "again.toml").write_text(dry.output, "utf-8")
    assert run("again.toml", "-o", "b", "-m", "1", "-q").exit_code == 0
    again, folder = tmp_path / "b", finished[0]
    first, second = weights(again), weights(folder)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (again / "settings.toml").read_text() == (folder / "settings.toml").read_text()


LEAVES_NO_MEMORY = """
import sys, tomllib
from pathlib import Path
import torch
import trainer
from trainer.run.memory import resident_mib
settings, data_dir, output = sys.argv[1:]
tree = tomllib.loads(Path(settings).read_text("utf-8"))
trainer.train(tree, output=output, data_dir=data_dir, workers=1, quiet=True)
before = resident_mib().get("resident_mib", 0)
torch.zeros(300 * 2**18)  # MiB, which the run would have kept
assert resident_mib().get("resident_mib", 0) < before + 100
"""


def test_a_run_from_python_leaves_memory_as_it_was(
    finished: tuple[Path, str], bot_data: Path, tmp_path: Path
) -> None:
    # in a process of its own: others have left free memory, from which the array would come
    command = [sys.executable, "-c", LEAVES_NO_MEMORY]
    arguments = [finished[0] / "settings.toml", bot_data, tmp_path / "b"]
    subprocess.run([*command, *map(str, arguments)], check=True, timeout=300)


def test_a_run_from_python_is_that_of_the_command(
    finished: tuple[Path, str], bot_data: Path, tmp_path: Path
) -> None:
    tree = tomllib.loads((finished[0] / "settings.toml").read_text("utf-8"))
    said: list[str] = []
    more: dict[str, Any] = {"data_dir": bot_data, "workers": 1}
    folder = trainer.train(tree, output=tmp_path / "b", say=said.append, **more)
    assert folder == tmp_path / "b"
    assert any(line.startswith("trained for") for line in said)
    first, second = weights(folder), weights(finished[0])
    assert all(torch.equal(first[name], second[name]) for name in first)
    # nothing is left to do, and it is the object of the same settings
    settings = Settings.model_validate(tree)
    assert trainer.train(settings, output=folder, resume=True, quiet=True, **more) == folder
    with pytest.raises(SettingsError, match=r"unknown key `run\.levl`"):
        trainer.train({**tree, "run": {**tree["run"], "levl": "x"}}, output=tmp_path / "c", **more)
    assert not (tmp_path / "c").exists()


def test_the_tutorials_recipe_runs_with_its_environment_budget(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    small = [
        *("--set", "on_policy.environments=2", "--set", "stages.0.max_env_steps=70"),
        *("--set", "stages.0.off_policy.rollouts=4", "--set", "stages.0.off_policy.rollout_len=8"),
        *("--set", "run.save_every_env_steps=64", "-m", "2"),
    ]
    result = run("bc_offpolicy.toml", "-o", "a", *small)
    assert result.exit_code == 0, result.output
    assert "network: small" in result.output
    assert "store: GoToLocal, the full store, because there is no GoToLocal-small" in result.output
    assert "stage 1 of 1: 128 env steps, 1,024 demo steps (" in result.output
    assert result.output.count("network:") == 1
    progress = read_checkpoint(tmp_path / "a").training["progress"]
    assert progress["env_steps"] == 128  # two rollouts of 2 x 32
    assert progress["demo_steps"] == 2 * 16 * 4 * 8


def test_the_plan_leaves_out_what_is_absent_and_the_bar_ends_at_what_it_says(
    bot_data: Path, tmp_path: Path
) -> None:
    settings = read_settings("ppo", ["run.device=cpu", "model.type=small"], tiny=True)
    said = expected_cost(new_run(settings, {}, WORDS, tmp_path)).lines("ppo.toml")
    assert any(line.startswith("stage 1 of 1: 128 env steps, ") for line in said)
    assert "demo" not in "".join(said) and "network:" not in "".join(said)
    changed = [*BARE[1:4:2], "stages.0.max_demo_steps=90", "on_policy="]
    cloning, _ = resolved(read_settings("bc_small_cpu", changed), bot_data)
    store = {"GoToLocal": open_store(bot_data / "GoToLocal.zarr")}
    reinforced: tuple[Settings, dict[str, Store], int] = (settings, {}, 128)
    for chosen, stores, total in (reinforced, (cloning, store, 160)):
        with open_stage(new_run(chosen, stores, WORDS, tmp_path)) as stage:
            assert stage.bar.total == total


def test_the_cost_is_measured_in_the_precision_of_the_run(bot_data: Path, tmp_path: Path) -> None:
    changed = [*BARE[1:4:2], "run.precision=bfloat16", "on_policy="]
    settings, _ = resolved(read_settings("bc_small_cpu", changed), bot_data)
    store = {"GoToLocal": open_store(bot_data / "GoToLocal.zarr")}
    run = new_run(settings, store, WORDS, tmp_path)
    seen: list[bool] = []
    run.network.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    expected_cost(run)
    assert seen and all(seen)


def test_the_small_store_is_taken_without_a_gpu_and_a_long_run_names_a_faster_recipe(
    bot_data: Path, run: Callable[..., Result]
) -> None:
    small = bot_data / "GoToLocal-small.zarr"
    small.symlink_to(bot_data / "GoToLocal.zarr")
    fit = ("--set", "stages.0.off_policy.rollouts=40")  # the store has 60 episodes
    try:
        dry = run("bc_offpolicy", "--dry-run", "-m", "1", *fit)
    finally:
        small.unlink()
    assert 'store = "GoToLocal-small"' in dry.output
    assert "because there is no GPU" in dry.output
    assert "trainer run bc_small_cpu.toml" in dry.output


def test_how_to_take_the_full_stores_is_said_of_the_stages_that_take_the_small_ones(
    tmp_path: Path,
) -> None:
    for name in ("GoToLocal-small", "Pickup-small", "GoToObj"):
        (tmp_path / f"{name}.zarr").mkdir()
    alone = read_settings("dagger_then_ppo_cpu", ["run.device=cpu", "run.level=GoToLocal"])
    levels = 'run.level=["GoToLocal", "GoToObj", {name="Pickup", proportion=2.0}]'
    mixed = read_settings("bc_offpolicy", ["run.device=cpu", levels])
    (cloning,) = mixed.stages
    _, said = resolved(alone.model_copy(update={"stages": (*alone.stages, cloning)}), tmp_path)
    hint = "--set stages.2.off_policy.store=GoToLocal uses the full store"
    assert said == [f"store: GoToLocal-small, because there is no GPU; {hint}"]
    twice, said = resolved(mixed.model_copy(update={"stages": (cloning, cloning)}), tmp_path)
    assert twice.store_names() == ["GoToLocal-small", "GoToObj", "Pickup-small"]
    _, first, _, second, *rest = shlex.split(said[-1].rpartition("; ")[2])
    assert rest == ["uses", "the", "full", "stores"] and second.startswith("stages.1.")
    full = read_settings("bc_offpolicy", [levels, first]).stages[0].off_policy
    assert full is not None
    shares = [(store.name, store.proportion) for store in full.store]
    assert shares == [("GoToLocal", 1), ("GoToObj", 1), ("Pickup", 2)]


def test_a_folder_that_holds_a_run_is_refused_without_overwrite_and_kept(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    assert run("bc_small_cpu", "-o", "a", "-q", *TINY).exit_code == 0
    (tmp_path / "a" / "notes.txt").write_text("mine")
    before = (tmp_path / "a" / "last.pt").read_bytes()
    refused = run("bc_small_cpu", "-o", "a", *TINY)
    assert refused.exit_code == 1 and "there is already a run in this folder" in refused.output
    assert (tmp_path / "a" / "last.pt").read_bytes() == before
    assert run("bc_small_cpu", "-o", "a", "-q", "--overwrite", *TINY).exit_code == 0
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"


def test_wrong_input_is_refused_before_anything_is_written(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    rows = "stages.0.off_policy.rollouts"
    for arguments, what in (
        (["nothing.toml"], "there is no such recipe"),
        (["bc_small_cpu", "--set", "run.levl=x"], "unknown key `run.levl`"),
        (["bc_small_cpu", "--set", "stages.0.off_policy.store=Nowhere"], "no such demo store"),
        (["bc_small_cpu", "--set", "losses.expert_ce.type=entropy"], "no loss named"),
        (["bc_small_cpu", "--set", "optimizer.type=adamm"], "did you mean adam"),
        (["bc_small_cpu", "--set", "optimizer.schedule.type=linea"], "did you mean linear"),
        (["bc_small_cpu", "--set", "stages.0.losses=['expert']"], "did you mean expert_ce"),
        (["bc_small_cpu", "--set", "run.level=GoToNowhere"], "there is no such level"),
        (["bc_small_cpu", "--set", "run.level=PutNext"], "cannot be played"),
        (["bc_small_cpu", "--set", f"{rows}=61"], f"use --set {rows}=60, or"),
        (["bc_small_cpu", "--set", "run.device=cuda"], "torch finds no GPU"),
        (["bc_small_cpu", *NO_WANDB], "Weights & Biases is not installed"),
    ):
        result = run(*arguments, "-o", "a")
        assert result.exit_code == 1, (arguments, result.output)
        assert what in result.output and "\n  next:  " in result.output, result.output
        assert not list(tmp_path.iterdir()), arguments


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_stop_saves_and_a_resumed_one_ends_with_the_same_weights(
    run: Callable[..., Result], bot_data: Path, tmp_path: Path, number: int
) -> None:
    longer = (*BARE, "--set", "stages.0.max_demo_steps=4000")
    assert run("bc_small_cpu", "-o", "whole", "-q", *longer).exit_code == 0
    settings = [word for word in longer if word not in ("-m", "1")]
    command = [
        *(sys.executable, "-m", "trainer", "run", "bc_small_cpu"),
        *(*settings, "-o", str(tmp_path / "cut"), "-m", "1", "--data-dir", str(bot_data)),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        _wait_for(tmp_path / "cut" / "last.pt")
        process.send_signal(number)
        said = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number, said
    assert said.endswith("  " + shlex.join(["trainer", *command[3:], "--resume"]) + "\n")
    steps = read_checkpoint(tmp_path / "cut").training["progress"]["demo_steps"]
    assert 0 < steps < 4000
    resumed = run("bc_small_cpu", "-o", "cut", "--resume", "-q", *longer)
    assert resumed.exit_code == 0, resumed.output
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_resume_without_a_checkpoint_says_how_the_run_begins(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    nothing = run("bc_small_cpu", "-o", "a", "--resume", *BARE)
    assert nothing.exit_code == 1 and "drop --resume" in nothing.output
    assert not list(tmp_path.iterdir())
    for name in "ab":  # it died before its first checkpoint
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").touch()
    left = run("bc_small_cpu", "-o", "a", "--resume", *BARE)
    assert left.exit_code == 1 and "--overwrite instead of --resume" in left.output
    again = run("bc_small_cpu", "-o", "a", *BARE)
    assert again.exit_code == 1 and "--resume=auto or --overwrite" in again.output
    assert run("bc_small_cpu", "-o", "a", "--overwrite", "-q", *BARE).exit_code == 0
    begun = run("bc_small_cpu", "-o", "b", "--resume=auto", "-q", *BARE)
    assert begun.exit_code == 0, begun.output
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_resume_auto_begins_a_run_and_goes_on_with_it(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    both = run("bc_small_cpu", "--resume=auto", "--overwrite")
    assert both.exit_code == 2 and "give only one" in both.output
    for resume in (["--resume=auto"], ["--resume", "auto"], ["--resume"]):
        goes_on = (tmp_path / "a").exists()
        result = run(*resume, "bc_small_cpu", "-o", "a", *BARE)
        assert result.exit_code == 0, result.output
        assert ("resumed at 800 demo steps" in result.output) is goes_on
        said = [line["demo_steps"] for line in read_log(tmp_path / "a")]
        assert said == sorted(said) and said[-1] == 800, resume
    # a run whose replacement died before its first checkpoint comes back
    (tmp_path / "a" / ".replaced").mkdir()
    for name in ("last.pt", "log.jsonl"):
        (tmp_path / "a" / name).rename(tmp_path / "a" / ".replaced" / name)
    before = weights(tmp_path / "a")
    assert run("bc_small_cpu", "-o", "a", "--resume=auto", "-q", *BARE).exit_code == 0
    assert all(torch.equal(before[name], now) for name, now in weights(tmp_path / "a").items())
    assert not (tmp_path / "a" / ".replaced").exists()


def test_a_recipe_runs_with_several_seeds_into_one_folder_and_their_mean_is_drawn(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    short = (*BARE, "--set", "stages.0.max_demo_steps=320")
    result = run("bc_small_cpu", "-o", "a", "--seeds", "3,5", *short)
    assert result.exit_code == 0, result.output
    assert result.output.endswith("learning curve: a/curve.png\n")
    assert (tmp_path / "a" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert run("bc_small_cpu", "-o", "b", "-q", "--set", "run.seed=5", *short).exit_code == 0
    alone, together = weights(tmp_path / "b"), weights(tmp_path / "a" / "seed-5")
    assert all(torch.equal(alone[name], together[name]) for name in alone)
    # one more seed: those that are done are resumed at their end
    more = run("bc_small_cpu", "-o", "a", "-q", "--seeds", "3-5", "--resume", *short)
    assert more.exit_code == 0, more.output
    assert sorted(path.name for path in (tmp_path / "a").glob("seed-*")) == [
        f"seed-{n}" for n in (3, 4, 5)
    ]
    wrong = run("bc_small_cpu", "-o", "c", "--seeds", "5-1", *short)
    assert wrong.exit_code == 1 and "not a list of seeds" in wrong.output


def test_the_curve_is_drawn_while_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, run: Callable[..., Result], tmp_path: Path
) -> None:
    monkeypatch.setattr(plot, "_LIVE_SECONDS", -1.0)
    monkeypatch.setattr(plot, "_LIVE_SHARE", 0)
    recipe = run("bc_small_cpu", "--dry-run", *BARE).output
    # what fails late: the picture is of the saves before
    own = "losses.expert_ce={type='tests.run.test_training:failing', after=5}"
    (tmp_path / "own.toml").write_text(recipe, "utf-8")
    with pytest.raises(ZeroDivisionError):
        raise run("own.toml", "-o", "a", "--set", own).exception or AssertionError
    assert (tmp_path / "a" / "curve.png").read_bytes().startswith(b"\x89PNG")


def failing(after: int) -> Loss:
    calls = iter(range(1, 100))

    def loss(model: Model, batch: Batch, memory: Any) -> LossResult:
        value = ExpertCrossEntropy()(model, batch, memory)
        if next(calls) > after:
            raise ZeroDivisionError
        return value

    return loss


def test_a_killed_run_leaves_a_whole_checkpoint(bot_data: Path, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "trainer", "run", "bc_small_cpu", "-o", str(tmp_path)),
        *("--data-dir", str(bot_data), "-q", "--overwrite", *BARE),
        *("--set", "stages.0.max_demo_steps=100_000_000", "--set", "run.save_every_demo_steps=1"),
    ]
    with subprocess.Popen(command, env=ENVIRONMENT) as process:
        _wait_for(tmp_path / "last.pt")
        time.sleep(0.3)
        process.kill()
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.training["progress"]["demo_steps"] > 0
    assert checkpoint.network()


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_run_with_other_settings_is_not_resumed(
    run: Callable[..., Result], finished: tuple[Path, str]
) -> None:
    folder = str(finished[0])
    refused = run("bc_small_cpu", "-o", folder, "--resume", *TINY, "--set", "optimizer.lr=0.1")
    assert refused.exit_code == 1 and "started with different settings" in refused.output


def test_evaluate_measures_a_checkpoint_and_the_references(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    folder, _ = finished
    common = ["--episodes", "3", "-m", "1", "--json", "-q"]
    for arguments in (
        [str(folder)],
        [str(folder / "last.pt"), "--policy", "random"],
        ["--policy", "bot", "--level", "GoToObj"],
    ):
        result = CliRunner().invoke(main, ["evaluate", *arguments, *common])
        assert result.exit_code == 0, result.output
        measured = json.loads(result.output)
        assert measured["episodes"] == 3
        assert measured["level"] == ("GoToObj" if "bot" in arguments else "GoToLocal")
    assert measured["success"] == 1.0  # the bot's
    assert CliRunner().invoke(main, ["evaluate", "--policy", "bot"]).exit_code == 2
    missing = CliRunner().invoke(main, ["evaluate", str(tmp_path / "nothing")])
    assert missing.exit_code == 1 and "there is no checkpoint" in missing.output


def test_what_evaluate_measures_is_written_and_added_to_the_run_that_draws_it(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder, ignore=shutil.ignore_patterns("evaluations.jsonl"))
    command = ["evaluate", str(folder), "-m", "1", "--overwrite"]
    for more in (["--seeds", "4-6,9"], ["--sample"], ["--level", "GoToObj"], ["--sample-loops"]):
        count = () if more[0] == "--seeds" else ("--episodes", "3")
        arguments = [*command, *count, "-o", str(tmp_path / "all.jsonl"), *more]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0 and "added to" in result.output, result.output
        lines = (tmp_path / "all.jsonl").read_text().splitlines()
        episodes = [json.loads(line) for line in lines]
        assert set(episodes[0]) == {"seed", "mission", "success", "return", "length"}
        seeds = [4, 5, 6, 9] if "--seeds" in more else range(2_000_000_000, 2_000_000_003)
        assert [episode["seed"] for episode in episodes] == list(seeds)
    added = read_log(folder, "evaluations.jsonl")
    groups = ["evaluation", "evaluation_sampled", "evaluation", "evaluation_loops"]
    assert [line["group"] for line in added] == groups
    assert [line.get("level") for line in added] == ["GoToLocal", None, "GoToObj", None]
    # the checkpoint's place among the curves, and only what can stand beside them
    assert {line["demo_steps"] for line in added} == {run_lines(folder)[-1]["demo_steps"]}
    figure = curves([Experiment("run", [run_lines(folder)])])
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "evaluation, greedy actions, 4 episodes, 95% interval" in labels
    assert "evaluation, sampled actions, 3 episodes, 95% interval" in labels
    assert "evaluation, sampled in loops, 3 episodes, 95% interval" in labels
    with (folder / "evaluations.jsonl").open("a") as stream:
        stream.write('{"group": "evaluation"}\n')
    damaged = CliRunner().invoke(main, ["plot", str(folder), "-o", str(tmp_path / "a.png")])
    assert damaged.exit_code == 1 and "line 5 was not written by a run" in damaged.output


def test_success_is_measured_every_so_many_steps_greedy_and_sampled_and_changes_no_weight(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    tiny = ("ppo", "--tiny", "-m", "1", "-q", "--set", "evaluation.episodes=2")
    assert run(*tiny, "-o", "a").exit_code == 0
    assert run(*tiny, "-o", "b", "--set", "evaluation.every=60").exit_code == 0
    measured = {
        name: [
            (line["group"], line["env_steps"])
            for line in read_log(tmp_path / name)
            if line["group"].startswith("evaluation")
        ]
        for name in "ab"
    }
    assert measured["a"] == [("evaluation", 128), ("evaluation_sampled", 128)]
    # cycles are of 32 steps: 64 is the first beyond 60, and the end is measured once
    steps = [64, 128]
    assert measured["b"] == [
        (group, step) for step in steps for group in ("evaluation", "evaluation_sampled")
    ]
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("sample", "groups"),
    [
        ("false", ["evaluation"]),
        ("true", ["evaluation_sampled"]),
        ("loops", ["evaluation_loops"]),
        ("both", None),
    ],
)
def test_which_actions_are_measured_is_a_setting(
    run: Callable[..., Result], tmp_path: Path, sample: str, groups: list[str] | None
) -> None:
    result = run("bc_small_cpu", "-o", "a", *TINY, "--set", f"evaluation.sample={sample}")
    assert result.exit_code == 0, result.output
    assert ("GoToLocal, sampled actions: success" in result.output) == (sample in ("true", "both"))
    assert ("GoToLocal, sampled in loops: success" in result.output) == (sample == "loops")
    found = [line["group"] for line in read_log(tmp_path / "a") if "interval_low" in line]
    assert found == (groups or ["evaluation", "evaluation_sampled"])


def test_the_two_ways_to_sample_exclude_each_other(finished: tuple[Path, str]) -> None:
    for command in ("evaluate", "watch"):
        arguments = [command, str(finished[0]), "--sample-loops", "--sample"]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 2 and "exclude each other" in result.output


def test_a_level_without_an_environment_is_refused_with_those_that_can_be_played(
    finished: tuple[Path, str],
) -> None:
    for arguments in (
        ["evaluate", "--policy", "bot", "--level", "PutNext"],
        ["evaluate", str(finished[0]), "--level", "PutNext"],
        ["watch", str(finished[0]), "--level", "PutNext"],
    ):
        refused = CliRunner().invoke(main, arguments)
        assert refused.exit_code == 1 and "cannot be played" in refused.output
        advice = refused.output.partition("next:")[2]
        assert "GoToLocal, " in advice and "fetch" not in advice and "PutNext," not in advice


def test_a_store_of_another_level_than_the_one_played_is_said_aloud(
    run: Callable[..., Result], finished: tuple[Path, str]
) -> None:
    other = ("--set", "run.level=GoToObj", "--set", "stages.0.off_policy.store=GoToLocal")
    dry = run("bc_small_cpu", "--dry-run", *TINY, *other)
    assert dry.exit_code == 0, dry.output
    assert "the store GoToLocal is of GoToLocal, but success is measured on GoToObj" in dry.output
    assert "another level" not in finished[1]
    same = run("bc_small_cpu", "--dry-run", *TINY, *other[2:], "--set", f"run.level={BABYAI_ID}")
    assert same.exit_code == 0 and "another level" not in same.output


def test_of_a_merged_store_any_level_may_be_measured(tmp_path: Path) -> None:
    paths = [tmp_path / f"{level}.zarr" for level in ("GoToLocal", "PickupLoc")]
    for path in paths:
        build_store(path, make_episodes([3]), level=path.stem)
    merge_stores(paths, tmp_path / "M.zarr", quiet=True)
    stores = {"M": open_store(tmp_path / "M.zarr")}
    assert other_levels(read_settings("bc_small_cpu.toml"), stores) == []
    (line,) = other_levels(read_settings("ppo.toml"), stores)
    assert 'run.level=["GoToLocal", "PickupLoc"] to measure it' in line


def test_recipes_are_listed_and_copied_but_never_over_a_file(tmp_path: Path) -> None:
    runner = CliRunner()
    assert "bc_offpolicy.toml" in runner.invoke(main, ["recipes"]).output
    target = tmp_path / "mine.toml"
    copy = ["recipes", "copy", "bc_small_cpu", "-o", str(target)]
    assert "trainer run" in runner.invoke(main, copy).output
    assert 'level = "GoToLocal"' in target.read_text()
    again = runner.invoke(main, copy)
    assert again.exit_code == 1 and "already exists" in again.output


def test_plot_draws_several_runs_into_one_picture(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    folders = [str(finished[0]), str(finished[0])]
    for against in ("demo_steps", "env_steps", "minutes"):
        output = tmp_path / f"{against}.png"
        result = CliRunner().invoke(main, ["plot", *folders, "-x", against, "-o", str(output)])
        assert result.exit_code == 0, result.output
        assert output.read_bytes().startswith(b"\x89PNG")
    empty = CliRunner().invoke(main, ["plot", str(tmp_path), "-o", str(tmp_path / "x.png")])
    assert empty.exit_code == 1 and "has no run" in empty.output


class ShiftedCrossEntropy:
    """A user's own loss, for both halves: pushes the network to one action."""

    def __init__(self, action: int) -> None:
        self.action = action

    def __call__(self, model: Model, batch: Batch, memory: torch.Tensor) -> LossResult:
        output = model(batch, memory)
        loss = -output.logits.log_softmax(2)[..., self.action].mean()
        return LossResult(loss, {"shift": torch.tensor(1.0)}, output.memory, batch["masks"].numel())


def shifted(action: int) -> Loss:
    return ShiftedCrossEntropy(action)


def from_the_docs(name: str, folder: Path) -> str:
    """The code of docs/own_parts.md that defines this name; also a module in the folder."""
    blocks = re.findall(r"```python\n(.*?)```", OWN_PARTS.read_text("utf-8"), re.S)
    (code,) = [block for block in blocks if re.search(rf"(def|class) {name}\b", block)]
    (folder / "from_the_docs.py").write_text(code, "utf-8")
    return str(code)


@pytest.mark.parametrize("unknown", [0.0, 0.3, 1.0])
def test_the_loss_in_the_docs_is_a_mean_over_the_steps_with_advice(
    unknown: float, tmp_path: Path
) -> None:
    scope: dict[str, Any] = {}
    exec(from_the_docs("smoothed_cross_entropy", tmp_path), scope)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 4, 7, generator=generator, requires_grad=True)
    action = torch.randint(7, (5, 4), generator=generator)
    action[torch.rand(5, 4, generator=generator) < unknown] = -1
    output = Output(logits, logits[..., 0], torch.zeros(4, 1))
    loss = scope["smoothed_cross_entropy"]()
    result = loss(lambda *_: output, {"expert_action": action}, output.memory)
    known = action >= 0
    wanted = torch.nn.functional.cross_entropy(logits[known], action[known], label_smoothing=0.1)
    assert result.steps == known.sum()
    assert result.loss.item() == pytest.approx(wanted.item() if known.any() else 0.0)
    assert loss.needs_expert


@pytest.mark.parametrize(
    "own",
    [
        "losses.expert_ce.type=from_the_docs:smoothed_cross_entropy",
        "model.type=from_the_docs:Plain",
    ],
)
def test_the_code_in_the_docs_trains_as_it_stands_there(
    own: str, run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "from_the_docs", raising=False)
    code = from_the_docs(own.rpartition(":")[2], tmp_path)
    result = run("bc_small_cpu", "-o", "a", *TINY, "--set", own)  # acts too
    assert result.exit_code == 0, result.output
    assert read_log(tmp_path / "a")[-1]["demo_steps"] == 800
    body = [line for line in code.splitlines() if line.strip() and not line.startswith("#")]
    assert "Plain" not in own or len(body) <= 15


def test_a_users_own_loss_trains_on_rollouts_and_on_demos_in_one_stage(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    own = f"{__name__}:shifted"
    result = run(
        *("bc_small_cpu", "-o", "a", *TINY, "--set", "stages.0.max_demo_steps=1600"),
        *("--set", f'losses.own={{type="{own}", action=3}}', "--set", "stages.0.losses={own=2.0}"),
        *("--set", "stages.0.repeats=2", "--set", "stages.0.minibatches=2"),
    )
    assert result.exit_code == 0, result.output
    lines = [line for line in read_log(tmp_path / "a") if line["group"] == "onpolicy"]
    assert lines[0]["own/shift"] == 1.0
    assert lines[-1]["own/loss"] < lines[0]["own/loss"]
    # 20 updates from demos; and 10 rollouts x 2 repeats x 2 minibatches
    assert read_checkpoint(tmp_path / "a", trust=True).training["progress"]["updates"] == 20 + 40


def test_stages_follow_one_another_with_their_own_losses(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    recipe = tmp_path / "two.toml"
    recipe.write_text(
        """
[run]
name = "two"
level = "GoToLocal"
[optimizer]
lr = 1e-3
schedule = {type = "cosine", to = 0.1}
[losses.ce]
type = "expert_cross_entropy"
[[stages]]
max_demo_steps = 64
[stages.off_policy]
rollouts = 4
rollout_len = 8
updates = 1
losses = ["ce"]
[[stages]]
max_demo_steps = 96
[stages.off_policy]
rollouts = 3
rollout_len = 8
updates = 1
losses = {ce = 0.5}
""",
        "utf-8",
    )
    assert run(str(recipe), "-o", "a").exit_code == 0
    lines = [line for line in read_log(tmp_path / "a") if line["group"] == "offpolicy"]
    assert [line["demo_steps"] for line in lines] == [32, 64, 88, 112, 136, 160]
    assert lines[-1]["loss"] == pytest.approx(0.5 * lines[-1]["ce/loss"])
    rates = [line["lr"] for line in read_log(tmp_path / "a") if line["group"] == "train"]
    assert rates[-1] == pytest.approx(1e-4) and rates == sorted(rates, reverse=True)
