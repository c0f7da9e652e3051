"""The page benchmarks/results.md and its pictures, from what was written down and nothing else."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from experiments import LEVELS, recorded
from running import RESULTS, results
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from demotools.babyai.vocabulary import WORDS
from trainer.acting.evaluate import wilson_interval
from trainer.learning.building import build_network
from trainer.learning.losses import ExpertCrossEntropy
from trainer.learning.networks.base import Model
from trainer.settings.models import read_settings, recipe_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE = Path(__file__).parents[1] / "results.md"
PICTURES = Path(__file__).parents[2] / "docs" / "pictures"
PUBLISHED = {
    "GoToLocal": ("99.8", "100"),
    "PutNextLocal": ("99.2", "100"),
    "GoTo": ("99.4", "100"),
    "Unlock": ("-", "100"),
    "Synth": ("97.3", "100"),
    "GoToSeq": ("95.4", "96.7"),
    "SynthSeq": ("87.7", "93.9"),
    "GoToImpUnlock": ("87.2", "84.0"),
    "BossLevel": ("77", "90.4"),
}
"""Success in % from 1 M demonstrations, BabyAI 1.0 and 1.1 (arXiv 1810.08272, 2007.12770)."""
README = Path(__file__).parents[2] / "README.md"
BEGIN = "<!-- written by benchmarks/study: do not edit -->\n"
END = "<!-- end of what benchmarks/study writes -->\n"
GPU_TERAFLOPS = 20
FEW = 1_000
SUCCESS = re.compile(r"^# Success:.*$", re.MULTILINE)
_INCHES, _DOTS_PER_INCH = (8.0, 4.5), 100
Record = dict[str, Any]


def write_report() -> None:
    """Write the page and the pictures."""
    records = results()
    PAGE.write_text(page(records), "utf-8")
    README.write_text(readme_with_results(records), "utf-8")
    for path, text in recipes_with_results(records).items():
        path.write_text(text, "utf-8")
    demonstrations_picture(of_part(last_of_each(records), "demonstrations"))
    minutes_picture(of_part(records, "minutes"))


def page(records: list[Record]) -> str:
    """The page, of sections for which there are records."""
    last = last_of_each(records)
    sections = {
        levels_section: of_part(last, "levels", "mazes", "mixture"),
        recipes_section: of_part(last, "recipes", "few"),
        demonstrations_section: of_part(last, "demonstrations"),
        minutes_section: of_part(records, "minutes"),
    }
    written = [section(chosen) for section, chosen in sections.items() if chosen]
    return "\n".join([HEADER, *written])


def readme_with_results(records: list[Record]) -> str:
    """The README, with the table of what is learnt from how much by the recipes as they are."""
    last = last_of_each(records)
    groups = grouped(
        [
            one
            for part in ("levels", "recipes", "few", "mazes")
            for one in of_part(last, part)
            if one["network"] == network_of(one["recipe"])
        ],
        lambda one: (one["level"], one["demos"], one["recipe"]),
    )
    rows = []
    for (level, demos, recipe), runs in sorted(
        groups.items(), key=lambda group: (LEVELS.index(group[0][0]), *group[0][1:])
    ):
        _, longest = max(grouped(runs, lambda one: one["demo_steps"]).items())
        rows.append(
            f"{level} | {demos:,} | `{recipe}` | {success(longest).partition(' |')[0]} | "
            f"{len(longest)} | {processor_minutes(longest)}"
        )
    head = ["level", "demonstrations", "recipe", "success on unseen episodes", "seeds"]
    before, _, rest = README.read_text("utf-8").partition(BEGIN)
    return (
        before + BEGIN + table([*head, "CPU minutes"], rows) + "\n" + END + rest.partition(END)[2]
    )


@cache
def network_of(recipe: str) -> str:
    """The network that a recipe names."""
    return read_settings(recipe).model.type


def recipes_with_results(records: list[Record]) -> dict[Path, str]:
    """The recipes, each with a line in its header that says what it reached."""
    last = last_of_each(records)
    fast = [one for one in of_part(last, "minutes") if one["precision"] == "float32"]
    few = [
        one
        for one in of_part(last, "recipes")
        if one["demos"] == FEW and one["network"] == network_of(one["recipe"])
    ]
    mazes = of_part(last, "mazes")
    reached = {
        "bc_fast.toml": fast,
        "bc_1000_demos.toml": few,
        "bc_bosslevel.toml": [
            one
            for one in mazes
            if (one["recipe"], one["demos"]) == ("bc_bosslevel.toml", recorded("BossLevel"))
        ],
        "bc_goto.toml": [
            one for one in mazes if (one["recipe"], one["level"]) == ("bc_goto.toml", "GoTo")
        ],
    }
    texts = {}
    for name, runs in reached.items():
        if runs:
            path = recipe_path(name)
            texts[path] = SUCCESS.sub(line_of(runs), path.read_text("utf-8"))
    return texts


def line_of(runs: list[Record]) -> str:
    """What a recipe reached, as a line of its header."""
    mean = sum(one["successes"] for one in runs) / sum(one["episodes"] for one in runs)
    worst = min(one["successes"] / one["episodes"] for one in runs)
    alone = all(one["jobs"] == 1 and one["threads"] == 2 for one in runs)
    seconds = 60 * statistics.median(one["minutes"] for one in runs)
    time = f" after {seconds:.0f} s on two cores" if alone else ""
    seeds = "one seed" if len(runs) == 1 else f"{len(runs)} seeds, worst {worst:.1%}"
    return f"# Success: {mean:.1%} of {runs[0]['episodes']:,} unseen episodes{time}; {seeds}."


def of_part(records: list[Record], *parts: str) -> list[Record]:
    """Those of these parts of the study."""
    return [one for one in records if one["part"] in parts]


HEADER = f"""# Results: success by number of demonstrations

