"""The 20 M-parameter network of the off-policy tutorial, and BabyAI 1.1's largest, for GPUs.

The mission is read by a bidirectional GRU; at each step the memory before it chooses among the
words (attention), what it chose scales and shifts two convolutional blocks (FiLM), and their
outcome goes into an LSTM. So only the first convolutions can be done for all steps at once: the
rest goes run by run as in `trainer.learning.networks.base`, step k of all runs that are still
going in one product, which is what makes it faster than T steps over B rollouts.

With `endpool` it is the network of BabyAI 1.1's BossLevel experiment: the view of
`trainer.learning.networks.film`, pooled at the very end, in place of the tutorial's, which is
pooled before the blocks.

Left out: batch normalisation, whose statistics would mix rollouts and make a step depend on the
batch around it; and the raw image, in whose place cell codes have an embedding.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from demotools.babyai.cells import ACTIONS, CELL_CODES
from trainer.batch import Batch
from trainer.learning.networks.base import (
    FilmBlock,
    Output,
    check_sizes,
    empty_memory,
    head,
    in_order,
    is_traced,
    output_of_runs,
    runs_of,
)
from trainer.learning.networks.film import BagOfWords, whole_view_stem


class WordEncoder(nn.Module):
    """A vector for each word of each mission: [M, L] token ids to [M, L, size]."""

    def __init__(self, vocabulary_size: int, size: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary_size + 1, size, padding_idx=0)
        self.gru = nn.GRU(size, size // 2, batch_first=True, bidirectional=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """Padding has zeros."""
        length = (tokens != 0).sum(1).clamp(min=1).cpu()
        packed = pack_padded_sequence(
            self.words(tokens), length, batch_first=True, enforce_sorted=False
        )
        states, _ = pad_packed_sequence(
            self.gru(packed)[0], batch_first=True, total_length=tokens.shape[1]
        )
        return states


class RecurrentWeights:
    """A weight matrix that multiplies at many steps; its gradient is one product over all.

    Left to itself, autograd adds a matrix of 67 MB into another at every step.
    """

    def __init__(self, weight: Tensor) -> None:
        self._factors: list[tuple[Tensor, Tensor]] = []
        self._weight = weight
        if not is_traced():
            self._weight = _Collected.apply(weight, self._factors)  # type: ignore[no-untyped-call]

    def times(self, rows: Tensor) -> Tensor:
        """[n, out] of [n, in]."""
        rows = rows.to(self._weight.dtype)
        if is_traced():
            return rows @ self._weight.t()
        product = _Product.apply(rows, self._weight, self._factors)  # type: ignore[no-untyped-call]
        return cast(Tensor, product)


class _Collected(torch.autograd.Function):
    """The weight itself; backward, the product of all that was collected."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, factors: list[tuple[Tensor, Tensor]]) -> Tensor:
        ctx.factors = factors
        ctx.set_materialize_grads(False)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *_gradients: Tensor | None) -> tuple[Tensor | None, None]:
        if not ctx.factors:
            return None, None
        gradients, rows = (torch.cat(part) for part in zip(*ctx.factors, strict=True))
        ctx.factors.clear()
        return gradients.t() @ rows, None


