import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from demotools.babyai.cells import unpacked_cells
from demotools.babyai.levels import EVALUATION_SEED, SEEDS, level_names, read_manifest
from demotools.errors import LevelError, ManifestError
from demotools.recording.environment import level_environment_id, make_environment, observed_cells

PLAYABLE = [level for level in level_names() if read_manifest(level).environment_id]


def test_eighteen_of_the_nineteen_levels_can_be_played() -> None:
    assert len(PLAYABLE) == 18
    assert set(level_names()) - set(PLAYABLE) == {"PutNext"}


def test_a_level_without_environment_is_refused_with_the_reason_of_its_manifest() -> None:
    reason = read_manifest("PutNext").no_environment
    assert reason
    with pytest.raises(LevelError, match="cannot be played") as error:
        make_environment("PutNext")
    assert reason in error.value.what
    assert "convert" in error.value.fix


def test_an_unknown_level_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(ManifestError, match="GoToLocal"):
        make_environment("gotolocl")


def test_an_environment_that_this_minigrid_lacks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "New.toml").write_text(
        'level = "New"\nenvironment_id = "BabyAI-New-v9"\nmission_pattern = ".*"\n'
    )
    with pytest.raises(LevelError, match=r"no environment BabyAI-New-v9"):
        make_environment("New", tmp_path)


def test_a_level_may_be_named_by_its_environment_id() -> None:
    assert level_environment_id("BabyAI-GoToLocal-v0") == "BabyAI-GoToLocal-v0"


def test_rejected_layouts_are_not_printed_and_other_output_is(
    capfd: pytest.CaptureFixture[str],
) -> None:
    # minigrid itself prints some forty lines for these seeds
    environment = make_environment("GoToRedBallGrey")
    sys.stdout.write("before\n")
    for seed in range(300):
        environment.reset(seed=seed)
    print("after")  # noqa: T201  (ours, which must come through)
    captured = capfd.readouterr()
    assert captured.out == "before\nafter\n"
    assert captured.err == ""


def test_who_needs_the_seeds_only_does_not_load_minigrid() -> None:
    code = "import sys, demotools.babyai.levels; sys.exit('minigrid' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_seeds_of_splits_and_evaluation_do_not_overlap() -> None:
    spans = [*SEEDS.values(), range(EVALUATION_SEED, EVALUATION_SEED + 10**9)]
    ordered = sorted(spans, key=lambda span: span.start)
    for earlier, later in pairwise(ordered):
        assert earlier.stop <= later.start


@pytest.mark.parametrize("level", PLAYABLE)
def test_the_views_of_a_thousand_steps_survive_packing(level: str) -> None:
    environment = make_environment(level)
    actions = np.random.default_rng(1).integers(0, 7, 1000).tolist()
    observation, _ = environment.reset(seed=0)
    images = [observation["image"]]
    for step, action in enumerate(actions):
        observation, _, terminated, truncated, _ = environment.step(action)
        if terminated or truncated:
            observation, _ = environment.reset(seed=step)
        images.append(observation["image"])
    seen = np.stack(images)
    cells = observed_cells(seen)
    assert cells.shape == (1001, 7, 7)
    assert np.array_equal(unpacked_cells(cells), seen)


def test_views_that_do_not_fit_a_byte_are_refused() -> None:
    with pytest.raises(LevelError, match="do not pack"):
        observed_cells(np.zeros((5, 56, 56, 3), dtype=np.uint8))
    with pytest.raises(LevelError, match="do not pack"):
        observed_cells(np.full((7, 7, 3), 11, dtype=np.uint8))
