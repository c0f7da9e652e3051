"""An LSTM over a batch of rollouts whose memory restarts where the masks say so.

A batch of T steps x B rollouts is cut into runs: stretches of one rollout over which memory is
carried. Sorted by length, the runs that are still going at step k are a prefix, so step k is one
product over them (`Runs`), and the weights' gradient is one product over all steps. On a CPU this
is several times faster than `nn.LSTM` on a PackedSequence and faster than T steps over all B
rollouts (docs/log.md has the figures); `lstm_by_steps`, the plain loop, is what it must equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Runs:
    """How the T x B steps of a batch are laid out run by run; N = T * B, R runs.

    order      int64 [N], flat index t * B + b of each step in the order of computation
    inverse    int64 [N], place in that order of each flat index
    sizes      runs that are still going at step 0, 1, ... of a run; sum N, sizes[0] = R
    before     int64 [N], row of the state that each step continues, in [R initial; N steps]
    rollout    int64 [R], the rollout of each run
    carried    bool [R], whether the run continues the memory of the batch before
    last       int64 [B], place in `order` of each rollout's last step
    """

    order: Tensor
    inverse: Tensor
    sizes: list[int]
    before: Tensor
    rollout: Tensor
    carried: Tensor
    last: Tensor


def runs_of(masks: Tensor) -> Runs:
    """The runs of a batch.

    masks   [T, B], 0 where memory restarts
    """
    T, B = masks.shape
    by_rollout = masks.t() != 0  # [B, T]
    begins = ~by_rollout
    begins[:, 0] = True
    start = begins.reshape(-1).nonzero().squeeze(1)  # flat index b * T + t
    length = torch.diff(start, append=start.new_tensor([B * T]))
    length, rank = torch.sort(length, descending=True, stable=True)
    start = start[rank]
    longest = int(length[0])
    # sizes[k] = number of runs longer than k
    ended = torch.bincount(length, minlength=longest + 1).cumsum(0)
    going = len(length) - ended[:longest]
    first = going.cumsum(0) - going  # place of step k's first row
    step = torch.repeat_interleave(torch.arange(longest, device=masks.device), going)
    place = torch.arange(B * T, device=masks.device)
    row = place - first[step]
    flat = start[row] + step
    order = flat % T * B + flat // T
    inverse = torch.empty_like(order)
    inverse[order] = place
    previous = len(length) + first[step - 1] + row
    return Runs(
        order=order,
        inverse=inverse,
        sizes=going.tolist(),
        before=torch.where(step == 0, row, previous),
        rollout=start // T,
        carried=(start % T == 0) & by_rollout.reshape(-1)[start],
        last=inverse[(T - 1) * B + torch.arange(B, device=masks.device)],
    )


def lstm_by_runs(
    cell: nn.LSTMCell, inputs: Tensor, runs: Runs, memory: Tensor
) -> tuple[Tensor, Tensor]:
    """Hidden states of every step, in the order of the runs, and the memory after the batch.

    inputs    [N, I], in the order of the runs
    memory    [B, 2H], hidden and cell state of every rollout before the batch
    returns   [N, H], and memory [B, 2H] without gradient
    """
    projected = nn.functional.linear(inputs, cell.weight_ih, cell.bias_ih + cell.bias_hh)
    initial = memory.detach()[runs.rollout] * runs.carried[:, None]
    hidden, state = _LSTMOverRuns.apply(  # type: ignore[no-untyped-call]
        projected, cell.weight_hh.to(projected.dtype), initial.to(projected.dtype), runs
    )
    after = torch.cat([hidden.detach()[runs.last], state[runs.last]], dim=1)
    return hidden, after


def lstm_by_steps(
    cell: nn.LSTMCell, inputs: Tensor, masks: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor]:
    """The same step by step, with masks: the definition that `lstm_by_runs` must equal.

    inputs    [T, B, I]
    masks     [T, B]
    memory    [B, 2H]
    returns   [T, B, H], and memory [B, 2H] without gradient
    """
    hidden, state = memory.detach().chunk(2, dim=1)
    outputs = []
    for step, mask in zip(inputs, masks.to(inputs.dtype), strict=True):
        hidden, state = cell(step, (hidden * mask[:, None], state * mask[:, None]))
        outputs.append(hidden)
    return torch.stack(outputs), torch.cat([hidden, state], dim=1).detach()


_sigmoid_backward = torch.ops.aten.sigmoid_backward
_tanh_backward = torch.ops.aten.tanh_backward


class _LSTMOverRuns(torch.autograd.Function):
    """LSTM (Hochreiter and Schmidhuber 1997, gates as in torch.nn.LSTMCell: i, f, g, o)."""

    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, weight: Tensor, initial: Tensor, runs: Runs
    ) -> tuple[Tensor, Tensor]:
        size = weight.shape[1]
        count = runs.sizes[0]
        gates = torch.empty_like(projected)
        # rows [0, R) hold the initial states, row R + n that of step n
        hidden = projected.new_empty(count + len(projected), size)
        state = torch.empty_like(hidden)
        hidden[:count], state[:count] = initial.chunk(2, dim=1)
        start, previous = 0, 0
        transposed = weight.t()
        for going in runs.sizes:
            gate = gates[start : start + going]
            torch.addmm(
                projected[start : start + going],
                hidden[previous : previous + going],
                transposed,
                out=gate,
            )
            gate[:, : 2 * size].sigmoid_()
            gate[:, 2 * size : 3 * size].tanh_()
            gate[:, 3 * size :].sigmoid_()
            i, f, g, o = gate.chunk(4, dim=1)
            here = slice(count + start, count + start + going)
            torch.mul(f, state[previous : previous + going], out=state[here])
            state[here].addcmul_(i, g)
            torch.tanh(state[here], out=hidden[here])
            hidden[here].mul_(o)
            previous, start = count + start, start + going
        ctx.save_for_backward(weight, gates, hidden, state)
        ctx.runs = runs
        ctx.mark_non_differentiable(after := state[count:])
        return hidden[count:], after

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        weight, gates, hidden, state = ctx.saved_tensors
        runs: Runs = ctx.runs
        count, size = runs.sizes[0], weight.shape[1]
        by_gates = torch.empty_like(gates)
        by_hidden = gradients[0].clone()
        by_state = state.new_zeros(count, size)
        previous = state[runs.before]
        stop = len(gates)
        for earlier, going in zip([0, *runs.sizes[:-1]][::-1], runs.sizes[::-1], strict=True):
            start = stop - going
            here = slice(start, stop)
            i, f, g, o = gates[here].chunk(4, dim=1)
            squashed = state[count + start : count + stop].tanh()
            dh, dc = by_hidden[here], by_state[:going]
            dc += _tanh_backward(dh * o, squashed)
            by_gates[here] = torch.cat(
                [
                    _sigmoid_backward(dc * g, i),
                    _sigmoid_backward(dc * previous[here], f),
                    _tanh_backward(dc * i, g),
                    _sigmoid_backward(dh * squashed, o),
                ],
                dim=1,
            )
            dc *= f
            if earlier:
                rows = by_hidden[start - earlier : start - earlier + going]
                rows.addmm_(by_gates[here], weight)
            stop = start
        return by_gates, by_gates.t() @ hidden[runs.before], None, None
