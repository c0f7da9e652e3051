"""The folder of a run: one process at a time, and what was there survives what fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from trainer.cli import main
from trainer.run.checkpoint import read_checkpoint
from trainer.run.folder import CHECKPOINT_FILE as FILE_NAME
from trainer.run.folder import REPLACED

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPE = ("run", "ppo", "--tiny", "-m", "1", "-q", "-o", "run", "--set", "run.device=cpu")
ENDLESS = ("--set", "stages.0.max_env_steps=100000000")


@pytest.fixture(scope="module")
def _finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    result = CliRunner().invoke(main, [*RECIPE[:-4], "-o", str(folder / "run"), *RECIPE[-2:]])
    assert result.exit_code == 0, result.output
    return folder / "run"


@pytest.fixture
def before(_finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The files of a finished run, which lies in the folder `run`."""
    import shutil

    monkeypatch.chdir(tmp_path)
    shutil.copytree(_finished, "run")
    return files()


def files() -> dict[str, bytes]:
    paths = [path for path in Path("run").rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path): path.read_bytes() for path in paths}


def invoked(*arguments: str) -> Result:
    return CliRunner().invoke(main, [*RECIPE, *arguments])


def started(*arguments: str, wait_for: str) -> subprocess.Popen[bytes]:
    """A run in a process of its own, once a file of its folder is there."""
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", *RECIPE, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for_it(process, lambda: Path("run", wait_for).exists())
    return process


def wait_for_it(process: subprocess.Popen[Any], there: Callable[[], bool]) -> None:
    """Wait until the running process has done something."""
    deadline = time.monotonic() + 120
    while not there():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)


def logged_lines() -> int:
    log = Path("run/log.jsonl")
    return log.read_bytes().count(b"\n") if log.exists() else 0


def test_overwriting_replaces_everything(before: dict[str, bytes]) -> None:
    Path("run/after-0000000009.pt").write_bytes(b"old")
    result = invoked("--overwrite", "--set", "run.seed=7")
    assert result.exit_code == 0, result.output
    assert "seed = 7" in Path("run/settings.toml").read_text("utf-8")
    assert len(Path("run/log.jsonl").read_bytes().splitlines()) == len(
        before["run/log.jsonl"].splitlines()
    )
    assert not Path("run", REPLACED).exists() and not Path("run/after-0000000009.pt").exists()
    assert len(list(Path("run/tensorboard").iterdir())) == 1


FAILING = """
from pathlib import Path
from demotools.recording.environment import make_environment

def make(level):
    if Path("run/.replaced").exists():
        raise OSError("no more of these")
    return make_environment(level)
"""


def test_a_run_that_fails_before_its_first_checkpoint_gives_the_old_one_back(
    before: dict[str, bytes],
) -> None:
    # fails where the stage begins, after all preparation
    Path("failing_late.py").write_text(FAILING, "utf-8")
    result = invoked("--overwrite", "--set", "on_policy.environment=failing_late:make")
    assert result.exit_code == 1 and "no more of these" in str(result.exception), result.output
    assert files() == before