Generated from `{RESULTS.name}` by `python benchmarks/study report`; do not edit by hand.

```console
$ python benchmarks/study run        # hours: the runs that are not noted yet
$ python benchmarks/study report     # docs/pictures/demonstrations.png, docs/pictures/seconds.png
```

**Success** is a reward above 0 within the level's step limit, measured with greedy actions on 1,000
episodes whose seeds no store may use. Brackets show Wilson's 95% interval over the episodes of all
training seeds; *worst* is the success of the worst seed. **Seeds** counts the training seeds, which
determine initial weights, data order and augmentation. **Steps shown** counts a step each time it
is trained on. All demonstrations are the bot's.

Nothing was tuned on these episodes: learning rates, sizes and budgets were chosen by the
cross-entropy on the `valid` store and by success on seeds from 1,500,000,000 upwards. Every run of
this study is listed; [log.md](../docs/log.md) records earlier attempts and what did not help.

**Seconds**, in the last table, are of training alone (without evaluation and interpreter start-up)
on an otherwise idle machine; **CPU minutes** include interpreter start-up.
"""


def last_of_each(records: list[Record]) -> list[Record]:
    """The last measurement of each run, level and network; those before belong to a curve."""
    last: dict[Hashable, Record] = {}
    for one in records:
        key = one["run"], one["level"], one["network"]
        if key not in last or last[key]["demo_steps"] <= one["demo_steps"]:
            last[key] = one
    return list(last.values())


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


def millions(records: list[Record]) -> str:
    """Steps shown."""
    return f"{records[0]['demo_steps'] / 1e6:.1f} M"


def processor_minutes(records: list[Record]) -> str:
    """The median of a group of runs, of those where it was noted."""
    noted = [one["processor_seconds"] for one in records if one["processor_seconds"] is not None]
    return f"{statistics.median(noted) / 60:.1f}" if noted else "not recorded"


def table(head: list[str], rows: Iterable[str]) -> str:
    """A Markdown table; the rows are whole lines without the outer bars."""
    lines = [" | ".join(head), " | ".join(["---"] * len(head)), *rows]
    return "\n".join(f"| {line} |" for line in lines)


def levels_section(records: list[Record]) -> str:
    """Every level of the paper that has an environment: runs of it alone, and of all together."""
    mixed = grouped(of_part(records, "mixture"), lambda one: one["level"])
    alone = [one for one in records if one["part"] != "mixture"]
    of_level = grouped(alone, lambda one: one["level"])
    rows = []
    for level in LEVELS:
        published = " | ".join(PUBLISHED.get(level, ("-", "-")))
        runs_of_all = mixed.get(level)
        of_all = success(runs_of_all).partition(" |")[0] if runs_of_all else "-"
        groups = grouped(
            of_level.get(level, []),
            lambda one: (one["demos"], one["recipe"], one["network"], millions([one])),
        )
        rows += [
            f"{level} | {demos:,} | `{recipe}` | `{network}` | {success(runs)} | {of_all} | "
            f"{published} | {steps} | {processor_minutes(runs)}"
            for (demos, recipe, network, steps), runs in groups.items()
        ] or [f"{level} | - | - | - | - | - | - | {of_all} | {published} | - | -"]
    head = ["level", "demonstrations", "recipe", "network", "success, mean", "worst", "seeds"]
    head.append("one for all")
    return (
        "## The levels\n\n*One for all* is a single `maze` network, initialised with the weights "
        "trained on BossLevel and then trained on a mixture of all 18 levels. The published "
        "figures, of BabyAI 1.0 and 1.1, are from 1,000,000 demonstrations. BossLevel's are in the "
        "abstract of arXiv 2007.12770; the others are quoted from secondary sources. Some "
        "layouts of Unlock and GoToImpUnlock cannot be solved: [levels.md](../docs/levels.md) says "
        "how many of these 1,000.\n\n"
        + table([*head, "published 1.0", "1.1", "steps shown", "CPU minutes"], rows)
        + f"\n\n{gpu_on_paper()}\n"
    )


def recipes_section(records: list[Record]) -> str:
    """Few demonstrations."""
    groups = grouped(records, lambda one: (one["level"], one["network"], one["demos"]))
    rows = [
        f"{level} | `{runs[0]['recipe']}` | `{network}` | {demos:,} | {success(runs)} | "
        f"{millions(runs)} | {processor_minutes(runs)}"
        for (level, network, demos), runs in sorted(groups.items())
    ]
    head = ["level", "recipe", "network", "demonstrations", "success, mean", "worst", "seeds"]
    head += ["steps shown", "CPU minutes"]
    return "## Few demonstrations\n\n" + table(head, rows) + "\n"


def demonstrations_section(records: list[Record]) -> str:
    """Success against the number of demonstrations, with and without augmentation."""
    groups = grouped(records, lambda one: (one["demos"], not one["augmented"]))
    rows = []
    for (demos, plain), runs in sorted(groups.items()):
        ce = statistics.mean(one["valid_cross_entropy"] for one in runs)
        rows.append(f"{demos:,} | {'no' if plain else 'yes'} | {success(runs)} | {ce:.3f}")
    head = ["demonstrations", "augmented", "success, mean", "worst", "seeds"]
    return (
        "## GoToLocal, success against demonstrations\n\n`bc_1000_demos.toml` with the network "
        f"`small` in bfloat16: {millions(records)} steps shown at every number of "
        "demonstrations, with all three symmetries or without augmentation. The stores are nested: "
        "each smaller one is part of the larger ones.\n\n"
        "![Success against the number of demonstrations](../docs/pictures/demonstrations.png)\n\n"
        + table([*head, "cross-entropy, valid"], rows)
        + "\n"
    )


def demonstrations_picture(records: list[Record]) -> None:
    """The same as a picture."""
    groups = grouped(records, lambda one: one["demos"])
    axes, save = _axes("demonstrations.png")
    for augmented, label in ((True, "with augmentation"), (False, "without")):
        chosen = [
            (demos, [one for one in runs if one["augmented"] == augmented])
            for demos, runs in sorted(groups.items())
        ]
        _draw(axes, [(demos, runs) for demos, runs in chosen if runs], label)
    axes.set_xscale("log")
    axes.set_xlabel("demonstrations [episodes]")
    save()


def minutes_section(records: list[Record]) -> str:
    """Success against time of training, the machine to itself."""
    groups = grouped(records, lambda one: (one["precision"], one["demo_steps"]))
    rows = []
    for (precision, steps), runs in sorted(groups.items()):
        seconds = [one["minutes"] * 60 for one in runs]
        spread = f"{statistics.median(seconds):.0f} ({min(seconds):.0f} to {max(seconds):.0f})"
        rows.append(f"{precision} | {steps / 1e6:.2f} M | {spread} | {success(runs)}")
    head = ["precision", "steps shown", "seconds, median", "success, mean", "worst", "seeds"]
    return (
        "## GoToLocal, success against time\n\n`bc_fast.toml` on two cores, one run at a time. All "
        "rows but the last of each precision are intermediate checkpoints, taken before the "
        "learning rate had decayed to its final value.\n\n"
        "![Success against seconds](../docs/pictures/seconds.png)\n\n" + table(head, rows) + "\n"
    )


def minutes_picture(records: list[Record]) -> None:
    """The same as a picture."""
    axes, save = _axes("seconds.png")
    for precision, runs_of_it in grouped(records, lambda one: one["precision"]).items():
        groups = grouped(runs_of_it, lambda one: one["demo_steps"])
        points = [
            (60 * statistics.median(one["minutes"] for one in runs), runs)
            for _steps, runs in sorted(groups.items())
        ]
        _draw(axes, points, f"bc_fast.toml, {precision}")
    axes.axhline(99, color="0.5", linestyle=":", linewidth=1)
    axes.set_xlabel("training time on two cores [seconds]")
    save()


@cache
def gpu_on_paper() -> str:
    """What the recipe for a GPU would cost, from the operations of one step."""
    settings = read_settings("bc_bosslevel_gpu.toml")
    steps = settings.stages[0].max_demo_steps or 0
    network = build_network(settings.model.type, settings.model.options, len(WORDS))
    operations = operations_per_step(network)
    hours = steps * operations / (GPU_TERAFLOPS * 1e12) / 3600
    return (
        f"The recipe for a GPU, `bc_bosslevel_gpu.toml`, has not been run. Its network takes "
        f"{operations / 1e6:.0f} million floating-point operations a step, forward and backward "
        f"(counted by torch), so its {steps / 1e9:.1f} billion steps take {hours:.0f} hours at a "
        f"sustained {GPU_TERAFLOPS} TFLOP/s, a few percent of the bfloat16 peak of current GPUs. "
        "[networks.md](../docs/networks.md) has its steps/s on a CPU."
    )


def operations_per_step(network: nn.Module) -> float:
    """Floating-point operations of a forward and a backward pass, a step."""
    T, B = 4, 8
    batch = {
        "cells": torch.zeros(T, B, 7, 7, dtype=torch.uint8),
        "direction": torch.zeros(T, B, dtype=torch.uint8),
        "expert_action": torch.zeros(T, B, dtype=torch.uint8),
        "masks": torch.ones(T, B, dtype=torch.uint8),
        "mission": torch.zeros(T, B, dtype=torch.int64),
        "mission_tokens": torch.ones(1, 5, dtype=torch.int64),
    }
    memory = network.initial_memory(B)  # type: ignore[operator]
    with FlopCounterMode(display=False) as counter:
        ExpertCrossEntropy()(cast(Model, network), batch, memory).loss.backward()  # type: ignore[no-untyped-call]
    return float(counter.get_total_flops()) / (T * B)


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
