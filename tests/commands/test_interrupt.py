"""Ctrl-C in a terminal, which goes to every process of the command, at several moments."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")  # the commands below train and play

EVALUATE = ("evaluate", "--policy", "bot", "--level", "GoToLocal", "--episodes", "1000000")
TRAIN = (
    *("run", "ppo", "--tiny", "--set", "stages.0.max_env_steps=100000000", "-o", "run"),
    # levels are stepped as a batch, in one more process for every 128 of them
    *("--set", "on_policy.environments=256"),
)


def helpers_of(pid: int) -> list[bytes]:
    """The command lines of the processes that this one started, as Linux lists them."""
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            try:
                found.append(Path(f"/proc/{child}/cmdline").read_bytes())
            except OSError:
                continue  # it ended meanwhile
    return found


def interrupted(
    folder: Path, arguments: tuple[str, ...], moment: Callable[[int], bool], wait: float
) -> tuple[int, str]:
    """Exit code and stderr of a command that is interrupted `wait` seconds after a moment."""
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", *arguments, "-m", "2"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not moment(process.pid):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.002)
        time.sleep(wait)
        os.killpg(process.pid, signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return process.returncode, errors


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="asks Linux for the processes")
@pytest.mark.parametrize(
    ("arguments", "workers", "wait"),
    [
        pytest.param(EVALUATE, 1, 0.0, marks=pytest.mark.slow),
        (EVALUATE, 1, 0.1),  # while it imports numpy
        (EVALUATE, 2, 0.3),
        pytest.param(TRAIN, 2, 0.1, marks=pytest.mark.slow),
        (TRAIN, 2, 2.0),
    ],
)
def test_ctrl_c_ends_every_process_without_a_traceback(
    tmp_path: Path, arguments: tuple[str, ...], workers: int, wait: float
) -> None:
    def started(pid: int) -> bool:
        return sum(b"spawn_main" in line for line in helpers_of(pid)) >= workers

    code, errors = interrupted(tmp_path, arguments, started, wait)
    assert "Traceback" not in errors, errors
    assert code == 130, errors


@pytest.mark.parametrize("program", ["demotools", "trainer"])
@pytest.mark.parametrize("module", ["demotools.errors", "click"])
def test_ctrl_c_during_the_imports_is_answered_as_later(
    tmp_path: Path, program: str, module: str
) -> None:
    # Python runs this file at its start, and this hook before anything is imported
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "def interrupt(event, arguments):\n"
        f"    if event == 'import' and arguments[0] == {module!r}:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.addaudithook(interrupt)\n"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-m", program, "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (130, "\ninterrupted\n")
