"""Networks: a batch of T x B steps and the memory before it -> logits, values, memory after it.

A batch is a dict of tensors: `cells` uint8 [T, B, 7, 7] packed views, `direction` uint8 [T, B],
`masks` [T, B] (0 where memory restarts), `mission` int64 [T, B], the row of each step's mission in
`mission_tokens` int64 [M, L] (0 = padding). Acting is the same with T = 1. Memory is one tensor
[B, memory size], zeros at the beginning; what is in it is the network's own affair.

    small   for CPUs       film   BabyAI 1.1's       big   the off-policy tutorial's
    base    what they share
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from demotools.errors import SettingsError
from trainer.named import build, demand
from trainer.networks.base import Model, Output, parameter_count
from trainer.networks.big import BigNetwork
from trainer.networks.film import FilmNetwork
from trainer.networks.small import SmallNetwork

__all__ = ["NETWORKS", "Model", "Output", "build_network", "parameter_count"]

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "small": SmallNetwork,
    "film": FilmNetwork,
    "big": BigNetwork,
}
"""The networks that `type` names, each built from the number of words and its keys."""


def build_network(name: str, options: dict[str, object], vocabulary_size: int) -> nn.Module:
    """The network `name` (ours or `package.module:Name`); SettingsError where there is none."""
    network = demand(
        "network", name, build("network", name, options, NETWORKS, vocabulary_size), nn.Module
    )
    if not callable(getattr(network, "initial_memory", None)):
        raise SettingsError(
            "the network has no method `initial_memory`",
            path=f"type = {name!r}",
            fix="give it one, from a number of rollouts to zeros [rollouts, memory size]",
        )
    return network
