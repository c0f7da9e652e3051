"""Builds networks, losses, optimizers and schedules by their names in the settings.

Networks: a batch of T x B steps and the memory before it -> logits, values, memory after it.

`trainer.batch` describes a batch. Acting is the same with T = 1. Memory is one tensor
[B, memory size], zeros at the beginning; its content is up to the network.

    small   for CPUs       film   BabyAI 1.1's       big   the off-policy tutorial's
    base    what they share

torch.compile where it pays: the convolutions, whose shapes recur, not the loop over runs.

The number and the sizes of a batch's runs are new in every batch, so a network that is compiled
whole is compiled again for each. docs/networks.md has what the parts gain.
"""

from __future__ import annotations

import inspect
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from demotools.babyai.cells import ACTIONS
from demotools.errors import SettingsError
from trainer.learning.losses import (
    A2C,
    PPO,
    ExpertCrossEntropy,
    Loss,
    SubgoalCrossEntropy,
    UsersLoss,
)
from trainer.learning.networks.big import BigNetwork
from trainer.learning.networks.film import FilmNetwork
from trainer.learning.networks.maze import MazeNetwork
from trainer.learning.networks.small import SmallNetwork
from trainer.settings.models import SUBGOALS, Device, Named, OptimizerSettings
from trainer.settings.user_code import accepted_settings, build, named_in, torch_class

_TRIED_STEPS = 1000
_HARMLESS_OPTIONS = {"betas", "eps", "weight_decay", "momentum", "amsgrad"}
SCHEDULES = ("constant", "linear", "cosine")


def _uncompiled(kind: type[Optimizer]) -> Callable[..., Optimizer]:
    """The same optimizer without torch's compiler, which takes longer to load than torch itself.

    torch loads it at the first call of these methods, only to say that it shall not compile them.
    """
    names = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    step = torch.no_grad()(inspect.unwrap(kind.step))
    return type(kind.__name__, (kind,), {**methods, "step": step, "__doc__": kind.__doc__})


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": partial(_uncompiled(torch.optim.Adam), fused=True),
    "adamw": partial(_uncompiled(torch.optim.AdamW), fused=True),
    "sgd": _uncompiled(torch.optim.SGD),
}


def build_optimizer(settings: OptimizerSettings, weights: Iterable[nn.Parameter]) -> Optimizer:
    """The optimizer of the settings over these weights; SettingsError where there is none."""
    options = {"lr": settings.lr, **settings.options}
    return build("optimizer.type", settings.type, options, OPTIMIZERS, weights, wanted=Optimizer)


class WeightAverage:
    """The exponential moving average of a network's weights (Polyak and Juditsky 1992).

    The first averages are of few updates: the weight of the past is at most (1 + n) / (10 + n)
    after n of them.

    decay   weight of the past, later on
    state   the averages, as the network's own `state_dict`
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self._network, self._decay = network, decay
        self.begin()

    def begin(self) -> None:
        """Average from the present weights on."""
        self.state = {name: it.detach().clone() for name, it in self._network.state_dict().items()}

    def update(self, updates: int) -> None:
        """Take in the weights after so many updates."""
        past = min(self._decay, (1 + updates) / (10 + updates))
        for name, values in self._network.state_dict().items():
            if values.is_floating_point():
                self.state[name].lerp_(values, 1 - past)
            else:
                self.state[name].copy_(values)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the network has the averages as its weights."""
        own = {name: it.detach().clone() for name, it in self._network.state_dict().items()}
        self._network.load_state_dict(self.state)
        try:
            yield
        finally:
            self._network.load_state_dict(own)


Unit = Literal["updates", "env_steps", "demo_steps"]
Planned = Mapping[Unit, int]
"""What a whole run is going to do."""


class Schedule:
    """The schedule of a learning rate, one step for each of what it counts.

    scheduler   torch's
    count       how many of these the run has done; None: it counts updates
    """

    def __init__(self, scheduler: LRScheduler, count: Callable[[], int] | None = None) -> None:
        self.scheduler = scheduler
        self._count = count
        self.state_dict = scheduler.state_dict
        self.load_state_dict = scheduler.load_state_dict

    def step(self) -> None:
        """An update has been made, or left out."""
        if self._count is None:
            self.scheduler.step()
            return
        for _ in range(self._count() - self.scheduler.last_epoch):
            self.scheduler.step()

    def rate(self) -> float:
        """The learning rate now."""
        return float(self.scheduler.optimizer.param_groups[0]["lr"])

    def compute_again(self) -> None:
        """Take the rate of where it stands, where that alone says what it is."""
        if isinstance(self.scheduler, LambdaLR):
            rates = zip(self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True)
            for group, (base, factor) in zip(
                self.scheduler.optimizer.param_groups, rates, strict=True
            ):
                group["lr"] = base * factor(self.scheduler.last_epoch)


