"""A network for mazes: `small` with a map of what it has seen, kept in its memory.

What it gets of the map (`trainer.learning.networks.map`) is a bag of the things on it. Each is a
pair: what it is, in the light of the mission (FiLM), and how it lies.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from demotools.babyai.cells import ACTIONS, CELL_CODES
from trainer.batch import Batch
from trainer.learning.networks.base import (
    Output,
    Words,
    check_sizes,
    head,
    in_order,
    is_traced,
    lstm_by_runs,
    output_of_runs,
    runs_of,
)
from trainer.learning.networks.map import CELLS, HOW, MapState, Things, explored, things
from trainer.learning.networks.small import SmallNetwork
from trainer.learning.networks.steps import Heads, KnownMissions, LSTMStep
from trainer.learning.networks.sums import attended, gathered_rows, summed_products

WORD_HEADS = 2
_TOGETHER = 32
"""Steps of one mission at most that ask its words together."""


class MazeNetwork(SmallNetwork):
    """A FiLM + LSTM policy for CPUs that keeps a map.

    vocabulary_size   N, words that token ids 1..N stand for
    channels          of the bag of things
    heads             with which the things are looked through after the LSTM; 0: not at all
    words             size of a head with which memory asks the words of the mission; 0: not at all
    search            whether the network gets distances and first moves
    """

    def __init__(
        self,
        vocabulary_size: int,
        *,
        embedding: int = 64,
        features: int = 256,
        memory: int = 256,
        instruction: int = 128,
        channels: int = 96,
        heads: int = 3,
        words: int = 32,
        search: bool = True,
    ) -> None:
        super().__init__(
            vocabulary_size,
            embedding=embedding,
            features=features,
            memory=memory,
            instruction=instruction,
        )
        check_sizes(channels=channels)
        self.search = search
        self.kinds = nn.Embedding(CELL_CODES, channels)
        self.film_kinds = nn.Linear(instruction, 2 * channels)
        self.lie = nn.Linear(HOW, channels)
        self.bag = nn.Linear(channels, features)
        self.told = nn.Linear(features, features)
        self.heads, self.words = heads, words
        if words:
            self.mission = nn.Linear(instruction, features)
            self.asked = nn.Linear(memory, WORD_HEADS * words)
            self.spoken = nn.Linear(instruction, 2 * WORD_HEADS * words)
        if heads:
            self.query = nn.Linear(memory + WORD_HEADS * words, channels)
        both = memory + features + bool(heads) * channels + WORD_HEADS * words
        self.actor = nn.Sequential(nn.Linear(both, 128), nn.Tanh(), nn.Linear(128, len(ACTIONS)))
        self.critic = head(both, 1)

    def initial_memory(self, rollouts: int) -> Tensor:
        """Zeros [B, 2 * memory + map]: hidden and cell state, and an empty map."""
        size = 2 * self.cell.hidden_size + MapState.size()
        return self.cell.weight_hh.new_zeros(rollouts, size)

    def acting(self) -> MazeSteps:  # type: ignore[override]
        """What gives its output of single steps while its weights stay as they are."""
        return MazeSteps(self)

    def forward(self, batch: Batch, memory: Tensor) -> Output:
        """Logits, values and the memory after; see `trainer.learning.building`."""
        if is_traced():
            raise TypeError("its map is computed with numpy")
        size = 2 * self.cell.hidden_size
        found, state = self._looked(batch, memory)
        step, first, code, how = (torch.from_numpy(one).to(memory.device) for one in found)
        tokens = batch["mission_tokens"]
        read = self.instruction.read(tokens)
        instruction = read.states.index_select(0, read.final)
        kinds, lying = self._things(step, code, how, batch["mission"].reshape(-1), instruction)
        told = torch.relu(self.bag(summed_products(kinds, lying, first, step)))

        runs = runs_of(batch["masks"])
        cells = in_order(batch["cells"], runs).flatten(1)
        mission = in_order(batch["mission"], runs)
        scale, shift = self.film(instruction).chunk(2, dim=1)
        told = told.index_select(0, runs.order)
        view = self._summed_cells(cells, mission, scale, shift) + self.view.bias
        told_here = self.told(told)
        if self.words:
            told_here = told_here + self.mission(instruction).index_select(0, mission.long())
        features = torch.relu(view + told_here)
        hidden, after = lstm_by_runs(self.cell, features, runs, memory[:, :size])
        parts = [hidden, told]
        asked = hidden
        if self.words:
            parts.append(self._heard(self.asked(hidden), read, tokens, mission.long()))
            asked = torch.cat([hidden, parts[-1].to(hidden.dtype)], dim=1)
        if self.heads:
            query = self.query(asked).index_select(0, runs.inverse)
            looked = attended(query.to(kinds.dtype), kinds, lying, first, step, self.heads)
            parts.append(looked.index_select(0, runs.order))
        both = torch.cat([part.to(hidden.dtype) for part in parts], dim=1)
        carried = torch.cat([after.to(memory.dtype), state.to(memory)], dim=1)
        return output_of_runs(self.actor, self.critic, both, carried, runs)

    def _looked(self, batch: Batch, memory: Tensor) -> tuple[Things, Tensor]:
        """The things on the maps of all steps, and the part of memory that is the map after them.

        The map is kept on the CPU, wherever the network is.
        """
        T, B = batch["masks"].shape[:2]
        direction = batch["direction"].cpu().numpy().astype(np.uint8)
        seen, state = explored(
            batch["cells"].cpu().numpy().reshape(T, B, CELLS),
            direction,
            batch["masks"].cpu().numpy() != 0,
            MapState.unpacked(memory[:, 2 * self.cell.hidden_size :]),
        )
        return things(seen, direction, search=self.search), state.packed()

    def _things(
        self, step: Tensor, code: Tensor, how: Tensor, mission: Tensor, instruction: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What R things are, and how they lie: [R, channels] each."""
        scale, shift = self.film_kinds(instruction).chunk(2, dim=1)
        present, number = torch.unique(code.long(), return_inverse=True)
        table = torch.relu(self.kinds(present) * (1 + scale[:, None]) + shift[:, None])
        row = mission.index_select(0, step) * len(present) + number
        lying = self.lie(how.t()).relu_()
        return gathered_rows(table.flatten(0, 1).to(lying.dtype), row), lying

    def _heard(self, query: Tensor, read: Words, tokens: Tensor, mission: Tensor) -> Tensor:
        """What those words say that memory asks for: [N, heads * words].

        query    [N, heads * words]
        tokens   int64 [M, L], of which `read` tells the states
        mission  int64 [N], row of
        """
        # steps of a mission side by side in groups of K, so that they ask its words together
        count = torch.bincount(mission, minlength=len(tokens))
        K = min(int(count.max()), _TOGETHER)
        groups = (count + K - 1) // K
        before = (groups.cumsum(0) - groups) * K - (count.cumsum(0) - count)
        by_mission = torch.sort(mission, stable=True).indices
        place = torch.empty_like(mission)
        numbers = torch.arange(len(mission), device=mission.device)
        place[by_mission] = numbers + before.index_select(0, mission[by_mission])
        step = mission.new_zeros(int(groups.sum()) * K)
        step[place] = numbers
        asking = query.index_select(0, step).view(-1, K, WORD_HEADS, self.words).transpose(1, 2)
        of = torch.repeat_interleave(groups)
        L = read.place.shape[1]
        spoken = self.spoken(read.states).index_select(0, read.place[of].flatten())
        keys, values = spoken.view(-1, L, 2, WORD_HEADS, self.words).permute(2, 0, 3, 1, 4)
        score = (asking @ keys.transpose(2, 3)).float() / self.words**0.5  # [groups, heads, K, L]
        score = score.masked_fill(tokens[of, None, None, :L] == 0, -1e4)
        heard: Tensor = score.softmax(3).to(values.dtype) @ values
        return heard.transpose(1, 2).reshape(len(step), -1).index_select(0, place)


