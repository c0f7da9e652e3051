"""Draws learning curves: success and losses of one or several runs.

Runs that differ only in their seeds are one experiment: their mean, with its 95% interval over the
seeds from bootstrap resamples.

Source: R. Agarwal et al., Deep Reinforcement Learning at the Edge of the Statistical Precipice
(NeurIPS 2021), and its package rliable.
"""

from __future__ import annotations

import io
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, pairwise, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from demotools.errors import DemotoolsError, optional_package, printable_text
from demotools.output import read_regular, write_output
from trainer.run.folder import SEED_FOLDER
from trainer.run.log import CURVE_FILE, EVALUATIONS_FILE, FILE_NAME, read_log
from trainer.settings.models import SETTINGS_FILE, setting_leaves, toml_tree
from trainer.settings.user_code import FOREIGN, error_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AgainstWhat = Literal["demo_steps", "env_steps", "minutes"]
AXES: tuple[AgainstWhat, ...] = get_args(AgainstWhat)

Dashes = Literal["-", "--", ":", "-."]
Lines: TypeAlias = list[dict[str, Any]]
_LABELS: dict[AgainstWhat, str] = {
    "demo_steps": "demonstration steps shown",
    "env_steps": "environment steps taken",
    "minutes": "training time",
}
_WIDTH_INCHES, _PANELS_INCHES, _LEGEND_INCHES, _DOTS_PER_INCH = 8.0, 6.2, 0.22, 100
_LEGEND_COLUMNS, _LINE, _GAP = 3, 2.8, 2.0  # in letters' heights: beside a label, and columns
_LONGEST_LABEL, _DRAWN = 120, 1.06  # on dots letters are wider, W by a twentieth
_WINDOW = 9
_FEW = 20
"""Curves of fewer points show each of them."""
_GRID, _RESAMPLES = 400, 2000
_LIVE_SECONDS, _LIVE_SHARE = 30.0, 20
_DASHES: tuple[Dashes, ...] = ("-", "--", ":", "-.")
_GREY = "0.5"
_HOLD_OUT, _MARK = "hold_out_loss", "x"
_MARKERS = {
    "evaluation": ("o", "evaluation, greedy actions"),
    "evaluation_sampled": ("s", "evaluation, sampled actions"),
    "evaluation_loops": ("D", "evaluation, sampled in loops"),
}
"""By group of measurements: how they are drawn, and what they are."""
# Runs that differ in nothing else are one experiment, repeated.
_REPEATED = ("run.seed", "run.name")


class Experiment(NamedTuple):
    """Runs that differ in their seeds only, most often one: their name, and the lines of each."""

    name: str
    runs: list[Lines]


class Curve(NamedTuple):
    """The points of one run: both float64 [N], x not falling."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]


def plot_runs(
    folders: Sequence[Path],
    output: Path,
    against: AgainstWhat | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Draw the curves of the runs in `folders` into the PNG `output`.

    against   None: see `common_axis`

    DemotoolsError  a folder holds no run, the picture is there already or cannot be written
    """
    folders = run_folders(folders)
    lines = [run_lines(folder) for folder in folders]
    keys = [_experiment_of(folder) for folder in folders]
    stream = io.BytesIO()
    with drawing():
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        figure = curves(experiments(folders, lines, keys), against)
        FigureCanvasAgg(figure).print_png(stream)  # type: ignore[no-untyped-call]
    write_output(output, stream.getvalue(), overwrite=overwrite)
    return output


class LiveCurve:
    """Draws the curve of a run anew as it goes on: at most twice a minute."""

    def __init__(self) -> None:
        self._next = time.monotonic() + _LIVE_SECONDS

    def refresh(self, folder: Path) -> None:
        """Draw it where it is time; what fails is said at the end of the run."""
        begun = time.monotonic()
        if begun >= self._next:
            drawn_curve(folder)
            taken = time.monotonic() - begun
            self._next = begun + max(_LIVE_SECONDS, _LIVE_SHARE * taken)


def drawn_curve(folder: Path) -> str:
    """Draw the curve of the run in `folder` into it; what to say of it. It fails no run."""
    try:
        return f"learning curve: {plot_runs([folder], folder / CURVE_FILE, overwrite=True)}"
    except DemotoolsError as error:
        return f"no learning curve was drawn: {error.what}; the rest of the run is in {folder}"


