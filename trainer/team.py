"""Processes that train one network together, as started by `torchrun`, and how they are stopped."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from demotools.errors import SettingsError
from demotools.workers.processes import processor_count

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """This process among those that train together; a run on its own is a team of one."""

    rank: int = 0
    world: int = 1

    @property
    def writes(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def share(self, count: int, what: str) -> range:
        """The part of `count` things that is this process's.

        SettingsError  the processes do not divide them
        """
        if count % self.world:
            raise SettingsError(
                f"{count} cannot be divided among {self.world} processes",
                path=what,
                fix=f"use a multiple of {self.world}, or change --nproc-per-node",
            )
        return range(self.rank * count // self.world, (self.rank + 1) * count // self.world)

    def gathered(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return cast(list[T], values)

    def any(self, wish: bool) -> bool:
        """Whether it is the wish of any process; the same answer in all."""
        return self.largest(int(wish)) > 0

    def largest(self, number: int) -> int:
        """The largest of the numbers of all processes."""
        if self.world == 1:
            return number
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        largest = torch.tensor(number, device=device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes, element by element."""
        if self.world == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def mean(self, scalars: Mapping[str, float]) -> dict[str, float]:
        """The mean of each scalar over the processes that have it."""
        columns: dict[str, list[float]] = {}
        for one in self.gathered(dict(scalars)):
            for name, value in one.items():
                columns.setdefault(name, []).append(value)
        return {name: sum(many) / len(many) for name, many in columns.items()}

    def average_gradients(self, trained: Iterable[nn.Parameter]) -> None:
        """Replace the gradient of each of these weights by its mean over all processes.

        A loss may leave a part of the network alone (cloning does not train the critic): what no
        process has a gradient of keeps none.
        """
        if self.world == 1:
            return
        weights = [one for one in trained if one.requires_grad]
        asked = torch.tensor([float(one.grad is not None) for one in weights]).to(weights[0])
        asked = self.total(asked)
        weights = [one for one, count in zip(weights, asked.tolist(), strict=True) if count]
        gradients = [one.grad if one.grad is not None else torch.zeros_like(one) for one in weights]
        mean = self.total(torch.cat([one.flatten() for one in gradients])) / self.world
        parts = torch.split(mean, [one.numel() for one in weights])
        for one, part in zip(weights, parts, strict=True):
            one.grad = part.view_as(one)


ALONE = Team()


def present_team() -> Team:
    """This process among those of torch's process group; alone where none was initialised."""
    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    return Team(dist.get_rank(), dist.get_world_size())


def processors_each() -> int:
    """How many of the processors that this job may use there are for each process of the team."""
    return max(processor_count() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def limit_threads() -> None:
    """No more threads than processors: torch knows of no control groups, and starts one a core.

    What `OMP_NUM_THREADS` asks for stays.
    """
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > processors_each():
        torch.set_num_threads(processors_each())


@contextmanager
def joined_team(device: str) -> Iterator[Team]:
    """The team that `torchrun` announces in the environment; alone where it does not."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ALONE
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield present_team()
    finally:
        dist.destroy_process_group()


STOPPING = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    if hasattr(signal, name)  # Windows has the first two
]
"""Ctrl-C, a scheduler's end of the job, a closed terminal, a scheduler's warning before it."""


class StopRequest:
    """Whether somebody wants the run to end.

    signal   the number of the signal that came to this process, or to another of the team that
             they have agreed on; 0 before
    came     whether one came to this process
    """

    def __init__(self) -> None:
        self.signal = 0
        self.came = self.raises = False

    def __bool__(self) -> bool:
        return self.signal != 0

    def agreed(self, team: Team) -> bool:
        """Whether a signal came to any process: the same answer, and number of it, in all.

        A scheduler that takes one process away must not have the others end as if all were done.
        """
        number = team.largest(self.signal)
        if number:  # else one that came meanwhile is for the next time that they agree
            self.signal = number
        return number != 0

    def at_once(self, act: Callable[[], None]) -> None:
        """Do what a signal to this process, now or before, ends where it stands, or leaves out."""
        self.raises = True
        try:
            if not self.came:
                act()
        except _Stopping:
            pass
        finally:
            self.raises = False


class _Stopping(BaseException):
    """A signal came in what ends at once."""


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Notes the first signal that asks for the end; a second Ctrl-C interrupts at once.

    What was ignored when the program was started (`nohup`) stays ignored.
    """
    request = StopRequest()

    def note(number: int, _frame: FrameType | None) -> None:
        if request.came and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal, request.came = number, True
        if request.raises:
            raise _Stopping

    heeded = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heeded}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
