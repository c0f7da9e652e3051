"""How a run is saved, and taken up where it was."""

from __future__ import annotations

import copy
import logging
import tomllib
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from demotools.errors import CheckpointError
from trainer.run.checkpoint import (
    BEST,
    FAILED,
    FILE_NAME,
    Checkpoint,
    fitting,
    keep_checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from trainer.run.state import Progress, Run, Stage, latest
from trainer.settings.models import Settings, setting_leaves, toml_of

_log = logging.getLogger(__name__)

_FEW_EPISODES = 100
_STATE = "the state of training in this checkpoint is damaged"


class _Process(BaseModel):
    """What a checkpoint holds of one process."""

    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True)

    random: torch.Tensor
    stage: dict[str, Any]


class _Training(BaseModel):
    """What a checkpoint holds beside the weights."""

    model_config = ConfigDict(strict=True)

    processes: Annotated[list[_Process], Field(min_length=1)]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    progress: dict[str, Annotated[bool | int | float, Field(ge=0)]]
    log_bytes: Annotated[int, Field(ge=0)]


def save(run: Run, stage: Stage | None = None) -> None:
    """Write the run's checkpoint, by one process for all; what is restored is in `restore`."""
    recent = latest(run.team.gathered(stage.recent)) if stage else []
    success = sum(recent) / max(len(recent), 1)
    # where a stage has a hold-out store, that says which is best
    by_success = stage is not None and stage.hold_out is None
    best = by_success and len(recent) >= _FEW_EPISODES and success > run.progress.best_success
    if best:
        run.progress.best_success = success
        # first: last.pt never says of a best one that it is there before it is
        save_best(run, stage)
    state = state_of(run, stage)
    if run.team.writes:
        write_state(run, FILE_NAME, state)
        keep_checkpoints(run.folder, run.settings.run.keep, run.progress.updates)
        _log.debug("saved after %d updates: %s", run.progress.updates, run.folder / FILE_NAME)
        run.on_save(run.folder)


def save_best(run: Run, stage: Stage | None) -> None:
    """Write the run as it stands as its best."""
    state = state_of(run, stage)
    if run.team.writes:
        write_state(run, BEST, state)


def load_best(run: Run) -> str:
    """Give the network the weights of best.pt where the last stage has a hold-out store.

    returns   what to say of it; empty where the last weights are those that count
    """
    rule = run.settings.stages[-1].early_stopping
    if rule is None or rule.hold_out is None:
        return ""
    try:
        best = read_checkpoint(run.folder / BEST)
        training = _checked(run, best)
        if training.progress["stage"] != len(run.settings.stages) - 1:
            raise CheckpointError("it is of an earlier stage", path=best.path, fix="")
        best.load_weights(run.network)
    except CheckpointError as error:
        return f"success is measured with the last weights, not the best: {error.what}"
    loss, steps = training.progress["best_hold_out"], int(training.progress["demo_steps"])
    return (
        f"success is measured with the best weights, {BEST}: "
        f"hold-out loss {loss:.4f} after {steps:,} demo steps"
    )


def state_of(run: Run, stage: Stage | None) -> dict[str, Any]:
    """Everything that a checkpoint holds of a run, of all processes; not a copy."""
    mine = {"random": torch.get_rng_state(), "stage": stage.state() if stage else {}}
    return _state(run, {"processes": run.team.gathered(mine)})


def copied(state: Any) -> Any:
    """A copy that stays as it is while training goes on, on the device of the original."""
    if isinstance(state, torch.Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map(copied, state))
    return copy.deepcopy(state)


def save_failed(run: Run, batch: Mapping[str, Any]) -> Path:
    """Write the weights, and the batch at which training failed, to be looked into."""
    return write_state(run, FAILED, _state(run, {"batch": dict(batch)}))


def _state(run: Run, more: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model": run.network.state_dict(),
        "training": {
            "optimizer": run.optimizer.state_dict(),
            "schedule": run.schedule.state_dict(),
            "progress": dict(vars(run.progress)),
            "log_bytes": run.log.size_bytes() if run.log is not None else 0,
            **more,
        },
    }


def write_state(run: Run, name: str, state: Mapping[str, Any]) -> Path:
    """Write what `state_of` gave as a checkpoint of this name."""
    path = run.folder / name
    write_checkpoint(path, settings=toml_of(run.settings), words=run.words, **state)
    return path


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Take up a run where its checkpoint was written.

    CheckpointError  the checkpoint is of another vocabulary or number of processes, or damaged
    """
    if checkpoint.words != run.words:
        differing = next(
            ours or theirs
            for ours, theirs in zip_longest(run.words, checkpoint.words)
            if ours != theirs
        )
        raise CheckpointError(
            f"the run was begun with another vocabulary (they differ at the word `{differing}`)",
            path=checkpoint.path,
            fix="resume with the stores that it was begun with, or begin anew with --overwrite",
        )
    training = _checked(run, checkpoint)
    everyone = training.processes
    if len(everyone) != run.team.world:
        raise CheckpointError(
            f"the run was begun by {len(everyone)} processes together, not {run.team.world}",
            path=checkpoint.path,
            fix=f"resume it with `torchrun --nproc-per-node {len(everyone)}`, or on as many hosts",
        )
    mine = everyone[run.team.rank]
    checkpoint.load_weights(run.network)
    with fitting(checkpoint.path, _STATE):
        run.optimizer.load_state_dict(training.optimizer)
        run.schedule.load_state_dict(training.schedule)
        torch.set_rng_state(mine.random)
    # in place: the schedule looks at it
    vars(run.progress).update(training.progress)
    run.restored = mine.stage or None
    if run.log is not None:
        run.log.cut(training.log_bytes)


def _checked(run: Run, checkpoint: Checkpoint) -> _Training:
    """The state of training in a checkpoint; CheckpointError where we do not write it so."""
    try:
        training = _Training.model_validate(checkpoint.training)
        known = vars(Progress())
        kinds = {key: type(value) for key, value in training.progress.items()}
        if kinds != {key: type(value) for key, value in known.items()}:
            raise ValueError("progress is not what this version of the trainer counts")
        if training.progress["stage"] > len(run.settings.stages):
            raise ValueError(f"it is at stage {training.progress['stage']}, which there is not")
    except ValidationError as error:
        problem = error.errors()[0]
        raise _damaged(checkpoint, f"{problem['msg']} at {problem['loc']}") from error
    except ValueError as error:
        raise _damaged(checkpoint, str(error)) from error
    return training


def _damaged(checkpoint: Checkpoint, why: str) -> CheckpointError:
    return CheckpointError(
        f"{_STATE}: {why}", path=checkpoint.path, fix="begin anew with --overwrite"
    )


# What changes nothing that the weights are made of.
_HARMLESS = ("run.name", "run.save_every_", "run.keep", "run.wandb", "evaluation.")


def check_resumed(checkpoint: Checkpoint, settings: Settings, *, forced: bool) -> None:
    """Refuse to resume with settings that changed; where that is harmless, only if not forced.

    CheckpointError  names the keys
    """
    before = setting_leaves(tomllib.loads(checkpoint.settings))
    now = setting_leaves(tomllib.loads(toml_of(settings)))
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    grave = [key for key in changed if not key.startswith(_HARMLESS)]
    if grave or (changed and not forced):
        keys = ", ".join(f"`{key}`" for key in grave or changed)
        raise CheckpointError(
            f"the run was begun with other settings: {keys}",
            path=checkpoint.path,
            fix="resume with the settings.toml that lies beside it, or begin anew with --overwrite"
            if grave
            else "they change nothing that was learned: add --force-settings, or set them back",
        )