@pytest.mark.slow
def test_a_run_under_a_limit_of_file_size_leaves_the_old_one_whole(
    before: dict[str, bytes],
) -> None:
    code = (
        "import resource, signal\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))\n"
        "from trainer.__main__ import run; run()"
    )
    for option in ("--resume", "--overwrite"):
        result = subprocess.run(
            [sys.executable, "-c", code, *RECIPE, option],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert result.returncode == 1 and "settings.toml" in result.stderr, result.stderr
        assert "Traceback" not in result.stderr
        after = {name: content for name, content in files().items() if "tensorboard" not in name}
        assert after == {k: v for k, v in before.items() if "tensorboard" not in k}


def test_a_killed_run_leaves_the_old_one_readable_and_it_comes_back(
    before: dict[str, bytes],
) -> None:
    process = started("--overwrite", *ENDLESS, "--set", "run.seed=9", wait_for=REPLACED)
    process.kill()
    process.wait()
    assert read_checkpoint(Path("run")).parsed().run.seed != 9
    result = invoked()
    assert result.exit_code == 1 and "there is already a run in this folder" in result.output
    after = files()
    assert {name: after[name] for name in before} == before
    assert not Path("run", REPLACED).exists()


@pytest.mark.usefixtures("before")
def test_a_folder_belongs_to_one_run_at_a_time_however_that_ends() -> None:
    process = started("--overwrite", *ENDLESS, wait_for=REPLACED)
    try:
        for option in ("--overwrite", "--resume"):
            result = invoked(option)
            assert result.exit_code == 1, result.output
            assert "another process is training in this folder" in result.output
            assert "Traceback" not in result.output
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    assert invoked("--overwrite").exit_code == 0


@pytest.mark.parametrize("moved", [0, 1, 2, 3, 99])
def test_wherever_the_moving_aside_is_cut_short_the_old_run_comes_back(
    before: dict[str, bytes], moved: int
) -> None:
    names = [FILE_NAME, "settings.toml", "log.jsonl", "tensorboard", "curve.png"]
    Path("run", REPLACED).mkdir()
    for name in names[:moved]:
        Path("run", name).rename(Path("run", REPLACED, name))
    assert read_checkpoint(Path("run")).settings
    if moved == 0:
        Path("run", REPLACED).rmdir()
    assert invoked().exit_code == 1
    assert files() == before


@pytest.mark.parametrize(
    ("number", "to_all"),
    [
        (signal.SIGTERM, False),
        (signal.SIGHUP, True),
        (signal.SIGUSR1, False),
        pytest.param(signal.SIGTERM, True, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, False, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, True, marks=pytest.mark.slow),
    ],
)
def test_what_asks_for_the_end_saves_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, to_all: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", *RECIPE, "-m", "2", *ENDLESS],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for_it(process, lambda: logged_lines() > 0)
    (os.killpg if to_all else os.kill)(process.pid, number)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + number, errors
    assert read_checkpoint(Path("run")).training["progress"]["env_steps"] > 0


def test_a_hangup_that_nohup_ignores_stays_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # children inherit it
    try:
        process = started(*ENDLESS, wait_for="settings.toml")
    finally:
        signal.signal(signal.SIGHUP, before)
    try:
        wait_for_it(process, lambda: logged_lines() > 0)  # by now it handles its signals
        process.send_signal(signal.SIGHUP)
        heard = logged_lines()
        # one that asks for the end has at most the line of the present cycle after it
        wait_for_it(process, lambda: logged_lines() > heard + 3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()


def test_a_copied_recipe_is_replaced_only_when_asked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    copy = ["recipes", "copy", "ppo", "-o", "mine.toml"]
    Path("mine.toml").write_text("mine", "utf-8")
    result = CliRunner().invoke(main, copy)
    assert result.exit_code == 1 and "the file already exists" in result.output
    assert Path("mine.toml").read_text("utf-8") == "mine"
    assert CliRunner().invoke(main, [*copy, "--overwrite"]).exit_code == 0
    assert "[run]" in Path("mine.toml").read_text("utf-8")


def test_special_files_are_refused_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.toml")
    os.mkfifo("pipe.pt")
    commands = (
        *("run pipe.toml", "run pipe.toml --dry-run", "recipes copy pipe.toml -o copy.toml"),
        *("evaluate pipe.pt", "watch pipe.pt", "watch /dev/zero"),
    )
    program = (
        "import sys; from click.testing import CliRunner; from trainer.cli import main\n"
        "for words in sys.argv[1:]:\n"
        "    result = CliRunner().invoke(main, words.split())\n"
        "    assert result.exit_code == 1 and 'not a regular file' in result.output, words\n"
        "    assert isinstance(result.exception, SystemExit), words\n"
    )
    # in a process that can be ended, should one of them wait
    done = subprocess.run(
        [sys.executable, "-c", program, *commands],
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
