"""`gymnasium.make("demotools/GoToLocal-v0")` gives the fast level, whoever is imported first."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from click.testing import CliRunner, Result
from gymnasium.utils.env_checker import check_env

import demotools  # noqa: F401 - it registers the levels
from demotools.babyai.levels import all_level_names
from demotools.cli import main
from demotools.errors import LevelError, ManifestError
from demotools.recording.environment import FastView, make_environment
from demotools.recording.registration import OWN_LEVELS_VARIABLE, environment_name
from trainer.run.session import dry_run


@pytest.mark.filterwarnings("ignore:The system font")
@pytest.mark.parametrize("level", ["GoToLocal", "BossLevel"])
def test_gymnasiums_checker_finds_nothing(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")  # the checker opens a window, too
    environment = gymnasium.make(f"demotools/{level}-v0").unwrapped
    assert isinstance(environment, FastView)
    check_env(environment)


def test_every_level_is_registered() -> None:
    assert {environment_name(level) for level in all_level_names()} <= gymnasium.registry.keys()
    with pytest.raises(LevelError, match="cannot be played"):
        gymnasium.make("demotools/PutNext-v0")


def test_it_plays_as_the_level_itself_does_and_can_be_drawn() -> None:
    ours = gymnasium.make("demotools/GoToLocal-v0", render_mode="rgb_array")
    plain = make_environment("GoToLocal")
    seen, _ = ours.reset(seed=7)
    assert seen["mission"] == plain.reset(seed=7)[0]["mission"]
    for action in (2, 1, 2, 0):
        seen, reward, *_ = ours.step(action)
        expected, plain_reward, *_ = plain.step(action)
        assert np.array_equal(seen["image"], expected["image"]) and reward == plain_reward
    picture = ours.render()
    assert isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.ndim == 3
    ours.close()


def test_a_video_is_recorded(tmp_path: Path) -> None:
    pytest.importorskip("moviepy", reason="gymnasium's RecordVideo needs moviepy")
    environment = gymnasium.make("demotools/GoToLocal-v0", render_mode="rgb_array")
    environment = gymnasium.wrappers.RecordVideo(environment, str(tmp_path), disable_logger=True)
    environment.reset(seed=1)
    for _ in range(5):
        environment.step(2)
    environment.close()  # type: ignore[no-untyped-call]
    assert [file.suffix for file in tmp_path.iterdir()] == [".mp4"]


@pytest.mark.parametrize("first", ["import gymnasium, demotools", "import demotools, gymnasium"])
def test_the_order_of_imports_does_not_matter_and_gymnasium_is_not_loaded_early(first: str) -> None:
    code = (
        "import sys, demotools; assert 'gymnasium' not in sys.modules\n" * ("demo" in first[:11])
        + first
        + "\nprint('demotools/GoToLocal-v0' in gymnasium.registry, len(sys.meta_path))"
    )
    before = subprocess.run(
        [sys.executable, "-c", "import sys, gymnasium; print(len(sys.meta_path))"],
        capture_output=True,
        text=True,
        check=True,
    )
    done = subprocess.run(
        [sys.executable, "-c", "import sys\n" + code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", before.stdout.strip()]


CASTLE = """
import gymnasium
from minigrid.envs.babyai.goto import GoToRedBallGrey


class Castle(GoToRedBallGrey):
    pass


gymnasium.register("CASTLE-v0", entry_point=Castle)
"""


@pytest.fixture
def castle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module of the user's in the working directory, which registers a level named after it."""
    name = f"castle_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(CASTLE.replace("CASTLE", name), "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(OWN_LEVELS_VARIABLE, "")
    yield name
    sys.modules.pop(name, None)
    gymnasium.registry.pop(f"{name}-v0", None)


@pytest.fixture
def typed(tmp_path: Path) -> Callable[..., Result]:
    """`typed("info mine")` runs `demotools` in a folder of its own."""
    return lambda line: CliRunner().invoke(main, [*line.split(), "--data-dir", str(tmp_path)])


def test_a_level_of_the_users_own_module_is_recorded_replayed_and_shown(
    castle: str, typed: Callable[..., Result], tmp_path: Path
) -> None:
    made = typed(f"generate {castle}:{castle}-v0 -n 20 -m 2 -q")
    assert made.exit_code == 0, made.output
    replayed = typed(f"verify {castle}-v0 --replay")
    assert "episodes played again in the environment (20 of 20" in replayed.output
    assert "no room" not in typed(f"show {castle}-v0").output
    told = dry_run(
        "bc_small_cpu.toml",
        overrides=[
            f"run.level={castle}:{castle}-v0",
            "stages.0.off_policy.store=auto",
            "stages.0.off_policy.augment=[]",
        ],
        tiny=True,
        data_dir=tmp_path,
    )
    assert f"store: {castle}-v0, the full store" in told and "another level" not in told


def test_a_store_does_not_make_us_import_a_module(castle: str) -> None:
    with pytest.raises(ManifestError, match="no such level"):
        make_environment(f"{castle}:{castle}-v0")
    with pytest.raises(ManifestError, match="no such level"):
        make_environment(f"{castle}-v0")
    assert castle not in sys.modules


@pytest.mark.parametrize(
    ("module", "level", "what"),
    [
        ("fortress", "CASTLE-v0", "No module named 'fortress'"),
        ("CASTLE", "CASTLES-v0", "did you mean CASTLE-v0?"),
        ("failing", "CASTLE-v0", "cannot be imported: ZeroDivisionError"),
        ("a b", "CASTLE-v0", "cannot be imported"),
        ("..x", "CASTLE-v0", "cannot be imported"),
        ("fort.keep", "CASTLE-v0", "change to the folder of the module"),
        ("mover", "CASTLE-v0", "cannot be imported: ZeroDivisionError"),
    ],
)
def test_a_module_that_does_not_register_the_level_is_told(
    castle: str, module: str, level: str, what: str
) -> None:
    Path("failing.py").write_text("1 / 0", "utf-8")
    Path("mover.py").write_text("import os; os.chdir('..'); 1 / 0", "utf-8")
    line = ["generate", f"{module}:{level}".replace("CASTLE", castle), "-n", "5"]
    result = CliRunner().invoke(main, line)
    assert result.exit_code == 1 and what.replace("CASTLE", castle) in result.stderr, result.output
    assert "next:" in result.stderr
