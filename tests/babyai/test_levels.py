"""Every BabyAI environment that minigrid registers is a level, with its grammar and its words."""

from __future__ import annotations

from pathlib import Path

import gymnasium
import numpy as np
import pytest

from demotools.babyai.cells import unpacked_cells
from demotools.babyai.levels import (
    all_level_names,
    level_from_environment_id,
    level_names,
    read_manifest,
)
from demotools.babyai.vocabulary import WORDS, mission_words
from demotools.errors import ManifestError
from demotools.recording.environment import make_environment, observed_cells

ALL = all_level_names()
FAMILIES = sorted(set(ALL) - set(level_names()))


def registered() -> set[str]:
    make_environment("GoToLocal")  # registers minigrid's environments
    return {name for name in gymnasium.registry if name.startswith("BabyAI-")}


def test_every_registered_environment_is_a_level_and_the_other_way_round() -> None:
    environments = [read_manifest(level).environment_id for level in ALL if level != "PutNext"]
    assert len(environments) == len(set(environments)) == 96
    assert set(environments) == registered()


def test_a_level_is_found_by_its_environment_id_whatever_the_version() -> None:
    assert read_manifest("BabyAI-GoToObjS6-v1").level == "GoToObjS6"
    assert read_manifest("GoToObjS6").environment_id == "BabyAI-GoToObjS6-v1"
    assert level_from_environment_id("BabyAI-GoToObjS6-v1") == "GoToObjS6"


def check_missions(level: str, seeds: range) -> None:
    manifest = read_manifest(level)
    environment = make_environment(level)
    for seed in seeds:
        observation, _ = environment.reset(seed=seed)
        mission = str(observation["mission"])
        assert manifest.matches_mission(mission), (level, seed, mission)
        assert set(mission_words(mission)) <= set(WORDS)
        image = observation["image"]
        assert np.array_equal(unpacked_cells(observed_cells(image)), image)


@pytest.mark.parametrize("level", FAMILIES)
def test_missions_match_the_grammar_of_the_family(level: str) -> None:
    check_missions(level, range(5))


@pytest.mark.slow
@pytest.mark.parametrize("level", [level for level in ALL if level != "PutNext"])
def test_hundreds_of_missions_match_the_grammar(level: str) -> None:
    check_missions(level, range(300))


@pytest.mark.parametrize("level", FAMILIES)
def test_no_grammar_takes_just_anything(level: str) -> None:
    manifest = read_manifest(level)
    assert not manifest.matches_mission("")
    assert not manifest.matches_mission("go to the red lamp")
    assert not manifest.matches_mission("make me a sandwich")


def test_a_misspelt_level_of_a_family_gets_its_nearest_names() -> None:
    with pytest.raises(ManifestError) as caught:
        read_manifest("KeyCoridorS3R2")
    assert "KeyCorridorS3R2" in caught.value.fix


def test_a_users_folder_may_add_a_family(tmp_path: Path) -> None:
    table = '[[family]]\nlike = "GoTo"\nenvironments = ["MyGoTo-v3"]\n'
    (tmp_path / "families.toml").write_text(table)
    manifest = read_manifest("MyGoTo", tmp_path)
    assert manifest.environment_id == "MyGoTo-v3"
    assert manifest.matches_mission("go to the red ball")
    assert "MyGoTo" in all_level_names(tmp_path)
    assert "GoToLocalS5N2" in all_level_names(tmp_path)


@pytest.mark.parametrize("grammar", ["", 'like = "GoTo"\nmission_pattern = "go"\n'])
def test_a_family_has_exactly_one_grammar(tmp_path: Path, grammar: str) -> None:
    (tmp_path / "families.toml").write_text(f'[[family]]\n{grammar}environments = ["Mine-v0"]\n')
    with pytest.raises(ManifestError, match=r"either like \(a level\) or mission_pattern"):
        read_manifest("Mine", tmp_path)


def test_the_table_of_the_docs_names_every_level() -> None:
    page = (Path(__file__).parents[2] / "docs" / "levels.md").read_text("utf-8")
    assert [level for level in ALL if f"| {level} |" not in page] == []
