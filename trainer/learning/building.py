"""Networks, losses, optimizers and schedules, made by the names that settings give them.

Networks: a batch of T x B steps and the memory before it -> logits, values, memory after it.

What a batch holds: `trainer.batch`. Acting is the same with T = 1. Memory is one tensor
[B, memory size], zeros at the beginning; what is in it is the network's own affair.

    small   for CPUs       film   BabyAI 1.1's       big   the off-policy tutorial's
    base    what they share

torch.compile where it pays: the convolutions, whose shapes recur, not the loop over runs.

The number and the sizes of a batch's runs are new in every batch, so a network that is compiled
whole is compiled again for each. docs/networks.md has what the parts gain.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from demotools.errors import SettingsError
from trainer.batch import Batch
from trainer.learning.losses import A2C, PPO, ExpertCrossEntropy, Loss, LossResult, needs_expert
from trainer.learning.networks.base import Model
from trainer.learning.networks.big import BigNetwork
from trainer.learning.networks.film import FilmNetwork
from trainer.learning.networks.maze import MazeNetwork
from trainer.learning.networks.small import SmallNetwork
from trainer.settings.models import Named, OptimizerSettings, Settings
from trainer.settings.user_code import accepted_settings, build, users_code

_TRIED_STEPS = 1000
_HARMLESS_OPTIONS = {"betas", "eps", "weight_decay", "momentum", "amsgrad"}
SCHEDULES = ("constant", "linear", "cosine")

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


def build_optimizer(settings: OptimizerSettings, model: nn.Module) -> Optimizer:
    """The optimizer of the settings over all weights; SettingsError where there is none."""
    options = {"lr": settings.lr, **settings.options}
    weights = model.parameters()
    return build("optimizer.type", settings.type, options, OPTIMIZERS, weights, wanted=Optimizer)


def build_schedule(
    settings: Named,
    optimizer: Optimizer,
    updates: int,
    env_steps: Callable[[], int] = lambda: 0,
) -> LRScheduler:
    """The schedule, stepped once an update; `updates` are planned for the whole run.

    env_steps   tells how many environment steps the run has taken

    Ours: constant; linear and cosine, both from 1 `to` a share of the learning rate, over the
    whole run, or over `env_steps`. Any torch scheduler is named as
    `torch.optim.lr_scheduler:Name`, with its own arguments beside.
    """

    def decaying(shape: Callable[[float], float]) -> Callable[..., LRScheduler]:
        def schedule(
            optimizer: Optimizer, to: float = 0.0, warmup: float = 0.0, env_steps: int | None = None
        ) -> LRScheduler:
            if not (0 <= to <= 1 and 0 <= warmup < 1):
                raise ValueError("0 <= to <= 1 and 0 <= warmup < 1 must hold")
            if env_steps is not None and not 0 < env_steps <= 10**15:
                raise ValueError("env_steps must be a number of steps")
            factor = _decay(shape, env_steps or updates, to, warmup)
            return LambdaLR(optimizer, factor if env_steps is None else by_env_steps(factor))

        return schedule

    def by_env_steps(factor: Callable[[int], float]) -> Callable[[int], float]:
        return lambda _update: factor(env_steps())

    def constant(optimizer: Optimizer) -> LRScheduler:
        return LambdaLR(optimizer, lambda _update: 1.0)

    ours: dict[str, Callable[..., LRScheduler]] = {
        "constant": constant,
        "linear": decaying(lambda x: 1 - x),
        "cosine": decaying(lambda x: (1 + math.cos(math.pi * x)) / 2),
    }
    key = "optimizer.schedule.type"
    return build(key, settings.type, settings.options, ours, optimizer, wanted=LRScheduler)


def spans_run(schedule: Named) -> bool:
    """Whether the rate at some moment depends on how long the whole run is."""
    return schedule.type in ("linear", "cosine") and "env_steps" not in schedule.options


def try_optimizer(settings: OptimizerSettings, model: nn.Module, updates: int) -> None:
    """Take a step with a copy of the weights, and the schedule to its end; leaves `model` alone.

    SettingsError  the optimizer or the schedule cannot do what the training loop asks of it
    """
    if (
        settings.type in OPTIMIZERS
        and settings.schedule.type in SCHEDULES
        and not (settings.options.keys() - _HARMLESS_OPTIONS)
    ):
        return  # they are known to work
    copies = [nn.Parameter(weights.detach().clone()) for weights in model.parameters()]
    with torch.random.fork_rng():
        optimizer = build_optimizer(settings, nn.ParameterList(copies))
        schedule = build_schedule(settings.schedule, optimizer, updates)
        for weights in copies:
            weights.grad = torch.zeros_like(weights)
        with accepted_settings("optimizer.type", settings.type):
            optimizer.step()
        with accepted_settings("optimizer.schedule.type", settings.schedule.type):
            for _ in range(min(updates, _TRIED_STEPS)):
                schedule.step()
            if updates > _TRIED_STEPS and type(schedule).__module__.startswith("torch."):
                # torch's own compute the rate from this count alone
                schedule.last_epoch = updates - 1
                schedule.step()
            rate = max(group["lr"] for group in optimizer.param_groups)
            if not 0 <= rate < math.inf:
                raise ValueError(f"the learning rate becomes {rate} within {updates:,} updates")


def clip_gradients(parameters: Iterable[Tensor], largest: float | None) -> Tensor:
    """The norm of all gradients before they are scaled down to at most `largest`."""
    return nn.utils.clip_grad_norm_(parameters, math.inf if largest is None else largest)


def _decay(
    shape: Callable[[float], float], updates: int, to: float, warmup: float
) -> Callable[[int], float]:
    """Factor of the learning rate by update: up over the share `warmup`, then from 1 down."""

    def factor(update: int) -> float:
        done = min(update / max(updates, 1), 1.0)
        if done < warmup:
            # never 0 at the first update; never above 1, however short the warm-up is
            return min((done + 1 / max(updates, 1)) / warmup, 1.0)
        return to + (1 - to) * shape((done - warmup) / (1 - warmup))

    return factor


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "small": SmallNetwork,
    "film": FilmNetwork,
    "big": BigNetwork,
    "maze": MazeNetwork,
}
"""The networks that `type` names, each built from the number of words and its keys."""


def build_network(name: str, options: dict[str, object], vocabulary_size: int) -> nn.Module:
    """The network `name` (ours or `package.module:Name`); SettingsError where there is none."""
    network = build("model.type", name, options, NETWORKS, vocabulary_size, wanted=nn.Module)
    if not callable(getattr(network, "initial_memory", None)):
        raise SettingsError(
            "the network has no method `initial_memory`",
            path=f"model.type = {name!r}",
            fix="give it one, from a number of rollouts to zeros [rollouts, memory size]",
        )
    return network


_COMPILER = "clang++" if sys.platform == "darwin" else "g++"


def compile_network(network: nn.Module, name: str) -> None:
    """Compile a network in place: its `compiled_parts` if it names any, else the whole of it.

    name   by which the settings name the network

    SettingsError  it names none, or there is no C++ compiler
    """
    parts = getattr(network, "compiled_parts", lambda: [network])()
    if not parts:
        raise SettingsError(
            f"no part of the network `{name}` gets faster by torch.compile on this device",
            path="run.compile",
            fix='remove it; on a CPU run.precision = "bfloat16" may help (docs/networks.md)',
        )
    compiler = os.environ.get("CXX") or _COMPILER
    if shutil.which(compiler) is None:
        raise SettingsError(
            f"torch.compile needs a C++ compiler, and there is no `{compiler}`",
            path="run.compile",
            fix="install it, name another in the variable CXX, or set run.compile = false",
        )
    for part in parts:
        part.compile()


LOSSES: dict[str, Callable[..., Loss]] = {
    "expert_cross_entropy": ExpertCrossEntropy,
    "ppo": PPO,
    "a2c": A2C,
}
"""The losses that `type` names."""


def build_losses(settings: Settings, names: dict[str, float]) -> dict[str, Loss]:
    """The losses of these names; SettingsError where a type does not exist."""
    return {name: _built(name, settings.losses[name]) for name in names}


def _built(name: str, named: Named) -> Loss:
    key = f"losses.{name}.type"
    loss = build(key, named.type, named.options, LOSSES)
    if named.type in LOSSES:
        return loss

    def checked(model: Model, batch: Batch, memory: Tensor) -> LossResult:
        with users_code(key, named.type):
            result = loss(model, batch, memory)
            if not isinstance(result, LossResult):
                raise TypeError(f"the loss gives {type(result).__name__}, not a LossResult")
            if result.loss.dim():
                raise ValueError(f"the loss is {tuple(result.loss.shape)}, not one number")
            if torch.is_grad_enabled() and not result.loss.requires_grad:
                raise ValueError("the loss has no gradient")
            if result.memory.shape != memory.shape:
                raise ValueError("the loss gives a memory that is not like the one it was given")
        return result

    checked.needs_expert = needs_expert(loss)  # type: ignore[attr-defined]
    return checked
