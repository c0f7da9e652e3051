"""What the networks share: what they give, how they are asked, their parts, and the LSTM.

An LSTM over a batch of rollouts whose memory restarts where the masks say so.

A batch of T steps x B rollouts is cut into runs: stretches of one rollout over which memory is
carried. Sorted by length, the runs that are still going at step k are a prefix, so step k is one
product over them (`Runs`), and the weights' gradient is one product over all steps. On a CPU this
is several times faster than `nn.LSTM` on a PackedSequence and faster than T steps over all B
rollouts (docs/log.md has the figures); `lstm_by_steps`, the plain loop, is what it must equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from operator import attrgetter
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import register_optimizer_step_post_hook

from demotools.babyai.cells import ACTIONS
from trainer.batch import Batch
from trainer.settings.user_code import users_code

LARGEST = 8192
_LARGEST_VIEW = 64
_HEAD = 64
_GROUP = 8


class Output(NamedTuple):
    """What a network says of every step.

    logits   [T, B, 7], unnormalised log-probabilities of the actions
    values   [T, B], the critic's
    memory   [B, memory size] after the last step, without gradient
    features gives what actor and critic see of every step, [T, B, size], to a loss with a head of
             its own; None where a network does not say
    """

    logits: Tensor
    values: Tensor
    memory: Tensor
    features: Callable[[], Tensor] | None = None


class Model(Protocol):
    """What a network offers beside being a `torch.nn.Module`."""

    def __call__(self, batch: Batch, memory: Tensor) -> Output:
        """The output of every step of a batch."""

    def initial_memory(self, rollouts: int) -> Tensor:
        """Memory before the first step: zeros [B, memory size]."""


class Words(NamedTuple):
    """What an instruction encoder says at every word of M missions.

    states   [W, size]
    place    int64 [M, L], the row of each word; of padding, any row
    final    int64 [M], the row of each mission's last word
    """

    states: Tensor
    place: Tensor
    final: Tensor


class InstructionEncoder(nn.Module):
    """Vectors of missions, [M, L] token ids to [M, size]: a GRU read up to the last word."""

    def __init__(self, vocabulary_size: int, size: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary_size + 1, size, padding_idx=0)
        self.gru = nn.GRU(size, size, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """[M, size]; a mission without any word gives what the first state gives."""
        read = self.read(tokens)
        return read.states.index_select(0, read.final)

    def read(self, tokens: Tensor) -> Words:
        """The states at every word; on a CPU padding is not read."""
        length = (tokens != 0).sum(1).clamp(min=1)
        if tokens.device.type != "cpu" or is_traced():
            place = torch.arange(tokens.numel(), device=tokens.device).view_as(tokens)
            final = place[:, 0] + length - 1
            return Words(self.gru(self.words(tokens))[0].flatten(0, 1), place, final)
        rank, going, first, step, row = _by_step(length)
        weight, recurrent, bias, recurrent_bias = self.gru.all_weights[0]
        projected = nn.functional.linear(self.words(tokens[rank[row], step]), weight, bias)
        states = _GRUOverWords.apply(  # type: ignore[no-untyped-call]
            projected,
            recurrent.to(projected.dtype),
            recurrent_bias.to(projected.dtype),
            going.tolist(),
            torch.where(step == 0, row, len(rank) + first[step - 1] + row),
        )
        inverse = torch.empty_like(rank)
        inverse[rank] = torch.arange(len(rank))
        place = (first + inverse[:, None]).clamp(max=len(step) - 1)
        return Words(states, place, first[length - 1] + inverse)


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


def check_view(view: Sequence[int]) -> tuple[int, int]:
    """A view as (H, W) of cells; ValueError where it is of another kind, or huge."""
    if len(view) != 2 or not all(type(side) is int and 0 < side <= _LARGEST_VIEW for side in view):
        shown = " x ".join(map(str, view))
        raise ValueError(f"it takes views of cells, H x W up to {_LARGEST_VIEW}, not {shown}")
    return view[0], view[1]


def head(memory: int, outputs: int) -> nn.Sequential:
    """An actor or a critic on an LSTM's hidden state: [n, memory] to [n, outputs]."""
    return nn.Sequential(nn.Linear(memory, _HEAD), nn.Tanh(), nn.Linear(_HEAD, outputs))


