"""What a run is going to cost, worked out from its settings and a few updates that are timed."""

from __future__ import annotations

import copy
import resource
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from demotools.store.reading import Store
from trainer.acting.collect import Collector, NetworkPolicy
from trainer.acting.vector import EnvironmentKind, VectorEnvironment, seed_streams
from trainer.learning.building import build_losses
from trainer.learning.losses import LossStep, merged_losses
from trainer.learning.networks.base import parameter_count
from trainer.run.state import DemoStream, StagePlan, enough_memory, stage_plan
from trainer.settings.models import Settings, StageSettings
from trainer.team import ALONE, Team

SLOW_SECONDS = 30 * 60
FASTER_RECIPE = "bc_small_cpu.toml"
_MEASURED_UPDATES = 3
_MEASURED_ENVIRONMENTS = 8
_MEASURED_STEPS = 32


@dataclass(frozen=True)
class Cost:
    """What a run is going to cost on this machine.

    seconds        expected, without evaluation
    memory_bytes   most that this process has used while it was measured
    disk_bytes     of the output folder, roughly
    passes         over the store of each stage
    """

    parameters: int
    stages: tuple[StagePlan, ...]
    passes: tuple[float, ...]
    seconds: float
    memory_bytes: int
    disk_bytes: int

    def lines(self, recipe: str) -> list[str]:
        """All of it for a person; names the faster recipe where it takes over 30 minutes."""
        result = [f"parameters: {self.parameters:,}"]
        for number, (stage, passes) in enumerate(zip(self.stages, self.passes, strict=True)):
            result.append(f"stage {number + 1} of {len(self.stages)}: {stage.text(passes)}")
        result.append(
            f"expected: {duration(self.seconds)} on this device, "
            f"{self.memory_bytes / 2**20:,.0f} MiB of memory, "
            f"{self.disk_bytes / 2**20:,.0f} MiB of disk"
        )
        if self.seconds > SLOW_SECONDS and FASTER_RECIPE not in recipe:
            result.append(f"that is long: `trainer run {FASTER_RECIPE}` is done in minutes")
        return result


def expected_cost(
    settings: Settings,
    model: nn.Module,
    words: tuple[str, ...],
    stores: dict[str, Store],
    processes: int,
    team: Team = ALONE,
) -> Cost:
    """The cost of a run; takes a second or so, and leaves the network and all streams alone.

    Measured is this process's share of the work, which all others do at the same time.

    SettingsError  the memory is not enough for it
    """
    # a copy: processes that train together watch every backward pass of the network's own weights
    model = copy.deepcopy(model)
    plans = tuple(stage_plan(stage, settings.on_policy) for stage in settings.stages)
    seconds, passes = 0.0, []
    with torch.random.fork_rng(), enough_memory():
        for stage, plan in zip(settings.stages, plans, strict=True):
            store = stores[stage.off_policy.store] if stage.off_policy else None
            passes.append(plan.demo_steps / store.steps if store else 0.0)
            if store is not None:
                stream = DemoStream(settings, stage, store, words, model, team)
                seconds += plan.off_policy_updates * _update_seconds(stream, model)
            if plan.on_policy_updates:
                each = _learning_seconds(settings, stage, model, words, team)
                seconds += plan.env_steps / team.world * stage.repeats * each
        env_steps = sum(plan.env_steps for plan in plans)
        if env_steps:
            each = _step_seconds(settings, model, words, processes, team)
            seconds += env_steps / team.world * each
    parameters = parameter_count(model)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Cost(
        parameters=parameters,
        stages=plans,
        passes=tuple(passes),
        seconds=seconds,
        memory_bytes=peak * (1 if sys.platform == "darwin" else 1024),
        disk_bytes=2 * 3 * 4 * parameters + 2**20,  # a checkpoint and its successor, and the log
    )


def duration(seconds: float) -> str:
    """A length of time for a person.

    >>> duration(42), duration(400), duration(20_000)
    ('42 s', '7 min', '5.6 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def _update_seconds(stream: DemoStream, model: nn.Module) -> float:
    """The median of a few updates without their last step, which changes the weights."""
    times = []
    for _ in range(_MEASURED_UPDATES):
        start = time.perf_counter()
        results = stream.results(LossStep(model), stream.batch())
        stream.merged(results).backward()  # type: ignore[no-untyped-call]
        model.zero_grad()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def _learning_seconds(
    settings: Settings, stage: StageSettings, model: nn.Module, words: tuple[str, ...], team: Team
) -> float:
    """Seconds to learn once from one step of an environment rollout."""
    assert settings.on_policy is not None
    losses = build_losses(settings, stage.losses)
    mine = len(team.share(settings.on_policy.environments, "on_policy.environments"))
    count = min(_MEASURED_ENVIRONMENTS, mine)
    kind = EnvironmentKind(settings.run.level, settings.on_policy.environment)
    with VectorEnvironment(kind, count) as vector:
        policy = NetworkPolicy(model, words, sample=True)
        rollout = Collector(vector, policy, words, settings.run.seed).collect(_MEASURED_STEPS)
    rollout = rollout.with_advantages(0.99, 1.0, normalise=True)
    start = time.perf_counter()
    memories = dict.fromkeys(losses, rollout.memory)
    results = LossStep(model)(losses, rollout.batch, memories)
    merged_losses(results, stage.losses).backward()  # type: ignore[no-untyped-call]
    model.zero_grad()
    return (time.perf_counter() - start) / rollout.batch["masks"].numel()


def _step_seconds(
    settings: Settings, model: nn.Module, words: tuple[str, ...], processes: int, team: Team
) -> float:
    """Seconds for one step of one environment, the policy's share included."""
    assert settings.on_policy is not None
    width = len(team.share(settings.on_policy.environments, "on_policy.environments"))
    count = min(_MEASURED_ENVIRONMENTS, width)
    policy = NetworkPolicy(model, words)
    policy.reset(width)
    spent = np.zeros(2)
    kind = EnvironmentKind(settings.run.level, settings.on_policy.environment)
    with VectorEnvironment(kind, count) as vector:
        step = vector.reset(seed_streams(range(1_000_000), count))
        repeats = -(-width // count)
        for _ in range(_MEASURED_STEPS):
            start = time.perf_counter()
            action = policy.act(
                np.tile(step.cells, (repeats, 1, 1))[:width],
                np.tile(step.direction, repeats)[:width],
                (step.missions * repeats)[:width],
                np.tile(step.mask, repeats)[:width],
            )
            acted = time.perf_counter()
            step = vector.step(action[:count])
            spent += [acted - start, time.perf_counter() - acted]
    acting = spent[0] / _MEASURED_STEPS / width
    cores = max(min(processes, torch.get_num_threads()), 1)
    return float(acting + spent[1] / _MEASURED_STEPS / count / cores)
