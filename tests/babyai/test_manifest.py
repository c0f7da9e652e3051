from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import gymnasium
import minigrid  # noqa: F401  (registers the environments)
import pytest

from demotools.babyai.levels import (
    SPLITS,
    level_names,
    manifest_of_data,
    read_archive,
    read_manifest,
    shipped_manifests,
)
from demotools.errors import ManifestError

PAPER_LEVELS = {
    "GoToObj",
    "GoToRedBallGrey",
    "GoToRedBall",
    "GoToLocal",
    "PutNextLocal",
    "PickupLoc",
    "GoToObjMaze",
    "GoTo",
    "Pickup",
    "UnblockPickup",
    "Open",
    "Unlock",
    "PutNext",
    "Synth",
    "SynthLoc",
    "GoToSeq",
    "SynthSeq",
    "GoToImpUnlock",
    "BossLevel",
}
WITH_ENVIRONMENT = sorted(PAPER_LEVELS - {"PutNext"})


def missions(environment_id: str, resets: int) -> Iterator[str]:
    """Missions of fresh episodes; minigrid's chatter goes nowhere."""
    with contextlib.redirect_stdout(io.StringIO()):
        environment = gymnasium.make(environment_id, disable_env_checker=True).unwrapped
        for seed in range(resets):
            observation, _ = environment.reset(seed=seed)
            yield observation["mission"]
        environment.close()


def test_the_nineteen_levels_of_the_paper_have_a_manifest() -> None:
    assert set(level_names()) == PAPER_LEVELS


def test_every_toml_file_with_a_capital_is_a_level() -> None:
    capitals = {path.stem for path in shipped_manifests().iterdir() if path.name[0].isupper()}
    assert capitals == PAPER_LEVELS


@pytest.mark.parametrize("level", sorted(PAPER_LEVELS))
def test_every_manifest_names_a_train_and_a_valid_file_and_where_to_get_them(level: str) -> None:
    manifest = read_manifest(level)
    assert set(manifest.files) == set(SPLITS)
    assert manifest.files["train"].name == f"BabyAI-{level}-v0.pkl"
    assert manifest.files["valid"].name == f"BabyAI-{level}-v0_valid.pkl"
    for file in manifest.files.values():
        kinds = [source.names[-1] for source in file.sources]
        own = ["gdrive"] if level in {"BossLevel", "GoTo", "GoToLocal", "GoToObjMaze"} else []
        jat = [] if level in {"GoToObjMaze", "PutNext"} else ["jat"]
        assert kinds == [*own, "copydemos", *jat]
        assert (file.size_bytes, file.sha256, file.md5) == (None, None, None)


def test_the_archive_of_all_levels_is_known_by_its_published_md5() -> None:
    archive = read_archive("copydemos")
    assert archive.md5 == "1df202ef2bbf2de768633059ed8db64c"
    assert archive.size_bytes is None


@pytest.mark.parametrize("level", WITH_ENVIRONMENT)
def test_a_level_has_an_environment(level: str) -> None:
    environment_id = read_manifest(level).environment_id
    assert environment_id is not None
    assert gymnasium.spec(environment_id).id == f"BabyAI-{level}-v0"


def test_put_next_says_why_it_has_no_environment() -> None:
    manifest = read_manifest("PutNext")
    assert manifest.environment_id is None
    assert manifest.no_environment is not None
    assert "3x3" in manifest.no_environment


def refused_missions(level: str, resets: int) -> list[str]:
    manifest = read_manifest(level)
    assert manifest.environment_id is not None
    texts = list(missions(manifest.environment_id, resets))
    assert len(texts) == resets
    return [text for text in texts if not manifest.matches_mission(text)]


@pytest.mark.parametrize("level", WITH_ENVIRONMENT)
def test_missions_of_the_environment_match_the_pattern(level: str) -> None:
    assert refused_missions(level, 40) == []


@pytest.mark.slow
@pytest.mark.parametrize("level", WITH_ENVIRONMENT)
def test_a_thousand_missions_of_the_environment_match_the_pattern(level: str) -> None:
    assert refused_missions(level, 1000) == []


