"""Other platforms and a light install, shown on one machine: what they lack is taken away."""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import demotools
import trainer
import trainer.cli
from demotools.errors import DemotoolsError
from trainer.settings.models import read_settings, toml_of

ELSEWHERE = Path(__file__).parent / "elsewhere"
ROOT = ELSEWHERE.parents[1]


def elsewhere(folder: Path, *arguments: str) -> str:
    """What Python prints there, without the modules, functions and signals that Windows lacks."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ELSEWHERE), str(ROOT)]),
            "DEMOTOOLS_DATA": str(folder),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_module_is_imported_where_posix_is_not(tmp_path: Path) -> None:
    modules = [
        module.name
        for package in (demotools, trainer)
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        if "__main__" not in module.name and module.name != "demotools.workers.cluster"
    ]
    check = "import signal, sys; assert not hasattr(signal, 'pthread_sigmask'); import "
    elsewhere(tmp_path, "-c", check + ", ".join(modules))


@pytest.mark.slow
def test_recording_training_evaluating_and_drawing_work_where_posix_is_not(tmp_path: Path) -> None:
    def typed(*arguments: str) -> str:
        return elsewhere(tmp_path, "-m", *arguments)

    typed("demotools", "generate", "GoToLocal", "--episodes", "60", "--workers", "2")
    typed("demotools", "verify", "GoToLocal", "--replay")
    typed("trainer", "run", "bc_small_cpu.toml", "--tiny", "-m", "2", "-o", "run")
    typed("trainer", "run", "bc_small_cpu.toml", "--tiny", "-m", "2", "-o", "run", "--resume")
    assert "of 4 episodes" in typed("trainer", "evaluate", "run", "--episodes", "4", "-m", "2")
    typed("trainer", "plot", "run")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "command",
    [
        "run ppo.toml",
        "run ppo --dry-run",
        "evaluate .",
        "watch .",
        "plot .",
        "report .",
    ],
)
def test_without_the_extra_a_command_names_it(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("log.jsonl").touch()
    Path("settings.toml").write_text(toml_of(read_settings("ppo")), "utf-8")
    for module in ("torch", "matplotlib"):
        monkeypatch.setitem(sys.modules, module, None)
    result = CliRunner().invoke(trainer.cli.main, command.split())
    assert result.exit_code == 1
    assert "is not installed" in result.stderr
    assert "pip install -c constraints.txt '.[train]'" in result.stderr


def test_without_the_extra_python_names_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(DemotoolsError, match="torch is not installed"):
        _ = trainer.train
