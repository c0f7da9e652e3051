"""One HTML file about one or several runs: curves, success, cost, settings. It needs no network."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from demotools.errors import SettingsError
from demotools.look.report import rendered_page
from demotools.output import read_regular
from trainer.report.plot import (
    AgainstWhat,
    curves,
    drawing,
    evaluations,
    experiment_key,
    experiments,
    interval_of_mean,
    run_folders,
    run_lines,
    run_names,
)
from trainer.settings.models import SETTINGS_FILE, parsed_settings, setting_leaves, toml_tree

_GREY = "#808080"
_STYLE: dict[Any, object] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "trainer",
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color"), _GREY),
    **dict.fromkeys(("xtick.color", "ytick.color", "grid.color"), _GREY),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
    "legend.framealpha": 0.0,
}


@dataclass(frozen=True)
class FinishedRun:
    """What the folder of a run tells.

    settings   values by key, as in `stages.0.off_policy.rollouts`
    lines      of its log
    """

    name: str
    folder: Path
    settings: dict[str, Any]
    lines: list[dict[str, Any]]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The measurements of success, the first one first."""
        return [line for line in self.lines if line["group"].startswith("evaluation")]

    @property
    def level(self) -> str:
        """What it was trained on."""
        names = re.compile(r"run\.level(\.\d+\.name)?")
        return " + ".join(self.settings[key] for key in self.settings if names.fullmatch(key))

    @property
    def measured(self) -> list[dict[str, Any]]:
        """The rows of the page: its evaluations, each followed by those of its single levels."""
        rows = []
        for line in self.evaluations:
            level = line.get("level") or self.level
            rows.append({**line, "level": level})
            for name in level.split(" + "):
                prefix = f"{name}/"
                of_level = {
                    key.removeprefix(prefix): value
                    for key, value in line.items()
                    if key.startswith(prefix)
                }
                rows += [{**line, **of_level, "level": name}] if of_level else []
        return rows

    @property
    def experiment(self) -> tuple[tuple[str, str], ...]:
        """What is equal for runs that differ in their seeds only."""
        return experiment_key(self.settings)

    def cost(self) -> dict[str, Any]:
        """Steps, minutes and device, up to the last line of the log."""
        last = self.lines[-1] if self.lines else {}
        steps = {axis: int(last.get(axis, 0)) for axis in ("demo_steps", "env_steps")}
        minutes = float(last.get("minutes", 0.0))
        return {
            **steps,
            "minutes": minutes,
            "steps_per_second": sum(steps.values()) / (60 * minutes) if minutes else None,
            "device": self.settings.get("run.device"),
            "network": self.settings.get("model.type"),
        }


@dataclass(frozen=True)
class Repeated:
    """The last measurements of runs that differ in their seeds only: their mean and the worst.

    interval   of the mean, 95%, over the seeds
    """

    names: list[str]
    mean: float
    interval: tuple[float, float]
    worst: float


@dataclass(frozen=True)
class RunReport:
    """What the folders tell, and the page that shows it.

    differing, equal   settings by key: one text for each run, empty where a run has no such key
    """

    runs: list[FinishedRun]
    repeated: list[Repeated]
    differing: dict[str, list[str]]
    equal: dict[str, list[str]]
    html: str

    def as_json(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return {
            "runs": [
                {
                    "name": run.name,
                    "folder": str(run.folder),
                    "evaluations": run.evaluations,
                    "cost": run.cost(),
                    "settings": run.settings,
                }
                for run in self.runs
            ],
            "repeated": [vars(group) for group in self.repeated],
            "differing": self.differing,
        }


def run_report(folders: Sequence[Path], against: AgainstWhat | None = None) -> RunReport:
    """The report of some runs.

    against   what the curves are drawn against; None: the steps that all runs took, else minutes

    DemotoolsError  a folder holds no run, or its log is damaged
    SettingsError   its settings are damaged
    """
    folders = run_folders(folders)
    runs = [
        FinishedRun(name, folder, _settings(folder), run_lines(folder))
        for name, folder in zip(run_names(folders), folders, strict=True)
    ]
    differing, equal = compared_settings([run.settings for run in runs])
    repeated = _repeated(runs)
    html = rendered_page(
        "report.html",
        "trainer",
        runs=runs,
        curves=_svg(runs, against),
        repeated=repeated,
        differing=differing,
        equal=equal,
    )
    return RunReport(runs, repeated, differing, equal, html)


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / SETTINGS_FILE
    if not file.is_file():
        raise SettingsError(
            "this folder has no run", path=file, fix="name a folder that `trainer run` wrote"
        )
    tree = toml_tree(read_regular(file), file)
    parsed_settings(tree, file)
    return setting_leaves(tree)


def compared_settings(
    settings: Sequence[dict[str, Any]],
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The keys in which runs differ and those in which they are equal, with each run's value.

    >>> compared_settings([{"a": 1, "b": 2}, {"a": 1, "b": 3, "c": True}])
    ({'b': ['2', '3'], 'c': ['', 'True']}, {'a': ['1', '1']})
    """
    differing: dict[str, list[str]] = {}
    equal: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for one in settings for key in one):
        values = [str(one[key]) if key in one else "" for one in settings]
        same = len(set(values)) == 1
        (equal if same else differing)[key] = values
    return differing, equal


def _repeated(runs: Sequence[FinishedRun]) -> list[Repeated]:
    groups: dict[tuple[tuple[str, str], ...], list[FinishedRun]] = {}
    for run in runs:
        if run.evaluations:
            groups.setdefault(run.experiment, []).append(run)
    result = []
    for group in groups.values():
        # of the most probable actions where they were measured
        last = [evaluations(run.lines, "evaluation") or run.evaluations for run in group]
        success = [lines[-1]["success"] for lines in last]
        if len(group) > 1:
            names = [run.name for run in group]
            low, high = (float(end[0]) for end in interval_of_mean(np.array(success)[:, None]))
            mean = sum(success) / len(success)
            result.append(Repeated(names, mean, (low, high), min(success)))
    return result


def _svg(runs: Sequence[FinishedRun], against: AgainstWhat | None) -> str:
    """The curves as an element of a page, as wide as the page lets it be."""
    stream = io.BytesIO()
    with drawing():
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG

        with matplotlib.rc_context(_STYLE):
            shown = experiments(
                [run.folder for run in runs],
                [run.lines for run in runs],
                [run.experiment for run in runs],
            )
            figure = curves(shown, against)
            none = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            FigureCanvasSVG(figure).print_svg(stream, metadata=none)  # type: ignore[no-untyped-call]
    text = stream.getvalue().decode()
    text = text[text.index("<svg") :]
    # the page decides on the size; the picture's shape is in its viewBox
    return re.sub(r'(<svg[^>]*?) width="[^"]*"|(<svg[^>]*?) height="[^"]*"', r"\1\2", text, count=2)
