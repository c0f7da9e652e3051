"""Makes the stores and the runs, and writes down what came of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from experiments import Experiment, recorded

from demotools.store.reading import open_store
from trainer.acting.evaluate import evaluate_policy
from trainer.acting.policy import NetworkPolicy
from trainer.run.checkpoint import read_checkpoint
from trainer.run.folder import CHECKPOINT_FILE as FILE_NAME
from trainer.run.log import read_log
from trainer.run.state import HoldOut

FOLDER = Path("build/study")
DATA = FOLDER / "data"
RESULTS = Path(__file__).parent / "results.jsonl"
VALID_EPISODES = 2_000
EPISODES = 1_000


def demotools(*arguments: str) -> None:
    """Run the command line on the study's folder of stores."""
    subprocess.run([sys.executable, "-m", "demotools", *arguments, "--data-dir", DATA], check=True)


def prepare(experiment: Experiment) -> None:
    """Record and cut the stores that a run needs, where they are not there yet."""
    level = experiment.level
    if not (DATA / f"{level}.zarr").exists():
        demotools("generate", level, "--episodes", str(recorded(level)))
    if not (DATA / f"{level}-valid.zarr").exists():
        demotools("generate", level, "--split", "valid", "--episodes", str(VALID_EPISODES))
    if not (DATA / f"{experiment.store}.zarr").exists():
        demotools("shrink", level, "--episodes", str(experiment.demos), "--name", experiment.store)


def train(experiment: Experiment, threads: int) -> float:
    """Train; the seconds of processor time that it took, start of the interpreter included."""
    folder = FOLDER / experiment.name
    settings = {
        "run.level": experiment.level,
        "run.seed": experiment.seed,
        "stages.0.off_policy.store": experiment.store,
        "evaluation": "",  # it is measured afterwards, with the cross-entropy beside it
    }
    if experiment.every:
        settings |= {"run.save_every_demo_steps": experiment.every, "run.keep": 1_000}
    given = [f"{key}={value}" for key, value in settings.items()] + list(experiment.overrides)
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


def measure(experiment: Experiment, checkpoint: Path, processes: int) -> dict[str, Any]:
    """Success on the unseen episodes, and cross-entropy on the valid store."""
    saved = read_checkpoint(checkpoint)
    network = saved.network().eval()
    found = evaluate_policy(
        NetworkPolicy(network, saved.words), experiment.level, EPISODES, processes=processes
    )
    valid = open_store(DATA / f"{experiment.level}-valid.zarr")
    return {
        "demo_steps": saved.training["progress"]["demo_steps"],
        "successes": found.successes,
        "episodes": found.episodes,
        "valid_cross_entropy": HoldOut(valid, network).cross_entropy(),
    }


def checkpoints(experiment: Experiment) -> list[Path]:
    """What is to be measured, the last one last."""
    folder = FOLDER / experiment.name
    copies = folder.glob("after-*.pt")
    return sorted(copies) or [folder / FILE_NAME]


def run(experiment: Experiment, threads: int, jobs: int) -> None:
    """Train, measure, and append what came of it to the results.

    threads, jobs   what torch computes with, and how many such runs went on beside each other
    """
    torch.set_num_threads(threads)
    prepare(experiment)
    seconds = train(experiment, threads)
    note(experiment, {"processor_seconds": seconds, "threads": threads, "jobs": jobs})


def note(experiment: Experiment, cost: dict[str, Any]) -> None:
    """Measure a run's checkpoints, and append a line for each to the results."""
    minutes = {
        line["demo_steps"]: line["minutes"]
        for line in read_log(FOLDER / experiment.name)
        if line["group"] == "train"
    }
    for checkpoint in checkpoints(experiment):
        measured = measure(experiment, checkpoint, cost["threads"])
        record = {
            "run": experiment.name,
            "part": experiment.part,
            "level": experiment.level,
            "demos": experiment.demos,
            "augmented": experiment.augmented,
            "recipe": experiment.recipe,
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
    return list({(one["run"], one["demo_steps"]): one for one in records}.values())


def missing(wanted: Iterator[Experiment]) -> list[Experiment]:
    """Those without a result."""
    done = {record["run"] for record in results()}
    return [experiment for experiment in wanted if experiment.name not in done]
