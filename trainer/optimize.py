"""Optimizers and the schedules of their learning rate, by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from demotools.errors import SettingsError
from trainer.config import Named, OptimizerSettings
from trainer.named import FOREIGN, build, demand, told

_TRIED_STEPS = 1000
_WANTED = {
    "optimizer": "one whose step() takes no arguments and dense gradients, as adam or sgd",
    "schedule": "one whose step() takes no arguments, once an update, for all updates of the run",
}

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


def build_optimizer(settings: OptimizerSettings, model: nn.Module) -> Optimizer:
    """The optimizer of the settings over all weights; SettingsError where there is none."""
    options = {"lr": settings.lr, **settings.options}
    built = build("optimizer", settings.type, options, OPTIMIZERS, model.parameters())
    return demand("optimizer", settings.type, built, Optimizer)


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
    built = build("schedule", settings.type, settings.options, ours, optimizer)
    return demand("schedule", settings.type, built, LRScheduler)


def try_optimizer(settings: OptimizerSettings, model: nn.Module, updates: int) -> None:
    """Take a step with a copy of the weights, and the schedule to its end; leaves `model` alone.

    SettingsError  the optimizer or the schedule cannot do what the training loop asks of it
    """
    copies = [nn.Parameter(weights.detach().clone()) for weights in model.parameters()]
    with torch.random.fork_rng():
        optimizer = build_optimizer(settings, nn.ParameterList(copies))
        schedule = build_schedule(settings.schedule, optimizer, updates)
        for weights in copies:
            weights.grad = torch.zeros_like(weights)
        with _refused("optimizer", settings.type):
            optimizer.step()
        with _refused("schedule", settings.schedule.type):
            for _ in range(min(updates, _TRIED_STEPS)):
                schedule.step()
            if updates > _TRIED_STEPS and type(schedule).__module__.startswith("torch."):
                # torch's own compute the rate from this count alone
                schedule.last_epoch = updates - 1
                schedule.step()
            rate = max(group["lr"] for group in optimizer.param_groups)
            if not 0 <= rate < math.inf:
                raise ValueError(f"the learning rate becomes {rate} within {updates:,} updates")


@contextmanager
def _refused(kind: str, name: str) -> Iterator[None]:
    try:
        yield
    except FOREIGN as error:
        raise SettingsError(
            f"the {kind} cannot be used here: {told(error)}",
            path=f"type = {name!r}",
            fix=f"name {_WANTED[kind]}, or correct the keys beside its type",
        ) from error


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
