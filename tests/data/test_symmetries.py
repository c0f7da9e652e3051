"""Which augmentation is refused, why, and what declares it; and what the manifests declare."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from click.testing import CliRunner, Result

from demotools.babyai.cells import (
    ACTIONS,
    AGENT_COLUMN,
    AGENT_ROW,
    BALL,
    BOX,
    COLOURS,
    DOOR,
    KEY,
    TYPES,
    UNPACKING_TABLE,
)
from demotools.babyai.levels import (
    Manifest,
    Symmetry,
    all_level_names,
    level_names,
    read_manifest,
)
from demotools.babyai.vocabulary import vocabulary_hash
from demotools.errors import ManifestError, SettingsError
from demotools.recording.environment import make_environment
from demotools.store.reading import Store, open_store
from demotools.store.reshape import merge_stores
from tests.conftest import build_store, make_episodes
from tests.store.test_store import edit_attributes
from tests.transformed import first_steps
from trainer.cli import main
from trainer.data.augment import check_augmentation
from trainer.settings.models import Settings, read_settings

PAGE = Path(__file__).parents[2] / "docs" / "augmentation.md"
MARK = "<!-- written by tests/data/test_symmetries.py: do not edit below -->\n"
SYMMETRIES = get_args(Symmetry)
DECLARING = [level for level in all_level_names() if read_manifest(level).symmetries]


def store_of(folder: Path, *missions: str, level: str = "GoToLocal") -> Store:
    episodes = replace(make_episodes([3] * len(missions)), mission=list(missions))
    return build_store(folder / "Mine.zarr", episodes, level=level)


def settings(*augment: str) -> Settings:
    return read_settings(
        "bc_small_cpu.toml",
        ["stages.0.off_policy.store=Mine", f"stages.0.off_policy.augment={json.dumps(augment)}"],
    )


def refused(store: Store, *augment: str) -> str:
    with pytest.raises(SettingsError) as caught:
        check_augmentation(settings(*augment), {"Mine": store})
    return str(caught.value)


@pytest.mark.parametrize("kind", [KEY, BALL, BOX])
def test_a_store_in_which_a_thing_is_toggled_is_not_retyped(tmp_path: Path, kind: int) -> None:
    episodes = make_episodes([3, 4, 2])
    view, action = episodes.view.copy(), episodes.action.copy()
    action[:] = ACTIONS.index("toggle")
    view[:, AGENT_COLUMN, AGENT_ROW - 1] = pack(DOOR)
    doors = build_store(tmp_path / "Mine.zarr", replace(episodes, view=view, action=action))
    assert check_augmentation(settings("retype"), {"Mine": doors}) == []
    view[5, AGENT_COLUMN, AGENT_ROW - 1] = pack(kind)
    toggled = build_store(tmp_path / "Other.zarr", replace(episodes, view=view, action=action))
    assert "retype cannot be used: episode 1 toggles a key, a ball or a box" in refused(
        toggled, "mirror", "retype"
    )
    assert check_augmentation(settings("mirror"), {"Mine": toggled}) == []


def pack(kind: int) -> int:
    """The code of a red one."""
    return int(UNPACKING_TABLE.tolist().index([kind, 0, 0]))


def with_words(store: Store, old: str, new: str) -> Store:
    """The store as somebody else would have written it, with another word in its vocabulary."""
    words = [new if word == old else word for word in store.attributes.vocabulary]
    about = {"vocabulary": words, "vocabulary_hash": vocabulary_hash(words)}
    edit_attributes(store.path, lambda attributes: attributes.update(about))
    return open_store(store.path)


def run(folder: Path, *arguments: str) -> Result:
    words = ["run", "bc_small_cpu", "--tiny", "--data-dir", str(folder), "-o", str(folder / "out")]
    words += ["--set", "stages.0.off_policy.store=Mine", *arguments]
    return CliRunner().invoke(main, words)


@pytest.mark.parametrize("how", [["--dry-run"], []])
def test_a_level_without_a_manifest_is_refused_before_training_with_the_lines_that_declare_it(
    tmp_path: Path, how: list[str]
) -> None:
    store_of(tmp_path, *["go to the red ball"] * 4, level="Jump")
    result = run(tmp_path, *how)
    assert result.exit_code == 1
    assert not (tmp_path / "out").exists()
    assert (
        result.stderr
        == """\
error: recolor and mirror and retype cannot be used: the level Jump of Mine has no manifest that \
declares it
  where: stages.0.off_policy.augment
  next:  train without it: --set 'stages.0.off_policy.augment=[]'. If the task is symmetric, a \
