"""What a run holds open, how far it has come, and how both are saved and taken up again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from demotools.errors import CheckpointError
from demotools.store import Store
from trainer.checkpoint import FILE_NAME, Checkpoint, keep_checkpoints, write_checkpoint
from trainer.collect import Collector, Forcing
from trainer.config import EarlyStopping, Settings, StageSettings, toml_of
from trainer.distributed import ALONE, Team
from trainer.envs import EnvironmentKind, VectorEnvironment
from trainer.log import Axis, Meter, RunLog, Stopwatch, progress_bar
from trainer.losses import Loss, LossStep
from trainer.models import build_network
from trainer.on_policy import needs_expert
from trainer.optimize import build_optimizer, build_schedule
from trainer.plan import stage_plan
from trainer.policy import NetworkPolicy
from trainer.streams import DemoStream, HoldOut, build_losses

_FEW_EPISODES = 100


@dataclass
class Progress:
    """How far a run has come.

    in_cycle        whether a cycle is under way, its rollout taken
    cycle_updates   off-policy updates done in it
    minutes         of training, over all sessions of the run
    stage_over      whether the stage's rule of early stopping has ended it
    best_hold_out   the least cross-entropy on the stage's hold-out store, and for how many
    in_vain         cycles there was no better one
    best_success    of training episodes, at any checkpoint
    """

    stage: int = 0
    env_steps: int = 0
    demo_steps: int = 0
    stage_env_steps: int = 0
    stage_demo_steps: int = 0
    in_cycle: bool = False
    cycle_updates: int = 0
    updates: int = 0
    minutes: float = 0.0
    stage_over: bool = False
    best_hold_out: float = math.inf
    in_vain: int = 0
    best_success: float = 0.0

    def add(self, *, env_steps: int = 0, demo_steps: int = 0) -> None:
        """Count steps, of the run and of the stage."""
        self.env_steps += env_steps
        self.stage_env_steps += env_steps
        self.demo_steps += demo_steps
        self.stage_demo_steps += demo_steps

    def next_stage(self) -> None:
        """The stage is done."""
        self.stage += 1
        self.stage_env_steps = self.stage_demo_steps = self.cycle_updates = 0
        self.stage_over, self.best_hold_out, self.in_vain = False, math.inf, 0

    def where(self) -> dict[str, float]:
        """Where a line of the log stands."""
        return {
            "minutes": self.minutes,
            "env_steps": self.env_steps,
            "demo_steps": self.demo_steps,
        }


@dataclass
class Run:
    """All that a run holds from its first step to its last.

    losses      the network with all losses of a batch, as several processes share it
    log         None in a process that does not write
    processes   of environments
    restored    state of the stage that a checkpoint was taken in, until the stage takes it up
    """

    settings: Settings
    folder: Path
    stores: dict[str, Store]
    words: tuple[str, ...]
    network: nn.Module
    losses: nn.Module
    optimizer: Optimizer
    schedule: LRScheduler
    progress: Progress
    team: Team
    log: RunLog | None
    processes: int
    quiet: bool
    watch: Stopwatch = field(default_factory=Stopwatch)
    meter: Meter = field(default_factory=Meter)
    restored: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Stage:
    """What one stage holds open; either half may be absent."""

    settings: StageSettings
    losses: dict[str, Loss]
    collector: Collector | None
    demos: DemoStream | None
    hold_out: HoldOut | None
    bar: tqdm[NoReturn]

    @property
    def axis(self) -> Axis:
        """Whose steps its budget counts."""
        return _axis(self.settings)

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


@dataclass(frozen=True)
class Parts:
    """What a run is made of, before anything of it is written."""

    settings: Settings
    stores: dict[str, Store]
    words: tuple[str, ...]
    network: nn.Module
    losses: nn.Module
    optimizer: Optimizer
    schedule: LRScheduler
    progress: Progress
    team: Team


def new_parts(
    settings: Settings, stores: dict[str, Store], words: tuple[str, ...], team: Team = ALONE
) -> Parts:
    """The parts of a new run, weights drawn by the run's seed, on the run's device.

    SettingsError  a network, loss, optimizer or schedule does not exist or refuses its keys
    """
    torch.use_deterministic_algorithms(settings.run.deterministic)
    torch.manual_seed(settings.run.seed)
    network = build_network(settings.model.type, settings.model.options, len(words))
    network.to(settings.run.device)
    if settings.run.compile:
        network.compile()
    if team.rank:
        # the same weights everywhere, but every process draws actions of its own
        torch.manual_seed(settings.run.seed + 1_000_003 * team.rank)
    for stage in settings.stages:
        build_losses(settings, stage.losses)
    updates = sum(stage_plan(stage, settings.on_policy).updates for stage in settings.stages)
    optimizer = build_optimizer(settings.optimizer, network)
    progress = Progress()
    schedule = build_schedule(
        settings.optimizer.schedule, optimizer, updates, lambda: progress.env_steps
    )
    losses = team.wrapped(LossStep(network, bfloat16=settings.run.precision == "bfloat16"))
    return Parts(settings, stores, words, network, losses, optimizer, schedule, progress, team)


@contextmanager
def open_run(
    parts: Parts, folder: Path, *, processes: int = 1, quiet: bool = True
) -> Iterator[Run]:
    """A run at its beginning, with its log open."""
    with RunLog(folder, parts.settings.run.wandb) if parts.team.writes else nullcontext() as log:
        yield Run(**vars(parts), folder=folder, log=log, processes=processes, quiet=quiet)


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
                collector.load_state(run.restored["collector"])
        if stage.off_policy is not None:
            store = run.stores[stage.off_policy.store]
            demos = DemoStream(settings, stage, store, run.words, run.network, run.team)
            if run.restored is not None:
                demos.load_state(run.restored["demos"])
        if stage.early_stopping is not None and stage.early_stopping.hold_out is not None:
            hold_out = HoldOut(run.stores[stage.early_stopping.hold_out], run.network)
        run.restored = None
        bar = progress_bar(
            f"stage {number + 1} of {len(settings.stages)}",
            _axis(stage),
            total=_budget(stage),
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


def ends_early(run: Run, stage: Stage, rule: EarlyStopping | None) -> bool:
    """Whether the stage's rule ends it now, after a cycle; the same answer in all processes."""
    if rule is None:
        return False
    if stage.hold_out is not None:
        value = stage.hold_out.cross_entropy()
        run.meter.add("offpolicy", {"hold_out_loss": value})
        better = value < run.progress.best_hold_out
        run.progress.best_hold_out = min(value, run.progress.best_hold_out)
        run.progress.in_vain = 0 if better else run.progress.in_vain + 1
        return run.team.any(run.progress.in_vain >= (rule.patience or 1))
    assert rule.success is not None
    recent = [success for of_rank in run.team.gathered(stage.recent) for success in of_rank]
    recent = recent[-rule.episodes :]
    return len(recent) == rule.episodes and sum(recent) >= rule.success * rule.episodes


