"""What `trainer report` tells of runs; a browser opens its page without a complaint."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from demotools.errors import DemotoolsError
from tests.browser import colours_of_page, needs_chromium
from tests.look.test_report import Page
from trainer.cli import main
from trainer.report.page import run_report
from trainer.report.plot import plot_runs
from trainer.settings.models import read_settings, toml_of

CURVE = [
    {"group": "offpolicy", "expert_ce/loss": 2 / (1 + n), "expert_ce/accuracy": n / 20, "loss": 1}
    for n in range(20)
]


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """`make_run("a", "optimizer.lr=1e-3", success=0.5)` is the folder of a finished run."""

    def make(
        name: str, *overrides: str, success: float | None = 0.9, demos: int = 1000, envs: int = 8
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        settings = read_settings("bc_small_cpu", ("run.device=cpu", *overrides))
        (folder / "settings.toml").write_text(toml_of(settings), "utf-8")
        lines: list[dict[str, Any]] = [
            {**line, "minutes": n / 10, "env_steps": envs * n, "demo_steps": demos * n}
            for n, line in enumerate(CURVE, start=1)
        ]
        if success is not None:
            interval = {"interval_low": success - 0.05, "interval_high": success + 0.04}
            measured = {"success": success, **interval, "episode_length": 5.25, "episodes": 500}
            lines.append({**lines[-1], "group": "evaluation", **measured})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "log.jsonl").write_text(text, "utf-8")
        return folder

    return make


def words(html: str) -> str:
    shown = html.replace("<wbr>", "")
    return " ".join(unescape(re.sub("<[^>]*>", " ", shown)).split())


def test_the_page_tells_success_with_interval_cost_and_settings(
    make_run: Callable[..., Path],
) -> None:
    html = run_report([make_run("first"), make_run("second", success=None)]).html
    text = words(html)
    assert "first 90.0% 85.0% to 94.0% greedy GoToLocal 500 5.2 2.0 min" in text
    assert "second not measured GoToLocal" in text
    assert "first small cpu 20,000 160 2.0 168" in text
    assert "stages.0.off_policy.rollout_len 20 20" in text


def test_of_several_levels_the_page_tells_each(make_run: Callable[..., Path]) -> None:
    folder = make_run("both", "run.level=['GoToObj', 'PickupLoc']")
    [*lines, measured] = map(json.loads, (folder / "log.jsonl").read_text("utf-8").splitlines())
    assert "both 90.0% 85.0% to 94.0% greedy GoToObj + PickupLoc" in words(
        run_report([folder]).html
    )
    measured |= {"PickupLoc/success": 0.5, "PickupLoc/episodes": 250}
    text = "".join(json.dumps(line) + "\n" for line in [*lines, measured])
    (folder / "log.jsonl").write_text(text, "utf-8")
    said = words(run_report([folder]).html)
    assert "both 50.0% 85.0% to 94.0% greedy PickupLoc 250" in said
    unmeasured = make_run("not", "run.level=['GoToObj', 'PickupLoc']", success=None)
    assert "not not measured GoToObj + PickupLoc" in words(run_report([unmeasured]).html)


def test_only_settings_that_differ_are_marked(make_run: Callable[..., Path]) -> None:
    one = make_run("one", "optimizer.lr=0.001")
    other = make_run("other", "optimizer.lr=0.002", "stages.0.off_policy.augment=")
    report = run_report([one, other])
    assert report.differing == {
        "optimizer.lr": ["0.001", "0.002"],
        "stages.0.off_policy.augment.0": ["recolor", ""],
        "stages.0.off_policy.augment.1": ["mirror", ""],
        "stages.0.off_policy.augment.2": ["retype", ""],
    }
    assert report.equal["run.level"] == ["GoToLocal", "GoToLocal"]
    marked = report.html.split('side differs"')[1].split("</table>")[0]
    keys = re.findall(r"<code>(.*?)</code>", marked)
    # on a narrow screen a key breaks between its words, never inside one
    assert keys[-1] == "stages.<wbr>0.<wbr>off_<wbr>policy.<wbr>augment.<wbr>2"
    assert {key.replace("<wbr>", "") for key in keys} == set(report.differing)
    assert "4 differ:" in report.html


def test_runs_that_differ_in_their_seeds_only_have_a_mean_and_a_worst(
    make_run: Callable[..., Path],
) -> None:
    runs = [make_run(f"s{seed}", f"run.seed={seed}", success=0.9 - seed / 10) for seed in range(3)]
    runs.append(make_run("another", "optimizer.lr=1", success=0.1))
    runs.append(make_run("unmeasured", "run.seed=9", success=None))
    (group,) = run_report(runs).repeated
    assert group.names == ["s0", "s1", "s2"]
    assert [group.mean, group.worst] == pytest.approx([0.8, 0.7])
    assert group.interval == pytest.approx((0.7, 0.9), abs=0.04)


def test_curves_are_drawn_against_the_steps_that_all_runs_took(
    make_run: Callable[..., Path],
) -> None:
    clone, reinforced = make_run("clone"), make_run("reinforced", demos=0)
    assert "demonstration steps" in run_report([clone]).html
    assert "environment steps taken" in run_report([clone, reinforced]).html
    assert "training time" in run_report([clone], "minutes").html
    without = make_run("without", envs=0)
    assert "training time" in run_report([without, reinforced]).html


def test_the_page_is_whole_and_needs_no_network(make_run: Callable[..., Path]) -> None:
    html = run_report([make_run("first")]).html
    page = SvgPage(html)
    assert page.open == []
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    # names of XML's vocabularies are the only addresses, and nobody loads them
    assert not re.search(r"https?://", re.sub(r'xmlns(:\w+)?="[^"]*"', "", html))
    assert "<metadata" not in html
    # text stays text, in the page's own colour
    assert re.search(r"<text[^>]*>demonstration steps shown", html)


class SvgPage(Page):
    """A page whose tags may close themselves, as those of pictures do."""

    def handle_startendtag(
        self,
        tag: str,  # noqa: ARG002 - the name is the library's
        attrs: list[tuple[str, str | None]],
    ) -> None:
        self.addresses += [value or "" for name, value in attrs if name.endswith("href")]


def test_names_of_folders_become_neither_markup_nor_formulas(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_run("<script>alert(1)<$x^{$")
    report = run_report([folder])
    assert "<script" not in report.html
    assert "<script>alert(1)<$x^{$" in words(report.html)
    assert plot_runs([folder], tmp_path / "curve.png").is_file()


def test_two_runs_of_the_same_name_are_told_apart_by_their_paths(
    make_run: Callable[..., Path],
) -> None:
    folders = [make_run("a/run"), make_run("b/run")]
    assert [run.name for run in run_report(folders).runs] == [str(folder) for folder in folders]


def test_a_run_that_has_only_begun_has_a_report(make_run: Callable[..., Path]) -> None:
    folder = make_run("begun", success=None)
    (folder / "log.jsonl").write_text("", "utf-8")
    assert "begun small cpu 0 0 0.0 –" in words(run_report([folder]).html)


@pytest.mark.parametrize("file", ["settings.toml", "log.jsonl"])
def test_a_folder_without_a_run_or_with_a_damaged_one_is_refused(
    make_run: Callable[..., Path], file: str
) -> None:
    folder = make_run("run")
    (folder / file).write_text("= {\n", "utf-8")
    with pytest.raises(DemotoolsError, match=r"not valid TOML|damaged") as damaged:
        run_report([folder])
    assert damaged.value.path == str(folder / file)
    (folder / file).unlink()
    with pytest.raises(DemotoolsError, match="has no run"):
        run_report([folder])


def report_command(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


def test_the_command_writes_one_file_and_does_not_replace_it_unasked(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    folder, file = make_run("run"), tmp_path / "runs.html"
    result = report_command(folder, "-o", file)
    assert result.exit_code == 0, result.output
    before = file.read_bytes()
    again = report_command(folder, "-o", file)
    assert again.exit_code == 1
    assert "add --overwrite" in again.output
    assert file.read_bytes() == before


def test_json_tells_the_figures_and_writes_no_file(
    make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [make_run("a", "run.seed=1"), make_run("b", "run.seed=2", success=0.7)]
    found = json.loads(report_command(*folders, "--json").output)
    assert [run["evaluations"][0]["success"] for run in found["runs"]] == [0.9, 0.7]
    assert found["runs"][0]["cost"]["demo_steps"] == 20_000
    assert found["differing"] == {"run.seed": ["1", "2"]}
    assert not (tmp_path / "runs.html").exists()


@needs_chromium
@pytest.mark.parametrize("size", [(1000, 1200), (390, 844)])
def test_chromium_opens_the_page_without_a_complaint(
    make_run: Callable[..., Path], tmp_path: Path, size: tuple[int, int]
) -> None:
    file = tmp_path / "runs.html"
    folders = [make_run("a"), make_run("b", "optimizer.lr=1")]
    file.write_text(run_report(folders).html, "utf-8")
    # the second run's curves, drawn over the first one's, which are the same
    assert (255, 127, 14) in colours_of_page(file, tmp_path, size)
