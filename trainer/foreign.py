"""What is asked of a network, and what becomes of it where a network of the user's fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from demotools.errors import DemotoolsError, SettingsError
from demotools.grid import ACTIONS
from trainer.named import FOREIGN, told
from trainer.networks import Model, Output
from trainer.rollouts import Batch

T = TypeVar("T")


def output_of(network: nn.Module, batch: Batch, memory: Tensor) -> Output:
    """The output of every step; SettingsError where the user's network fails or gives another."""
    output = _asked(network, lambda model: model(batch, memory))
    if not _is_ours(network):
        _check(network, output, tuple(batch["masks"].shape), tuple(memory.shape))
    return Output(*output)


def memory_of(network: nn.Module, rollouts: int) -> Tensor:
    """Memory before the first step; SettingsError where the user's network gives none."""
    memory = _asked(network, lambda model: model.initial_memory(rollouts))
    if not isinstance(memory, Tensor) or memory.dim() != 2 or len(memory) != rollouts:
        what = tuple(memory.shape) if isinstance(memory, Tensor) else type(memory).__name__
        raise _wrong(network, f"begins with the memory {what}, not with zeros ({rollouts}, size)")
    return memory


def _asked(network: nn.Module, question: Callable[[Model], T]) -> T:
    if _is_ours(network):
        return question(cast(Model, network))
    try:
        return question(cast(Model, network))
    except DemotoolsError:
        raise
    except FOREIGN as error:
        raise _wrong(network, f"fails: {told(error)}") from error


def _check(
    network: nn.Module, output: Any, steps: tuple[int, ...], memory: tuple[int, ...]
) -> None:
    """SettingsError where this is no output of so many steps."""
    if not isinstance(output, tuple) or len(output) != len(Output._fields):
        raise _wrong(network, f"gives {type(output).__name__}, not logits, values and memory")
    wanted = {"logits": (*steps, len(ACTIONS)), "values": steps, "memory": memory}
    for (name, shape), tensor in zip(wanted.items(), output, strict=True):
        if not isinstance(tensor, Tensor) or tensor.shape != shape:
            what = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise _wrong(network, f"gives the {name} {what}, not {shape}")
    if not output[0].isfinite().all():
        raise _wrong(network, "gives logits that are not finite")


def _is_ours(network: nn.Module) -> bool:
    return type(network).__module__.startswith("trainer.")


def _wrong(network: nn.Module, what: str) -> SettingsError:
    kind = type(network)
    return SettingsError(
        f"the network {what}",
        path=f"type = '{kind.__module__}:{kind.__qualname__}'",
        fix="correct that class",
    )