def save(run: Run, stage: Stage | None = None) -> None:
    """Write the run's checkpoint, by one process for all; what is restored is in `restore`."""
    recent = stage.recent if stage else []
    success = sum(recent) / max(len(recent), 1)
    best = len(recent) >= _FEW_EPISODES and success > run.progress.best_success
    if best and run.team.writes:
        run.progress.best_success = success
    mine = {"random": torch.get_rng_state(), "stage": stage.state() if stage else {}}
    everyone = run.team.gathered(mine)
    if not run.team.writes:
        return
    write_state(run, FILE_NAME, {"processes": everyone})
    keep_checkpoints(run.folder, run.settings.run.keep, run.progress.updates, best=best)


def write_state(run: Run, name: str, more: Mapping[str, Any]) -> Path:
    """Write a checkpoint of everything that is the same in all processes, and `more`."""
    path = run.folder / name
    write_checkpoint(
        path,
        settings=toml_of(run.settings),
        words=run.words,
        model=run.network.state_dict(),
        training={
            "optimizer": run.optimizer.state_dict(),
            "schedule": run.schedule.state_dict(),
            "progress": dict(vars(run.progress)),
            "log_bytes": run.log.size_bytes() if run.log is not None else 0,
            **more,
        },
    )
    return path


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Take up a run where its checkpoint was written.

    CheckpointError  the checkpoint is of another vocabulary or number of processes
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
    everyone = checkpoint.training["processes"]
    if len(everyone) != run.team.world:
        raise CheckpointError(
            f"the run was begun by {len(everyone)} processes together, not {run.team.world}",
            path=checkpoint.path,
            fix=f"resume it with `torchrun --nproc-per-node {len(everyone)}`, or on as many hosts",
        )
    mine = everyone[run.team.rank]
    training = checkpoint.training
    run.network.load_state_dict(checkpoint.model)
    run.optimizer.load_state_dict(training["optimizer"])
    run.schedule.load_state_dict(training["schedule"])
    # in place: the schedule looks at it
    vars(run.progress).update(training["progress"])
    torch.set_rng_state(mine["random"])
    run.restored = mine["stage"] or None
    if run.log is not None:
        run.log.cut(training["log_bytes"])


def _budget(stage: StageSettings) -> int:
    budget = stage.max_env_steps or stage.max_demo_steps
    assert budget is not None
    return budget


def _axis(stage: StageSettings) -> Axis:
    return "env_steps" if stage.max_env_steps else "demo_steps"


def _steps_of(stage: StageSettings, progress: Progress) -> int:
    """Steps of the stage's budget that are done."""
    return progress.stage_env_steps if stage.max_env_steps else progress.stage_demo_steps
