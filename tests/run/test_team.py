from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from demotools.babyai.cells import CELL_CODES
from demotools.babyai.vocabulary import WORDS
from demotools.errors import SettingsError
from demotools.workers.processes import processor_count
from trainer.acting.collect import Rollout
from trainer.batch import Batch
from trainer.cli import main
from trainer.learning.losses import (
    PPO,
    ExpertCrossEntropy,
    Loss,
    LossResult,
    LossStep,
    weighted_sum,
)
from trainer.learning.networks.base import Model
from trainer.learning.networks.small import SmallNetwork
from trainer.run.checkpoint import read_checkpoint
from trainer.run.log import read_log
from trainer.run.session import Stopped, train
from trainer.team import (
    ALONE,
    Team,
    joined_team,
    limit_threads,
    processors_each,
    stop_request,
)

UPDATES = 50
BC = (
    # the tutorial's learning rate: with a larger one differences of rounding grow faster
    *("bc_small_cpu", "-q", "-m", "1", "--set", "evaluation=", "--set", "optimizer.lr=2.5e-4"),
    *("--set", "stages.0.off_policy.rollouts=16", "--set", "stages.0.off_policy.rollout_len=10"),
    *("--set", "stages.0.off_policy.updates=1"),
    *("--set", f"stages.0.max_demo_steps={UPDATES * 160}"),
)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def trained(data: Path, folder: Path, *arguments: str, world: int = 2, code: int = 0) -> None:
    """Run `trainer run` as `world` processes that train together, to end with this exit code."""
    line = ["-m", "trainer", "run", *arguments, "-o", str(folder), "--data-dir", str(data)]
    run_together(line, world, code)


def run_together(line: list[str], world: int, code: int = 0, stdout: Any = None) -> None:
    """Run Python with these arguments in `world` processes, as torchrun starts them."""
    port = free_port()
    processes = []
    for rank in range(world):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(world),
            "RANK": str(rank),
            "LOCAL_RANK": "0",
        }
        command = [sys.executable, *line]
        processes.append(subprocess.Popen(command, env=environment, stdout=stdout))
    assert [process.wait(100) for process in processes] == [code] * world


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_log(folder) if line["group"] == "offpolicy"]


def test_two_processes_have_the_loss_curve_of_one(bot_data: Path, tmp_path: Path) -> None:
    # cloning leaves the critic alone, so a part of the network has no gradient
    bare = (*BC, "--set", "on_policy=")
    trained(bot_data, tmp_path / "one", *bare, world=1)
    trained(bot_data, tmp_path / "two", *bare)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == UPDATES
    assert one[-1] < 0.9 * one[0]
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) <= 1e-5


def fixed_rollout() -> Rollout:
    """Random steps of 4 environments, whose rewards and advised steps lie unequally."""
    random = torch.Generator().manual_seed(3)
    scale = torch.tensor([0.1, 1.0, 5.0, 9.0])

    def drawn(below: int, *more: int) -> Tensor:
        return torch.randint(below, (6, 4, *more), generator=random)

    def uniform() -> Tensor:
        return torch.rand(6, 4, generator=random)

    batch = {
        "cells": drawn(CELL_CODES, 7, 7).byte(),
        "direction": drawn(4).byte(),
        "masks": drawn(2).float(),
        "mission": torch.zeros(6, 4, dtype=torch.int64),
        "mission_tokens": torch.tensor([[1, 2, 3]]),
        "action": drawn(7),
        "expert_action": drawn(7).where(uniform() < scale / 10, -1),
        "reward": uniform() * scale,
        "value": uniform(),
        "next_value": uniform(),
        "log_prob": uniform() / 10 - 2,
        "terminated": uniform() < 0.2,
        "truncated": torch.zeros(6, 4, dtype=torch.bool),
        "stage_steps": torch.tensor(0),
    }
    return Rollout(batch, torch.rand(4, 16, generator=random), np.zeros((0, 2)))


def write_gradient(path: str) -> None:
    """Learn by PPO and the expert from this process's rows of the rollout; write the gradient."""
    losses: dict[str, Loss] = {"ppo": PPO(), "expert_ce": ExpertCrossEntropy()}
    torch.manual_seed(0)
    network = SmallNetwork(len(WORDS), embedding=8, features=8, memory=8, instruction=8)
    whole = fixed_rollout()
    with joined_team("cpu") as team:
        share = team.share(4, "environments")
        rows = slice(share.start, share.stop)
        batch = {
            name: values[:, rows] if values.shape[:2] == (6, 4) else values
            for name, values in whole.batch.items()
        }
        mine = Rollout(batch, whole.memory[rows], whole.episodes)
        mine = mine.with_advantages(0.99, 0.95, normalise=True, team=team)
        results = LossStep(network)(losses, mine.batch, dict.fromkeys(losses, mine.memory))
        weighted_sum(results, {"ppo": 1.0, "expert_ce": 0.5}, team).backward()  # type: ignore[no-untyped-call]
        team.average_gradients(network.parameters())
        if team.writes:
            torch.save({name: p.grad for name, p in network.named_parameters()}, path)
        if team.world == 2:
            assert_averages(team)