@pytest.mark.parametrize(
    ("level", "mission"),
    [
        ("GoToLocal", "go to the red door"),
        ("GoToLocal", "go to the  red ball"),
        ("GoToLocal", "go to the red ball\n"),
        ("GoToLocal", "go to the ball"),
        ("GoToLocal", " go to the red ball"),
        ("GoToRedBallGrey", "go to a red ball"),
        ("GoToObj", "go to a red ball"),
        ("PutNextLocal", "put a red ball next to the green key"),
        ("PickupLoc", "pick up the red ball on your front"),
        ("PickupLoc", "pick up the red object"),
        ("Open", "open the door"),
        ("Synth", "go to the red ball behind you"),
        ("Synth", "pick up the door"),
        ("SynthLoc", "go to the red ball and open the door"),
        ("GoToSeq", "open the door"),
        ("GoToSeq", "go to the ball on your left"),
        ("GoToSeq", " and go to the ball"),
        ("GoToSeq", "go to the ballgo to the key"),
        ("BossLevel", "open the door and open a door and open the red door"),
        ("BossLevel", "open the door, then open a door, then open the red door"),
        ("BossLevel", "open the door after you open a door, then open the red door"),
        ("BossLevel", "open a door, then open a door and open a door and open the red door"),
        ("BossLevel", "open the door, then "),
        ("BossLevel", ""),
        ("BossLevel", "open the door" * 1000),
    ],
)
def test_what_the_grammar_cannot_say_is_no_mission(level: str, mission: str) -> None:
    assert not read_manifest(level).matches_mission(mission)


@pytest.mark.parametrize(
    ("level", "mission"),
    [
        ("PutNext", "put the red ball next to a green key"),
        ("GoToSeq", "go to a door and go to the red key after you go to a box and go to the ball"),
        (
            "BossLevel",
            "put a grey key in front of you next to the door on your left and open a door "
            "behind you, then pick up the box and go to a green door on your right",
        ),
    ],
)
def test_what_the_grammar_can_say_is_a_mission(level: str, mission: str) -> None:
    assert read_manifest(level).matches_mission(mission)


def test_a_level_is_also_found_by_its_environment_id() -> None:
    assert read_manifest("BabyAI-GoToLocal-v0") == read_manifest("GoToLocal")


def test_an_unknown_level_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(ManifestError) as failure:
        read_manifest("gotolocl")
    assert "GoToLocal" in failure.value.fix


@pytest.mark.parametrize("name", ["../GoToLocal", "archives", "", "GoTo/../GoTo"])
def test_a_name_that_is_no_level_name_is_not_looked_up_as_a_path(name: str) -> None:
    with pytest.raises(ManifestError, match="no such level"):
        read_manifest(name)


@pytest.mark.parametrize("name", ["Mine-TwoRoom-v0", "ours/TwoRoom-v0", "MiniGrid-Empty-5x5-v0"])
def test_data_may_be_of_any_gymnasium_id(name: str) -> None:
    assert manifest_of_data(name).level == name


@pytest.mark.parametrize("name", ["../TwoRoom-v0", "a/b/C-v0", "/C-v0", "TwoRoom", "BabyAI-No-v0"])
def test_data_of_what_is_no_gymnasium_id_or_no_level_are_refused(name: str) -> None:
    with pytest.raises(ManifestError, match="no such level"):
        manifest_of_data(name)


USER_MANIFEST = """
level = "{level}"
no_environment = "ours"
mission_pattern = "jump"
[files.train]
name = "{level}.pkl"
sources = [{{ https = "http://localhost/a.pkl" }}]
"""


def test_a_users_folder_adds_levels_and_overrides_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for level in ("Jump", "GoTo"):
        (tmp_path / f"{level}.toml").write_text(USER_MANIFEST.format(level=level))
    assert set(level_names(tmp_path)) == PAPER_LEVELS | {"Jump"}
    assert read_manifest("GoTo", tmp_path).mission_pattern == "jump"
    assert read_manifest("Open", tmp_path) == read_manifest("Open")
    monkeypatch.setenv("DEMOTOOLS_MANIFESTS", str(tmp_path))
    assert read_manifest("Jump").files["train"].name == "Jump.pkl"
    assert read_archive("copydemos").name == "copydemos.tar.gz"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('level = "Jump"', 'level = "Walk"'), "the manifest is for level Walk"),
        (('"jump"', '"(jump"'), "mission_pattern.*not a regular expression"),
        (('"ours"', '"ours"\nenvironment_id = "x"'), "either environment_id or no_environment"),
        (("https =", "gdrive = 'abcdefghijk', https ="), "sources.0.*one of gdrive"),
        (("https =", "member = 'a', gdrive = 'abcdefghijk' #"), "TOML"),
        (("http://localhost/a.pkl", "file:///etc/passwd"), "https"),
        (("Jump.pkl", "../Jump.pkl"), "files.train.name"),
        (("sources", "sourcs"), "files.train.sour"),
        (("[files.train]", "[files.test]"), "files.test"),
    ],
)
def test_a_wrong_manifest_is_refused_at_its_key(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    text = USER_MANIFEST.format(level="Jump").replace(*change)
    (tmp_path / "Jump.toml").write_text(text)
    with pytest.raises(ManifestError, match=message):
        read_manifest("Jump", tmp_path)
