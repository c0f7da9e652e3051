"""A network for CPUs of 0.6 M parameters: what comes before its LSTM is a sum of table rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from demotools.babyai.cells import ACTIONS, CELL_CODES, VIEW_SIZE
from trainer.batch import Batch
from trainer.learning.networks.base import (
    InstructionEncoder,
    Output,
    check_sizes,
    check_view,
    empty_memory,
    head,
    in_order,
    is_traced,
    lstm_by_runs,
    output_of_runs,
    runs_of,
)
from trainer.learning.networks.sums import linear_of_rows


class SmallNetwork(nn.Module):
    """A FiLM + LSTM policy for CPUs, about 0.6 M parameters.

    Each of the 198 cell codes has an embedding, which every mission scales and shifts (FiLM, Perez
    et al. 2018); one linear layer over the 49 cells, then an LSTM, an actor and a critic. Because
    a cell meets the mission before it meets its neighbours, all that comes before the LSTM is a
    sum of 49 rows of one table (position x mission x code), see `_summed_cells`.

    vocabulary_size   N, words that token ids 1..N stand for
    view              H and W of the cells that are seen
    actions           how many there are
    """

    def __init__(
        self,
        vocabulary_size: int,
        *,
        embedding: int = 64,
        features: int = 128,
        memory: int = 128,
        instruction: int = 64,
        view: Sequence[int] = (VIEW_SIZE, VIEW_SIZE),
        actions: int = len(ACTIONS),
    ) -> None:
        super().__init__()
        check_sizes(embedding=embedding, features=features, memory=memory, instruction=instruction)
        check_sizes(actions=actions)
        self._positions = math.prod(check_view(view))
        self.instruction = InstructionEncoder(vocabulary_size, instruction)
        self.film = nn.Linear(instruction, 2 * embedding)
        self.codes = nn.Embedding(CELL_CODES, embedding)
        self.view = nn.Linear(self._positions * embedding, features)
        self.cell = nn.LSTMCell(features, memory)
        self.actor = head(memory, actions)
        self.critic = head(memory, 1)

    def initial_memory(self, rollouts: int) -> Tensor:
        """Zeros [B, 2 * memory]: hidden and cell state."""
        return empty_memory(self.cell, rollouts)

    def compiled_parts(self) -> list[nn.Module]:
        """None: tables and the loop over runs, whose shapes are new in every batch."""
        return []

    def forward(self, batch: Batch, memory: Tensor) -> Output:
        """Logits, values and the memory after; see `trainer.learning.building`."""
        runs = runs_of(batch["masks"])
        cells = in_order(batch["cells"], runs).flatten(1)
        mission = in_order(batch["mission"], runs)
        scale, shift = self.film(self.instruction(batch["mission_tokens"])).chunk(2, dim=1)
        features = torch.relu(self._summed_cells(cells, mission, scale, shift) + self.view.bias)
        hidden, after = lstm_by_runs(self.cell, features, runs, memory)
        return output_of_runs(self.actor, self.critic, hidden, after, runs)

    def _summed_cells(self, cells: Tensor, mission: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """The linear layer over the embedded cells of N views: [N, features].

        cells          uint8 [N, positions]
        mission        int64 [N], row of
        scale, shift   [M, embedding]

        The embeddings are computed once for each mission and code in the batch, and multiplied by
        the weights of a position once, however often they stand there.
        """
        if is_traced():
            seen = self.codes(cells.int()) * (1 + scale[mission, None]) + shift[mission, None]
            return nn.functional.linear(torch.relu(seen).flatten(1), self.view.weight)
        present = torch.bincount(cells.flatten(), minlength=CELL_CODES).nonzero().squeeze(1)
        number = torch.zeros(CELL_CODES, dtype=torch.int32, device=cells.device)
        number[present] = torch.arange(len(present), dtype=torch.int32, device=cells.device)
        table = torch.relu(self.codes(present) * (1 + scale[:, None]) + shift[:, None])
        rows = table.flatten(0, 1)  # [M * codes, embedding]
        index = number[cells.int()] + (mission.int() * len(present))[:, None]
        if torch.is_autocast_enabled(cells.device.type):
            rows = rows.to(torch.get_autocast_dtype(cells.device.type))
        return linear_of_rows(rows, index, self.view.weight.to(rows.dtype))
