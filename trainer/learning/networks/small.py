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
from trainer.learning.networks.steps import Heads, KnownMissions, LSTMStep
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

    def acting(self) -> SmallSteps:
        """What gives its output of single steps while its weights stay as they are."""
        return SmallSteps(self)

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


_TABLE_BYTES = 30 << 20


class SmallSteps:
    """The output of a `SmallNetwork` of single steps, to within rounding, several times as fast.

    It holds what follows from the weights alone, and is right as long as they stay as they are.
    Every mission is read once. The product of an embedded cell and the weights of a position is
    computed once for each mission and code, for all positions together, which costs as much as a
    whole view; so that is done only up to as many times as views were asked for.
    """

    def __init__(self, network: SmallNetwork) -> None:
        self._network, view = network, network.view
        self._missions = KnownMissions(self._read, self._forget)
        self._lstm = LSTMStep(network.cell)
        self._heads = Heads(network.actor, network.critic)
        self._view_bias = view.bias.detach()
        embedding = network.codes.embedding_dim
        # [embedding, positions * features]
        by_position = view.weight.detach().view(len(view.weight), -1, embedding)
        self._by_position = by_position.permute(2, 1, 0).flatten(1)
        row = self._by_position.shape[1]
        self._positions = torch.arange(row // view.out_features, dtype=torch.int32)
        self._table = view.weight.new_empty(
            max(_TABLE_BYTES // (row * view.weight.element_size()), 1), row
        )
        self._asked = self._multiplied = 0
        self._forget()

    @property
    def known_products(self) -> int:
        """Of how many missions and codes the products are known."""
        return self._rows

    def _forget(self) -> None:
        # by mission and code the first of its positions in the table, -1 where it is not there
        self._place = torch.empty(0, dtype=torch.int32)
        self._rows = 0

    def __call__(self, batch: Batch, memory: Tensor) -> Output:
        """As the network's own for T = 1, without gradients; it does not give the features."""
        with torch.no_grad():
            number = self._missions(batch["mission_tokens"])
            memory = memory * batch["masks"][0].to(memory.dtype)[:, None]
            seen = self._summed_cells(batch["cells"][0].flatten(1), batch["mission"][0], number)
            after = self._lstm(seen.add_(self._view_bias).relu_(), memory)
            return Output(*self._heads(after.hidden), torch.cat(after, dim=1))

    def _read(self, tokens: Tensor) -> list[Tensor]:
        unknown = self._place.new_full((len(tokens) * CELL_CODES,), -1)
        self._place = torch.cat([self._place, unknown])
        return [self._network.film(self._network.instruction(tokens))]

    def _summed_cells(self, cells: Tensor, mission: Tensor, number: Tensor) -> Tensor:
        """As the network's: [B, features].

        cells     uint8 [B, positions]
        mission   int64 [B], row of
        number    int64 [M], of each mission
        """
        self._asked += len(cells)
        key = (number[mission] * CELL_CODES)[:, None] + cells
        place = self._place.index_select(0, key.flatten())
        if int(place.min()) < 0:
            if not self._multiply(torch.unique(key.flatten()[place < 0])):
                scale, shift = self._missions.values[0][number].chunk(2, dim=1)
                return self._network._summed_cells(cells, mission, scale, shift)
            place = self._place.index_select(0, key.flatten())
        row = place.view_as(cells) + self._positions
        table = self._table.view(-1, len(self._view_bias))
        return nn.functional.embedding_bag(row, table, mode="sum")

    def _multiply(self, keys: Tensor) -> bool:
        """Put these missions and codes into the table, if there is room and it is worth it."""
        if self._multiplied + len(keys) > self._asked:
            return False
        if self._rows + len(keys) > len(self._table):
            self._place.fill_(-1)
            self._rows = 0
            return False
        mission, code = keys // CELL_CODES, keys % CELL_CODES
        scale, shift = self._missions.values[0][mission].chunk(2, dim=1)
        rows = torch.relu(self._network.codes(code) * (1 + scale) + shift)
        after = self._rows + len(keys)
        torch.mm(rows, self._by_position, out=self._table[self._rows : after])
        first = torch.arange(self._rows, after, dtype=torch.int32) * len(self._positions)
        self._place[keys] = first
        self._multiplied, self._rows = self._multiplied + len(keys), after
        return True
