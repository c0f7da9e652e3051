"""What a run holds open, how far it has come, and how both are saved and taken up again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from demotools.errors import CheckpointError
from demotools.store import Store
from trainer.checkpoint import FILE_NAME, Checkpoint, write_checkpoint
from trainer.collect import Collector
from trainer.config import Settings, StageSettings, toml_of
from trainer.envs import EnvironmentKind, VectorEnvironment
from trainer.log import Axis, Meter, RunLog, Stopwatch, progress_bar
from trainer.losses import Loss
from trainer.models import Model, build_network
from trainer.optimize import build_optimizer, build_schedule
from trainer.plan import stage_plan
from trainer.policy import NetworkPolicy
from trainer.streams import DemoStream, build_losses


@dataclass
class Progress:
    """How far a run has come.

    cycle_updates   off-policy updates done in the present cycle
    minutes         of training, over all sessions of the run
    """

    stage: int = 0
    env_steps: int = 0
    demo_steps: int = 0
    stage_env_steps: int = 0
    stage_demo_steps: int = 0
    cycle_updates: int = 0
    updates: int = 0
    minutes: float = 0.0

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

    processes   of environments
    restored    state of the stage that a checkpoint was taken in, until the stage takes it up
    """

    settings: Settings
    folder: Path
    stores: dict[str, Store]
    words: tuple[str, ...]
    network: nn.Module
    optimizer: Optimizer
    schedule: LRScheduler
    log: RunLog
    processes: int
    quiet: bool
    progress: Progress = field(default_factory=Progress)
    watch: Stopwatch = field(default_factory=Stopwatch)
    meter: Meter = field(default_factory=Meter)
    restored: Mapping[str, Any] | None = None

    @property
    def model(self) -> Model:
        """The network, as losses call it."""
        return cast(Model, self.network)


@dataclass(frozen=True)
class Stage:
    """What one stage holds open; either half may be absent."""

    settings: StageSettings
    losses: dict[str, Loss]
    collector: Collector | None
    demos: DemoStream | None
    bar: tqdm[NoReturn]

    @property
    def axis(self) -> Axis:
        """Whose steps its budget counts."""
        return _axis(self.settings)

    def finished(self, progress: Progress) -> bool:
        """Whether its budget is spent."""
        return _steps_of(self.settings, progress) >= _budget(self.settings)

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
    optimizer: Optimizer
    schedule: LRScheduler


def new_parts(settings: Settings, stores: dict[str, Store], words: tuple[str, ...]) -> Parts:
    """The parts of a new run, weights drawn by the run's seed, on the run's device.

    SettingsError  a network, loss, optimizer or schedule does not exist or refuses its keys
    """
    torch.manual_seed(settings.run.seed)
    network = build_network(settings.model.type, settings.model.options, len(words))
    network.to(settings.run.device)
    for stage in settings.stages:
        build_losses(settings, stage.losses)
    updates = sum(stage_plan(stage, settings.on_policy).updates for stage in settings.stages)
    optimizer = build_optimizer(settings.optimizer, network)
    schedule = build_schedule(settings.optimizer.schedule, optimizer, updates)
    return Parts(settings, stores, words, network, optimizer, schedule)


@contextmanager
def open_run(
    parts: Parts, folder: Path, *, processes: int = 1, quiet: bool = True
) -> Iterator[Run]:
    """A run at its beginning, with its log open."""
    with RunLog(folder) as log:
        yield Run(**vars(parts), folder=folder, log=log, processes=processes, quiet=quiet)


@contextmanager
def open_stage(run: Run) -> Iterator[Stage]:
    """The present stage, its environments and its store open, where the progress says."""
    number = run.progress.stage
    settings, stage = run.settings, run.settings.stages[number]
    losses = build_losses(settings, stage.losses)
    with ExitStack() as stack:
        collector, demos = None, None
        if settings.on_policy is not None:
            kind = EnvironmentKind(settings.run.level)
            count = settings.on_policy.environments
            vector = VectorEnvironment(kind, count, processes=run.processes)
            # without losses of its own the rollout only tracks success, as evaluation does
            policy = NetworkPolicy(run.network, run.words, sample=bool(stage.losses))
            seed = settings.run.seed + number
            collector = Collector(stack.enter_context(vector), policy, run.words, seed)
        if stage.off_policy is not None:
            store = run.stores[stage.off_policy.store]
            demos = DemoStream(settings, stage, store, run.words, run.network)
            if run.restored is not None:
                demos.load_state(run.restored["demos"])
        run.restored = None
        bar = progress_bar(
            f"stage {number + 1} of {len(settings.stages)}",
            _axis(stage),
            total=_budget(stage),
            done=_steps_of(stage, run.progress),
            quiet=run.quiet,
        )
        yield Stage(stage, losses, collector, demos, stack.enter_context(bar))


def save(run: Run, stage: Stage | None = None) -> None:
    """Write the run's checkpoint; what is restored is in `restore`."""
    state = {"demos": stage.demos.state()} if stage and stage.demos else {}
    write_checkpoint(
        run.folder / FILE_NAME,
        settings=toml_of(run.settings),
        words=run.words,
        model=run.network.state_dict(),
        training={
            "optimizer": run.optimizer.state_dict(),
            "schedule": run.schedule.state_dict(),
            "progress": vars(run.progress),
            "random": torch.get_rng_state(),
            "stage": state,
        },
    )


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Take up a run where its checkpoint was written.

    CheckpointError  the checkpoint is of other settings or another vocabulary

    The environments of the on-policy half begin new episodes.
    """
    if checkpoint.settings != toml_of(run.settings) or checkpoint.words != run.words:
        raise CheckpointError(
            "the run was begun with other settings, or on a store with another vocabulary",
            path=checkpoint.path,
            fix="resume with the settings.toml that lies beside it, or begin anew with --overwrite",
        )
    training = checkpoint.training
    run.network.load_state_dict(checkpoint.model)
    run.optimizer.load_state_dict(training["optimizer"])
    run.schedule.load_state_dict(training["schedule"])
    run.progress = Progress(**training["progress"])
    torch.set_rng_state(training["random"])
    run.restored = training["stage"] or None


def _budget(stage: StageSettings) -> int:
    budget = stage.max_env_steps or stage.max_demo_steps
    assert budget is not None
    return budget


def _axis(stage: StageSettings) -> Axis:
    return "env_steps" if stage.max_env_steps else "demo_steps"


def _steps_of(stage: StageSettings, progress: Progress) -> int:
    """Steps of the stage's budget that are done."""
    return progress.stage_env_steps if stage.max_env_steps else progress.stage_demo_steps
