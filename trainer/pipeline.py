"""The training loop: stages in sequence, each of cycles until its budget is spent.

A cycle is one rollout from the environments, `repeats` x `minibatches` updates on it with the
on-policy losses, then `updates` batches from a demo store with the off-policy losses. Either half
may be absent: without a section `on_policy` no environment is made; without losses of its own the
rollout only tracks success; without a section `off_policy` no store is opened.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from demotools.errors import SettingsError
from trainer.checkpoint import FILE_NAME
from trainer.collect import Collector, minibatches
from trainer.interrupt import StopRequest
from trainer.log import Axis, Group
from trainer.losses import LossResult, merged_losses
from trainer.optimize import clip_gradients
from trainer.run import Progress, Run, Stage, open_stage, save
from trainer.streams import DemoStream

_AXES: dict[Group, Axis] = {"offpolicy": "demo_steps", "environment": "env_steps"}


def train(run: Run, stop: StopRequest) -> None:
    """Run all stages; save at every interval, at the end, and when asked to stop."""
    progress = run.progress
    while progress.stage < len(run.settings.stages):
        with open_stage(run) as stage:
            while not stage.finished(progress):
                before = Progress(**vars(progress))
                _cycle(run, stage, stop)
                _report(run, stage, before)
                if stop or _save_is_due(run, before):
                    save(run, stage)
                if stop:
                    return
        progress.next_stage()
    save(run)


def _cycle(run: Run, stage: Stage, stop: StopRequest) -> None:
    # a run that was stopped inside a cycle has taken this cycle's rollout already
    if stage.collector is not None and not run.progress.cycle_updates:
        _learn_from_environments(run, stage, stage.collector)
    if stage.demos is not None:
        _learn_from_demos(run, stage, stage.demos, stop)


def _learn_from_environments(run: Run, stage: Stage, collector: Collector) -> None:
    """One rollout, and the updates on it where the stage has losses for it."""
    assert run.settings.on_policy is not None
    with run.watch.of("environment"):
        rollout = collector.collect(run.settings.on_policy.rollout_len)
    run.progress.add(env_steps=rollout.batch["masks"].numel())
    run.meter.add("environment", rollout.scalars())
    for _ in range(stage.settings.repeats if stage.losses else 0):
        for batch, memory in minibatches(rollout, stage.settings.minibatches):
            with run.watch.of("forward"):
                results = {
                    name: loss(run.model, batch, memory) for name, loss in stage.losses.items()
                }
            run.meter.add("train", _update(run, results, stage.settings.losses))
    stage.advance(run)


def _learn_from_demos(run: Run, stage: Stage, demos: DemoStream, stop: StopRequest) -> None:
    """Updates on batches from the store, up to the end of the cycle or of the budget."""
    progress, settings = run.progress, demos.settings
    spent = False
    while progress.cycle_updates < settings.updates and not spent and not stop:
        with run.watch.of("data"):
            batch = demos.batch()
        with run.watch.of("forward"):
            results = demos.results(run.model, batch)
        run.meter.add("offpolicy", _update(run, results, settings.losses))
        progress.add(demo_steps=settings.batch_steps)
        progress.cycle_updates += 1
        stage.advance(run)
        spent = bool(stage.settings.max_demo_steps) and stage.finished(progress)
    if progress.cycle_updates == settings.updates:
        progress.cycle_updates = 0


def _update(
    run: Run, results: Mapping[str, LossResult], weights: Mapping[str, float]
) -> dict[str, float]:
    """One step of the optimizer down the weighted sum of losses; what the log shows of it."""
    with run.watch.of("forward"):
        loss = merged_losses(results, weights)
        value = loss.item()
    if not math.isfinite(value):
        raise SettingsError(
            f"the loss became {value} at update {run.progress.updates}",
            path=run.folder / FILE_NAME,
            fix="lower optimizer.lr or optimizer.max_grad_norm; the checkpoint is from before",
        )
    with run.watch.of("backward"):
        run.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = clip_gradients(run.network.parameters(), run.settings.optimizer.max_grad_norm)
        run.optimizer.step()
        run.schedule.step()
    run.progress.updates += 1
    scalars = {"loss": value, "gradient_norm": norm.item()}
    for name, result in results.items():
        of_loss: dict[str, Tensor] = {"loss": result.loss, **result.scalars}
        scalars |= {f"{name}/{key}": tensor.item() for key, tensor in of_loss.items()}
    return scalars


def _report(run: Run, stage: Stage, before: Progress) -> None:
    """The means of a cycle to the log."""
    progress = run.progress
    seconds, shares = run.watch.shares()
    progress.minutes += seconds / 60
    speed = (progress.demo_steps - before.demo_steps) / seconds
    lr = float(run.schedule.get_last_lr()[0])
    run.meter.add("train", {"lr": lr, "demo_steps_per_second": speed, **shares})
    for group, values in run.meter.means().items():
        run.log.write(group, values, axis=_AXES.get(group, stage.axis), where=progress.where())


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
