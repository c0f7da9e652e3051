"""From a recipe to a finished run, and from a checkpoint to its success; the commands call these.

Nothing here prints: lines for the user go to the function `say` that the caller hands over.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from demotools.environment import level_environment_id
from demotools.errors import SettingsError, from_os_error
from trainer.checkpoint import FILE_NAME as CHECKPOINT_FILE
from trainer.checkpoint import read_checkpoint
from trainer.config import read_settings, toml_of
from trainer.evaluate import Evaluation, Policy, RandomPolicy, evaluate_policy
from trainer.interrupt import stop_request
from trainer.log import BOARD_FOLDER, Axis
from trainer.log import FILE_NAME as LOG_FILE
from trainer.pipeline import train
from trainer.plan import duration, expected_cost
from trainer.plot import FILE as PLOT_FILE
from trainer.plot import plot_runs
from trainer.policy import NetworkPolicy
from trainer.resolve import open_stores, resolved, shared_words
from trainer.run import Parts, Run, new_parts, open_run, restore

SETTINGS_FILE = "settings.toml"
_FILES = (SETTINGS_FILE, CHECKPOINT_FILE, LOG_FILE, PLOT_FILE, BOARD_FOLDER)


@dataclass(frozen=True)
class Options:
    """What the command line of `trainer run` says.

    data   folder of the demo stores
    """

    recipe: str
    overrides: tuple[str, ...]
    output: Path | None
    data: Path
    processes: int
    resume: bool = False
    overwrite: bool = False
    quiet: bool = False


def run_recipe(options: Options, say: Callable[[str], None]) -> int:
    """Train by a recipe; the number of the signal that ended it early, else 0.

    SettingsError, StoreError, CheckpointError  before anything is written
    """
    parts, said = _prepared(options)
    settings = parts.settings
    folder = options.output or Path("runs") / settings.run.name
    checkpoint = read_checkpoint(folder) if options.resume else None
    if checkpoint is None:
        _clear(folder, overwrite=options.overwrite)
    for line in [*said, f"folder: {folder}"]:
        say(line)
    with open_run(parts, folder, processes=options.processes, quiet=options.quiet) as run:
        if checkpoint is not None:
            restore(run, checkpoint)
        (folder / SETTINGS_FILE).write_text(toml_of(settings), "utf-8")
        with stop_request() as stop:
            train(run, stop)
        if not stop:
            say(f"trained for {duration(60 * run.progress.minutes)}")
            _evaluate(run, say)
    say(f"learning curve: {plot_runs([folder], folder / PLOT_FILE)}")
    if stop:
        say(f"stopped; the checkpoint is {folder / CHECKPOINT_FILE}, --resume goes on from it")
    return stop.signal


def dry_run_text(options: Options) -> str:
    """The resolved settings as TOML that runs again as it is; the cost in its comments."""
    parts, said = _prepared(options)
    return "".join(f"# {line}\n" for line in said) + toml_of(parts.settings)


def measured_success(
    checkpoint: Path | None,
    reference: str | None,
    level: str | None,
    episodes: int,
    processes: int,
    *,
    quiet: bool,
) -> Evaluation:
    """The success of a checkpoint, or of the reference `bot` or `random` in its place.

    checkpoint   None: only with a reference and a level
    level        None: the one that the checkpoint was trained on
    """
    saved = read_checkpoint(checkpoint) if checkpoint is not None else None
    policy: Policy | Literal["bot"]
    if reference is not None:
        policy = "bot" if reference == "bot" else RandomPolicy()
    else:
        assert saved is not None
        policy = NetworkPolicy(saved.network(), saved.words)
    if level is None:
        assert saved is not None
        level = saved.parsed().run.level
    return evaluate_policy(policy, level, episodes, processes=processes, quiet=quiet)


def _prepared(options: Options) -> tuple[Parts, list[str]]:
    """The parts of the run, and what the user should know of it before the first step."""
    settings, reasons = resolved(read_settings(options.recipe, options.overrides), options.data)
    if settings.on_policy is not None or settings.evaluation is not None:
        level_environment_id(settings.run.level)
    stores = open_stores(settings, options.data)
    words = shared_words(list(stores.values()))
    parts = new_parts(settings, stores, words)
    cost = expected_cost(settings, parts.network, words, stores, options.processes)
    return parts, [*reasons, *cost.lines(options.recipe)]


def _clear(folder: Path, *, overwrite: bool) -> None:
    """An empty place for a new run; only what a run writes is ever removed."""
    existing = [folder / name for name in _FILES if (folder / name).exists()]
    if existing and not overwrite:
        raise SettingsError(
            "there is a run in this folder already",
            path=folder,
            fix="add --resume to go on with it, --overwrite to replace it, or name another with -o",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in existing:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    except OSError as error:
        raise from_os_error(error, folder) from error


def _evaluate(run: Run, say: Callable[[str], None]) -> None:
    """Measure success where the settings ask for it, and note it in the log."""
    if run.settings.evaluation is None:
        return
    result = evaluate_policy(
        NetworkPolicy(run.network.eval(), run.words),
        run.settings.run.level,
        run.settings.evaluation.episodes,
        processes=run.processes,
        quiet=run.quiet,
    )
    low, high = result.interval
    scalars = {
        "success": result.success,
        "interval_low": low,
        "interval_high": high,
        "episode_length": result.mean_length,
        "episodes": result.episodes,
    }
    axis: Axis = "demo_steps" if run.progress.demo_steps else "env_steps"
    run.log.write("evaluation", scalars, axis=axis, where=run.progress.where())
    say(result.text())
