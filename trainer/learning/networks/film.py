"""BabyAI 1.1's network `bow_endpool_res`: the whole view stays in sight up to the last pooling.

Source: Hui, Chevalier-Boisvert, Bahdanau and Bengio 2020 (arXiv 2007.12770); sizes as in the
defaults of mila-iqia/babyai (`babyai/model.py`): 128 channels, memory 128, instruction 128. Nothing
before the LSTM depends on memory, so all steps of a batch go through the convolutions at once, and
only the LSTM goes run by run.

Different from it, and why:
- Group normalisation in place of batch normalisation, whose statistics would make a step depend on
  the batch around it, mix the rollouts of the store with those of the environments, and act
  otherwise than it was trained. With none at all it learns more slowly (docs/log.md).
- A channel is scaled by 1 + what the instruction says, not by that itself: the same functions.
- No ReLU after the pooling: a sum of what is never negative needs none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from demotools.babyai.cells import ACTIONS, COLOURS, OBJECTS, STATES, VIEW_SIZE
from trainer.batch import Batch
from trainer.learning.networks.base import (
    FilmBlock,
    InstructionEncoder,
    Output,
    check_sizes,
    check_view,
    empty_memory,
    head,
    in_order,
    lstm_by_runs,
    output_of_runs,
    runs_of,
    step_norm,
)


class BagOfWords(nn.Module):
    """Vectors of packed cells, uint8 [...] to [..., size]: object, colour and state summed."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.objects = nn.Embedding(len(OBJECTS), size)
        self.colours = nn.Embedding(len(COLOURS), size)
        self.states = nn.Embedding(len(STATES), size)

    def forward(self, cells: Tensor) -> Tensor:
        """Summed once for each of the 198 codes, in the order of their packing."""
        objects, colours = self.objects.weight[:, None, None], self.colours.weight[:, None]
        codes = (objects + colours + self.states.weight).flatten(0, 2)
        return nn.functional.embedding(cells.int(), codes)


def whole_view_stem(channels: int) -> nn.Sequential:
    """Two convolutions that keep the whole view: [n, channels, h, w] of the same."""
    layers = [
        (nn.Conv2d(channels, channels, 3, padding=1), step_norm(channels), nn.ReLU())
        for _ in range(2)
    ]
    return nn.Sequential(*(layer for three in layers for layer in three))


class Sight(nn.Module):
    """What is seen, in the light of the instruction: [n, channels] of uint8 [n, 7, 7] cells."""

    def __init__(self, channels: int, instruction: int) -> None:
        super().__init__()
        self.cells = BagOfWords(channels)
        self.stem = whole_view_stem(channels)
        self.blocks = nn.ModuleList(FilmBlock(channels, instruction, normed=True) for _ in range(2))

    def forward(self, cells: Tensor, instruction: Tensor) -> Tensor:
        """The largest value of each channel anywhere in the view."""
        view = self.stem(self.cells(cells).permute(0, 3, 1, 2))
        for block in self.blocks:
            view = block(view, instruction)
        return cast(Tensor, view.amax((2, 3)))


class FilmNetwork(nn.Module):
    """Two convolutions, two FiLM blocks, an LSTM; about 1.2 M parameters.

    vocabulary_size   N, words that token ids 1..N stand for
    view              H and W of the cells that are seen: no weight depends on them
    actions           how many there are
    """

    def __init__(
        self,
        vocabulary_size: int,
        *,
        channels: int = 128,
        memory: int = 128,
        instruction: int = 128,
        view: Sequence[int] = (VIEW_SIZE, VIEW_SIZE),
        actions: int = len(ACTIONS),
    ) -> None:
        super().__init__()
        check_sizes(channels=channels, memory=memory, instruction=instruction, actions=actions)
        check_view(view)
        self.instruction = InstructionEncoder(vocabulary_size, instruction)
        self.sight = Sight(channels, instruction)
        self.cell = nn.LSTMCell(channels, memory)
        self.actor = head(memory, actions)
        self.critic = head(memory, 1)

    def initial_memory(self, rollouts: int) -> Tensor:
        """Zeros [B, 2 * memory]: hidden and cell state."""
        return empty_memory(self.cell, rollouts)

    def compiled_parts(self) -> list[nn.Module]:
        """All before the LSTM, on a GPU; on a CPU it gains nothing (docs/log.md)."""
        return [self.sight] if self.cell.weight_hh.is_cuda else []

    def forward(self, batch: Batch, memory: Tensor) -> Output:
        """Logits, values and the memory after; see `trainer.learning.building`."""
        runs = runs_of(batch["masks"])
        instruction = self.instruction(batch["mission_tokens"])[in_order(batch["mission"], runs)]
        features = self.sight(in_order(batch["cells"], runs), instruction)
        hidden, after = lstm_by_runs(self.cell, features, runs, memory)
        return output_of_runs(self.actor, self.critic, hidden, after, runs)
