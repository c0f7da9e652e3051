"""The script of docs/slurm.md, run by stand-ins that warn, preempt and kill as SLURM does."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.run.test_log import (
    STAND_IN,
    WHERE,
    board_series,
    log_series,
    stand_in_calls,
    untimed,
)
from trainer.run.checkpoint import read_checkpoint
from trainer.run.log import FILE_NAME, read_log

ROOT = Path(__file__).parents[2]
PROGRAMS = {
    "trainer": f'exec {sys.executable} -m trainer "$@"',
    # the step that signals are sent to, whose exit code it gives
    "srun": 'echo $$ > "$STEP"; exec "$@"',
    "scontrol": 'echo "$@" >> "$REQUEUED"',
}
LINE = (
    *("bc_and_ppo", "--tiny", "-m", "1", "--set", "run.wandb=project"),
    *("--set", "stages.0.max_env_steps=960", "--set", "run.save_every_env_steps=96"),
)


def scripts() -> list[str]:
    return re.findall(r"```bash\n(.*?)```", (ROOT / "docs/slurm.md").read_text("utf-8"), re.S)


class Slurm:
    """Starts attempts of one job, and sends signals to their step."""

    def __init__(self, base: Path, data: Path) -> None:
        self.folder, self.base = base / "run", base
        programs = base / "programs"
        programs.mkdir()
        for name, text in PROGRAMS.items():
            (programs / name).write_text(f"#!/bin/bash\n{text}\n", "utf-8")
            (programs / name).chmod(0o755)
        (programs / "wandb.py").write_text(STAND_IN, "utf-8")
        (base / "train.sh").write_text(scripts()[0], "utf-8")
        self.environment = {
            **os.environ,
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{programs}",
            "OMP_NUM_THREADS": "1",
            "DEMOTOOLS_DATA": str(data),
            "STAND_IN": str(base / "stand_in.jsonl"),
            "STEP": str(base / "step"),
            "REQUEUED": str(base / "requeued"),
            **{"SLURM_JOB_ID": "77", "SLURM_CPUS_PER_TASK": "1"},
        }

    def attempt(self, number: int = 0, lines: int = 0) -> int:
        """Run the job until it ends, signalled once its log has so many lines; its exit code."""
        (self.base / "step").unlink(missing_ok=True)
        job = subprocess.Popen(
            ["bash", "train.sh", *LINE, "-o", str(self.folder)],
            cwd=self.base,
            env=self.environment,
        )
        deadline = time.monotonic() + 400
        while number and self.lines() < lines:
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        if number:
            os.kill(int((self.base / "step").read_text()), number)
        return job.wait(400)

    def lines(self) -> int:
        file = self.folder / FILE_NAME
        return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.mark.slow
def test_a_job_that_is_warned_preempted_and_killed_ends_as_one_that_nobody_disturbed(
    bot_data: Path, tmp_path: Path
) -> None:
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole, cut = (Slurm(tmp_path / name, bot_data) for name in ("whole", "cut"))
    assert whole.attempt() == 0
    count = whole.lines()
    assert cut.attempt(signal.SIGUSR1, count // 4) == 128 + signal.SIGUSR1
    assert (cut.base / "requeued").read_text("utf-8") == "requeue 77\n"
    assert cut.attempt(signal.SIGTERM, count // 2) == 128 + signal.SIGTERM
    assert cut.attempt(signal.SIGKILL, 3 * count // 4) == 128 + signal.SIGKILL
    assert 0 < steps(cut.folder) < steps(whole.folder)
    assert cut.attempt() == 0
    assert (cut.base / "requeued").read_text("utf-8") == "requeue 77\n"

    ours, theirs = (read_checkpoint(one.folder).model for one in (cut, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # a cycle that a signal cut in two has one line of each group
    assert [untimed(line) for line in read_log(cut.folder)] == [
        untimed(line) for line in read_log(whole.folder)
    ]
    assert board_series(cut.folder) == log_series(cut.folder)
    calls = stand_in_calls(cut.base)
    begun = [call["begun"]["id"] for call in calls if "begun" in call]
    assert len(begun) == 4 and len(set(begun)) == 1
    assert [untimed(call["values"]) for call in calls if "values" in call] == [
        untimed(tagged(line)) for line in read_log(cut.folder)
    ]


def tagged(line: dict[str, Any]) -> dict[str, Any]:
    """A line of the log as Weights & Biases gets it."""
    rest = line.keys() - {"group", *WHERE}
    return {name: line[name] for name in WHERE} | {
        f"{line['group']}/{name}": line[name] for name in rest
    }


def steps(folder: Path) -> int:
    return int(read_checkpoint(folder).training["progress"]["env_steps"])


@pytest.mark.parametrize("number", range(2))
def test_the_scripts_on_the_page_are_bash(number: int) -> None:
    subprocess.run(["bash", "-n"], input=scripts()[number], text=True, check=True)
