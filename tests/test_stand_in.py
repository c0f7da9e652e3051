"""Networks and runs on a device beside the CPU, in a process of their own (`tests.stand_in`)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("stand_in_cases.py")


@pytest.mark.slow
def test_networks_and_runs_work_on_a_device_beside_the_cpu() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(command, cwd=CASES.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout
