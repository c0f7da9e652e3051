"""The page benchmarks/results.md and its pictures, from what was written down and nothing else."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from running import RESULTS, results

from trainer.evaluate import wilson_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE = Path(__file__).parents[1] / "results.md"
PICTURES = Path(__file__).parents[2] / "docs" / "pictures"
PUBLISHED = {"GoToLocal": ("99.8", "100"), "PutNextLocal": ("99.2", "100")}
"""Success in % from 1 M demonstrations, BabyAI 1.0 and 1.1 (arXiv 1810.08272, 2007.12770)."""
_INCHES, _DOTS_PER_INCH = (8.0, 4.5), 100
Record = dict[str, Any]


def write_report() -> None:
    """Write the page and the pictures."""
    records = results()
    sections = [
        HEADER,
        levels_section([one for one in records if one["part"] == "levels"]),
        recipes_section([one for one in records if one["part"] == "recipes"]),
        demonstrations_section([one for one in records if one["part"] == "demonstrations"]),
        minutes_section([one for one in records if one["part"] == "minutes"]),
    ]
    PAGE.write_text("\n".join(section for section in sections if section), "utf-8")


HEADER = f"""# What is learnt from how many demonstrations

Written by `python benchmarks/study report` from `{RESULTS.name}`; not edited by hand.

**Success** is a reward within the level's step limit, with the most probable actions, on 1,000
episodes whose seeds no store may use. The brackets are Wilson's 95% interval, over all training
seeds together. **Seed** is that of training: weights, order, augmentation. Demonstrations are the
bot's.

Nothing was chosen on these episodes: rates, sizes and budgets were settled by the cross-entropy on
the `valid` store and by success on the seeds from 1,500,000,000 on. Every run that was made is
here.

