"""What a run holds from its first step to its last, and how far it has come."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from demotools.errors import SettingsError
from demotools.store import Store
from trainer.config import Settings
from trainer.distributed import ALONE, Team
from trainer.log import Meter, RunLog, Stopwatch
from trainer.losses import LossStep
from trainer.networks import build_network
from trainer.networks.compiling import compile_network
from trainer.optimize import build_optimizer, build_schedule, try_optimizer
from trainer.plan import stage_plan
from trainer.streams import build_losses


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
    say         takes a line for the user
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
    say: Callable[[str], None]
    watch: Stopwatch = field(default_factory=Stopwatch)
    meter: Meter = field(default_factory=Meter)
    restored: Mapping[str, Any] | None = None


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
        compile_network(network, settings.model.type)
    if team.rank:
        # the same weights everywhere, but every process draws actions of its own
        torch.manual_seed(settings.run.seed + 1_000_003 * team.rank)
    for number, stage in enumerate(settings.stages):
        build_losses(settings, stage.losses)
        check_minibatches(settings, number, team)
    updates = sum(stage_plan(stage, settings.on_policy).updates for stage in settings.stages)
    try_optimizer(settings.optimizer, network, updates)
    optimizer = build_optimizer(settings.optimizer, network)
    progress = Progress()
    schedule = build_schedule(
        settings.optimizer.schedule, optimizer, updates, lambda: progress.env_steps
    )
    losses = team.wrapped(LossStep(network, bfloat16=settings.run.precision == "bfloat16"))
    return Parts(settings, stores, words, network, losses, optimizer, schedule, progress, team)


def check_minibatches(settings: Settings, number: int, team: Team) -> None:
    """That every process has a whole environment for each of its minibatches."""
    stage = settings.stages[number]
    if not stage.losses or settings.on_policy is None:
        return
    mine = len(team.share(settings.on_policy.environments, "on_policy.environments"))
    if stage.minibatches > mine:
        raise SettingsError(
            f"there are {stage.minibatches} minibatches of whole environments, of which each of "
            f"{team.world} processes has only {mine}",
            path=f"stages.{number}.minibatches",
            fix=f"give {mine} or less, or more on_policy.environments",
        )


@contextmanager
def open_run(
    parts: Parts,
    folder: Path,
    *,
    processes: int = 1,
    quiet: bool = True,
    say: Callable[[str], None] = lambda _line: None,
) -> Iterator[Run]:
    """A run at its beginning, with its log open.

    say   takes a line for the user
    """
    settings = parts.settings

    def speak(line: str) -> None:
        with tqdm.external_write_mode():
            say(line)

    with ExitStack() as stack:
        log = None
        if parts.team.writes:
            log = RunLog(
                folder,
                # a kind of steps that every cycle takes
                axis="demo_steps" if all(s.off_policy for s in settings.stages) else "env_steps",
                project=settings.run.wandb,
                config=settings.model_dump(exclude_none=True, mode="json", by_alias=True),
                say=speak,
            )
            stack.enter_context(log)
        yield Run(
            **vars(parts), folder=folder, log=log, processes=processes, quiet=quiet, say=speak
        )