def build_schedule(
    settings: Named,
    optimizer: Optimizer,
    planned: Planned,
    done: Callable[[Unit], int] = lambda _unit: 0,
) -> Schedule:
    """The schedule, stepped once an update.

    done   tells how far the run has come

    Ours: constant; linear and cosine, both from 1 `to` a share of the learning rate, over the
    whole run, or over `env_steps` or `demo_steps`. Any torch scheduler is named as
    `torch.optim.lr_scheduler:Name`, with its own arguments beside; a function among these is named
    as `package.module:function`. It counts updates, or steps `every_env_steps` or
    `every_demo_steps`.
    """
    key = "optimizer.schedule.type"

    def decaying(shape: Callable[[float], float]) -> Callable[..., LRScheduler]:
        def schedule(
            optimizer: Optimizer,
            to: float = 0.0,
            warmup: float = 0.0,
            env_steps: int | None = None,
            demo_steps: int | None = None,
        ) -> LRScheduler:
            if not (0 <= to <= 1 and 0 <= warmup < 1):
                raise ValueError("0 <= to <= 1 and 0 <= warmup < 1 must hold")
            unit, over = _one_unit({"env_steps": env_steps, "demo_steps": demo_steps})
            if unit is None:
                return LambdaLR(optimizer, _decay(shape, planned["updates"], to, warmup))
            factor = _decay(shape, over, to, warmup)
            return LambdaLR(optimizer, lambda _update: factor(done(unit)))

        return schedule

    def constant(optimizer: Optimizer) -> LRScheduler:
        return LambdaLR(optimizer, lambda _update: 1.0)

    ours: dict[str, Callable[..., LRScheduler]] = {
        "constant": constant,
        "linear": decaying(lambda x: 1 - x),
        "cosine": decaying(lambda x: (1 + math.cos(math.pi * x)) / 2),
    }
    options, unit, every = _counted(settings)
    if torch_class(settings.type) is not None:
        options = {name: named_in(f"optimizer.schedule.{name}", it) for name, it in options.items()}
    scheduler = build(key, settings.type, options, ours, optimizer, wanted=LRScheduler)
    return Schedule(scheduler, None if unit is None else lambda: done(unit) // every)


def _counted(settings: Named) -> tuple[dict[str, Any], Unit | None, int]:
    """The options of a schedule, and where it is not ours, what it counts: every so many of it."""
    options = settings.options
    if settings.type in SCHEDULES:
        return options, None, 1
    with accepted_settings("optimizer.schedule.type", settings.type):
        every: dict[Unit, Any] = {
            "env_steps": options.pop("every_env_steps", None),
            "demo_steps": options.pop("every_demo_steps", None),
        }
        return options, *_one_unit(every)


def _one_unit(given: Mapping[Unit, Any]) -> tuple[Unit | None, int]:
    """The one unit of these that has a number, and that; ValueError where there are two."""
    there = [(unit, number) for unit, number in given.items() if number is not None]
    if len(there) > 1:
        raise ValueError("give env_steps or demo_steps, not both")
    for unit, number in there:
        if type(number) is not int or not 0 < number <= 10**15:
            raise ValueError(f"{unit} must be a number of steps")
        return unit, number
    return None, 1


def spans_run(schedule: Named) -> bool:
    """Whether the rate at some moment depends on how long the whole run is."""
    by_steps = schedule.options.keys() & {"env_steps", "demo_steps"}
    return schedule.type in ("linear", "cosine") and not by_steps


def try_optimizer(
    settings: OptimizerSettings, weights: Iterable[nn.Parameter], planned: Planned
) -> None:
    """Take a step with copies of the weights, and the schedule to its end; leaves `weights` alone.

    SettingsError  the optimizer or the schedule cannot do what the training loop asks of it
    """
    if (
        settings.type in OPTIMIZERS
        and settings.schedule.type in SCHEDULES
        and not (settings.options.keys() - _HARMLESS_OPTIONS)
    ):
        return  # they are known to work
    copies = [nn.Parameter(one.detach().clone()) for one in weights]
    _, unit, every = _counted(settings.schedule)
    steps = planned[unit or "updates"] // every
    with torch.random.fork_rng():
        optimizer = build_optimizer(settings, copies)
        schedule = build_schedule(settings.schedule, optimizer, planned).scheduler
        for one in copies:
            one.grad = torch.zeros_like(one)
        with accepted_settings("optimizer.type", settings.type):
            optimizer.step()
        with accepted_settings("optimizer.schedule.type", settings.schedule.type):
            for _ in range(min(steps, _TRIED_STEPS)):
                schedule.step()
            if steps > _TRIED_STEPS and type(schedule).__module__.startswith("torch."):
                # torch's own compute the rate from this count alone
                schedule.last_epoch = steps - 1
                schedule.step()
            rate = max(group["lr"] for group in optimizer.param_groups)
            if not 0 <= rate < math.inf:
                raise ValueError(f"the learning rate becomes {rate} after at most {steps:,} steps")


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
    network.action_count = options.get("actions", len(ACTIONS))  # type: ignore[assignment]
    if not callable(getattr(network, "initial_memory", None)):
        raise SettingsError(
            "the network has no method `initial_memory`",
            path=f"model.type = {name!r}",
            fix="add one that takes a number of rollouts and returns zeros [rollouts, memory size]",
        )
    return network


def available_device(wanted: Device, setting: str) -> Device:
    """The device, `auto` replaced by what there is; SettingsError where torch finds no GPU."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(wanted, True):
        raise SettingsError(
            f"torch finds no GPU for {wanted}",
            path=setting,
            fix='set it to "cpu" or "auto"',
        )
    if wanted != "auto":
        return wanted
    return "cuda" if there["cuda"] else "cpu"


_COMPILER = "clang++" if sys.platform == "darwin" else "g++"


def compile_network(network: nn.Module, name: str) -> None:
    """Compile a network in place: its `compiled_parts` if it names any, else the whole of it.

    name   by which the settings name the network

    SettingsError  it names none, or there is no C++ compiler
    """
    parts = getattr(network, "compiled_parts", lambda: [network])()
    if not parts:
        raise SettingsError(
            f"torch.compile makes no part of the network `{name}` faster on this device",
            path="run.compile",
            fix='remove it; on a CPU run.precision = "bfloat16" may help (docs/networks.md)',
        )
    compiler = os.environ.get("CXX") or _COMPILER
    if shutil.which(compiler) is None:
        raise SettingsError(
            f"torch.compile needs a C++ compiler, but `{compiler}` is not installed",
            path="run.compile",
            fix="install it, name another in the CXX variable, or set run.compile = false",
        )
    for part in parts:
        part.compile()


_TRIED_SIZE, _TRIED_TIMES, _PAYS = 384, 9, 1.5


def faster_precision(device: str) -> tuple[Literal["float32", "bfloat16"], str]:
    """In which a network is computed faster here, and a line that says why.

    By the quickest of a few products of matrices, some 20 ms; what else an update does is as fast
    in one as in the other.
    """
    if device != "cpu":
        return "float32", f"precision: float32, because bfloat16 is not measured on {device}"

    def quickest(dtype: torch.dtype) -> float:
        one = torch.ones(_TRIED_SIZE, _TRIED_SIZE, dtype=dtype)
        times = []
        for _ in range(_TRIED_TIMES):
            begun = time.perf_counter()
            torch.mm(one, one)
            times.append(time.perf_counter() - begun)
        return min(times)

    ratio = quickest(torch.float32) / quickest(torch.bfloat16)
    chosen: Literal["float32", "bfloat16"] = "bfloat16" if ratio >= _PAYS else "float32"
    return chosen, f"precision: {chosen}, because bfloat16 multiplies at {ratio:.1f} times the rate"


LOSSES: dict[str, Callable[..., Loss]] = {
    "expert_cross_entropy": ExpertCrossEntropy,
    "ppo": PPO,
    "a2c": A2C,
    SUBGOALS: SubgoalCrossEntropy,
}
"""The losses that `type` names."""


def build_loss(name: str, named: Named, *sizes: int) -> Loss:
    """The loss of the section `losses.NAME`; SettingsError where its type does not exist.

    sizes   of what a head of it takes and gives; none where it has no head
    """
    key = f"losses.{name}.type"
    loss = build(key, named.type, named.options, LOSSES, *sizes)
    return loss if named.type in LOSSES else UsersLoss(key, named.type, loss)