file Jump.toml with the lines `level = "Jump"`, `environment_id = "…"`, `mission_pattern = "…"`, \
`symmetries = ["mirror", "recolor", "retype"]` in the folder $DEMOTOOLS_MANIFESTS declares it, and \
`pytest tests/data/test_augment.py -k Jump -m 'slow or not slow'` proves it (docs/augmentation.md)
"""
    )


def test_those_lines_do_declare_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(tmp_path, "go to the red ball", level="Jump")
    told = refused(store, "recolor").partition("Jump.toml with")[2].partition("in the folder")[0]
    folder = tmp_path / "manifests"
    folder.mkdir()
    (folder / "Jump.toml").write_text("\n".join(re.findall("`(.*?)`", told)))
    monkeypatch.setenv("DEMOTOOLS_MANIFESTS", str(folder))
    assert check_augmentation(settings("recolor"), {"Mine": store}) == []
    told = refused(store, "mirror", "recolor")
    assert "mirror cannot be used: the manifest of Jump does not declare it" in told
    assert """--set 'stages.0.off_policy.augment=["recolor"]'""" in told
    assert """symmetries = ["mirror", "recolor"]""" in told
    (folder / "Jump.toml").write_text("level = ")
    with pytest.raises(ManifestError, match="not valid TOML"):
        check_augmentation(settings("recolor"), {"Mine": store})


def test_a_level_that_nobody_can_play_is_refused_with_that_reason(tmp_path: Path) -> None:
    store = store_of(tmp_path, "put the red ball next to the green key", level="PutNext")
    assert "PutNext does not declare it" in refused(store, "mirror")
    assert "which has no environment to prove it in" in refused(store, "mirror")


def test_a_store_of_images_is_refused(tmp_path: Path) -> None:
    pixels = np.zeros((3, 8, 8, 3), dtype=np.uint8)
    store = build_store(tmp_path / "Mine.zarr", replace(make_episodes([3]), view=pixels))
    assert "this store has images (8 x 8 x 3)" in refused(store, "recolor")
    assert "next:  train without augmentation" in refused(store, "recolor")


@pytest.mark.parametrize("word", ["clockwise", "west", "pink", "lamp"])
def test_words_that_may_name_a_side_or_a_colour_are_refused_until_a_manifest_says_they_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    store = store_of(tmp_path, "go to the red ball", f"go to the {word} box")
    told = refused(store, "recolor", "mirror")
    assert f"recolor and mirror cannot be used: missions of this store contain `{word}`" in told
    assert f'in the manifest of GoToLocal, as in unchanged_words = ["{word}"]' in told
    manifest = f"""
level = "GoToLocal"
environment_id = "BabyAI-GoToLocal-v0"
mission_pattern = ".*"
symmetries = ["recolor", "mirror"]
unchanged_words = ["{word}"]
"""
    (tmp_path / "GoToLocal.toml").write_text(manifest)
    monkeypatch.setenv("DEMOTOOLS_MANIFESTS", str(tmp_path))
    assert check_augmentation(settings("recolor", "mirror"), {"Mine": store}) == []


def test_many_unknown_words_are_not_all_listed(tmp_path: Path) -> None:
    names = [f"{first}{second}x" for first in "abcdef" for second in "abcdef"]
    told = refused(store_of(tmp_path, " ".join(names)), "mirror")
    assert "`acx`, `adx` and" not in told
    assert "`bax`, `bbx` and 28 more" in told


@pytest.mark.parametrize(
    ("symmetry", "word", "told"),
    [
        ("rephrase", "after", "has `then`, `you` but not `after`"),
        ("recolor", "grey", "`red`, `green`, `blue`, `purple`, `yellow` but not `grey`"),
        ("mirror", "right", "has `left` but not `right`"),
        ("retype", "box", "has `key`, `ball` but not `box`"),
    ],
)
def test_a_word_without_its_counterpart_is_refused(
    tmp_path: Path, symmetry: str, word: str, told: str
) -> None:
    level = "GoToSeq" if symmetry == "rephrase" else "GoToLocal"
    store = with_words(store_of(tmp_path, "go to the red ball", level=level), word, "rhubarb")
    assert told in refused(store, symmetry)


def test_an_exchanged_word_cannot_be_declared_to_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(tmp_path, "go to the red ball", level="Jump")
    manifest = """