def empty_memory(cell: nn.LSTMCell, rollouts: int) -> Tensor:
    """Zeros [B, 2 * memory]: hidden and cell state."""
    return cell.weight_hh.new_zeros(rollouts, 2 * cell.hidden_size)


def is_traced() -> bool:
    """Whether a step is being written down as a graph: then no shape may depend on a value."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined,no-untyped-call]


def in_order(values: Tensor, runs: Runs) -> Tensor:
    """[N, ...] in the order of the runs, of [T, B, ...]."""
    return values.flatten(0, 1).index_select(0, runs.order)


def output_of_runs(
    actor: nn.Module, critic: nn.Module, hidden: Tensor, after: Tensor, runs: Runs
) -> Output:
    """What actor and critic say of every step.

    hidden   [N, size], what they see, in the order of the runs
    after    [B, memory size], memory after the batch
    """
    rollouts = after.shape[0]  # in a graph len() would be a constant
    logits = actor(hidden).index_select(0, runs.inverse).unflatten(0, (-1, rollouts))
    values = critic(hidden).index_select(0, runs.inverse).reshape(-1, rollouts)
    shape = (-1, rollouts, hidden.shape[1])
    return Output(logits, values, after, lambda: hidden[runs.inverse].reshape(shape))


def parameter_count(model: nn.Module) -> int:
    """The number of weights that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def output_of(network: nn.Module, batch: Batch, memory: Tensor) -> Output:
    """The output of every step; a user's network is checked, as wrong shapes could go unnoticed."""
    if _is_ours(network):
        return cast(Output, network(batch, memory))
    with users_code("model.type", _name(network), batch):
        output = network(batch, memory)
        steps = tuple(batch["masks"].shape)
        actions = getattr(network, "action_count", len(ACTIONS))
        wanted = {"logits": (*steps, actions), "values": steps, "memory": memory.shape}
        for (name, shape), tensor in zip(wanted.items(), output[:3], strict=True):
            if tensor.shape != shape:
                raise ValueError(f"the {name} are {tuple(tensor.shape)}, not {tuple(shape)}")
    return Output(*output)


Step = Callable[[Batch, Tensor], Output]


def acting(network: nn.Module) -> Step:
    """What gives the output of single steps without gradients.

    It is what a network of ours prepares on a CPU by its `acting`, anew whenever its weights have
    changed, else the network itself.
    """
    # what a class inherits computes what another network does
    prepare = _is_ours(network) and vars(type(network)).get("acting")
    # tensors of inference mode do not tell whether they have changed
    if not prepare or any(
        weight.device.type != "cpu" or weight.is_inference() for weight in network.parameters()
    ):
        return partial(output_of, network)
    _mark_steps_of_optimizers()
    return _Prepared(network, prepare)


class _Prepared:
    """What `prepare` makes of a network, made anew where its weights have changed since."""

    def __init__(self, network: nn.Module, prepare: Callable[[nn.Module], Step]) -> None:
        self._network, self._prepare = network, prepare
        self._weights = list(network.parameters())
        self._versions: list[int] = []

    def __call__(self, batch: Batch, memory: Tensor) -> Output:
        versions = list(map(_version_of, self._weights))
        if versions != self._versions:
            self._step, self._versions = self._prepare(self._network), versions
        return self._step(batch, memory)


_version_of = attrgetter("_version")


@cache
def _mark_steps_of_optimizers() -> None:
    """From now on a weight's version tells of every optimizer's step.

    torch counts changes of tensors, but for those that its fused optimizers make.
    """

    def mark(optimizer: torch.optim.Optimizer, _arguments: Any, _options: Any) -> None:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                increment_version(weight)

    register_optimizer_step_post_hook(mark)


def memory_of(network: nn.Module, rollouts: int) -> Tensor:
    """Memory before the first step: zeros [B, memory size]."""
    with users_code("model.type", "" if _is_ours(network) else _name(network)):
        memory = cast(Model, network).initial_memory(rollouts)
        if memory.dim() != 2 or len(memory) != rollouts:
            raise ValueError(f"the first memory is {tuple(memory.shape)}, not ({rollouts}, size)")
    return memory


def _is_ours(network: nn.Module) -> bool:
    return type(network).__module__.startswith("trainer.")