class _Product(torch.autograd.Function):
    """rows @ weight.t(), whose share of the weight's gradient is left to `_Collected`."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, factors: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.factors = factors
        return rows @ weight.t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        rows, weight = ctx.saved_tensors
        ctx.factors.append((gradients[0], rows))
        return gradients[0] @ weight, None, None


class BigNetwork(nn.Module):
    """Attention, FiLM and an LSTM of 2048: about 20 M parameters.

    vocabulary_size   N, words that token ids 1..N stand for
    embedding         size of a cell's; with `endpool` it is `channels`
    endpool           whether the whole view stays in sight up to the last pooling
    """

    def __init__(
        self,
        vocabulary_size: int,
        *,
        memory: int = 2048,
        instruction: int = 256,
        channels: int = 128,
        embedding: int = 32,
        endpool: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(memory=memory, instruction=instruction, channels=channels, embedding=embedding)
        if instruction % 2:
            raise ValueError("instruction must be even")
        self.words = WordEncoder(vocabulary_size, instruction)
        self.codes: nn.Module = (
            BagOfWords(channels) if endpool else nn.Embedding(CELL_CODES, embedding)
        )
        self.stem = whole_view_stem(channels) if endpool else _pooled_stem(embedding, channels)
        self.query = nn.Linear(2 * memory, instruction)
        self.blocks = nn.ModuleList(
            FilmBlock(channels, instruction, normed=endpool) for _ in range(2)
        )
        self.cell = nn.LSTMCell(channels, memory)
        self.actor = head(memory, len(ACTIONS))
        self.critic = head(memory, 1)

    def initial_memory(self, rollouts: int) -> Tensor:
        """Zeros [B, 2 * memory]: hidden and cell state."""
        return empty_memory(self.cell, rollouts)

    def compiled_parts(self) -> list[nn.Module]:
        """The convolutions, on a GPU; on a CPU they gain nothing (docs/log.md)."""
        return [self.stem, *self.blocks] if self.query.weight.is_cuda else []

    def forward(self, batch: Batch, memory: Tensor) -> Output:
        """Logits, values and the memory after; see `trainer.learning.building`."""
        runs = runs_of(batch["masks"])
        views = self.seen(in_order(batch["cells"], runs))
        mission = in_order(batch["mission"], runs)
        words = self.words(batch["mission_tokens"])
        present = present_words(batch["mission_tokens"])
        hidden, state = (memory.detach()[runs.rollout] * runs.carried[:, None]).chunk(2, dim=1)
        every_hidden, every_state, start = [], [], 0
        # a run that begins has memory zero: there is nothing to multiply
        weights = RecurrentWeights(self.cell.weight_hh.to(_computing_dtype(memory)))
        rows: Tensor | None = None if is_traced() else runs.carried.nonzero().squeeze(1)
        for going in runs.sizes:
            here = slice(start, start + going)
            row = mission[here]
            before = hidden[:going], state[:going]
            hidden, state = self.step(views[here], words[row], present[row], *before, weights, rows)
            rows = None
            every_hidden.append(hidden)
            every_state.append(state.detach())
            start += going
        outcome = torch.cat(every_hidden)  # [T * B, memory], in the order of the runs
        after = torch.cat([outcome.detach()[runs.last], torch.cat(every_state)[runs.last]], dim=1)
        return output_of_runs(self.actor, self.critic, outcome, after, runs)

    def seen(self, cells: Tensor) -> Tensor:
        """What does not depend on memory: uint8 [n, 7, 7] to [n, channels, h, w].

        h and w are 2, with `endpool` 7.
        """
        return cast(Tensor, self.stem(self.codes(cells.int()).permute(0, 3, 1, 2)))

    def step(
        self,
        view: Tensor,
        words: Tensor,
        present: Tensor,
        hidden: Tensor,
        state: Tensor,
        weights: RecurrentWeights,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One step of n rows: hidden and cell state [n, memory] after it.

        view           [n, channels, h, w]
        words          [n, L, instruction], and whether each is there, bool [n, L]
        hidden, state  [n, memory] before
        rows           those whose memory before is not zero; None: all
        """
        memory = torch.cat([hidden, state], dim=1)
        if rows is None:
            query = self.query(memory)
            recurrent = weights.times(hidden)
        else:
            query = self.query.bias.expand(len(view), -1).index_copy(
                0, rows, self.query(memory[rows])
            )
            recurrent = weights.times(hidden[rows])
            recurrent = recurrent.new_zeros(len(view), recurrent.shape[1]).index_copy(
                0, rows, recurrent
            )
        score = torch.einsum("nlw,nw->nl", words, query).masked_fill(~present, -torch.inf)
        instruction = torch.einsum("nlw,nl->nw", words, score.softmax(1))
        for block in self.blocks:
            view = block(view, instruction)
        bias = self.cell.bias_ih + self.cell.bias_hh
        gates = nn.functional.linear(view.amax((2, 3)), self.cell.weight_ih, bias) + recurrent
        i, f, g, o = gates.chunk(4, dim=1)  # in the order of torch.nn.LSTMCell
        state = f.sigmoid() * state + i.sigmoid() * g.tanh()
        return o.sigmoid() * state.tanh(), state


def _pooled_stem(embedding: int, channels: int) -> nn.Sequential:
    """The tutorial's convolutions, which pool: [n, embedding, 7, 7] to [n, channels, 2, 2]."""
    return nn.Sequential(
        nn.Conv2d(embedding, channels, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )


def _computing_dtype(like: Tensor) -> torch.dtype:
    """What products are computed in: autocast's, where it is on."""
    kind = like.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype


def present_words(tokens: Tensor) -> Tensor:
    """Which words of missions can be attended to: bool [M, L]; never none of a mission.

    >>> present_words(torch.tensor([[4, 2, 0], [0, 0, 0]])).tolist()
    [[True, True, False], [True, False, False]]
    """
    present = tokens != 0
    present[:, 0] = True
    return present