def assert_averages(team: Team) -> None:
    """Of weights that both processes, only the second, and none have a gradient of."""
    both, one, none = weights = [nn.Parameter(torch.zeros(3, 2)) for _ in range(3)]
    both.grad = torch.full((3, 2), 1.0 + team.rank)
    one.grad = torch.full((3, 2), 4.0) if team.rank else None
    team.average_gradients(weights)
    assert both.grad.tolist() == [[1.5, 1.5]] * 3
    assert one.grad is not None and one.grad.tolist() == [[2.0, 2.0]] * 3
    assert none.grad is None


def test_two_processes_learn_from_a_rollout_what_one_does(tmp_path: Path) -> None:
    gradients = []
    for world in (1, 2):
        path = tmp_path / f"{world}.pt"
        call = f"from tests.run.test_team import *; write_gradient({str(path)!r})"
        run_together(["-c", call], world)
        gradients.append(torch.load(path, weights_only=True))
    for name, one in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], one, rtol=1e-4, atol=1e-6)
    assert gradients[0]["actor.0.weight"].abs().max() > 1e-3


@pytest.mark.slow
def test_two_processes_share_environments_and_resume_together(
    bot_data: Path, tmp_path: Path
) -> None:
    exact = ("bc_and_ppo", "--tiny", "-q", "-m", "1", "--set", "evaluation=")
    trained(bot_data, tmp_path / "whole", *exact, "--set", "run.keep=9")
    progress = read_checkpoint(tmp_path / "whole").training["progress"]
    assert (progress["env_steps"], progress["demo_steps"]) == (128, 4 * 2 * 32)
    copies = sorted((tmp_path / "whole").glob("after-*.pt"))
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/last.pt").write_bytes(copies[0].read_bytes())
    trained(bot_data, tmp_path / "cut", *exact, "--set", "run.keep=9", "--resume")
    ours, theirs = (read_checkpoint(tmp_path / name).model for name in ("whole", "cut"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_on_demonstrations_alone_goes_on_with_another_number_of_processes(
    before: int, after: int, bot_data: Path, tmp_path: Path
) -> None:
    kept = (
        *(*BC, "--set", "on_policy=", "--set", "run.save_every_demo_steps=4000"),
        *("--set", "run.keep=9"),
    )
    trained(bot_data, tmp_path / "whole", *kept, world=before)
    (tmp_path / "cut").mkdir()
    middle = sorted((tmp_path / "whole").glob("after-*.pt"))[0]
    assert 10 < int(middle.stem.partition("-")[2]) < 40
    for name, source in (("last.pt", middle), ("log.jsonl", tmp_path / "whole/log.jsonl")):
        (tmp_path / "cut" / name).write_bytes(source.read_bytes())
    trained(bot_data, tmp_path / "cut", *kept, "--resume", world=after)
    whole, cut = losses(tmp_path / "whole"), losses(tmp_path / "cut")
    assert len(whole) == len(cut) == UPDATES
    assert max(abs(a - b) for a, b in zip(whole, cut, strict=True)) <= 1e-5


@pytest.mark.slow
def test_environments_that_processes_shared_are_resumed_by_as_many(
    bot_data: Path, tmp_path: Path
) -> None:
    line = ("bc_and_ppo", "--tiny", "-q", "-m", "1", "--set", "evaluation=", "--set", "run.keep=9")
    trained(bot_data, tmp_path, *line)
    next(tmp_path.glob("after-*.pt")).replace(tmp_path / "last.pt")
    arguments = ["run", *line, "-o", str(tmp_path), "--data-dir", str(bot_data), "--resume"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "2 processes shared the environments of this stage, not 1" in result.output


def test_torch_takes_no_more_threads_than_there_are_processors_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    try:
        torch.set_num_threads(10_000)
        limit_threads()
        assert torch.get_num_threads() == processors_each() == processor_count()
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "10000")
        limit_threads()
        assert torch.get_num_threads() == processors_each() == 1
    finally:
        torch.set_num_threads(before)


def test_two_processes_train_by_stages_that_use_other_parts_of_the_network(
    tmp_path: Path,
) -> None:
    # the first leaves the critic alone, the second does not
    trained(tmp_path, tmp_path / "a", *("dagger_then_ppo_cpu", "--tiny", "-q", "-m", "1"))
    assert {line["group"] for line in read_log(tmp_path / "a")} >= {"onpolicy", "evaluation"}


def test_what_processes_cannot_share_is_refused() -> None:
    assert Team(1, 2).share(6, "rollouts") == range(3, 6)
    assert ALONE.share(7, "rollouts") == range(7)
    with pytest.raises(SettingsError, match="7 cannot be divided among 2 processes"):
        Team(0, 2).share(7, "off_policy.rollouts")


def stopping_cross_entropy() -> Loss:
    """Cross-entropy against the expert, and a wish that the run end at its 21st batch.

    STOP names the ranks that it comes to.
    """
    loss, calls = ExpertCrossEntropy(), itertools.count()

    def stopping(model: Model, batch: Batch, memory: Tensor) -> LossResult:
        if next(calls) == 20 and os.environ.get("RANK", "0") in os.environ.get("STOP", ""):
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(model, batch, memory)

    return stopping


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_cycle_that_another_number_of_processes_ends_has_the_means_of_all_of_it(
    before: int, after: int, bot_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_cycle = (
        *(*BC, "--set", "on_policy=", "--set", f"stages.0.off_policy.updates={UPDATES}"),
        *("--set", "losses.expert_ce.type=tests.run.test_team:stopping_cross_entropy"),
    )
    trained(bot_data, tmp_path / "whole", *one_cycle, world=1)
    monkeypatch.setenv("STOP", "0, 1")
    code = 128 + signal.SIGTERM
    trained(bot_data, tmp_path / "cut", *one_cycle, world=before, code=code)
    assert losses(tmp_path / "cut") == []
    monkeypatch.setenv("STOP", "")
    trained(bot_data, tmp_path / "cut", *one_cycle, "--resume", world=after)
    whole, cut = losses(tmp_path / "whole"), losses(tmp_path / "cut")
    assert len(whole) == len(cut) == 1
    assert abs(whole[0] - cut[0]) <= 1e-5


class Slow(Team):
    """To agree takes it so long that a signal comes meanwhile."""

    def largest(self, number: int) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        return number


def test_a_signal_that_comes_while_the_processes_agree_is_not_lost() -> None:
    with stop_request() as stop:
        assert not stop.agreed(Slow())
        assert stop.agreed(ALONE)
        assert stop.signal == signal.SIGTERM


def measured(folder: Path) -> bool:
    return any(line["group"].startswith("evaluation") for line in read_log(folder))


def test_all_processes_stop_where_a_signal_comes_to_one(
    bot_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("STOP", "1")
    trained(
        *(bot_data, tmp_path, *BC[:1], *BC[2:], "--set", "on_policy="),
        *("--set", "evaluation.episodes=2"),
        *("--set", "losses.expert_ce.type=tests.run.test_team:stopping_cross_entropy"),
        code=128 + signal.SIGTERM,
    )
    said = capfd.readouterr().out
    assert "stopped; the checkpoint is" in said
    assert f"process 1 stopped; process 0 has saved {tmp_path / 'last.pt'}\n" in said
    assert not measured(tmp_path)


def test_a_signal_right_before_success_is_measured_stops_that_too(
    bot_data: Path, tmp_path: Path
) -> None:
    def say(line: str) -> None:
        if line.startswith("trained for"):
            os.kill(os.getpid(), signal.SIGTERM)

    settings = (*BC[5::2], "on_policy=", "evaluation.episodes=2", "stages.0.max_demo_steps=320")
    given: dict[str, Any] = {"overrides": settings, "data_dir": bot_data, "say": say}
    with pytest.raises(Stopped):
        train("bc_small_cpu", output=tmp_path / "run", **given)
    assert not measured(tmp_path / "run")


def stopped_at_its_last_save(data: str, folder: str) -> None:
    """Train in this process, which is told to stop while its last checkpoint is written."""

    def stop(_folder: Path) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)

    settings = (*BC[5::2], "on_policy=", "evaluation.episodes=2", "stages.0.max_demo_steps=320")
    train("bc_small_cpu", output=folder, overrides=settings, data_dir=data, on_save=stop)


def test_a_signal_that_comes_after_the_last_step_stops_all_processes(
    bot_data: Path, tmp_path: Path
) -> None:
    given = f"{str(bot_data)!r}, {str(tmp_path / 'run')!r}"
    call = f"from tests.run.test_team import *; stopped_at_its_last_save({given})"
    run_together(["-c", call], 2, 128 + signal.SIGUSR1)
    assert not measured(tmp_path / "run")


def of_unlike_machines(rank: int, data: str, folder: str) -> None:
    """Train in this process, where rank 1 multiplies bfloat16 fast, and rank 0 does not."""
    multiplied, autocast = torch.mm, set()
    slow = (torch.bfloat16, torch.float32)[rank]

    def as_this_machine(*factors: Tensor, **more: Any) -> Tensor:
        time.sleep(0.002 * (factors[0].dtype == slow))
        return multiplied(*factors, **more)

    torch.mm = as_this_machine  # type: ignore[assignment]
    nn.modules.module.register_module_forward_hook(
        lambda *_: autocast.add(torch.is_autocast_enabled("cpu"))
    )
    settings = (*BC[5::2], "on_policy=", "run.precision=auto", "stages.0.max_demo_steps=320")
    train("bc_small_cpu", output=folder, overrides=settings, data_dir=data, workers=1)
    assert autocast == {False}


def test_the_precision_that_the_first_of_unlike_machines_chooses_holds_for_all(
    bot_data: Path, tmp_path: Path
) -> None:
    given = f"int(__import__('os').environ['RANK']), {str(bot_data)!r}, {str(tmp_path / 'run')!r}"
    run_together(["-c", f"from tests.run.test_team import *; of_unlike_machines({given})"], 2)
    assert 'precision = "float32"' in (tmp_path / "run/settings.toml").read_text()