@contextmanager
def drawing() -> Iterator[None]:
    """Matplotlib as it is without a window; DemotoolsError where it fails all the same.

    A notebook's MPLBACKEND names a backend of its own, which is no part of this installation.
    """
    window = os.environ.pop("MPLBACKEND", None) if "matplotlib" not in sys.modules else None
    try:
        optional_package("matplotlib", "train")  # it reads the variable when it is loaded
        yield
    except DemotoolsError:
        raise
    except FOREIGN as error:
        raise DemotoolsError(
            f"the curves cannot be drawn: {error_text(error)}",
            path="matplotlib",
            fix="check your matplotlibrc, or reinstall matplotlib",
        ) from error
    finally:
        if window is not None:
            os.environ["MPLBACKEND"] = window


def common_axis(runs: Sequence[Lines]) -> AgainstWhat:
    """The first axis along which all runs that have begun went, else minutes."""
    last = [lines[-1] for lines in runs if lines]
    return next((axis for axis in AXES if all(line[axis] for line in last)), "minutes")


def curves(shown: Sequence[Experiment], against: AgainstWhat | None = None) -> Figure:
    """Success, agreement with the expert, and loss of experiments.

    against   None: see `common_axis`
    """
    # the object-oriented interface: no window, no global state
    from matplotlib.figure import Figure

    runs = [lines for experiment in shown for lines in experiment.runs]
    axis = against or common_axis(runs)
    scale, unit = _unit(axis, [line[axis] for lines in runs for line in lines])
    figure = Figure(dpi=_DOTS_PER_INCH, layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    dashes = dict(zip(_losses(runs), cycle(_DASHES), strict=False))
    for number, (_name, repeats) in enumerate(shown):
        placed = [[{**line, "x": line[axis] / scale} for line in lines] for lines in repeats]
        colour = f"C{number}"
        _draw_success(panels[0], placed, colour)
        _draw_curves(panels[1], placed, "accuracy", dashes, colour, factor=100)
        _draw_curves(panels[2], placed, "loss", dashes, colour)
        held_out = [[line for line in lines if _HOLD_OUT in line] for lines in placed]
        found = [_points(lines, _HOLD_OUT) for lines in held_out]
        _draw_mean(panels[2], found, colour, _MARK)
        for border in _stage_borders(placed[0]):
            for panel in panels:
                panel.axvline(border, color=colour, linewidth=0.8, linestyle=(0, (1, 3)))
    places = {line[axis] / scale for lines in runs for line in lines}
    if len(places) == 1 and (place := places.pop()) > 0:
        panels[0].set_xlim(0, 1.1 * place)  # the first measurement, from the beginning of the run
    panels[0].set_ylabel("success\n[% of episodes]")
    panels[1].set_ylabel("agreement with\nexpert [% of steps]")
    panels[2].set_ylabel(f"loss{_loss_unit(runs)}")
    _scale_losses(panels[2], [line for lines in runs for line in lines])
    panels[2].set_xlabel(f"{_LABELS[axis]} [{unit}]" if unit else _LABELS[axis])
    for panel, what in zip(panels, ("not measured", "no expert", "no loss"), strict=True):
        panel.grid(alpha=0.3)
        if not panel.has_data():
            panel.text(0.5, 0.5, what, ha="center", va="center", transform=panel.transAxes)
    _add_legend(figure, shown, dashes)
    return figure


def run_folders(folders: Sequence[Path]) -> list[Path]:
    """The folders of the runs, where that of an experiment stands for those of its seeds."""
    found = []
    for folder in folders:
        seeds = [] if (folder / FILE_NAME).exists() else list(folder.glob(f"{SEED_FOLDER}*"))
        numbered = sorted(
            (path for path in seeds if (path / FILE_NAME).exists()),
            key=lambda path: (len(path.name), path.name),
        )
        found += numbered or [folder]
    return list(dict.fromkeys(found))


def experiment_key(settings: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """What is equal for runs that differ in their seeds only; `settings` values by key."""
    return tuple((key, str(settings[key])) for key in sorted(settings) if key not in _REPEATED)


def experiments(
    folders: Sequence[Path], lines: Sequence[Lines], keys: Sequence[object]
) -> list[Experiment]:
    """The runs in these folders, those with the same key together."""
    groups: dict[object, list[int]] = {}
    for number, key in enumerate(keys):
        groups.setdefault(key, []).append(number)
    names = run_names(folders)
    return [
        Experiment(
            _common_name([folders[n] for n in group], [names[n] for n in group]),
            [lines[n] for n in group],
        )
        for group in groups.values()
    ]


def _common_name(folders: Sequence[Path], names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    parents = {folder.resolve().parent for folder in folders}
    if len(parents) == 1 and all(folder.name.startswith(SEED_FOLDER) for folder in folders):
        name = printable_text(parents.pop().name)
    else:
        letters = zip(*names, strict=False)
        same = (one[0] for one in takewhile(lambda one: len(set(one)) == 1, letters))
        name = "".join(same).rstrip("-_ ./=0123456789") or names[0]
    return f"{name}, {len(names)} seeds"


def _experiment_of(folder: Path) -> object:
    """What distinguishes its runs from others; a folder without readable settings is its own."""
    try:
        tree = toml_tree(read_regular(folder / SETTINGS_FILE), folder)
    except DemotoolsError:
        return folder
    return experiment_key(setting_leaves(tree))


def run_lines(folder: Path) -> Lines:
    """The lines of a run's log, and of what was measured later.

    DemotoolsError  the folder holds no run, or a damaged log
    """
    if not (folder / FILE_NAME).is_file():
        raise DemotoolsError(
            "this folder has no run", path=folder, fix="name a folder that `trainer run` wrote"
        )
    lines = read_log(folder)
    if (folder / EVALUATIONS_FILE).is_file():
        lines = sorted(lines + read_log(folder, EVALUATIONS_FILE), key=lambda line: line["minutes"])
    return lines


def run_names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names; where two have the same, the paths as they were given.

    >>> run_names([Path("runs/a"), Path("runs/b")]), run_names([Path("x/run"), Path("y/run")])
    (['a', 'b'], ['x/run', 'y/run'])
    """
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [folder.as_posix() for folder in folders]
    return [printable_text(name) for name in names]


def _add_legend(
    figure: Figure, experiments: Sequence[Experiment], dashes: dict[str, Dashes]
) -> None:
    """Below the panels: the colour of every experiment, then what lines, dots and dashes are."""
    from matplotlib.lines import Line2D

    runs = [lines for experiment in experiments for lines in experiment.runs]
    several = any(len(experiment.runs) > 1 for experiment in experiments)
    entries = [
        Line2D([], [], color=f"C{number}", linewidth=4, label=_plain(experiment.name))
        for number, experiment in enumerate(experiments)
    ]
    for group, (marker, actions) in _MARKERS.items():
        measured = [line for lines in runs for line in evaluations(lines, group)]
        if measured:
            counts = sorted({line["episodes"] for line in measured})
            several_counts = f"{counts[0]:,} to " if len(counts) > 1 else ""
            label = f"{actions}, {several_counts}{counts[-1]:,} episodes"
            dot = Line2D([], [], color=_GREY, marker=marker, linestyle="")
            dot.set_label(f"{label}, 95% interval")
            dot.set_markerfacecolor(_GREY if group == "evaluation" else "none")
            entries.append(dot)
    if several:
        band = Line2D([], [], color=_GREY, linewidth=8, alpha=0.3)
        band.set_label("95% interval of the mean over seeds")
        entries.append(band)
    if any(_tracked(lines) for lines in runs):
        entries.append(Line2D([], [], color=_GREY, label="success: training episodes"))
    for name, style in dashes.items():
        entries.append(Line2D([], [], color=_GREY, linestyle=style, label=f"loss {_plain(name)}"))
    if any(_HOLD_OUT in line for lines in runs for line in lines):
        entries.append(Line2D([], [], color=_GREY, marker=_MARK, label="hold-out loss"))
    if any(_stage_borders([{**line, "x": 0} for line in lines]) for lines in runs):
        border = Line2D([], [], color=_GREY, linewidth=0.8, linestyle=(0, (1, 3)))
        border.set_label("a stage ends")
        entries.append(border)
    widths = {
        columns: _legend_inches([str(entry.get_label()) for entry in entries], columns)
        for columns in range(1, _LEGEND_COLUMNS + 1)
    }
    columns = max((n for n, inches in widths.items() if inches <= _WIDTH_INCHES), default=1)
    rows = -(-len(entries) // columns)
    figure.set_size_inches(
        max(_WIDTH_INCHES, widths[columns]), _PANELS_INCHES + rows * _LEGEND_INCHES
    )
    figure.legend(handles=entries, loc="outside lower center", ncols=columns, fontsize="small")


def _legend_inches(labels: Sequence[str], columns: int) -> float:
    """The width of a legend of so many columns, with a margin."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size="small")
    widths = [text_to_path.get_text_width_height_descent(one, font, False)[0] for one in labels]
    beside = sum(max(part, default=0) for part in map(list, np.array_split(widths, columns)))
    letters = columns * _LINE + (columns - 1) * _GAP + 2 * _GAP
    return float(_DRAWN * beside + letters * font.get_size_in_points()) / 72


def _plain(name: str) -> str:
    """A name as a label: a dollar would begin a formula, and no font has what does not print."""
    shown = printable_text(name)
    if len(shown) > _LONGEST_LABEL:  # the middle says least
        half = _LONGEST_LABEL // 2
        shown = f"{shown[: half - 1]}…{shown[-half:]}"
    return shown.replace("$", r"\$")


def _unit(axis: AgainstWhat, values: Sequence[float]) -> tuple[float, str]:
    """What to divide by, and its name, so that the largest value is of a few digits.

    >>> _unit("demo_steps", [800]), _unit("env_steps", [50_000]), _unit("minutes", [0.4])
    ((1, ''), (1000.0, 'thousand'), (0.016666666666666666, 'seconds'))
    """
    largest = max(values, default=0)
    if axis == "minutes":
        return (1, "minutes") if largest >= 2 else (1 / 60, "seconds")
    if largest >= 1e6:
        return 1e6, "million"
    return (1e3, "thousand") if largest >= 1e4 else (1, "")


def _of_group(lines: Lines, group: str) -> Lines:
    return [line for line in lines if line["group"] == group]


def evaluations(lines: Lines, group: str) -> Lines:
    """The measurements of success on the run's own level and the seeds of evaluation."""
    return [line for line in _of_group(lines, group) if "level" not in line]


def _tracked(lines: Lines) -> Lines:
    """The success of training episodes."""
    return [line for line in _of_group(lines, "environment") if "success" in line]


def _losses(runs: Sequence[Lines], scalar: str = "loss") -> list[str]:
    """The names of the losses that report this scalar."""
    found = dict.fromkeys(key for lines in runs for line in lines for key in line)
    return [key.removesuffix(f"/{scalar}") for key in found if key.endswith(f"/{scalar}")]


def _loss_unit(runs: Sequence[Lines]) -> str:
    """Of a cross-entropy, which reports agreement too; other losses have no unit of their own."""
    losses = _losses(runs)
    return "\n[nats per step]" if losses and set(losses) <= set(_losses(runs, "accuracy")) else ""


def _scale_losses(panel: Axes, lines: Lines) -> None:
    """A scale on which small and large losses can be told apart, with ticks in plain decimals.

    Logarithmic, where none is below zero; else, as PPO's may be, linear near zero and logarithmic
    beyond. Linear where they are all of a size.
    """
    drawn = ("/loss", _HOLD_OUT)
    losses = [line[key] for line in lines for key in line if key.endswith(drawn)]
    size = np.abs(losses) if losses else np.ones(1)
    largest, middle = float(size.max()), float(np.median(size))
    if losses and min(losses) > 0 and largest > 3 * min(losses):
        panel.set_yscale("log", subs=(2, 5))
        panel.yaxis.set_minor_formatter(_decimal)
    elif losses and min(losses) <= 0 and largest > 10 * middle > 0:
        width = max(middle, largest / 1e6)
        panel.set_yscale("asinh", linear_width=width)
        decades = range(math.ceil(math.log10(width)), math.floor(math.log10(largest)) + 1)
        factors = (1, 3) if len(decades) < 4 else (1,)
        sizes = [factor * 10.0**power for power in decades for factor in factors]
        ticks = [0.0, *(sign * tick for tick in sizes for sign in (-1, 1))]
        panel.set_yticks([tick for tick in ticks if min(losses) <= tick <= largest])
        panel.minorticks_off()
    panel.yaxis.set_major_formatter(_decimal)


def _decimal(value: float, _position: float = 0) -> str:
    """A tick: plain where that is short.

    >>> _decimal(0.001), _decimal(-20.0), _decimal(1e-7)
    ('0.001', '-20', '1e-07')
    """
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return np.format_float_positional(value, precision=6, trim="-")


def _stage_borders(lines: Lines) -> list[float]:
    """Where a stage ends and another begins."""
    staged = [line for line in _of_group(lines, "train") if "stage" in line]
    return [
        line["x"]
        for line, after in pairwise(staged)
        if round(after["stage"]) > round(line["stage"])
    ]


def _draw_success(panel: Axes, repeats: Sequence[Lines], colour: str) -> None:
    """The success of training rollouts, and of evaluations with their intervals."""
    found = []
    for lines in repeats:
        tracked = _tracked(lines)
        y = _smoothed([(100 * line["success"], line["episodes"]) for line in tracked])
        found.append(_points(tracked, "success")._replace(y=np.array(y)))
    _draw_mean(panel, found, colour, "-")
    for group, (marker, _actions) in _MARKERS.items():
        # the first measurement of all seeds, then the second one of all, ...
        for measured in zip(*(evaluations(lines, group) for lines in repeats), strict=False):
            success = np.array([line["success"] for line in measured])
            low, high = measured[0]["interval_low"], measured[0]["interval_high"]
            if len(measured) > 1:
                low, high = (float(end[0]) for end in interval_of_mean(success[:, None]))
            middle = float(success.mean())
            panel.errorbar(
                [np.mean([line["x"] for line in measured])],
                [100 * middle],
                yerr=[[100 * max(middle - low, 0)], [100 * max(high - middle, 0)]],
                fmt=marker,
                capsize=4,
                color=colour,
                markerfacecolor=colour if group == "evaluation" else "none",
                zorder=3,
            )
    panel.set_ylim(-3, 103)


def _draw_curves(
    panel: Axes,
    repeats: Sequence[Lines],
    scalar: str,
    dashes: dict[str, Dashes],
    colour: str,
    *,
    factor: float = 1,
) -> None:
    """One curve for every loss that reports this scalar, in its dashes."""
    for group in ("offpolicy", "onpolicy"):
        for name, style in dashes.items():
            key = f"{name}/{scalar}"
            found = []
            for lines in repeats:
                chosen = [line for line in _of_group(lines, group) if key in line]
                found.append(_points(chosen, key, factor))
            _draw_mean(panel, found, colour, style)


def _points(lines: Lines, key: str, factor: float = 1) -> Curve:
    y = np.array([line[key] for line in lines], dtype=np.float64) * factor
    return Curve(np.array([line["x"] for line in lines], dtype=np.float64), y)


def _draw_mean(panel: Axes, found: Sequence[Curve], colour: str, style: str) -> None:
    """One run's curve; of several the mean, its interval, and each of them thin."""
    found = [curve for curve in found if len(curve.x)]
    if not found:
        return
    mean = found[0]
    if len(found) > 1:
        x, values = together(found)
        for curve in found:
            panel.plot(*curve, style, color=colour, linewidth=0.6, alpha=0.4)
        low, high = interval_of_mean(values)
        panel.fill_between(x, low, high, color=colour, alpha=0.25, linewidth=0)
        mean = Curve(x, values.mean(axis=0))
    # a point alone would be no line
    (line,) = panel.plot(*mean, style, color=colour)
    if len(mean.x) < _FEW and style != _MARK:
        line.set_marker(".")


def together(found: Sequence[Curve]) -> Curve:
    """Several curves at the same places, as far as all of them go: x [N], y [curves, N].

    >>> x, y = together([Curve(np.array([0, 2.]), np.array([0, 4.])),
    ...                  Curve(np.array([1, 3.]), np.array([5, 5.]))])
    >>> x.tolist(), y.tolist()
    ([1.0, 2.0], [[2.0, 4.0], [5.0, 5.0]])
    """
    start, stop = max(curve.x[0] for curve in found), min(curve.x[-1] for curve in found)
    places = np.unique(np.concatenate([curve.x for curve in found]))
    x = places[(places >= start) & (places <= stop)]
    if len(x) > _GRID:
        x = np.linspace(start, stop, _GRID)
    return Curve(x, np.array([np.interp(x, *curve) for curve in found]))


def interval_of_mean(
    values: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The 95% interval of the mean over seeds: percentiles of the means of bootstrap resamples.

    values   float64 [seeds, N]
    """
    seeds = len(values)
    drawn = np.random.default_rng(0).integers(seeds, size=(_RESAMPLES, seeds))
    shares = (drawn[:, :, None] == np.arange(seeds)).mean(axis=1)
    low, high = np.percentile(shares @ values, [2.5, 97.5], axis=0)
    return low, high


def _smoothed(values: list[tuple[float, float]]) -> list[float]:
    """The mean of each value and those shortly before it, by their weights.

    >>> _smoothed([(100, 1), (0, 3)])
    [100.0, 25.0]
    """
    windows = [values[max(0, end - _WINDOW) : end] for end in range(1, len(values) + 1)]
    return [
        sum(value * weight for value, weight in window) / sum(weight for _value, weight in window)
        for window in windows
    ]
