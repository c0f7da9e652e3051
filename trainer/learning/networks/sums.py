"""Sums over rows of tables whose gradients are computed as such sums too.

What torch computes backward of gathered rows adds row to row, one after another; where it is known
which rows go where, the sum is several times faster by `embedding_bag` in both directions.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


def gathered_rows(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index]: [R, E] of [Q, E]; index int64 [R]."""
    return _GatheredRows.apply(rows, index)  # type: ignore[no-any-return,no-untyped-call]


class _GatheredRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.count = len(rows)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        order, first = _by_row(index, ctx.count)
        return _bags(gradients[0].contiguous(), order, first), None


def summed_products(left: Tensor, right: Tensor, first: Tensor, segment: Tensor) -> Tensor:
    """Sums of left * right over the rows of each of N segments: [N, F] of [R, F].

    first     int64 [N], the first row of each
    segment   int64 [R], the one of each row, never less than the one before
    """
    return _SummedProducts.apply(  # type: ignore[no-any-return,no-untyped-call]
        left, right, first, segment
    )


class _SummedProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, first: Tensor, segment: Tensor) -> Tensor:
        ctx.save_for_backward(left, right, segment)
        return _segment_sums(left * right, first)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        left, right, segment = ctx.saved_tensors
        gradient = gradients[0].index_select(0, segment)
        return gradient * right, gradient.mul_(left), None, None


def attended(
    query: Tensor, keys: Tensor, values: Tensor, first: Tensor, segment: Tensor, heads: int
) -> Tensor:
    """What each of N queries finds among the rows of its segment, by attention: [N, F].

    query           [N, F], for all heads side by side
    keys, values    [R, F], the same
    first, segment  see `summed_products`
    """
    return _Attended.apply(  # type: ignore[no-any-return,no-untyped-call]
        query, keys, values, first, segment, heads
    )


class _Attended(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        first: Tensor,
        segment: Tensor,
        heads: int,
    ) -> Tensor:
        ctx.scale = (keys.shape[1] / heads) ** -0.5
        shape = (len(keys), heads, -1)
        products = query.index_select(0, segment).mul_(keys)
        score = _over_heads(products, heads) * ctx.scale
        weight = score.clamp(max=_LARGEST_SCORE).exp()
        share = weight / (_segment_sums(weight, first) + 1e-6).index_select(0, segment)
        torch.mul(values.view(shape), share.to(values.dtype)[..., None], out=products.view(shape))
        ctx.save_for_backward(query, keys, values, first, segment, share, score <= _LARGEST_SCORE)
        return _segment_sums(products, first)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        query, keys, values, first, segment, share, passes = ctx.saved_tensors
        heads = share.shape[1]
        shape = (len(keys), heads, -1)
        gradient = gradients[0].index_select(0, segment)
        by_share = _over_heads(gradient * values, heads)
        of_all = _segment_sums(share * by_share, first).index_select(0, segment)
        by_score = (share * (by_share - of_all) * passes * ctx.scale).to(keys.dtype)[..., None]
        by_values = gradient.view(shape).mul_(share.to(values.dtype)[..., None])
        by_query = _segment_sums((keys.view(shape) * by_score).flatten(1), first)
        by_keys = query.index_select(0, segment).view(shape).mul_(by_score)
        return by_query, by_keys.flatten(1), by_values.flatten(1), None, None, None


_LARGEST_SCORE = 40


def _over_heads(products: Tensor, heads: int) -> Tensor:
    """Sums over each head: [R, heads] of [R, F], in float32 at least."""
    exact = torch.promote_types(products.dtype, torch.float32)
    return products.view(len(products), heads, -1).sum(2, dtype=exact)


