"""`gymnasium.make("demotools/GoToLocal-v0")` gives the fast level, whoever is imported first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import demotools  # noqa: F401 - it registers the levels
from demotools.babyai.levels import all_level_names
from demotools.errors import LevelError
from demotools.recording.environment import FastView, make_environment
from demotools.recording.registration import environment_name


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