def _name(network: nn.Module) -> str:
    return f"{type(network).__module__}:{type(network).__qualname__}"


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
    if T == 1:  # acting: every step is a run of its own, and no shape depends on the masks
        place = torch.arange(B, device=masks.device)
        return Runs(place, place, [B], place, place, masks[0] != 0, place)
    by_rollout = masks.t() != 0  # [B, T]
    begins = ~by_rollout
    begins[:, 0] = True
    start = begins.reshape(-1).nonzero().squeeze(1)  # flat index b * T + t
    length = torch.diff(start, append=start.new_tensor([B * T]))
    rank, going, first, step, row = _by_step(length)
    start = start[rank]
    flat = start[row] + step
    order = flat % T * B + flat // T
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(B * T, device=masks.device)
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


def _by_step(length: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """How R sequences are laid out step by step, the longest first, so that those going on lead.

    length    int64 [R]
    returns   int64: the sequences, the longest first [R]; how many are going on at step 0, 1, ...
              and the place of the first of these [K]; the step of every place, and which of the
              sorted sequences it belongs to [N]
    """
    rank = torch.sort(length, descending=True, stable=True).indices
    ended = torch.bincount(length).cumsum(0)
    going = len(length) - ended[:-1]
    first = going.cumsum(0) - going
    step = torch.repeat_interleave(torch.arange(len(going), device=length.device), going)
    return rank, going, first, step, torch.arange(len(step), device=length.device) - first[step]


def lstm_by_runs(
    cell: nn.LSTMCell, inputs: Tensor, runs: Runs, memory: Tensor
) -> tuple[Tensor, Tensor]:
    """Hidden states of every step, in the order of the runs, and the memory after the batch.

    inputs    [N, I], in the order of the runs
    memory    [B, 2H], hidden and cell state of every rollout before the batch
    returns   [N, H], and memory [B, 2H] without gradient
    """
    initial = memory.detach()[runs.rollout] * runs.carried[:, None]
    if is_traced():
        hidden, state = cell(inputs, initial.chunk(2, dim=1))
        return hidden, torch.cat([hidden, state], dim=1)
    if torch.is_autocast_enabled(inputs.device.type):
        inputs = inputs.to(torch.get_autocast_dtype(inputs.device.type))
    weights = (cell.weight_ih, cell.weight_hh, cell.bias_ih + cell.bias_hh)
    hidden, state = _LSTMOverRuns.apply(  # type: ignore[no-untyped-call]
        inputs, *(one.to(inputs.dtype) for one in (*weights, initial)), runs
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


_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
_tanh_backward = torch.ops.aten.tanh_backward.grad_input


class _LSTMOverRuns(torch.autograd.Function):
    """LSTM (Hochreiter and Schmidhuber 1997, gates as in torch.nn.LSTMCell: i, f, g, o)."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        inward: Tensor,
        weight: Tensor,
        bias: Tensor,
        initial: Tensor,
        runs: Runs,
    ) -> tuple[Tensor, Tensor]:
        size, count = weight.shape[1], runs.sizes[0]
        gates = nn.functional.linear(inputs, inward, bias)
        # rows [0, R) hold the initial states, row R + n that of step n
        hidden = gates.new_empty(count + len(gates), size)
        state = torch.empty_like(hidden)
        hidden[:count], state[:count] = initial.chunk(2, dim=1)
        rows = [count, *runs.sizes]
        hiddens, states = torch.split(hidden, rows), torch.split(state, rows)
        transposed = weight.t()
        for step, gate in enumerate(torch.split(gates, runs.sizes)):
            going = len(gate)
            new, cell = hiddens[step + 1], states[step + 1]
            gate.addmm_(hiddens[step][:going], transposed)
            i, f, g, o = gate.chunk(4, dim=1)
            gate[:, : 2 * size].sigmoid_()
            g.tanh_()
            o.sigmoid_()
            torch.mul(f, states[step][:going], out=cell).addcmul_(i, g)
            torch.tanh(cell, out=new).mul_(o)
        ctx.save_for_backward(inputs, inward, weight, gates, hidden, state)
        ctx.runs = runs
        ctx.mark_non_differentiable(after := state[count:])
        return hidden[count:], after

    @staticmethod
    def backward(
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor, None, None]:
        inputs, inward, weight, gates, hidden, state = ctx.saved_tensors
        runs: Runs = ctx.runs
        count, size = runs.sizes[0], weight.shape[1]
        # of all steps at once: by what the gradients of cell and hidden state are multiplied
        i, f, g, o = gates.chunk(4, dim=1)
        squashed = state[count:].tanh()
        by_gates = torch.empty_like(gates)
        by_i, by_f, by_g, by_o = by_gates.chunk(4, dim=1)
        _sigmoid_backward(g, i, grad_input=by_i)
        _sigmoid_backward(state.index_select(0, runs.before), f, grad_input=by_f)
        _tanh_backward(i, g, grad_input=by_g)
        _sigmoid_backward(squashed, o, grad_input=by_o)
        to_cell = _tanh_backward(o, squashed, grad_input=squashed)
        by_hidden = gradients[0].clone()
        by_cell = state.new_zeros(count, size)
        parts = [torch.split(each, runs.sizes) for each in (by_gates, by_hidden, to_cell, f)]
        for step in reversed(range(len(runs.sizes))):
            gate, change, through, kept = (part[step] for part in parts)
            cell = by_cell[: len(gate)]
            cell.addcmul_(change, through)
            gate[:, : 3 * size].view(-1, 3, size).mul_(cell[:, None])
            gate[:, 3 * size :].mul_(change)
            if step:
                cell.mul_(kept)
                parts[1][step - 1][: len(gate)].addmm_(gate, weight)
        transposed = by_gates.t()
        before = hidden.index_select(0, runs.before)
        by_inputs = by_gates @ inward if ctx.needs_input_grad[0] else None
        by_weights = (transposed @ inputs, transposed @ before, by_gates.sum(0))
        return by_inputs, *by_weights, None, None


class _GRUOverWords(torch.autograd.Function):
    """GRU (Cho et al. 2014, gates as in torch.nn.GRU: r, z, n) over missions laid out by step."""

    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        weight: Tensor,
        bias: Tensor,
        sizes: list[int],
        before: Tensor,
    ) -> Tensor:
        size, count = weight.shape[1], sizes[0]
        gates = projected.clone()
        by_hidden = torch.empty_like(projected)
        # rows [0, M) hold the initial states, row M + n that at place n
        hidden = projected.new_zeros(count + len(projected), size)
        states = torch.split(hidden, [count, *sizes])
        transposed = weight.t()
        for step, (gate, turned) in enumerate(
            zip(torch.split(gates, sizes), torch.split(by_hidden, sizes), strict=True)
        ):
            before_step = states[step][: len(gate)]
            torch.addmm(bias, before_step, transposed, out=turned)
            gate[:, : 2 * size].add_(turned[:, : 2 * size]).sigmoid_()
            r, z, n = gate.chunk(3, dim=1)
            n.addcmul_(r, turned[:, 2 * size :]).tanh_()
            torch.lerp(n, before_step, z, out=states[step + 1])
        ctx.save_for_backward(weight, gates, by_hidden, hidden)
        ctx.sizes, ctx.before = sizes, before
        return hidden[count:]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        weight, gates, by_hidden, hidden = ctx.saved_tensors
        sizes: list[int] = ctx.sizes
        size = weight.shape[1]
        # of all words at once: by what the gradients of the states are multiplied
        r, z, n = gates.chunk(3, dim=1)
        previous = hidden.index_select(0, ctx.before)
        inward, recurrent = torch.empty_like(gates), torch.empty_like(gates)
        by_r, by_z, by_n = inward.chunk(3, dim=1)
        _tanh_backward(1 - z, n, grad_input=by_n)
        _sigmoid_backward(by_n * by_hidden[:, 2 * size :], r, grad_input=by_r)
        _sigmoid_backward(previous - n, z, grad_input=by_z)
        torch.cat([by_r, by_z, by_n * r], dim=1, out=recurrent)
        by_states = gradients[0].clone()
        parts = [torch.split(each, sizes) for each in (recurrent, by_states, z)]
        for step in reversed(range(len(sizes))):
            back, change, kept = (part[step] for part in parts)
            back.view(-1, 3, size).mul_(change[:, None])
            if step:
                parts[1][step - 1][: len(back)].addcmul_(change, kept).addmm_(back, weight)
        inward.view(-1, 3, size).mul_(by_states[:, None])
        return inward, recurrent.t() @ previous, recurrent.sum(0), None, None
