"""One stage of a run: the environments and the store that it holds open, and when it is over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NoReturn

from tqdm import tqdm

from trainer.checkpoint import fitting
from trainer.collect import Collector, Forcing
from trainer.config import OnPolicySettings, StageSettings
from trainer.envs import EnvironmentKind, VectorEnvironment
from trainer.log import Axis, progress_bar
from trainer.losses import Loss
from trainer.on_policy import needs_expert
from trainer.plan import stage_plan
from trainer.policy import NetworkPolicy
from trainer.run import Progress, Run
from trainer.streams import DemoStream, HoldOut, build_losses

_STATE = "the state of this stage in the checkpoint is damaged"


@dataclass(frozen=True)
class Stage:
    """What one stage holds open; either half may be absent."""

    settings: StageSettings
    losses: dict[str, Loss]
    collector: Collector | None
    demos: DemoStream | None
    hold_out: HoldOut | None
    bar: tqdm[NoReturn]

    def finished(self, progress: Progress) -> bool:
        """Whether its budget is spent, or its rule of early stopping has ended it."""
        return progress.stage_over or _steps_of(self.settings, progress) >= _budget(self.settings)

    @property
    def recent(self) -> list[bool]:
        """Which of the latest training episodes here succeeded."""
        return list(self.collector.recent) if self.collector is not None else []

    def state(self) -> dict[str, Any]:
        """What must survive a resume."""
        halves = {"collector": self.collector, "demos": self.demos}
        return {name: half.state() for name, half in halves.items() if half is not None}

    def advance(self, run: Run) -> None:
        """Move the bar to where the run is."""
        self.bar.set_postfix(run.meter.shown(), refresh=False)
        self.bar.update(_steps_of(self.settings, run.progress) - self.bar.n)


@contextmanager
def open_stage(run: Run) -> Iterator[Stage]:
    """The present stage, its environments and its store open, where the progress says."""
    number = run.progress.stage
    settings, stage = run.settings, run.settings.stages[number]
    losses = build_losses(settings, stage.losses)
    with ExitStack() as stack:
        collector, demos, hold_out = None, None, None
        if settings.on_policy is not None:
            collector = _collector(run, stage, losses, stack)
            if run.restored is not None:
                with fitting(run.folder, _STATE):
                    collector.load_state(run.restored["collector"])
        if stage.off_policy is not None:
            store = run.stores[stage.off_policy.store]
            demos = DemoStream(settings, stage, store, run.words, run.network, run.team)
            if run.restored is not None:
                with fitting(run.folder, _STATE):
                    demos.load_state(run.restored["demos"])
        if stage.early_stopping is not None and stage.early_stopping.hold_out is not None:
            hold_out = HoldOut(run.stores[stage.early_stopping.hold_out], run.network)
        run.restored = None
        bar = progress_bar(
            f"stage {number + 1} of {len(settings.stages)}",
            _axis(stage),
            total=_planned(stage, settings.on_policy),
            done=_steps_of(stage, run.progress),
            quiet=run.quiet or not run.team.writes,
        )
        yield Stage(stage, losses, collector, demos, hold_out, stack.enter_context(bar))


def _collector(
    run: Run, stage: StageSettings, losses: Mapping[str, Loss], stack: ExitStack
) -> Collector:
    """The stage's environments, this process's share of them, and the policy in them."""
    on_policy = run.settings.on_policy
    assert on_policy is not None
    expert = stage.teacher_forcing is not None or any(map(needs_expert, losses.values()))
    kind = EnvironmentKind(run.settings.run.level, on_policy.environment, expert=expert)
    share = run.team.share(on_policy.environments, "on_policy.environments")
    vector = VectorEnvironment(kind, len(share), processes=run.processes)
    forcing = stage.teacher_forcing
    return Collector(
        stack.enter_context(vector),
        # without losses of its own the rollout only tracks success, as evaluation does
        NetworkPolicy(run.network, run.words, sample=bool(losses)),
        run.words,
        run.settings.run.seed + run.progress.stage,
        first=share.start,
        everywhere=on_policy.environments,
        forcing=Forcing(forcing.start, forcing.stop, forcing.steps) if forcing else None,
        bootstrap=bool(losses),
    )


def ends_early(run: Run, stage: Stage) -> bool:
    """Whether the stage's rule ends it now, after a cycle; the same answer in all processes.

    By a hold-out store, `in_vain` is 0 from here on where these weights are the best so far.
    """
    rule, progress = stage.settings.early_stopping, run.progress
    if rule is None:
        return False
    why = ""
    if stage.hold_out is not None:
        # rounding differs from process to process: that of one counts for all
        value = run.team.gathered(stage.hold_out.cross_entropy())[0]
        run.meter.add("offpolicy", {"hold_out_loss": value})
        better = value < progress.best_hold_out
        progress.best_hold_out = min(value, progress.best_hold_out)
        progress.in_vain = 0 if better else progress.in_vain + 1
        if progress.in_vain >= (rule.patience or 1):
            why = (
                f"in {progress.in_vain} cycles the hold-out loss on {rule.hold_out} was never "
                f"below {progress.best_hold_out:.4f}"
            )
    else:
        assert rule.success is not None
        recent = latest(run.team.gathered(stage.recent))[: rule.episodes]
        if len(recent) == rule.episodes and sum(recent) >= rule.success * rule.episodes:
            share = sum(recent) / len(recent)
            why = f"{share:.1%} of the latest {rule.episodes} training episodes succeeded"
    if why:
        run.say(f"stage {progress.stage + 1} ends early: {why}")
    return bool(why)


def latest(by_rank: Sequence[Sequence[bool]]) -> list[bool]:
    """The episodes of all processes, the latest first, in turn one of each process.

    >>> latest([[False, True], [True, True, False]])
    [True, False, False, True, True]
    """
    turns = zip_longest(*(reversed(recent) for recent in by_rank))
    return [success for turn in turns for success in turn if success is not None]


def _budget(stage: StageSettings) -> int:
    budget = stage.max_env_steps or stage.max_demo_steps
    assert budget is not None
    return budget


def _planned(stage: StageSettings, on_policy: OnPolicySettings | None) -> int:
    """Steps of its budget's kind that it takes: whole rollouts or batches, often some more."""
    plan = stage_plan(stage, on_policy)
    return plan.env_steps if stage.max_env_steps else plan.demo_steps


def _axis(stage: StageSettings) -> Axis:
    return "env_steps" if stage.max_env_steps else "demo_steps"


def _steps_of(stage: StageSettings, progress: Progress) -> int:
    """Steps of the stage's budget that are done."""
    return progress.stage_env_steps if stage.max_env_steps else progress.stage_demo_steps
