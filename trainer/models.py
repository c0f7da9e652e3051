"""Networks: a batch of T x B steps and the memory before it -> logits, values, memory after it.

A batch is a dict of tensors: `cells` uint8 [T, B, 7, 7] packed views, `direction` uint8 [T, B],
`masks` [T, B] (0 where memory restarts), `mission` int64 [T, B], the row of each step's mission in
`mission_tokens` int64 [M, L] (0 = padding). Acting is the same with T = 1. Memory is one tensor
[B, memory size], zeros at the beginning; what is in it is the network's own affair.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from demotools.errors import SettingsError
from demotools.grid import ACTIONS, CELL_CODES, VIEW_SIZE
from trainer.named import build, demand
from trainer.recurrence import lstm_by_runs, runs_of
from trainer.rollouts import Batch

CELLS = VIEW_SIZE * VIEW_SIZE
LARGEST = 8192


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


def check_sizes(**sizes: int) -> None:
    """ValueError where a size of a layer is none, or one that no machine has memory for."""
    for name, size in sizes.items():
        if type(size) is not int or not 0 < size <= LARGEST:
            raise ValueError(f"{name} must be from 1 to {LARGEST}")


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


class SmallNetwork(nn.Module):
    """A FiLM + LSTM policy for CPUs, about 0.6 M parameters.

    Each of the 198 cell codes has an embedding, which every mission scales and shifts (FiLM, Perez
    et al. 2018); one linear layer over the 49 cells, then an LSTM, an actor and a critic. Because
    a cell meets the mission before it meets its neighbours, all that comes before the LSTM is a
    sum of 49 rows of one table (position x mission x code), see `_summed_cells`.

    vocabulary_size   N, words that token ids 1..N stand for
    """

    def __init__(
        self,
        vocabulary_size: int,
        *,
        embedding: int = 64,
        features: int = 128,
        memory: int = 128,
        instruction: int = 64,
    ) -> None:
        super().__init__()
        check_sizes(embedding=embedding, features=features, memory=memory, instruction=instruction)
        self.instruction = InstructionEncoder(vocabulary_size, instruction)
        self.film = nn.Linear(instruction, 2 * embedding)
        self.codes = nn.Embedding(CELL_CODES, embedding)
        self.view = nn.Linear(CELLS * embedding, features)
        self.cell = nn.LSTMCell(features, memory)
        self.actor = nn.Sequential(nn.Linear(memory, 64), nn.Tanh(), nn.Linear(64, len(ACTIONS)))
        self.critic = nn.Sequential(nn.Linear(memory, 64), nn.Tanh(), nn.Linear(64, 1))

    def initial_memory(self, rollouts: int) -> Tensor:
        """Zeros [B, 2 * memory]: hidden and cell state."""
        return self.cell.weight_hh.new_zeros(rollouts, 2 * self.cell.hidden_size)

    def forward(self, batch: Batch, memory: Tensor) -> Output:
        """Logits, values and the memory after; see the module."""
        T, B = batch["masks"].shape
        runs = runs_of(batch["masks"])
        cells = batch["cells"].reshape(T * B, CELLS)[runs.order]
        mission = batch["mission"].reshape(T * B)[runs.order]
        scale, shift = self.film(self.instruction(batch["mission_tokens"])).chunk(2, dim=1)
        features = torch.relu(self._summed_cells(cells, mission, scale, shift) + self.view.bias)
        hidden, after = lstm_by_runs(self.cell, features, runs, memory)
        logits = self.actor(hidden)[runs.inverse].reshape(T, B, -1)
        values = self.critic(hidden)[runs.inverse].reshape(T, B)
        return Output(logits, values, after)

    def _summed_cells(self, cells: Tensor, mission: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """The linear layer over the embedded cells of N views: [N, features].

        cells          uint8 [N, 49]
        mission        int64 [N], row of
        scale, shift   [M, embedding]

        With few missions and codes in the batch it is cheaper to multiply their table by the
        weights of each position once and sum 49 rows a view; with many, the plain product is.
        """
        present = torch.bincount(cells.flatten(), minlength=CELL_CODES).nonzero().squeeze(1)
        number = torch.zeros(CELL_CODES, dtype=torch.int32, device=cells.device)
        number[present] = torch.arange(len(present), dtype=torch.int32, device=cells.device)
        table = torch.relu(self.codes(present) * (1 + scale[:, None]) + shift[:, None])
        rows = table.flatten(0, 1)  # [M * codes, embedding]
        index = number[cells.int()] + (mission.int() * len(present))[:, None]
        if 2 * len(rows) > len(cells):
            return nn.functional.linear(rows[index].flatten(1), self.view.weight)
        weight = self.view.weight.reshape(-1, CELLS, rows.shape[1])
        products = torch.einsum("re,fpe->prf", rows, weight).flatten(0, 1)
        index += torch.arange(CELLS, dtype=torch.int32, device=cells.device) * len(rows)
        return nn.functional.embedding_bag(index, products, mode="sum")


def build_network(name: str, options: dict[str, object], vocabulary_size: int) -> nn.Module:
    """The network `name` (ours or `package.module:Name`); SettingsError where there is none."""
    from trainer.big import BigNetwork  # it is written in terms of this module

    ours: dict[str, Callable[..., nn.Module]] = {"small": SmallNetwork, "big": BigNetwork}
    network = demand(
        "network", name, build("network", name, options, ours, vocabulary_size), nn.Module
    )
    if not callable(getattr(network, "initial_memory", None)):
        raise SettingsError(
            "the network has no method `initial_memory`",
            path=f"type = {name!r}",
            fix="give it one, from a number of rollouts to zeros [rollouts, memory size]",
        )
    return network


def parameter_count(model: nn.Module) -> int:
    """The number of weights that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
