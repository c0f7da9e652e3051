"""The page of results says what was measured, and nothing else."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from demotools.babyai.levels import level_names, read_manifest
from demotools.errors import SettingsError
from trainer.settings.models import read_settings, toml_of

pytest.importorskip("torch")

STUDY = Path(__file__).parents[1] / "benchmarks" / "study"


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(STUDY)
    return import_module("report")


def record(**changes: Any) -> dict[str, Any]:
    about = {"run": "x", "part": "levels", "level": "GoToLocal", "demos": 200_000}
    measured = {"demo_steps": 3_000_000, "successes": 990, "episodes": 1_000, "minutes": 0.5}
    cost = {"processor_seconds": 90.0, "threads": 1, "jobs": 2, "valid_cross_entropy": 0.03}
    how = {"augmented": False, "recipe": "bc_fast.toml", "precision": "float32", "seed": 1}
    return {**about, **measured, **cost, **how, "network": "small", **changes}


def test_the_page_is_what_the_noted_results_give(report: Any) -> None:
    assert report.PAGE.read_text("utf-8") == report.page(report.results())


def test_the_readme_says_what_the_noted_results_give(report: Any) -> None:
    assert report.README.read_text("utf-8") == report.readme_with_results(report.results())


def test_the_recipes_say_what_they_reached(report: Any) -> None:
    texts = report.recipes_with_results(report.results())
    assert {path.name for path in texts} == {
        *("bc_fast.toml", "bc_1000_demos.toml", "bc_bosslevel.toml", "bc_goto.toml")
    }
    for path, text in texts.items():
        assert path.read_text("utf-8") == text
        assert re.search(r"^# Success: (9\d|100)\.\d% of 1,000 unseen episodes", text, re.M)


def test_the_recipe_for_a_gpu_says_what_it_costs(report: Any) -> None:
    text = report.recipe_path("bc_bosslevel_gpu.toml").read_text("utf-8").replace("\n# ", " ")
    numbers = re.findall(r"takes? (\d+ [mh]\w+)", report.gpu_on_paper())
    assert len(numbers) == 2 and all(number in text for number in numbers)


def test_seeds_are_taken_together_and_the_worst_is_told(report: Any) -> None:
    of_all = [
        record(part="mixture", level=level, successes=950) for level in ("GoToLocal", "Synth")
    ]
    text = report.levels_section([record(), record(seed=2, successes=970), *of_all])
    assert (
        "| GoToLocal | 200,000 | `bc_fast.toml` | `small` | 98.00% (97.29% to 98.53%) | 97.0% | "
        "2 | 95.00% (93.47% to 96.19%) | 99.8 | 100 | 3.0 M | 1.5 |" in text
    )
    # what was not run has a row too
    assert (
        "| Synth | - | - | - | - | - | - | 95.00% (93.47% to 96.19%) | 97.3 | 100 | - | - |" in text
    )
    assert "| Open | - | - | - | - | - | - | - | - | - | - | - |" in text
    assert text.count("\n| ") == 1 + 1 + 18


def test_the_readme_shows_what_a_recipe_reaches_with_the_network_that_it_names(
    report: Any,
) -> None:
    few = {"part": "few", "demos": 333, "recipe": "bc_1000_demos.toml"}
    runs = [record(**few, successes=900), record(**few, successes=980, network="maze")]
    rows = [line for line in report.readme_with_results(runs).splitlines() if "| 333 |" in line]
    assert len(rows) == 1 and "98.00%" in rows[0]
    other = report.readme_with_results(runs[:1])
    assert "| 333 |" not in other


def test_runs_of_another_length_are_told_apart(report: Any) -> None:
    maze = {"part": "mazes", "level": "Synth", "recipe": "bc_goto.toml", "network": "maze"}
    runs = [record(**maze), record(**maze, run="y", demo_steps=16_000_000, successes=997)]
    for noted in (runs, runs[::-1]):
        text = report.levels_section(noted)
        assert re.search(r"\| 99\.00% .*\| 3\.0 M \|", text)
        assert re.search(r"\| 99\.70% .*\| 16\.0 M \|", text)
        # the README has the longest
        readme = report.readme_with_results(noted)
        assert "99.70%" in readme and "99.00%" not in readme


def test_the_recipe_of_bosslevel_says_what_all_its_demonstrations_gave(report: Any) -> None:
    boss = {"part": "mazes", "level": "BossLevel", "recipe": "bc_bosslevel.toml"}
    texts = report.recipes_with_results(
        [record(**boss), record(**boss, run="y", demos=20_000, successes=500)]
    )
    (text,) = texts.values()
    assert "# Success: 99.0% of 1,000 unseen episodes" in text


def test_what_a_run_had_reached_on_its_way_is_in_no_table_but_that_of_its_curve(
    report: Any,
) -> None:
    for part, rows in (("mazes", 1), ("few", 1), ("minutes", 2)):
        halfway = record(part=part, demo_steps=1_500_000, successes=500)
        # the later one may be noted first
        for noted in ([halfway, record(part=part)], [record(part=part), halfway]):
            text = report.page(noted)
            assert text.count("99.00%") == 1 and text.count("50.00%") == rows - 1
            assert ("50.00%" in report.readme_with_results(noted)) is False
    texts = report.recipes_with_results(
        [record(part="minutes", demo_steps=1, successes=500), record(part="minutes")]
    )
    assert "# Success: 99.0% of 1,000" in next(iter(texts.values()))


def test_precisions_are_told_apart(report: Any) -> None:
    runs = [record(part="minutes"), record(part="minutes", precision="bfloat16", minutes=0.25)]
    text = report.minutes_section(runs)
    assert "| float32 | 3.00 M | 30 (30 to 30) | 99.00%" in text
    assert "| bfloat16 | 3.00 M | 15 (15 to 15) | 99.00%" in text


def test_every_run_of_the_study_has_settings_that_its_levels_allow(report: Any) -> None:
    del report
    module = import_module("experiments")
    for one in module.experiments():
        if one.seed == 1:
            settings = read_settings(one.recipe, one.settings)
            (stage,) = settings.stages
            assert stage.off_policy is not None and bool(stage.off_policy.augment) == one.augmented
            for level in one.levels:
                assert {*stage.off_policy.augment} <= {*read_manifest(level).symmetries}
            assert settings.run.precision == one.precision
            assert settings.run.level_names == one.levels
    with_environment = {one for one in level_names() if read_manifest(one).environment_id}
    assert {*module.LEVELS} == with_environment


def test_a_run_made_elsewhere_counts_where_its_settings_are_those_of_the_study(
    report: Any, tmp_path: Path
) -> None:
    del report
    running, runs = import_module("running"), import_module("experiments").experiments()
    one = next(each for each in runs if each.recipe == "bc_goto.toml")
    free = ("run.device=cpu", "run.keep=7", "stages.0.off_policy.store=mine.zarr", "on_policy=")
    for more, told in (
        ((), None),
        (("optimizer.lr=1e-3",), "optimizer.lr"),
        (("run.seed=7",), "run.seed"),
        (("run.init_from=x",), "run.init_from"),
    ):
        settings = read_settings(one.recipe, [*one.settings, *free, *more])
        (tmp_path / "settings.toml").write_text(toml_of(settings), "utf-8")
        if told is None:
            running.check_same(one, tmp_path)
        else:
            with pytest.raises(SettingsError, match=f"differs from {one.name} in {told}\n"):
                running.check_same(one, tmp_path)


def test_every_run_of_the_study_has_a_name_of_its_own(report: Any) -> None:
    del report
    names = [one.name for one in import_module("experiments").experiments()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "name, level, least",
    [
        ("GoToLocal-1000", "GoToLocal", 1.0),
        ("AllLevels", "PutNextLocal", 1.0),
        pytest.param("BossLevel", "BossLevel", 0.8, marks=pytest.mark.slow),
    ],
)
def test_the_weights_that_ship_play_as_the_page_says(name: str, level: str, least: float) -> None:
    from trainer.acting.evaluate import evaluate_policy
    from trainer.acting.policy import NetworkPolicy
    from trainer.run.checkpoint import read_checkpoint

    saved = read_checkpoint(STUDY.parent / "weights" / f"{name}.pt")
    policy = NetworkPolicy(saved.network().eval(), saved.words)
    found = evaluate_policy(policy, level, 40, processes=1)
    assert found.successes >= least * found.episodes
