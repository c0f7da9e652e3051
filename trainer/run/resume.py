"""Saves a run, and resumes it where it was."""

from __future__ import annotations

import copy
import logging
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from demotools.errors import CheckpointError, first_problem
from demotools.output import counted
from trainer.learning.building import spans_run
from trainer.learning.losses import held_by, loss_states, loss_weights
from trainer.run.checkpoint import (
    Checkpoint,
    fitting,
    keep_checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from trainer.run.folder import BEST, CHECKPOINT_FILE, FAILED, HARMLESS
from trainer.run.log import MeterState, one_meter
from trainer.run.state import Progress, Run, Stage, latest
from trainer.settings.models import Settings, differing_keys, setting_leaves, toml_of

_log = logging.getLogger(__name__)

_FEW_EPISODES = 100
_STATE = "the state of training in this checkpoint is damaged"


class _Process(BaseModel):
    """What a checkpoint holds of one process.

    meter   of a cycle that is under way
    """

    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True)

    random: torch.Tensor
    stage: dict[str, Any]
    losses: dict[str, Any]
    meter: MeterState = Field(default_factory=dict)


class _Training(BaseModel):
    """What a checkpoint holds beside the weights that act.

    weights   those that are trained, where others act
    """

    model_config = ConfigDict(strict=True)

    processes: Annotated[list[_Process], Field(min_length=1)]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    progress: dict[str, Annotated[bool | int | float, Field(ge=0)]]
    log_bytes: Annotated[int, Field(ge=0)]
    weights: dict[str, Any] | None = None


def save(run: Run, stage: Stage) -> None:
    """Write the run's checkpoint, by one process for all; what is restored is in `restore`."""
    rule = stage.settings.early_stopping
    judged = rule.episodes if rule is not None and rule.success is not None else None
    recent = latest(run.team.gathered(stage.recent))[:judged]
    success = sum(recent) / max(len(recent), 1)
    enough = len(recent) >= min(_FEW_EPISODES, judged or _FEW_EPISODES)
    # where a stage has a hold-out store, that says which is best
    if stage.hold_out is None and enough and success > run.progress.best_success:
        run.progress.best_success = success
        # first: last.pt never says of a best one that it is there before it is
        save_best(run, stage)
    state = state_of(run, stage)
    if run.team.writes:
        write_state(run, CHECKPOINT_FILE, state)
        keep_checkpoints(run.folder, run.settings.run.keep, run.progress.updates)
        _log.debug("saved after %d updates: %s", run.progress.updates, run.folder / CHECKPOINT_FILE)
        run.on_save(run.folder)


def save_best(run: Run, stage: Stage) -> None:
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
        best = read_checkpoint(run.folder / BEST, trust=True)  # only its weights are taken
        training = _checked(run, best)
        if training.progress["stage"] != len(run.settings.stages) - 1:
            raise CheckpointError("it belongs to an earlier stage", path=best.path, fix="")
        best.load_weights(run.network)
        run.average = None  # these are averages already, where any are asked for
    except CheckpointError as error:
        return f"success is measured with the last weights, not the best: {error.what}"
    loss, steps = training.progress["best_hold_out"], int(training.progress["demo_steps"])
    return (
        f"success is measured with the best weights, {BEST}: "
        f"hold-out loss {loss:.4f} after {steps:,} demo steps"
    )


