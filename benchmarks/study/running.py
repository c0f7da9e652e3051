"""Makes the stores and the runs, and writes down what came of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from experiments import FOLDER, Experiment, recorded

from demotools.errors import SettingsError
from demotools.store.reading import open_store
from trainer.acting.evaluate import evaluate_policy
from trainer.acting.policy import NetworkPolicy
from trainer.run.checkpoint import read_checkpoint
from trainer.run.folder import CHECKPOINT_FILE as FILE_NAME
from trainer.run.log import read_log
from trainer.run.state import HoldOut
from trainer.settings.models import (
    SETTINGS_FILE,
    Settings,
    differing_keys,
    parsed_settings,
    read_settings,
    setting_leaves,
    toml_of,
)

DATA = FOLDER / "data"
RESULTS = Path(__file__).parent / "results.jsonl"
VALID_EPISODES = 2_000
EPISODES = 1_000


def demotools(*arguments: str) -> None:
    """Run the command line on the study's folder of stores."""
    subprocess.run([sys.executable, "-m", "demotools", *arguments, "--data-dir", DATA], check=True)


def prepare(experiment: Experiment) -> None:
    """Record and cut the stores that a run needs, where they are not there yet."""
    for level, store in zip(experiment.levels, experiment.stores, strict=True):
        if not (DATA / f"{level}.zarr").exists():
            demotools("generate", level, "--episodes", str(recorded(level)))
        if not (DATA / f"{store}.zarr").exists():
            demotools("shrink", level, "--episodes", str(experiment.demos), "--name", store)
    prepare_valid(experiment)


def prepare_valid(experiment: Experiment) -> None:
    """Record the stores that a run is measured on, where they are not there yet."""
    for level in experiment.levels:
        if not (DATA / f"{level}-valid.zarr").exists():
            demotools("generate", level, "--split", "valid", "--episodes", str(VALID_EPISODES))


def train(experiment: Experiment, threads: int) -> float:
    """Train; the seconds of processor time that it took, start of the interpreter included."""
    folder = FOLDER / experiment.name
    # it is measured afterwards, with the cross-entropy beside it
    given = [*experiment.settings, "evaluation="]
    if experiment.every:
        given += [f"run.save_every_demo_steps={experiment.every}", "run.keep=1000"]
    before = os.times()
    subprocess.run(
        [sys.executable, "-m", "trainer", "run", experiment.recipe, "-o", str(folder)]
        + ["--overwrite", "--data-dir", str(DATA), "-m", str(threads)]
        + [word for setting in given for word in ("--set", setting)],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    after = os.times()
    return (after.children_user - before.children_user) + (
        after.children_system - before.children_system
    )


def measure(level: str, checkpoint: Path, processes: int) -> dict[str, Any]:
    """Success on the unseen episodes of a level, and cross-entropy on its valid store."""
    saved = read_checkpoint(checkpoint)
    network = saved.network().eval()
    found = evaluate_policy(
        NetworkPolicy(network, saved.words), level, EPISODES, processes=processes
    )
    valid = open_store(DATA / f"{level}-valid.zarr")
    return {
        "demo_steps": saved.training["progress"]["demo_steps"],
        "successes": found.successes,
        "episodes": found.episodes,
        "valid_cross_entropy": HoldOut(valid, network).cross_entropy(),
    }


def checkpoints(folder: Path) -> list[Path]:
    """What is to be measured of a run, the last one last."""
    copies = folder.glob("after-*.pt")
    return sorted(copies) or [folder / FILE_NAME]


def run(experiment: Experiment, threads: int, jobs: int) -> None:
    """Train, measure, and append what came of it to the results.

    threads, jobs   what torch computes with, and how many such runs went on beside each other
    """
    torch.set_num_threads(threads)
    prepare(experiment)
    seconds = train(experiment, threads)
    cost = {"processor_seconds": seconds, "threads": threads, "jobs": jobs}
    note(experiment, FOLDER / experiment.name, cost)


def settings_of(folder: Path) -> Settings:
    """The settings with which a run was made."""
    return parsed_settings(tomllib.loads((folder / SETTINGS_FILE).read_text("utf-8")), folder)


def check_same(experiment: Experiment, folder: Path) -> None:
    """SettingsError where a run was not made with the settings of the experiment.

    How often it was saved and measured while it trained does not count. Of the stores only their
    shares are known here: that they hold so many episodes is the word of whoever made the run.
    """
    made = settings_of(folder)
    wanted = read_settings(experiment.recipe, experiment.settings)
    trees = [toml_of(settings) for settings in (made, wanted)]
    one, other = (setting_leaves(tomllib.loads(tree)) for tree in trees)
    for tree in (one, other):  # begun with another run's weights or not, wherever these lie
        tree["run.init_from"] = "run.init_from" in tree
    free = ("run.name", "run.device", "run.save_every", "run.keep", "evaluation.", "on_policy.")
    differing = [
        key
        for key in differing_keys(one, other)
        if not key.startswith(free) and ".store" not in key
    ]
    shares = [
        [store.proportion for store in run.stages[0].off_policy.store]
        for run in (made, wanted)
        if run.stages[0].off_policy
    ]
    if len(shares) != 2 or shares[0] != shares[1]:
        differing.append("stages.0.off_policy.store")
    if differing:
        raise SettingsError(
            f"the run differs from {experiment.name} in {', '.join(differing)}",
            path=folder,
            fix="make it with the settings that `python benchmarks/study settings NAME` prints",
        )


def note(experiment: Experiment, folder: Path, cost: dict[str, Any]) -> None:
    """Measure a run's checkpoints, and append a line for each, and each level, to the results."""
    minutes = {
        line["demo_steps"]: line["minutes"] for line in read_log(folder) if line["group"] == "train"
    }
    network = settings_of(folder).model.type
    for checkpoint, level in product(checkpoints(folder), experiment.levels):
        measured = measure(level, checkpoint, cost["threads"])
        record = {
            "run": experiment.name,
            "part": experiment.part,
            "level": level,
            "demos": min(experiment.demos, recorded(level)),
            "augmented": experiment.augmented,
            "recipe": experiment.recipe,
            "network": network,
            "precision": experiment.precision,
            "seed": experiment.seed,
            **measured,
            "minutes": minutes.get(measured["demo_steps"]),
            **cost,
        }
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def results() -> list[dict[str, Any]]:
    """All that was written down, the later one where a run was repeated."""
    lines = RESULTS.read_text("utf-8").splitlines() if RESULTS.exists() else []
    records = map(json.loads, lines)
    return list({(one["run"], one["level"], one["demo_steps"]): one for one in records}.values())


def missing(wanted: Iterator[Experiment]) -> list[Experiment]:
    """Those without a result."""
    done = {record["run"] for record in results()}
    return [experiment for experiment in wanted if experiment.name not in done]
