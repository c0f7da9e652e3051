"""What a picture of learning curves says: axes with units, every run by its name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import trainer
from trainer.cli import main
from trainer.report.plot import Lines, common_axis, curves
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
    panel = curves([("run", lines)]).axes[2]
    assert panel.get_xlabel() == label
    assert panel.dataLim.x1 == pytest.approx(right)


def test_only_a_cross_entropy_is_in_nats_per_step() -> None:
    assert curves([("a", CLONED)]).axes[2].get_ylabel() == "loss\n[nats per step]"
    assert curves([("a", REINFORCED)]).axes[2].get_ylabel() == "loss"
    assert curves([("a", CLONED), ("b", REINFORCED)]).axes[2].get_ylabel() == "loss"


def test_the_legend_names_every_run_and_the_dashes_and_lies_outside_the_panels() -> None:
    runs = [("cloned", CLONED), ("reinforced", REINFORCED), ("not begun", [])]
    figure = curves(runs)
    (legend,) = figure.legends
    said = [text.get_text() for text in legend.get_texts()]
    assert said == ["cloned", "reinforced", "not begun", "loss expert_ce", "loss ppo"]
    styles = [line.get_linestyle() for line in figure.axes[2].get_lines()]
    assert styles == [line.get_linestyle() for line in legend.get_lines()[3:]] == ["-", "--"]
    figure.draw_without_rendering()
    top = legend.get_window_extent().y1
    assert all(panel.get_window_extent().y0 > top for panel in figure.axes)


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
    figure = curves([("plain", CLONED), ("watched", watched)])
    drawn = [line for line in figure.axes[2].get_lines() if line.get_marker() == "."]
    assert [np.asarray(line.get_ydata()).tolist() for line in drawn] == [losses]
    assert drawn[0].get_color() == "C1"
    (legend,) = figure.legends
    assert legend.get_texts()[-1].get_text() == "hold-out loss"