def state_of(run: Run, stage: Stage) -> dict[str, Any]:
    """Everything that a checkpoint holds of a run, of all processes; not a copy."""
    mine = {
        "random": torch.get_rng_state(),
        "stage": stage.state(),
        "losses": loss_states(run.by_name),
        "meter": run.meter.state(),
    }
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
    weights = run.network.state_dict()
    if run.average is not None:
        more = {**more, "weights": weights}
    return {
        # those that act: whatever reads a checkpoint takes the averages
        "model": weights if run.average is None else run.average.state,
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

    CheckpointError  the checkpoint is of another vocabulary, its environments were shared by
                     another number of processes, or it is damaged
    """
    if checkpoint.words != run.words:
        differing = next(
            ours or theirs
            for ours, theirs in zip_longest(run.words, checkpoint.words)
            if ours != theirs
        )
        raise CheckpointError(
            f"the run was started with a different vocabulary (see the word `{differing}`)",
            path=checkpoint.path,
            fix="resume with the stores that it was started with, or start over with --overwrite",
        )
    training = _checked(run, checkpoint)
    mine = _dealt(run, checkpoint, training)
    checkpoint.load_weights(run.network)
    if run.average is not None:
        run.average.begin()
        replace(checkpoint, model=training.weights or {}).load_weights(run.network)
    held = held_by(run.by_name)
    for name in held.keys() & mine.losses.keys():
        with fitting(checkpoint.path, f"the saved state of the loss `{name}` does not fit it"):
            held[name].load_state_dict(mine.losses[name])
    new = loss_weights(run.of_names(held.keys() - mine.losses.keys()))
    with fitting(checkpoint.path, _STATE):
        run.optimizer.load_state_dict(_with_new_weights(training.optimizer, run.weights, new))
        run.schedule.load_state_dict(training.schedule)
        if spans_run(run.settings.optimizer.schedule):
            run.schedule.compute_again()  # the plan as it is now may be longer
        torch.set_rng_state(mine.random)
    # in place: the schedule looks at it
    vars(run.progress).update(training.progress)
    run.meter.load_state(mine.meter)
    run.restored = mine.stage or None
    if run.log is not None:
        run.log.cut(training.log_bytes)


def _dealt(run: Run, checkpoint: Checkpoint, training: _Training) -> _Process:
    """This process's part of what so many processes held, dealt anew where there are now others.

    Rows of batches from a store are the same wherever they are played; environments are not.
    """
    everyone = training.processes
    rank, world = run.team.rank, len(everyone)
    if world == run.team.world:
        return everyone[rank]
    random = everyone[rank].random if rank < world else torch.get_rng_state()
    losses = everyone[min(rank, world - 1)].losses
    progress = Progress(**training.progress)  # type: ignore[arg-type]
    if progress.finished(run.settings.stages[progress.stage]):
        return _Process(random=random, stage={}, losses=losses)
    if any("collector" in one.stage for one in everyone):
        raise CheckpointError(
            f"{world} processes shared the environments of this stage, not {run.team.world}",
            path=checkpoint.path,
            fix=f"resume it with `torchrun --nproc-per-node {world}`, or on as many hosts",
        )
    with fitting(checkpoint.path, _STATE):
        parts = [one.stage["demos"] for one in everyone]
        memory = {
            name: torch.cat([part["memory"][name] for part in parts]) for name in parts[0]["memory"]
        }
        share = run.team.share(len(next(iter(memory.values()))), "off_policy.rollouts")
        rows = slice(share.start, share.stop)
        demos = {
            "iterator": parts[0]["iterator"],  # of all processes
            "memory": {name: of_all[rows] for name, of_all in memory.items()},
        }
        meter = one_meter([one.meter for one in everyone])
    return _Process(random=random, stage={"demos": demos}, losses=losses, meter=meter)


def _with_new_weights(
    state: dict[str, Any], weights: list[torch.nn.Parameter], new: list[torch.nn.Parameter]
) -> dict[str, Any]:
    """State of an optimizer that knows these weights too, which losses of a new stage bring."""
    groups = state["param_groups"]
    last = {id(one) for one in weights[len(weights) - len(new) :]}
    if not new or len(groups) != 1 or last != {id(one) for one in new}:
        return state
    known = groups[0]["params"]
    more = range(len(known), len(known) + len(new))
    return {**state, "param_groups": [{**groups[0], "params": [*known, *more]}]}


def _checked(run: Run, checkpoint: Checkpoint) -> _Training:
    """The state of training in a checkpoint; CheckpointError where we do not write it so."""
    if checkpoint.training.keys() <= {"progress"}:
        raise CheckpointError(
            "this has only weights, not the state of training",
            path=checkpoint.path,
            fix="resume from a checkpoint that `trainer run` wrote",
        )
    try:
        training = _Training.model_validate(checkpoint.training)
        known = vars(Progress())
        kinds = {key: type(value) for key, value in training.progress.items()}
        if kinds != {key: type(value) for key, value in known.items()}:
            raise ValueError("its progress counters are not those of this version of the trainer")
        if training.progress["stage"] >= len(run.settings.stages):
            raise ValueError(f"it is at stage {training.progress['stage']}, which does not exist")
    except ValidationError as error:
        place, what = first_problem(error, "python")
        raise _damaged(checkpoint, f"at `{place}`: {what}") from error
    except ValueError as error:
        raise _damaged(checkpoint, str(error)) from error
    return training


def _damaged(checkpoint: Checkpoint, why: str) -> CheckpointError:
    return CheckpointError(
        f"{_STATE}: {why}", path=checkpoint.path, fix="start over with --overwrite"
    )


# What changes nothing that the weights are made of.


def resumed_settings(
    checkpoint: Checkpoint, settings: Settings, *, forced: bool
) -> tuple[Settings, list[str]]:
    """The settings that a run goes on with, and what to say of a plan that has grown.

    The last stage may have a larger budget, and stages may come after it, with losses and
    environments that only they need. Whatever else changed is refused; where it is harmless, only
    if not forced.

    CheckpointError  names the keys
    """
    tree = tomllib.loads(checkpoint.settings)
    begun = tree["run"].get("init_from")
    if settings.run.init_from is None and begun is not None:
        settings = settings.with_run(init_from=begun)  # it is where the run comes from
    before, now = setting_leaves(tree), setting_leaves(settings.tree())
    lines, grown = _growth(checkpoint, settings)
    changed = [key for key in differing_keys(before, now) if not key.startswith(grown)]
    grave = [key for key in changed if not key.startswith(HARMLESS)]
    if grave or (changed and not forced):
        keys = ", ".join(f"`{key}`" for key in grave or changed)
        raise CheckpointError(
            f"the run was started with different settings: {keys}",
            path=checkpoint.path,
            fix="resume with the settings.toml next to it, or start over with --overwrite; only "
            "the last stage's budget may grow, and stages may be appended"
            if grave
            else "they do not affect the weights: add --force-settings, or change them back",
        )
    return settings, lines


def _growth(checkpoint: Checkpoint, settings: Settings) -> tuple[list[str], tuple[str, ...]]:
    """What a plan has more than when its run was begun: lines, and beginnings of keys."""
    old, lines, keys = checkpoint.parsed(), list[str](), list[str]()
    last, count = len(old.stages) - 1, len(settings.stages)
    if count <= last:
        return [], ()
    for kind in ("env_steps", "demo_steps"):
        less, more = (getattr(one.stages[last], f"max_{kind}") for one in (old, settings))
        if less and more and less < more:
            what = kind.replace("_", " ")
            lines.append(f"the budget of stage {last + 1} grows from {less:,} to {more:,} {what}")
            keys.append(f"stages.{last}." + f"max_{kind}")
    if count > last + 1:
        lines.append(f"new: {counted(count - last - 1, 'stage')} after stage {last + 1}")
        keys += [f"stages.{number}." for number in range(last + 1, count)]
        keys += [f"losses.{name}." for name in settings.losses if name not in old.losses]
        with fitting(checkpoint.path, _STATE):
            done = Progress(**checkpoint.training["progress"])
            ended = done.stage == last and done.finished(old.stages[last])
        if old.on_policy is None and ended:
            keys.append("on_policy.")  # its environments are the new stages' alone
    if lines and spans_run(settings.optimizer.schedule):
        lines.append(
            f"the schedule {settings.optimizer.schedule.type} spans the whole run, which is now "
            "longer: from here on the learning rate follows the longer plan, so the weights will "
            "not be those of a run planned at this length"
        )
    return lines, tuple(keys)