def linear_of_rows(rows: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """A linear layer over P gathered rows of each of N steps: [N, F].

    It is `linear(rows[index].flatten(1), weight)`. On a CPU each pair of a row and a position is
    multiplied once, however many steps have it, unless most have a pair of their own.

    rows     [R, E]
    index    int [N, P]
    weight   [F, P * E]
    """
    N, P = index.shape
    if rows.device.type == "cpu" and len(rows) <= _SPARSE * N:
        key = (index + torch.arange(P) * len(rows)).flatten()
        present = torch.zeros(P * len(rows), dtype=torch.int32)
        pairs = present.index_fill_(0, key, 1).nonzero().squeeze(1)
        if _WORTH * len(pairs) < len(key):
            count = present.view(P, -1).sum(1)
            # to a multiple of 64 at each position: oneDNN prepares a product of every new size
            room = (count + _ALIKE - 1) // _ALIKE * _ALIKE
            start = room.cumsum(0) - room
            shift = start - (count.cumsum(0) - count)
            place = (present.cumsum(0) - 1).index_select(0, key).view(N, P) + shift
            row = pairs.new_zeros(int(room.sum()))
            row[torch.arange(len(pairs)) + shift.repeat_interleave(count)] = pairs % len(rows)
            bounds = [*start.tolist(), len(row)]
            return _ByPosition.apply(  # type: ignore[no-any-return,no-untyped-call]
                rows, weight, row, place.flatten().int(), bounds
            )
    gathered = rows.index_select(0, index.flatten()).view(N, -1)
    return nn.functional.linear(gathered, weight)


_SPARSE, _WORTH, _ALIKE = 8, 2, 64
"""Of rows to a step there are at most so many; of cells to a pair at least so many."""


class _ByPosition(torch.autograd.Function):
    """See `linear_of_rows`; row int64 [Q] of each pair, place int32 [N * P] of a step's pairs.

    bounds   the first pair of each position, then Q; what is none is a pair that no step has"""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, row: Tensor, place: Tensor, bounds: list[int]
    ) -> Tensor:
        P, size = len(bounds) - 1, rows.shape[1]
        gathered = rows.index_select(0, row)
        products = rows.new_empty(len(row), len(weight))
        for p, (start, stop) in enumerate(pairwise(bounds)):
            part = weight[:, p * size : (p + 1) * size]
            torch.mm(gathered[start:stop], part.t(), out=products[start:stop])
        ctx.save_for_backward(rows, weight, row, place)
        ctx.bounds = bounds
        first = torch.arange(0, len(place), P, dtype=place.dtype, device=place.device)
        return _bags(products, place, first)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        rows, weight, row, place = ctx.saved_tensors
        bounds: list[int] = ctx.bounds
        P, size = len(bounds) - 1, rows.shape[1]
        # which steps have a pair: the same sum with rows and sums exchanged
        order, begin = _by_row(place, len(row))
        products = _bags(gradients[0].contiguous(), order // P, begin)
        gathered = rows.index_select(0, row)
        by_weight = weight.new_empty(P, len(weight), size)
        by_gathered = torch.empty_like(gathered)
        for p, (start, stop) in enumerate(pairwise(bounds)):
            part, here = weight[:, p * size : (p + 1) * size], slice(start, stop)
            torch.mm(products[here].t(), gathered[here], out=by_weight[p])
            torch.mm(products[here], part, out=by_gathered[here])
        exact = torch.promote_types(rows.dtype, torch.float32)
        by_rows = torch.zeros_like(rows, dtype=exact).index_add_(0, row, by_gathered.to(exact))
        by_layer = by_weight.transpose(0, 1).flatten(1)
        return by_rows.to(rows.dtype), by_layer, None, None, None


def _by_row(index: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The places of `index` in the order of the rows that it names, and the first of each row."""
    order = torch.sort(index, stable=True).indices
    count = torch.bincount(index, minlength=rows)
    return order, count.cumsum(0) - count


def _segment_sums(rows: Tensor, first: Tensor) -> Tensor:
    return _bags(rows, torch.arange(len(rows), device=rows.device), first)


def _bags(rows: Tensor, index: Tensor, first: Tensor) -> Tensor:
    """Sums of rows[index] from each `first` to the next."""
    return nn.functional.embedding_bag(index, rows, first.to(index.dtype), mode="sum")
