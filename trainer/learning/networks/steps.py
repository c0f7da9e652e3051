"""Parts of networks that act on a CPU: what follows from the weights alone is prepared once.

A single step of some environments is many small operations. These parts make few of them, and are
right for as long as the weights stay as they are; none needs a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

_MOST_MISSIONS = 1024


class KnownMissions:
    """Whatever follows from missions, each of which is read once.

    read     of tokens [M, L] tensors [M, ...]; of longer missions they may be longer, and those of
             shorter ones then end in zeros
    forget   is called when the numbers that missions had are given to others
    """

    def __init__(
        self, read: Callable[[Tensor], Sequence[Tensor]], forget: Callable[[], None] | None = None
    ) -> None:
        self._read, self._forget = read, forget
        self._known: dict[bytes, int] = {}
        self.values: list[Tensor] = []
        """What was read: a row for each number."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """The number of each of M missions: int64 [M].

        tokens   int64 [M, L]
        """
        width, text = tokens.shape[1] * tokens.element_size(), tokens.numpy().tobytes()
        missions = [
            text[start : start + width].rstrip(b"\0") for start in range(0, len(text), width)
        ]
        new = {each: row for row, each in enumerate(missions) if each not in self._known}
        if new and len(self._known) + len(new) > _MOST_MISSIONS:
            self._known, self.values = {}, []
            if self._forget is not None:
                self._forget()
            new = {each: row for row, each in enumerate(missions)}
        if new:
            self._append(self._read(tokens[list(new.values())]))
            known = len(self._known)
            self._known.update(zip(new, range(known, known + len(new)), strict=True))
        return torch.tensor([self._known[mission] for mission in missions])

    def _append(self, read: Sequence[Tensor]) -> None:
        known, count = len(self._known), len(read[0])
        if not self.values:
            self.values = [one.new_zeros(0, *one.shape[1:]) for one in read]
        for number, one in enumerate(read):
            held = self.values[number]
            # twice as much room as is needed, and longer missions
            shape = [max(sizes) for sizes in zip(held.shape[1:], one.shape[1:], strict=True)]
            if known + count > len(held) or list(held.shape[1:]) != shape:
                room = one.new_zeros(max(2 * (known + count), len(held)), *shape)
                room[(slice(known), *map(slice, held.shape[1:]))] = held[:known]
                self.values[number] = held = room
            held[(slice(known, known + count), *map(slice, one.shape[1:]))] = one


class State(NamedTuple):
    """Of an LSTM: [B, size] each."""

    hidden: Tensor
    cell: Tensor


class LSTMStep:
    """One step of an LSTM, as one product."""

    def __init__(self, cell: nn.LSTMCell) -> None:
        def gates(rows: Tensor) -> Tensor:
            i, f, g, o = rows.detach().chunk(4)
            return torch.cat([i, f, o, g])

        self._weight = gates(torch.cat([cell.weight_ih, cell.weight_hh], dim=1)).t()
        self._bias = gates(cell.bias_ih + cell.bias_hh)

    def __call__(self, features: Tensor, memory: Tensor) -> State:
        """The state after `features`, [B, I].

        memory   [B, 2H], hidden and cell state before them, which it does not change
        """
        size = memory.shape[1] // 2
        joined = torch.cat([features, memory[:, :size]], dim=1)
        gates = torch.addmm(self._bias, joined, self._weight)
        i, f, o = gates[:, : 3 * size].sigmoid_().chunk(3, dim=1)
        state = (memory[:, size:] * f).addcmul_(i, gates[:, 3 * size :].tanh_())
        return State(state.tanh().mul_(o), state)


class Heads:
    """Actor and critic, each a layer, tanh and a layer, as two products."""

    def __init__(self, *heads: nn.Module) -> None:
        layers = [[cast(nn.Sequential, one)[place] for one in heads] for place in (0, 2)]
        first, last = (cast(list[nn.Linear], each) for each in layers)
        with torch.no_grad():
            self._first = torch.cat([layer.weight for layer in first]).t()
            self._first_bias = torch.cat([layer.bias for layer in first])
            self._last = torch.block_diag(  # type: ignore[no-untyped-call]
                *(layer.weight for layer in last)
            ).t()
            self._last_bias = torch.cat([layer.bias for layer in last])

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The logits, [1, B, actions], and the values, [1, B]."""
        inner = torch.addmm(self._first_bias, hidden, self._first).tanh_()
        said = torch.addmm(self._last_bias, inner, self._last)[None]
        return said[..., :-1], said[..., -1]
