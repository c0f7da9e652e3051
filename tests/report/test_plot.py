"""What a picture of learning curves says: axes with units, every run by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import trainer
from trainer.cli import main
from trainer.report.plot import (
    Experiment,
    Lines,
    common_axis,
    curves,
    experiments,
    interval_of_mean,
    run_folders,
)
from trainer.run.log import FILE_NAME
from trainer.settings.models import SETTINGS_FILE

RECIPE = Path(trainer.__file__).parent / "recipes" / "ppo.toml"


def run_log(
    loss: str, *, demos: int = 0, envs: int = 0, minutes: float = 9, agreement: bool = False
) -> Lines:
    """The log of a run of ten cycles, up to so many steps."""
    return [
        {
            "group": "offpolicy" if demos else "onpolicy",
            f"{loss}/loss": 1 / n,
            **({f"{loss}/accuracy": 0.5} if agreement else {}),
            **{"demo_steps": demos * n // 10, "env_steps": envs * n // 10},
            "minutes": minutes * n / 10,
        }
        for n in range(1, 11)
    ]


LONG = "BabyAIGoToLocalBC1000,max_demo_steps=60000,rollouts=100"
CLONED = run_log("expert_ce", demos=2_000_000, agreement=True)
REINFORCED = run_log("ppo", envs=50_000)


def test_the_axis_is_that_of_the_steps_which_all_runs_took() -> None:
    both = run_log("ppo", demos=1000, envs=1000)
    assert common_axis([CLONED]) == common_axis([CLONED, both]) == "demo_steps"
    assert common_axis([REINFORCED]) == common_axis([REINFORCED, both]) == "env_steps"
    assert common_axis([CLONED, REINFORCED]) == "minutes"
    assert common_axis([[], REINFORCED]) == "env_steps"


@pytest.mark.parametrize(
    ("lines", "label", "right"),
    [
        (CLONED, "demonstration steps shown [million]", 2),
        (REINFORCED, "environment steps taken [thousand]", 50),
        (run_log("ppo", envs=800), "environment steps taken", 800),
        (run_log("ppo", minutes=0.5), "training time [seconds]", 30),
    ],
)
def test_ticks_are_numbers_of_a_few_digits(lines: Lines, label: str, right: float) -> None:
    panel = curves([Experiment("run", [lines])]).axes[2]
    assert panel.get_xlabel() == label
    assert panel.dataLim.x1 == pytest.approx(right)


def test_only_a_cross_entropy_is_in_nats_per_step() -> None:
    assert curves([Experiment("a", [CLONED])]).axes[2].get_ylabel() == "loss\n[nats per step]"
    assert curves([Experiment("a", [REINFORCED])]).axes[2].get_ylabel() == "loss"
    assert (
        curves([Experiment("a", [CLONED]), Experiment("b", [REINFORCED])]).axes[2].get_ylabel()
        == "loss"
    )


def test_the_legend_names_every_run_and_the_dashes_and_lies_outside_the_panels() -> None:
    named = {"cloned": CLONED, "reinforced": REINFORCED, "not begun": []}
    figure = curves([Experiment(name, [lines]) for name, lines in named.items()])
    (legend,) = figure.legends
    said = [text.get_text() for text in legend.get_texts()]
    assert said == ["cloned", "reinforced", "not begun", "loss expert_ce", "loss ppo"]
    styles = [line.get_linestyle() for line in figure.axes[2].get_lines()]
    assert styles == [line.get_linestyle() for line in legend.get_lines()[3:]] == ["-", "--"]
    figure.draw_without_rendering()
    top = legend.get_window_extent().y1
    assert all(panel.get_window_extent().y0 > top for panel in figure.axes)


def test_a_run_that_was_measured_often_has_a_legend_no_wider_than_the_picture() -> None:
    measured = [
        {"group": group, "success": 0.5, "interval_low": 0.4, "interval_high": 0.6, **CLONED[-1]}
        | {"group": group, "episodes": episodes}
        for group in ("evaluation", "evaluation_sampled")
        for episodes in (4, 18, 24, 30, 1000)
    ]
    for names in (["often"], [LONG], [LONG, f"{LONG},seed=2", "short"], ["W" * 250]):
        shown = [Experiment(name, [[*CLONED, *measured]]) for name in names]
        figure = curves(shown)
        (legend,) = figure.legends
        assert "4 to 1,000 episodes" in legend.get_texts()[len(names)].get_text()
        figure.draw_without_rendering()
        assert 0 < legend.get_window_extent().x0 < legend.get_window_extent().x1 < figure.bbox.x1


def test_a_single_measurement_stands_on_an_axis_from_the_beginning_of_the_run() -> None:
    figure = curves([Experiment("begun", [CLONED[:1]])])
    assert figure.axes[0].get_xlim() == pytest.approx((0, 1.1 * 200))
    assert curves([Experiment("two", [CLONED[:2]])]).axes[0].get_xlim()[0] > 0


@pytest.mark.parametrize(
    ("arguments", "ending", "right"),
    [
        (["plot", "-o", "c2.xyz"], ".xyz", "c2.png"),
        (["watch", "--gif", "a.mp4"], ".mp4", "a.gif"),
        (["report", "-o", "runs.pdf"], ".pdf", "runs.html"),
    ],
)
def test_a_name_of_another_kind_of_file_is_refused(
    arguments: list[str], ending: str, right: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(FILE_NAME).write_text("", "utf-8")
    result = CliRunner().invoke(main, [arguments[0], ".", *arguments[1:]])
    assert result.exit_code == 1
    assert f"this name ends in {ending}" in result.output and f"name it {right}" in result.output
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


@pytest.mark.parametrize("name", ["a\x1b[2J", "a\nb", "\udcff", "$x$", "$\\frac", "a$b"])
@pytest.mark.parametrize("command", ["plot", "report"])
def test_any_name_of_a_folder_or_a_loss_is_drawn(tmp_path: Path, name: str, command: str) -> None:
    folder = tmp_path / "runs" / name
    try:
        folder.mkdir(parents=True)
    except OSError:
        pytest.skip("this file system has only names in UTF-8")
    lines = run_log(name, demos=9)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / FILE_NAME).write_text(text, "utf-8")
    settings = RECIPE.read_text("utf-8").partition("[tiny]")[0]
    (folder / SETTINGS_FILE).write_text(settings, "utf-8")
    arguments = [command, str(folder), "-o", str(tmp_path / "out"), "-q"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output


def test_a_picture_that_is_there_is_kept_unless_it_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text("", "utf-8")
    picture = tmp_path / "mine.png"
    picture.write_text("mine", "utf-8")
    refused = CliRunner().invoke(main, ["plot", str(tmp_path), "-o", str(picture)])
    assert refused.exit_code == 1 and "--overwrite" in refused.output
    assert picture.read_text("utf-8") == "mine"
    replaced = CliRunner().invoke(
        main, ["plot", str(tmp_path), "-o", str(picture), "--overwrite", "-q"]
    )
    assert replaced.exit_code == 0, replaced.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_hold_out_loss_is_drawn_beside_the_loss_in_the_colour_of_its_run() -> None:
    losses = [1.5 / n for n in range(1, 11)]
    pairs = zip(CLONED, losses, strict=True)
    watched: Lines = [{**line, "hold_out_loss": loss} for line, loss in pairs]
    figure = curves([Experiment("plain", [CLONED]), Experiment("watched", [watched])])
    drawn = [line for line in figure.axes[2].get_lines() if line.get_marker() == "x"]
    assert [np.asarray(line.get_ydata()).tolist() for line in drawn] == [losses]
    assert drawn[0].get_color() == "C1"
    (legend,) = figure.legends
    assert legend.get_texts()[-1].get_text() == "hold-out loss"


def measured(*successes: float) -> Lines:
    where = {"demo_steps": 1000, "env_steps": 0, "minutes": 2.0}
    interval = {"interval_low": 0.0, "interval_high": 1.0, "episodes": 500}
    return [{"group": "evaluation", **where, "success": one, **interval} for one in successes]


def seeds_of_one_recipe(folder: Path, *names: str, lr: str = "2.5e-4") -> list[Path]:
    """Folders of runs that differ in their seeds only."""
    text = RECIPE.read_text("utf-8").partition("[tiny]")[0].replace("lr = 2.5e-4", f"lr = {lr}")
    assert f"lr = {lr}" in text and "\nseed = 1\n" in text
    for number, name in enumerate(names):
        path = folder / name
        path.mkdir(parents=True)
        (path / SETTINGS_FILE).write_text(text.replace("seed = 1", f"seed = {number}"), "utf-8")
        (path / FILE_NAME).write_text("", "utf-8")
    return [folder / name for name in names]


def test_runs_that_differ_in_their_seeds_are_one_experiment(tmp_path: Path) -> None:
    seeds = seeds_of_one_recipe(tmp_path / "a", "seed-1", "seed-2", "seed-10")
    others = seeds_of_one_recipe(tmp_path, "b-1", "b-2", lr="1e-3")
    assert run_folders([tmp_path / "a", *others, seeds[0]]) == [*seeds, *others]
    result = CliRunner().invoke(
        main, ["plot", str(tmp_path / "a"), *map(str, others), "-o", str(tmp_path / "c.png")]
    )
    assert result.exit_code == 0, result.output
    empty: Lines = []
    found = experiments([*seeds, *others], [empty] * 5, [1, 1, 1, 2, 2])
    assert [one.name for one in found] == ["a, 3 seeds", "b, 2 seeds"]
    found = experiments(seeds, [empty] * 3, [1, 2, 1])
    assert [one.name for one in found] == ["a, 2 seeds", "seed-2"]


def test_the_seeds_of_an_experiment_are_one_colour_a_mean_and_its_interval() -> None:
    runs = [
        [{**line, "ce/loss": line["ce/loss"] + bias} for line in run_log("ce", demos=1000)]
        + measured(success)
        for bias, success in ((0.0, 0.5), (0.3, 0.7), (0.6, 0.9))
    ]
    panel = curves([Experiment("a", runs)]).axes[2]
    *thin, mean = panel.get_lines()
    assert {line.get_color() for line in panel.get_lines()} == {"C0"} and len(thin) == 3
    assert mean.get_ydata() == pytest.approx([1 / n + 0.3 for n in range(1, 11)])
    ((left, bottom), (right, top)) = panel.collections[0].get_datalim(panel.transData).get_points()
    assert (left, right) == (100, 1000) and 0.1 <= bottom < 0.4 and 1.3 < top <= 1.6
    (dot,) = [line for line in curves([Experiment("a", runs)]).axes[0].get_lines() if dotted(line)]
    assert dot.get_ydata() == pytest.approx([70])


def dotted(line: Any) -> bool:
    return bool(line.get_marker() == "o")


def test_the_interval_of_the_mean_is_that_of_resampled_seeds() -> None:
    values = np.array([[0.1], [0.2], [0.5], [0.7], [0.9]])
    random = np.random.default_rng(5)
    means = [random.choice(values[:, 0], 5).mean() for _ in range(20_000)]
    low, high = interval_of_mean(values)
    # 2,000 resamples tell the percentiles to within this
    assert [low[0], high[0]] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.03)


def test_a_success_that_was_measured_once_is_seen() -> None:
    tracked = {"group": "environment", "demo_steps": 0, "env_steps": 9, "minutes": 1}
    lines = [{**tracked, "success": 0.5, "episodes": 4}]
    (line,) = curves([Experiment("a", [lines])]).axes[0].get_lines()
    assert line.get_ydata() == pytest.approx([50]) and line.get_marker() == "."


def test_losses_below_zero_have_a_scale_of_their_own_and_ticks_are_plain() -> None:
    fallen = [{**line, "ppo/loss": 8 / 10**n - 0.01} for n, line in enumerate(REINFORCED)]
    for lines, scale in ((CLONED, "log"), (fallen, "asinh")):
        figure = curves([Experiment("a", [lines])])
        figure.draw_without_rendering()
        panel = figure.axes[2]
        assert panel.get_yscale() == scale
        shown = [
            text.get_text() for text in panel.get_yticklabels() + panel.get_yticklabels(minor=True)
        ]
        assert "0.1" in "".join(shown) and not any(set(text) & set("e$^{") for text in shown)
    flat = [{**line, "ppo/loss": (-1) ** n} for n, line in enumerate(REINFORCED)]
    assert curves([Experiment("a", [flat])]).axes[2].get_yscale() == "linear"


def test_where_a_stage_ends_there_is_a_line() -> None:
    where = {"env_steps": 0, "minutes": 1}
    stages = [{"group": "train", **where, "demo_steps": n, "stage": 1 + n // 3} for n in range(5)]
    panel = curves([Experiment("a", [stages + CLONED])], "demo_steps").axes[1]
    places = [np.unique(np.asarray(line.get_xdata())) for line in panel.get_lines()]
    (border,) = [place for place in places if len(place) == 1]
    assert border == pytest.approx([2 / 1e6])
