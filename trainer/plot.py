"""Learning curves as a picture: success and losses of one run or several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from demotools.errors import DemotoolsError
from trainer.log import FILE_NAME, read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AgainstWhat = Literal["demo_steps", "env_steps", "minutes"]
AXES: tuple[AgainstWhat, ...] = get_args(AgainstWhat)
FILE = "curve.png"
_LABELS: dict[AgainstWhat, str] = {
    "demo_steps": "demonstration steps shown [million]",
    "env_steps": "environment steps taken [million]",
    "minutes": "training time [minutes]",
}
_WIDTH_INCHES, _HEIGHT_INCHES, _DOTS_PER_INCH = 8.0, 6.4, 100
_WINDOW = 9


def plot_runs(folders: Sequence[Path], output: Path, against: AgainstWhat = "demo_steps") -> Path:
    """Draw the curves of the runs in `folders` into the PNG `output`.

    DemotoolsError  a folder holds no run, or there is nothing to draw
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    lines = [run_lines(folder) for folder in folders]
    figure = curves(list(zip(run_names(folders), lines, strict=True)), against)
    temporary = output.with_name(f".{output.name}.tmp")
    FigureCanvasAgg(figure).print_png(str(temporary))  # type: ignore[no-untyped-call]
    return temporary.replace(output)


def curves(
    runs: Sequence[tuple[str, list[dict[str, Any]]]], against: AgainstWhat = "demo_steps"
) -> Figure:
    """Success, agreement with the expert, and loss of runs: names and lines of their logs."""
    # the object-oriented interface: no window, no global state
    from matplotlib.figure import Figure

    figure = Figure((_WIDTH_INCHES, _HEIGHT_INCHES), dpi=_DOTS_PER_INCH, layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    for number, (name, lines) in enumerate(runs):
        colour = f"C{number}"
        # a dollar would begin a formula
        _draw_success(panels[0], lines, against, name.replace("$", r"\$"), colour)
        for group in ("offpolicy", "onpolicy"):
            _draw_curve(panels[1], lines, group, "accuracy", against, colour, percent=True)
            _draw_curve(panels[2], lines, group, "loss", against, colour)
    panels[0].set_ylabel("success\n[% of episodes]")
    panels[1].set_ylabel("agreement with\nexpert [% of steps]")
    panels[2].set_ylabel("loss\n[nats per step]")
    lowest = [min(line.get_ydata()) for line in panels[2].get_lines()]
    # the loss of PPO may be negative
    panels[2].set_yscale("log" if lowest and min(lowest) > 0 else "linear")
    panels[2].set_xlabel(_LABELS[against])
    for panel in panels:
        panel.grid(alpha=0.3)
    if panels[0].get_legend_handles_labels()[0]:
        panels[0].legend(loc="lower right", fontsize="small")
    else:
        panels[0].text(
            0.5, 0.5, "not measured", ha="center", va="center", transform=panels[0].transAxes
        )
    return figure


def run_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; DemotoolsError where the folder holds no run."""
    if not (folder / FILE_NAME).is_file():
        raise DemotoolsError(
            "this folder holds no run", path=folder, fix="name a folder that `trainer run` wrote"
        )
    try:
        return read_log(folder)
    except ValueError as error:
        raise DemotoolsError(
            f"the log is damaged: {error}",
            path=folder / FILE_NAME,
            fix="remove its broken lines, or leave out this run",
        ) from error


def run_names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names; where two have the same, the paths as they were given.

    >>> run_names([Path("runs/a"), Path("runs/b")]), run_names([Path("x/run"), Path("y/run")])
    (['a', 'b'], ['x/run', 'y/run'])
    """
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [folder.as_posix() for folder in folders]


def _draw_success(
    panel: Axes, lines: list[dict[str, Any]], against: AgainstWhat, name: str, colour: str
) -> None:
    """The success of training rollouts, and of evaluations with their intervals."""
    tracked = [line for line in lines if line["group"] == "environment" and "success" in line]
    if tracked:
        y = _smoothed([100 * line["success"] for line in tracked])
        panel.plot(_x(tracked, against), y, color=colour, label=f"{name}: training episodes")
    measured = [line for line in lines if line["group"] == "evaluation"]
    if measured:
        success = [100 * line["success"] for line in measured]
        low = [100 * (line["success"] - line["interval_low"]) for line in measured]
        high = [100 * (line["interval_high"] - line["success"]) for line in measured]
        label = f"{name}: evaluation, {measured[-1]['episodes']:,} episodes"
        panel.errorbar(
            _x(measured, against),
            success,
            yerr=[low, high],
            fmt="o",
            capsize=4,
            color=colour,
            label=f"{label}, 95% interval",
        )
    panel.set_ylim(-3, 103)


def _draw_curve(
    panel: Axes,
    lines: list[dict[str, Any]],
    group: str,
    scalar: str,
    against: AgainstWhat,
    colour: str,
    *,
    percent: bool = False,
) -> None:
    """One curve for every loss that reports this scalar."""
    of_group = [line for line in lines if line["group"] == group]
    names = dict.fromkeys(key for line in of_group for key in line if key.endswith(f"/{scalar}"))
    for style, name in zip(("-", "--", ":", "-."), names, strict=False):
        chosen = [line for line in of_group if name in line]
        y = [line[name] * (100 if percent else 1) for line in chosen]
        panel.plot(_x(chosen, against), y, style, color=colour, label=name)


def _x(lines: list[dict[str, Any]], against: AgainstWhat) -> list[float]:
    scale = 1.0 if against == "minutes" else 1e-6
    return [line[against] * scale for line in lines]


def _smoothed(values: list[float]) -> list[float]:
    """The mean of each value and those shortly before it."""
    return [
        sum(window) / len(window)
        for window in (values[max(0, end - _WINDOW) : end] for end in range(1, len(values) + 1))
    ]
