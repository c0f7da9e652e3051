"""Helper processes: how many, and what is said where none can start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from demotools.workers import processes
from demotools.workers.processes import processor_count

ROOT = Path(processes.__file__).parents[2]
POOL = """
from pathlib import Path
from demotools.workers.processes import opened_workers
with opened_workers(2, Path("work")) as workers:
    print(workers.submit(str).result())
"""
VECTOR = """
from trainer.acting.vector import EnvironmentKind, VectorEnvironment, seed_streams
with VectorEnvironment(EnvironmentKind("GoToObj", expert=True), 2, processes=2) as vector:
    print(len(vector.reset(seed_streams(range(9), 2)).missions))
"""
EVALUATION = """
from trainer.acting.evaluate import evaluate_policy
print(evaluate_policy("bot", "GoToObj", 2, processes=2).episodes)
"""


def ran(folder: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        input=stdin,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("code", [POOL, VECTOR, EVALUATION])
def test_a_script_without_a_guard_is_told_so(tmp_path: Path, code: str) -> None:
    (tmp_path / "script.py").write_text(code, "utf-8")
    result = ran(tmp_path, "script.py")
    last = result.stderr.rpartition("process could be started")[2]
    assert result.returncode == 1 and 'has no `if __name__ == "__main__":`' in last
    assert "put the code of the script under" in last and "out of memory" not in result.stderr


@pytest.mark.parametrize("code", [POOL, VECTOR])
def test_a_script_from_standard_input_is_told_so(tmp_path: Path, code: str) -> None:
    result = ran(tmp_path, "-", stdin=code)
    assert result.returncode == 1
    assert "process could be started: it would have to import the program" in result.stderr


@pytest.mark.parametrize("code", [POOL, VECTOR])
def test_a_script_with_a_guard_and_a_command_line_need_nothing(tmp_path: Path, code: str) -> None:
    assert ran(tmp_path, "-c", code).returncode == 0
    inner = code.strip().replace("\n", "\n    ")
    (tmp_path / "script.py").write_text(f'if __name__ == "__main__":\n    {inner}\n', "utf-8")
    result = ran(tmp_path, "script.py")
    assert result.returncode == 0, result.stderr


def test_processes_of_environments_that_nobody_closed_end_with_the_program(tmp_path: Path) -> None:
    code = VECTOR.replace("with ", "vector = ").replace(" as vector:\n    print", "\nprint")
    assert ran(tmp_path, "-c", code).returncode == 0


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no affinity")
def test_processors_are_those_that_this_process_may_use() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert processor_count() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    ("groups", "files", "quotas"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, [2]),
        ("0::/", {"cpu.max": "max 100000"}, []),
        ("0::/a/b", {"a/cpu.max": "50000 100000", "a/b/cpu.max": "max 100000"}, [1]),
        ("0::/gone/there", {"cpu.max": "300000 100000"}, [3]),
        (
            "3:cpu,cpuacct:/a\n2:memory:/a",
            {"cpu/a/cpu.cfs_quota_us": "200000", "cpu/a/cpu.cfs_period_us": "100000"},
            [2],
        ),
        ("3:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, []),
        ("0::/", {"cpu.max": "nonsense"}, []),
    ],
)
def test_control_groups_limit_the_processors(
    tmp_path: Path, groups: str, files: dict[str, str], quotas: list[int]
) -> None:
    (tmp_path / "groups").write_text(groups, "utf-8")
    for name, text in files.items():
        path = tmp_path / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "ascii")
    found = set(processes._quotas(tmp_path / "groups", tmp_path / "fs"))
    assert found == set(quotas)


def test_nothing_counts_processors_in_another_way() -> None:
    for package in ("demotools", "trainer"):
        for file in (ROOT / package).rglob("*.py"):
            if file.name != "processes.py":
                assert "cpu_count(" not in file.read_text("utf-8"), file