**Minutes** are of training alone (no evaluation, no start of the interpreter), where the run had
the machine to itself; processor minutes include the start of the interpreter.
"""


def grouped(
    records: Iterable[Record], key: Callable[[Record], Hashable]
) -> dict[Any, list[Record]]:
    """Records by a key, in the order in which the keys come up."""
    groups: dict[Any, list[Record]] = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    return groups


def success(records: list[Record]) -> str:
    """Mean, interval and worst of a group of runs, in %."""
    successes, episodes = (sum(one[key] for one in records) for key in ("successes", "episodes"))
    low, high = wilson_interval(successes, episodes)
    worst = min(one["successes"] / one["episodes"] for one in records)
    return f"{successes / episodes:.2%} ({low:.2%} to {high:.2%}) | {worst:.1%} | {len(records)}"


def processor_minutes(records: list[Record]) -> str:
    return f"{statistics.median(one['processor_seconds'] for one in records) / 60:.1f}"


def table(head: list[str], rows: Iterable[str]) -> str:
    """A Markdown table; the rows are whole lines without the outer bars."""
    lines = [" | ".join(head), " | ".join(["---"] * len(head)), *rows]
    return "\n".join(f"| {line} |" for line in lines)


def levels_section(records: list[Record]) -> str:
    """The six single-room levels."""
    if not records:
        return ""
    rows = []
    for level, runs in grouped(records, lambda one: one["level"]).items():
        old, new = PUBLISHED.get(level, ("-", "-"))
        steps = f"{runs[0]['demo_steps'] / 1e6:.1f} M"
        rows.append(
            f"{level} | {success(runs)} | {old} | {new} | {steps} | {processor_minutes(runs)}"
        )
    head = ["level", "success, mean", "worst", "seeds", "published 1.0", "1.1", "steps shown"]
    return (
        "## Single rooms, 200,000 demonstrations\n\n`small`, `bc_fast.toml` with the level's "
        "name and the steps of the table. The published figures are from 1,000,000 "
        "demonstrations.\n\n" + table([*head, "processor minutes"], rows) + "\n"
    )


def recipes_section(records: list[Record]) -> str:
    """Few demonstrations."""
    if not records:
        return ""
    groups = grouped(records, lambda one: (one["recipe"], one["demos"]))
    rows = [
        f"`{recipe}` | {demos:,} | {success(runs)} | {runs[0]['demo_steps'] / 1e6:.1f} M"
        f" | {processor_minutes(runs)}"
        for (recipe, demos), runs in sorted(groups.items())
    ]
    head = ["recipe", "demonstrations", "success, mean", "worst", "seeds", "steps shown"]
    return "## GoToLocal, few demonstrations\n\n" + table([*head, "processor minutes"], rows) + "\n"


def demonstrations_section(records: list[Record]) -> str:
    """Success against the number of demonstrations, with and without augmentation."""
    if not records:
        return ""
    groups = grouped(records, lambda one: (one["demos"], not one["augmented"]))
    rows = []
    for (demos, plain), runs in sorted(groups.items()):
        ce = statistics.mean(one["valid_cross_entropy"] for one in runs)
        rows.append(f"{demos:,} | {'no' if plain else 'yes'} | {success(runs)} | {ce:.3f}")
    axes, save = _axes("demonstrations.png")
    for plain, label in ((False, "with augmentation"), (True, "without")):
        points = [
            (demos, runs) for (demos, is_plain), runs in sorted(groups.items()) if is_plain == plain
        ]
        _draw(axes, points, label)
    axes.set_xscale("log")
    axes.set_xlabel("demonstrations [episodes]")
    save()
    head = ["demonstrations", "augmented", "success, mean", "worst", "seeds"]
    return (
        "## GoToLocal, success against demonstrations\n\n`bc_1000_demos.toml`, "
        f"{records[0]['demo_steps'] / 1e6:.1f} M steps shown whatever their number; stores are "
        "nested: a smaller one is a part of a larger one.\n\n"
        "![Success against the number of demonstrations](../docs/pictures/demonstrations.png)\n\n"
        + table([*head, "cross-entropy, valid"], rows)
        + "\n"
    )


def minutes_section(records: list[Record]) -> str:
    """Success against minutes of training, the machine to itself."""
    if not records:
        return ""
    groups = grouped(records, lambda one: one["demo_steps"])
    rows, points = [], []
    for steps, runs in sorted(groups.items()):
        seconds = [one["minutes"] * 60 for one in runs]
        points.append((statistics.median(seconds), runs))
        spread = f"{statistics.median(seconds):.0f} ({min(seconds):.0f} to {max(seconds):.0f})"
        rows.append(f"{steps / 1e6:.2f} M | {spread} | {success(runs)}")
    axes, save = _axes("minutes.png")
    _draw(axes, points, "bc_fast.toml, 200,000 demonstrations")
    axes.axhline(99, color="0.5", linestyle=":", linewidth=1)
    axes.set_xlabel("training time on two cores [seconds]")
    save()
    head = ["steps shown", "seconds, median", "success, mean", "worst", "seeds"]
    return (
        "## GoToLocal, success against time\n\n`bc_fast.toml`, two cores, one run at a time.\n\n"
        "![Success against seconds](../docs/pictures/seconds.png)\n\n".replace(
            "seconds.png", "minutes.png"
        )
        + table(head, rows)
        + "\n"
    )


def _axes(name: str) -> tuple[Axes, Callable[[], None]]:
    """Axes of success, and what writes them into a picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_INCHES, dpi=_DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots()
    axes.set_ylabel("success on 1,000 unseen episodes [%]")
    axes.grid(alpha=0.3)

    def save() -> None:
        axes.set_ylim(top=100.5)
        axes.legend(loc="lower right")
        FigureCanvasAgg(figure).print_png(PICTURES / name)  # type: ignore[no-untyped-call]

    return axes, save


def _draw(axes: Axes, points: list[tuple[float, list[Record]]], label: str) -> None:
    """Mean of the runs with Wilson's interval; each run as a faint dot."""
    x = [place for place, _runs in points]
    totals = [
        (sum(one["successes"] for one in runs), sum(one["episodes"] for one in runs))
        for _place, runs in points
    ]
    mean = [100 * good / played for good, played in totals]
    bounds = [wilson_interval(good, played) for good, played in totals]
    below = [value - 100 * low for value, (low, _high) in zip(mean, bounds, strict=True)]
    above = [100 * high - value for value, (_low, high) in zip(mean, bounds, strict=True)]
    drawn = axes.errorbar(x, mean, yerr=[below, above], marker="o", capsize=3, label=label)
    for place, runs in points:
        single = [100 * one["successes"] / one["episodes"] for one in runs]
        axes.plot([place] * len(runs), single, ".", color=drawn[0].get_color(), alpha=0.4)
