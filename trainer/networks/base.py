"""What the networks share: what they give, how it is asked for, and the parts of which they are."""

from __future__ import annotations

from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from trainer.recurrence import Runs
from trainer.rollouts import Batch

LARGEST = 8192
_HEAD = 64
_GROUP = 8


class Output(NamedTuple):
    """What a network says of every step.

    logits   [T, B, 7], unnormalised log-probabilities of the actions
    values   [T, B], the critic's
    memory   [B, memory size] after the last step, without gradient
    """

    logits: Tensor
    values: Tensor
    memory: Tensor


class Model(Protocol):
    """What a network offers beside being a `torch.nn.Module`."""

    def __call__(self, batch: Batch, memory: Tensor) -> Output:
        """The output of every step of a batch."""

    def initial_memory(self, rollouts: int) -> Tensor:
        """Memory before the first step: zeros [B, memory size]."""


class InstructionEncoder(nn.Module):
    """Vectors of missions, [M, L] token ids to [M, size]: a GRU read up to the last word."""

    def __init__(self, vocabulary_size: int, size: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary_size + 1, size, padding_idx=0)
        self.gru = nn.GRU(size, size, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """[M, size]; a mission without any word gives what the first state gives."""
        states, _last = self.gru(self.words(tokens))
        final = ((tokens != 0).sum(1) - 1).clamp(min=0)
        return cast(Tensor, states[torch.arange(len(tokens), device=tokens.device), final])


class FilmBlock(nn.Module):
    """Two convolutions, the second scaled and shifted by an instruction, beside a shortcut.

    Source: Perez et al. 2018.

    normed   whether the first and what is scaled and shifted are normalised by `step_norm`
    """

    def __init__(self, channels: int, instruction: int, *, normed: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.film = nn.Linear(instruction, 2 * channels)
        self.norm_first = step_norm(channels) if normed else nn.Identity()
        self.norm_film = step_norm(channels) if normed else nn.Identity()

    def forward(self, view: Tensor, instruction: Tensor) -> Tensor:
        """[n, channels, h, w] of the same."""
        scale, shift = self.film(instruction)[..., None, None].chunk(2, dim=1)
        inner = self.second(torch.relu(self.norm_first(self.first(view))))
        return view + torch.relu(self.norm_film(inner * (1 + scale) + shift))


def check_sizes(**sizes: int) -> None:
    """ValueError where a size of a layer is none, or one that no machine has memory for."""
    for name, size in sizes.items():
        if type(size) is not int or not 0 < size <= LARGEST:
            raise ValueError(f"{name} must be from 1 to {LARGEST}")


def step_norm(channels: int) -> nn.GroupNorm:
    """Normalisation of each step by itself, in groups of 8 channels (Wu and He 2018).

    ValueError  the channels are no multiple of 8
    """
    if channels % _GROUP:
        raise ValueError(f"channels must be a multiple of {_GROUP}")
    return nn.GroupNorm(channels // _GROUP, channels)


def head(memory: int, outputs: int) -> nn.Sequential:
    """An actor or a critic on an LSTM's hidden state: [n, memory] to [n, outputs]."""
    return nn.Sequential(nn.Linear(memory, _HEAD), nn.Tanh(), nn.Linear(_HEAD, outputs))


def empty_memory(cell: nn.LSTMCell, rollouts: int) -> Tensor:
    """Zeros [B, 2 * memory]: hidden and cell state."""
    return cell.weight_hh.new_zeros(rollouts, 2 * cell.hidden_size)


def in_order(values: Tensor, runs: Runs) -> Tensor:
    """[N, ...] in the order of the runs, of [T, B, ...]."""
    return values.flatten(0, 1)[runs.order]


def output_of_runs(
    actor: nn.Module, critic: nn.Module, hidden: Tensor, after: Tensor, runs: Runs
) -> Output:
    """What actor and critic say of every step.

    hidden   [N, memory], in the order of the runs
    after    [B, 2 * memory], memory after the batch
    """
    rollouts = len(after)
    logits = actor(hidden)[runs.inverse].unflatten(0, (-1, rollouts))
    values = critic(hidden)[runs.inverse].reshape(-1, rollouts)
    return Output(logits, values, after)


def parameter_count(model: nn.Module) -> int:
    """The number of weights that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
