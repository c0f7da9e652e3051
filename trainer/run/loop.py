"""The training loop: stages in sequence, each a series of cycles until its budget is spent.

A cycle is one rollout from the environments, `repeats` x `minibatches` updates on it with the
on-policy losses, then `updates` batches from a demo store with the off-policy losses. Either half
may be absent: without a section `on_policy` no environment is made; without losses of its own the
rollout only tracks success; without a section `off_policy` no store is opened.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import get_args

import torch
from torch import Tensor

from demotools.errors import DemotoolsError, SettingsError
from trainer.acting.collect import Collector, minibatches
from trainer.batch import Batch
from trainer.learning.building import clip_gradients
from trainer.learning.losses import Loss, LossResult, kl_targets, weighted_sum
from trainer.run.folder import CHECKPOINT_FILE
from trainer.run.log import Group, Stopwatch
from trainer.run.memory import enough_memory, resident_mib, return_memory
from trainer.run.resume import copied, save, save_best, save_failed, state_of, write_state
from trainer.run.state import (
    Progress,
    Run,
    Stage,
    StoreBatches,
    ends_early,
    open_stage,
    rollout_updates,
)
from trainer.run.success import measure_if_due
from trainer.settings.user_code import naming_users_code, users_code
from trainer.team import StopRequest


def run_stages(run: Run, stop: StopRequest) -> None:
    """Train through all stages; save at every interval, at the end, and when asked to stop."""
    progress, run.watch = run.progress, Stopwatch()
    for number in range(progress.stage, len(run.settings.stages)):
        if number > progress.stage:
            progress.next_stage()
            run.restored = None
        if progress.finished(run.settings.stages[number]):
            continue
        with open_stage(run) as stage:
            while not progress.finished(stage.settings):
                before = replace(progress)
                with _saved_first(run, stage), enough_memory():
                    # a run that was stopped inside a cycle has taken this cycle's rollout already
                    if stage.collector is not None and not progress.in_cycle:
                        _learn_from_environments(run, stage, stage.collector)
                    if stage.demos is not None:
                        progress.in_cycle = True
                        _learn_from_demos(run, stage, stage.demos, stop)
                    whole = not progress.in_cycle or progress.finished(stage.settings)
                    progress.stage_over = whole and ends_early(run, stage)
                _report(run, before, whole=whole)
                if whole and stage.hold_out is not None and progress.in_vain == 0:
                    save_best(run, stage)
                ending = stop.agreed(run.team)
                # a measurement may take longer than there is time
                stop.at_once(partial(measure_if_due, run, stage, before, ending=ending))
                ending = ending or stop.agreed(run.team)
                # at its end with all that a larger budget would go on from
                if ending or progress.finished(stage.settings) or _save_is_due(run, before):
                    save(run, stage)
                if ending:
                    return


def _learn_from_environments(run: Run, stage: Stage, collector: Collector) -> None:
    """One rollout, and the updates on it where the stage has losses for it."""
    settings = run.settings.on_policy
    assert settings is not None
    with run.watch.of("environment"):
        rollout_len = stage.settings.rollout_len or settings.rollout_len
        rollout = collector.collect(rollout_len, run.progress.stage_env_steps)
    run.progress.add(env_steps=rollout.batch["masks"].numel() * run.team.world)
    run.meter.add("environment", rollout.scalars())
    if stage.losses:
        rollout = rollout.with_advantages(
            settings.gamma,
            settings.gae_lambda,
            normalise=settings.normalise_advantages,
            team=run.team,
        )
    planned, targets = rollout_updates(stage.settings), kl_targets(stage.losses)
    dealt = (
        batch
        for _ in range(stage.settings.repeats)
        for batch in minibatches(rollout, stage.settings.minibatches)
    )
    for number, (batch, memory) in zip(range(1, planned + 1), dealt, strict=False):
        memories = dict.fromkeys(stage.losses, memory)
        _, scalars = _update(run, stage.losses, stage.settings.losses, batch, memories)
        run.meter.add("onpolicy", scalars)
        gone = any(scalars[f"{name}/approximate_kl"] > targets[name] for name in targets)
        if targets and run.team.any(gone):
            # the rate is planned over all updates: it goes on over those left out
            for _ in range(planned - number):
                run.schedule.step()
            break
    if targets:
        run.meter.add("onpolicy", {"updates": number})
    stage.advance(run)


def _learn_from_demos(run: Run, stage: Stage, demos: StoreBatches, stop: StopRequest) -> None:
    """Updates on batches from the store, up to the end of the cycle or of the budget."""
    progress, settings = run.progress, demos.settings
    while not (
        progress.cycle_updates == settings.updates
        or (stage.settings.max_demo_steps and progress.finished(stage.settings))
        or stop.agreed(run.team)
    ):
        with run.watch.of("data"):
            batch = next(demos)
        progress.add(demo_steps=settings.batch_steps)  # before the schedule, which may count them
        results, scalars = _update(run, demos.losses, settings.losses, batch, demos.memory)
        demos.carry({name: result.memory for name, result in results.items()})
        run.meter.add("offpolicy", scalars)
        progress.cycle_updates += 1
        stage.advance(run)
    if progress.cycle_updates == settings.updates:
        progress.cycle_updates, progress.in_cycle = 0, False


def _update(
    run: Run,
    losses: Mapping[str, Loss],
    weights: Mapping[str, float],
    batch: Batch,
    memories: Mapping[str, Tensor],
) -> tuple[dict[str, LossResult], dict[str, float]]:
    """One step of the optimizer down the weighted sum of losses; what the log shows of it."""
    settings = run.settings.optimizer
    with run.watch.of("forward"):
        results = run.losses(losses, batch, memories)
        loss = weighted_sum(results, weights, run.team)
    with run.watch.of("backward"):
        run.optimizer.zero_grad()
        with naming_users_code(run.settings):
            loss.backward()  # type: ignore[no-untyped-call]
        run.team.average_gradients(run.weights)
        norm = clip_gradients(run.weights, settings.max_grad_norm)
        scalars = _fetched(loss, norm, results)  # the one wait for the device
        if not (math.isfinite(scalars["loss"]) and math.isfinite(scalars["gradient_norm"])):
            raise _failure(run, scalars, losses, batch)
        with users_code("optimizer.type", settings.type):
            run.optimizer.step()
        with users_code("optimizer.schedule.type", settings.schedule.type):
            run.schedule.step()
    run.progress.updates += 1
    if run.average is not None:
        run.average.update(run.progress.updates)
    return results, scalars


def _fetched(loss: Tensor, norm: Tensor, results: Mapping[str, LossResult]) -> dict[str, float]:
    """All scalars of an update, by one transfer from the device."""
    named = {"loss": loss, "gradient_norm": norm}
    numbers = {}
    for name, result in results.items():
        for key, value in {"loss": result.loss, **result.scalars}.items():
            if isinstance(value, Tensor):
                named[f"{name}/{key}"] = value
            else:
                numbers[f"{name}/{key}"] = float(value)
    stacked = torch.stack([value.detach().to(loss).reshape(()) for value in named.values()])
    return dict(zip(named, stacked.tolist(), strict=True)) | numbers


class _NotFiniteError(SettingsError):
    """A loss or a gradient that is not a number; the same weights would give it again."""


@contextmanager
def _saved_first(run: Run, stage: Stage) -> Iterator[None]:
    """Where anything fails in a cycle, the state at its beginning is saved, then it is raised.

    By then weights, memory and streams may have moved on, each to another place. A run that goes
    on from there makes the whole cycle again, and ends as if nothing had failed.
    """
    # where several processes train together, the others cannot be asked any more
    before = copied(state_of(run, stage)) if run.team.world == 1 else None
    try:
        yield
    except _NotFiniteError:
        raise
    except Exception as error:
        if before is not None:
            try:
                write_state(run, CHECKPOINT_FILE, before)
                kept = f"training so far is saved, and --resume continues it: {run.folder}"
            except (DemotoolsError, MemoryError) as another:
                kept = f"training so far could not be saved: {another}"
            if isinstance(error, DemotoolsError):
                error.fix += f"; {kept}"
            else:
                error.add_note(kept)
        raise


def _failure(
    run: Run, scalars: Mapping[str, float], losses: Mapping[str, Loss], batch: Batch
) -> SettingsError:
    """What to raise where something is not a number; all there is to look into is saved."""
    what, value = "the norm of the gradients", scalars["gradient_norm"]
    if not math.isfinite(scalars["loss"]):
        culprits = [name for name in losses if not math.isfinite(scalars[f"{name}/loss"])]
        what, value = f"the loss {' and '.join(culprits) or 'sum'}", scalars["loss"]
    progress = run.progress
    finite = all(parameter.isfinite().all() for parameter in run.weights)
    path = save_failed(run, batch) if run.team.writes else run.folder
    return _NotFiniteError(
        f"{what} became {value} at update {progress.updates} "
        f"(env step {progress.env_steps}, demo step {progress.demo_steps}; the weights before it "
        f"are {'' if finite else 'not '}finite)",
        path=path,
        fix="inspect the batch saved there, or start over with --overwrite and a lower lr",
    )


def _report(run: Run, before: Progress, *, whole: bool) -> None:
    """The means of a cycle to the log; of one that was stopped, when it has been ended."""
    progress = run.progress
    seconds, shares = run.watch.shares()
    progress.minutes += seconds / 60
    if not whole:
        return
    demo_speed = (progress.demo_steps - before.demo_steps) / seconds
    env_speed = (progress.env_steps - before.env_steps) / seconds
    speeds = {"demo_steps_per_second": demo_speed, "env_steps_per_second": env_speed}
    return_memory()
    stage = {"stage": before.stage + 1, "lr": run.schedule.rate()}
    run.meter.add("train", {**stage, **speeds, **shares, **resident_mib()})
    means = run.meter.means()
    for group in get_args(Group):
        values = run.team.mean(means.get(group, {}))
        if values and run.log is not None:
            run.log.write(group, values, where=progress.where())


def _save_is_due(run: Run, before: Progress) -> bool:
    """Whether the last cycle went past a multiple of the interval of saving."""
    settings, progress = run.settings.run, run.progress
    return any(
        every is not None and now // every > then // every
        for every, now, then in (
            (settings.save_every_env_steps, progress.env_steps, before.env_steps),
            (settings.save_every_demo_steps, progress.demo_steps, before.demo_steps),
        )
    )
