"""Learning curves as a picture: success and losses of one run or several."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from demotools.errors import DemotoolsError, optional_package, printable_text
from demotools.output import write_output
from trainer.run.log import CURVE_FILE, EVALUATIONS_FILE, FILE_NAME, read_log
from trainer.settings.user_code import FOREIGN, told

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
_LEGEND_COLUMNS, _LONG_NAME = 3, 30
_WINDOW = 9
_LIVE_SECONDS, _LIVE_SHARE = 30.0, 20
_DASHES: tuple[Dashes, ...] = ("-", "--", ":", "-.")
_GREY = "0.5"
_HOLD_OUT, _MARK = "hold_out_loss", "."
_MARKERS = {
    "evaluation": ("o", "evaluation, greedy actions"),
    "evaluation_sampled": ("s", "evaluation, sampled actions"),
}
"""By group of measurements: how they are drawn, and what they are."""


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
    lines = [run_lines(folder) for folder in folders]
    stream = io.BytesIO()
    with drawing():
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        figure = curves(list(zip(run_names(folders), lines, strict=True)), against)
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
        return f"there is no learning curve: {error.what}; all else of the run is in {folder}"


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
            f"the curves cannot be drawn: {told(error)}",
            path="matplotlib",
            fix="look at your matplotlibrc, or install matplotlib again",
        ) from error
    finally:
        if window is not None:
            os.environ["MPLBACKEND"] = window


def common_axis(runs: Sequence[Lines]) -> AgainstWhat:
    """The first axis along which all runs that have begun went, else minutes."""
    last = [lines[-1] for lines in runs if lines]
    return next((axis for axis in AXES if all(line[axis] for line in last)), "minutes")


def curves(runs: Sequence[tuple[str, Lines]], against: AgainstWhat | None = None) -> Figure:
    """Success, agreement with the expert, and loss of runs: names and lines of their logs.

    against   None: see `common_axis`
    """
    # the object-oriented interface: no window, no global state
    from matplotlib.figure import Figure

    axis = against or common_axis([lines for _name, lines in runs])
    scale, unit = _unit(axis, [line[axis] for _name, lines in runs for line in lines])
    figure = Figure(dpi=_DOTS_PER_INCH, layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    dashes = dict(zip(_losses(runs), cycle(_DASHES), strict=False))
    for number, (_name, lines) in enumerate(runs):
        placed = [{**line, "x": line[axis] / scale} for line in lines]
        colour = f"C{number}"
        _draw_success(panels[0], placed, colour)
        _draw_curves(panels[1], placed, "accuracy", dashes, colour, factor=100)
        _draw_curves(panels[2], placed, "loss", dashes, colour)
        held_out = [line for line in placed if _HOLD_OUT in line]
        if held_out:
            y = [line[_HOLD_OUT] for line in held_out]
            panels[2].plot([line["x"] for line in held_out], y, _MARK, markersize=3, color=colour)
    panels[0].set_ylabel("success\n[% of episodes]")
    panels[1].set_ylabel("agreement with\nexpert [% of steps]")
    panels[2].set_ylabel(f"loss{_loss_unit(runs)}")
    lowest = [min(line.get_ydata()) for line in panels[2].get_lines()]
    # the loss of PPO may be negative
    panels[2].set_yscale("log" if lowest and min(lowest) > 0 else "linear")
    panels[2].set_xlabel(f"{_LABELS[axis]} [{unit}]" if unit else _LABELS[axis])
    for panel, what in zip(panels, ("not measured", "no expert", "no loss"), strict=True):
        panel.grid(alpha=0.3)
        if not panel.has_data():
            panel.text(0.5, 0.5, what, ha="center", va="center", transform=panel.transAxes)
    _add_legend(figure, runs, dashes)
    return figure


def run_lines(folder: Path) -> Lines:
    """The lines of a run's log, and of what was measured later.

    DemotoolsError  the folder holds no run, or a damaged log
    """
    if not (folder / FILE_NAME).is_file():
        raise DemotoolsError(
            "this folder holds no run", path=folder, fix="name a folder that `trainer run` wrote"
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
    figure: Figure, runs: Sequence[tuple[str, Lines]], dashes: dict[str, Dashes]
) -> None:
    """Below the panels: the colour of every run, then what lines, dots and dashes are."""
    from matplotlib.lines import Line2D

    shown = [_plain(name) for name, _lines in runs]
    entries = [
        Line2D([], [], color=f"C{number}", linewidth=4, label=name)
        for number, name in enumerate(shown)
    ]
    for group, (marker, actions) in _MARKERS.items():
        measured = [line for _name, lines in runs for line in evaluations(lines, group)]
        if measured:
            counts = sorted({line["episodes"] for line in measured})
            label = f"{actions}, {' or '.join(f'{count:,}' for count in counts)} episodes"
            dot = Line2D([], [], color=_GREY, marker=marker, linestyle="")
            dot.set_label(f"{label}, 95% interval")
            dot.set_markerfacecolor(_GREY if group == "evaluation" else "none")
            entries.append(dot)
    if any(_tracked(lines) for _name, lines in runs):
        entries.append(Line2D([], [], color=_GREY, label="success: training episodes"))
    for name, style in dashes.items():
        entries.append(Line2D([], [], color=_GREY, linestyle=style, label=f"loss {_plain(name)}"))
    if any(_HOLD_OUT in line for _name, lines in runs for line in lines):
        entries.append(Line2D([], [], color=_GREY, marker=_MARK, label="hold-out loss"))
    long = any(len(str(entry.get_label())) > _LONG_NAME for entry in entries)
    columns = _LEGEND_COLUMNS - long
    rows = -(-len(entries) // columns)
    figure.set_size_inches(_WIDTH_INCHES, _PANELS_INCHES + rows * _LEGEND_INCHES)
    figure.legend(handles=entries, loc="outside lower center", ncols=columns, fontsize="small")


def _plain(name: str) -> str:
    """A name as a label: a dollar would begin a formula, and no font has what does not print."""
    return printable_text(name).replace("$", r"\$")


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


def _losses(runs: Sequence[tuple[str, Lines]], scalar: str = "loss") -> list[str]:
    """The names of the losses that report this scalar."""
    found = dict.fromkeys(key for _name, lines in runs for line in lines for key in line)
    return [key.removesuffix(f"/{scalar}") for key in found if key.endswith(f"/{scalar}")]


def _loss_unit(runs: Sequence[tuple[str, Lines]]) -> str:
    """Of a cross-entropy, which reports agreement too; other losses have no unit of their own."""
    losses = _losses(runs)
    return "\n[nats per step]" if losses and set(losses) <= set(_losses(runs, "accuracy")) else ""


def _draw_success(panel: Axes, lines: Lines, colour: str) -> None:
    """The success of training rollouts, and of evaluations with their intervals."""
    tracked = _tracked(lines)
    if tracked:
        y = _smoothed([(100 * line["success"], line["episodes"]) for line in tracked])
        panel.plot([line["x"] for line in tracked], y, color=colour)
    for group, (marker, _actions) in _MARKERS.items():
        measured = evaluations(lines, group)
        if not measured:
            continue
        success = [100 * line["success"] for line in measured]
        # not below zero, as rounding makes them where all episodes succeeded
        low = [max(100 * (line["success"] - line["interval_low"]), 0) for line in measured]
        high = [max(100 * (line["interval_high"] - line["success"]), 0) for line in measured]
        x = [line["x"] for line in measured]
        fill = colour if group == "evaluation" else "none"
        panel.errorbar(
            *(x, success),
            yerr=[low, high],
            fmt=marker,
            capsize=4,
            color=colour,
            markerfacecolor=fill,
        )
    panel.set_ylim(-3, 103)


def _draw_curves(
    panel: Axes,
    lines: Lines,
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
            chosen = [line for line in _of_group(lines, group) if key in line]
            if chosen:
                y = [line[key] * factor for line in chosen]
                panel.plot([line["x"] for line in chosen], y, style, color=colour)


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
