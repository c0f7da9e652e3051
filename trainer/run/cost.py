"""Estimates the cost of a run from its settings and a few timed updates."""

from __future__ import annotations

import copy
import sys
import time
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from trainer.acting.collect import Collector
from trainer.acting.policy import NetworkPolicy
from trainer.acting.vector import seed_streams
from trainer.learning.losses import weighted_sum
from trainer.learning.networks.base import parameter_count
from trainer.run.memory import enough_memory
from trainer.run.state import (
    Run,
    StagePlan,
    StoreBatches,
    made_losses,
    passes_of,
    stage_environments,
    stage_plan,
)
from trainer.settings.models import StageSettings
from trainer.settings.user_code import naming_users_code, users_code
from trainer.team import processors_each

SLOW_SECONDS = 30 * 60
FASTER_RECIPE = "bc_small_cpu.toml"
_MEASURED_UPDATES = 2
_MEASURED_ENVIRONMENTS = 64
_MEASURED_STEPS = 16


@dataclass(frozen=True)
class Cost:
    """What a run is going to cost on this machine.

    seconds        expected, without evaluation
    memory_bytes   most that this process has used while it was measured; None: not known
    disk_bytes     of the output folder, roughly
    passes         over the store of each stage
    """

    parameters: int
    stages: tuple[StagePlan, ...]
    passes: tuple[float, ...]
    seconds: float
    memory_bytes: int | None
    disk_bytes: int

    def lines(self, recipe: str) -> list[str]:
        """All of it for a person; names the faster recipe where it takes over 30 minutes."""
        result = [f"parameters: {self.parameters:,}"]
        for number, (stage, passes) in enumerate(zip(self.stages, self.passes, strict=True)):
            result.append(f"stage {number + 1} of {len(self.stages)}: {stage.text(passes)}")
        needed = [f"expected: {duration(self.seconds)} on this device"]
        if self.memory_bytes is not None:
            needed.append(f"{self.memory_bytes / 2**20:,.0f} MiB of memory")
        result.append(", ".join([*needed, f"{self.disk_bytes / 2**20:,.0f} MiB of disk"]))
        if self.seconds > SLOW_SECONDS and FASTER_RECIPE not in recipe:
            result.append(f"that is long; `trainer run {FASTER_RECIPE}` takes only minutes")
        return result


def expected_cost(run: Run) -> Cost:
    """The cost of a run; takes a second or so, and leaves the network and all streams alone.

    Measured is this process's share of the work, which all others do at the same time.

    SettingsError  the memory is not enough for it
    """
    # a copy: processes that train together watch every backward pass of the network's own weights
    run = replace(run, network=copy.deepcopy(run.network))
    run.network.register_forward_hook(partial(_check_output, run.settings.model.type))
    # others, so that the run's own stay as they are
    run.by_name = made_losses(run.settings, run.network, run.stores)
    run.losses = run.losses.on(run.network)
    settings, model = run.settings, run.network
    plans = tuple(stage_plan(stage, settings.on_policy) for stage in settings.stages)
    seconds, passes = 0.0, []
    with torch.random.fork_rng(), naming_users_code(settings), enough_memory():
        for stage, plan, sources in zip(settings.stages, plans, run.sources, strict=True):
            passes.append(0.0)
            if stage.off_policy is not None:
                passes[-1] = passes_of(stage, plan, sources)
                seconds += plan.off_policy_updates * _update_seconds(run, stage)
            if plan.env_steps:
                seconds += plan.env_steps / run.team.world * _env_step_seconds(run, stage)
    parameters = parameter_count(model)
    return Cost(
        parameters=parameters,
        stages=plans,
        passes=tuple(passes),
        seconds=seconds,
        memory_bytes=_peak_bytes(),
        disk_bytes=2 * 3 * 4 * parameters + 2**20,  # a checkpoint and its successor, and the log
    )


def _check_output(name: str, _network: nn.Module, _given: object, output: object) -> None:
    """SettingsError where a network of the user's gives another kind of thing than ours do."""
    parts = output if isinstance(output, tuple | list) else ()
    if not (3 <= len(parts) <= 4 and all(isinstance(one, Tensor) for one in parts[:3])):
        kinds = ", ".join(type(one).__name__ for one in parts)
        shown = f"a {type(output).__name__} of {kinds}" if parts else type(output).__name__
        with users_code("model.type", name):
            raise ValueError(
                f"it returns {shown}, not (logits, values, memory): three tensors, optionally "
                "followed by a function that returns the features, or None"
            )


def _peak_bytes() -> int | None:
    """The most memory that this process has had; None where no system call tells."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def duration(seconds: float) -> str:
    """A length of time for a person.

    >>> duration(42), duration(400), duration(20_000)
    ('42 s', '7 min', '5.6 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def _update_seconds(run: Run, stage: StageSettings) -> float:
    """Of the fastest of a few updates, without the optimizer's step, which changes the weights."""
    times = []
    with closing(StoreBatches(run, stage)) as batches:
        for _ in range(_MEASURED_UPDATES):
            start = time.perf_counter()
            results = run.losses(batches.losses, next(batches), batches.memory)
            weighted_sum(results, batches.settings.losses).backward()  # type: ignore[no-untyped-call]
            run.network.zero_grad()
            batches.carry({name: result.memory for name, result in results.items()})
            times.append(time.perf_counter() - start)
    return min(times)


def _env_step_seconds(run: Run, stage: StageSettings) -> float:
    """Seconds for one step of one environment: to take it, and to learn from it."""
    losses = run.of_names(stage.losses)
    count = min(_MEASURED_ENVIRONMENTS, len(run.environments))
    with stage_environments(run, stage, range(count), processes=1) as v:
        v.reset(seed_streams(range(1_000_000), count))
        start = time.perf_counter()
        for _ in range(_MEASURED_STEPS):
            v.step(np.zeros(count, dtype=np.int64))
        stepping = time.perf_counter() - start
        policy = NetworkPolicy(run.network, run.words, sample=True)
        collector = Collector(v, policy, run.settings.run.seed)
        start = time.perf_counter()
        rollout = collector.collect(_MEASURED_STEPS)
        acting = max(time.perf_counter() - start - stepping, 0.0)
    learning = 0.0
    if losses:
        rollout = rollout.with_advantages(0.99, 1.0, normalise=True)
        start = time.perf_counter()
        results = run.losses(losses, rollout.batch, dict.fromkeys(losses, rollout.memory))
        weighted_sum(results, stage.losses).backward()  # type: ignore[no-untyped-call]
        run.network.zero_grad()
        learning = stage.repeats * (time.perf_counter() - start)
    processes = min(run.workers, count, processors_each())
    return (stepping / processes + acting + learning) / (_MEASURED_STEPS * count)