level = "Jump"
no_environment = "ours"
mission_pattern = ".*"
symmetries = ["mirror"]
unchanged_words = ["right"]
"""
    (tmp_path / "Jump.toml").write_text(manifest)
    monkeypatch.setenv("DEMOTOOLS_MANIFESTS", str(tmp_path))
    with pytest.raises(ManifestError, match="unchanged_words lists `right`, which augmentation"):
        check_augmentation(settings("mirror"), {"Mine": store})


def test_a_symmetry_that_widens_the_level_is_said(tmp_path: Path) -> None:
    store = store_of(tmp_path, "go to the red ball", level="GoToRedBall")
    assert check_augmentation(settings("recolor", "mirror"), {"Mine": store}) == [
        "augment: recolor makes episodes of the task of GoToRedBall that the level itself never "
        "has (docs/augmentation.md)"
    ]
    assert check_augmentation(settings(), {"Mine": store}) == []


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ('symmetries = ["rotate"]', "symmetries.0"),
        ('symmetries = ["mirror", "mirror"]', "mirror, mirror: list each only once"),
        ('widened_by = ["mirror"]', "widened_by lists mirror, but symmetries does not"),
        ('unchanged_words = ["two words"]', "unchanged_words.0"),
        ('symmetry = ["mirror"]', "symmetry"),
    ],
)
def test_a_wrong_declaration_is_refused_at_its_key(tmp_path: Path, keys: str, told: str) -> None:
    (tmp_path / "Jump.toml").write_text(
        f'level = "Jump"\nno_environment = "ours"\nmission_pattern = "jump"\n{keys}\n'
    )
    with pytest.raises(ManifestError) as caught:
        read_manifest("Jump", tmp_path)
    assert told in caught.value.what


def widening(level: str, seeds: int) -> tuple[str, ...]:
    """The declared symmetries that make what no episode of these seeds has."""
    seen = first_steps(make_environment(level), range(seeds))
    mirrored = {(kind, side.translate(EXCHANGED)) for kind, side in seen.sides}
    widens = {
        "recolor": _lacks_some(seen.colours, len(COLOURS)),
        "mirror": mirrored != seen.sides,
        "retype": _lacks_some(seen.types, len(TYPES)),
        "rephrase": len(seen.orders) == 1,
    }
    return tuple(name for name in read_manifest(level).symmetries if widens[name])


def _lacks_some(pairs: set[tuple[str, str]], choices: int) -> bool:
    """Whether some kind has been seen with less than all choices."""
    found: dict[str, set[str]] = {}
    for kind, choice in pairs:
        found.setdefault(kind, set()).add(choice)
    return any(len(some) < choices for some in found.values())


EXCHANGED = str.maketrans("<>", "><")


@pytest.mark.parametrize("level", ["GoToObjS4", "GoToRedBallGrey", "OpenRedDoor", "UnlockPickup"])
def test_a_level_says_what_widens_it(level: str) -> None:
    assert widening(level, 200) == read_manifest(level).widened_by


@pytest.mark.slow
@pytest.mark.parametrize("level", DECLARING)
def test_every_level_says_what_widens_it(level: str) -> None:
    assert widening(level, 500) == read_manifest(level).widened_by


def table() -> str:
    """The symmetries of every level, for docs/augmentation.md."""
    of_the_paper = level_names()
    others = [level for level in all_level_names() if level not in of_the_paper]
    lines = [MARK]
    for title, levels in (("The levels of the paper", of_the_paper), ("All others", others)):
        lines += [
            f"### {title}",
            "",
            f"| level | {' | '.join(SYMMETRIES)} |",
            "| --- | --- | --- | --- | --- |",
        ]
        for level in levels:
            manifest = read_manifest(level)
            said = " | ".join(_said(manifest, one) for one in SYMMETRIES)
            lines.append(f"| {level} | {said} |")
        lines.append("")
    return "\n".join(lines)


def _said(manifest: Manifest, symmetry: str) -> str:
    if symmetry not in manifest.symmetries:
        return "refused: no environment" if manifest.environment_id is None else "refused"
    return "yes, widens" if symmetry in manifest.widened_by else "yes"


def test_the_table_of_the_docs_is_what_the_manifests_declare() -> None:
    assert PAGE.read_text("utf-8").endswith(table())


if __name__ == "__main__":
    text = PAGE.read_text("utf-8")
    PAGE.write_text(text.partition(MARK)[0] + table(), "utf-8")


def test_a_merged_store_needs_what_each_of_its_levels_declares(tmp_path: Path) -> None:
    stores = [
        build_store(tmp_path / f"{level}.zarr", make_episodes([3]), level=level)
        for level in ("GoToLocal", "GoToRedBall", "Jump")
    ]
    merge_stores([store.path for store in stores[:2]], tmp_path / "Two.zarr", quiet=True)
    (line,) = check_augmentation(settings("recolor"), {"Mine": open_store(tmp_path / "Two.zarr")})
    assert "recolor makes episodes of the task of GoToRedBall that" in line
    merge_stores([store.path for store in stores], tmp_path / "Three.zarr", quiet=True)
    told = refused(open_store(tmp_path / "Three.zarr"), "recolor")
    assert "the level Jump of Three has no manifest that declares it" in told