class MazeSteps:
    """The output of a `MazeNetwork` of single steps, to within rounding, about twice as fast.

    As `SmallSteps` it reads every mission once, and holds what follows from the weights alone.
    """

    def __init__(self, network: MazeNetwork) -> None:
        self._network = network
        self._missions = KnownMissions(self._read)
        self._lstm = LSTMStep(network.cell)
        self._heads = Heads(network.actor, network.critic)

    def _read(self, tokens: Tensor) -> list[Tensor]:
        """Of M missions what scales and shifts cells, and things, and what is added to the view.

        With attention to words, then of every word 1, and of padding 0, [M, L]; and keys and
        values, [M, 2, heads, L, words].
        """
        network, encoder = self._network, self._network.instruction
        length = (tokens != 0).sum(1).clamp(min=1)
        tokens = tokens[:, : int(length.max())]
        # torch's own is quicker for the few that are new
        states = encoder.gru(encoder.words(tokens))[0]
        instruction = states[torch.arange(len(tokens)), length - 1]
        film = network.film(instruction), network.film_kinds(instruction)
        bias = network.view.bias + network.told.bias
        if not network.words:
            return [*film, bias.expand(len(tokens), -1)]
        is_word = (torch.arange(tokens.shape[1]) < length[:, None]).to(bias)
        spoken = network.spoken(states) * is_word[..., None]
        spoken = spoken.unflatten(2, (2, WORD_HEADS, network.words)).permute(0, 2, 3, 1, 4)
        return [*film, bias + network.mission(instruction), is_word, spoken]

    def __call__(self, batch: Batch, memory: Tensor) -> Output:
        """As the network's own for T = 1, without gradients; it does not give the features."""
        with torch.no_grad():
            network = self._network
            size = 2 * network.cell.hidden_size
            found, state = network._looked(batch, memory)
            step, first, code, how = map(torch.from_numpy, found)
            mission = self._missions(batch["mission_tokens"])[batch["mission"][0].long()]
            film, film_kinds, bias, *words = self._missions.values
            kinds = self._lit(network.kinds, code, film_kinds, mission[step])
            lying = network.lie(how.t()).relu_()
            told = network.bag(summed_products(kinds, lying, first, step)).relu_()
            cells = batch["cells"][0].flatten(1)
            seen = self._lit(network.codes, cells, film, mission).flatten(1)
            features = torch.addmm(bias[mission], seen, network.view.weight.t())
            features = features.addmm_(told, network.told.weight.t()).relu_()
            mask = batch["masks"][0].to(memory.dtype)[:, None]
            after = self._lstm(features, memory[:, :size] * mask)
            parts = [after.hidden, told]
            if words:
                parts.append(self._heard(network.asked(after.hidden), mission))
            if network.heads:
                query = network.query(torch.cat([parts[0], *parts[2:]], dim=1))
                parts.append(attended(query, kinds, lying, first, step, network.heads))
            logits, values = self._heads(torch.cat(parts, dim=1))
            return Output(logits, values, torch.cat([*after, state], dim=1))

    def _lit(self, table: nn.Embedding, codes: Tensor, film: Tensor, mission: Tensor) -> Tensor:
        """Embedded codes [N, ...] in the light of missions, whose numbers are int64 [N]."""
        rows = nn.functional.embedding(codes.int(), table.weight)
        scale, shift = (
            film[mission].view(-1, *[1] * (codes.dim() - 1), 2 * rows.shape[-1]).chunk(2, -1)
        )
        return rows.mul_(1 + scale).add_(shift).relu_()

    def _heard(self, query: Tensor, mission: Tensor) -> Tensor:
        """As the network's: [B, heads * words]; mission int64 [B], the numbers."""
        is_word, spoken = (values[mission] for values in self._missions.values[3:])
        keys, values = spoken.unbind(1)  # [B, heads, L, words]
        asking = query.view(len(query), WORD_HEADS, -1, 1)
        score = (keys @ asking).squeeze(3).div_(keys.shape[3] ** 0.5)
        share = score.add_((is_word - 1).mul_(1e4)[:, None]).softmax(2)
        return (share[:, :, None] @ values).flatten(1)
