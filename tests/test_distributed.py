from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from demotools.errors import SettingsError
from demotools.generate import generate, planned_recording
from trainer.checkpoint import read_checkpoint
from trainer.distributed import ALONE, Team
from trainer.log import read_log

UPDATES = 50
BC = (
    # the tutorial's learning rate: with a larger one differences of rounding grow faster
    *("bc_small_cpu", "-q", "-m", "1", "--set", "evaluation=", "--set", "optimizer.lr=2.5e-4"),
    *("--set", "stages.0.off_policy.rollouts=16", "--set", "stages.0.off_policy.rollout_len=10"),
    *("--set", "stages.0.off_policy.updates=1"),
    *("--set", f"stages.0.max_demo_steps={UPDATES * 160}"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    recording = planned_recording("GoToLocal", 60, split="train", first_seed=None)
    generate(recording, folder / "GoToLocal.zarr", workers=1, overwrite=False, quiet=True)
    return folder


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def trained(data: Path, folder: Path, *arguments: str, world: int = 2) -> None:
    """Run `trainer run` as `world` processes that train together, as torchrun starts them."""
    port = free_port()
    line = [sys.executable, "-m", "trainer", "run", *arguments, "-o", str(folder)]
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
        processes.append(subprocess.Popen([*line, "--data-dir", str(data)], env=environment))
    assert [process.wait(100) for process in processes] == [0] * world


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_log(folder) if line["group"] == "offpolicy"]


def test_two_processes_have_the_loss_curve_of_one(data: Path, tmp_path: Path) -> None:
    # cloning leaves the critic alone, so a part of the network has no gradient
    bare = (*BC, "--set", "on_policy=")
    trained(data, tmp_path / "one", *bare, world=1)
    trained(data, tmp_path / "two", *bare)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == UPDATES
    assert one[-1] < 0.9 * one[0]
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) <= 1e-5


@pytest.mark.slow
def test_two_processes_share_environments_and_resume_together(data: Path, tmp_path: Path) -> None:
    exact = ("bc_and_ppo", "--tiny", "-q", "-m", "1", "--set", "evaluation=")
    trained(data, tmp_path / "whole", *exact, "--set", "run.keep=9")
    progress = read_checkpoint(tmp_path / "whole").training["progress"]
    assert (progress["env_steps"], progress["demo_steps"]) == (128, 4 * 2 * 32)
    copies = sorted((tmp_path / "whole").glob("after-*.pt"))
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/last.pt").write_bytes(copies[0].read_bytes())
    trained(data, tmp_path / "cut", *exact, "--set", "run.keep=9", "--resume")
    ours, theirs = (read_checkpoint(tmp_path / name).model for name in ("whole", "cut"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_processes_cannot_share_is_refused() -> None:
    assert Team(1, 2).share(6, "rollouts") == range(3, 6)
    assert ALONE.share(7, "rollouts") == range(7)
    with pytest.raises(SettingsError, match="7 cannot be shared out to 2 processes"):
        Team(0, 2).share(7, "off_policy.rollouts")
