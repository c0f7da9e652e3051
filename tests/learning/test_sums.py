"""Sums over rows, and their gradients, are those of the plain formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trainer.learning.networks.sums import attended, gathered_rows, linear_of_rows, summed_products


def gradients(result: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return torch.autograd.grad(result, of, torch.randn_like(result))


# rows that many steps share, rows that few have, more rows than are worth looking through
@pytest.mark.parametrize("count", [5, 200, 2000])
def test_a_linear_layer_over_gathered_rows_is_the_plain_product(count: int) -> None:
    torch.manual_seed(0)
    N, P, E, F = 40, 9, 6, 7
    rows = torch.randn(count, E, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(F, P * E, dtype=torch.float64, requires_grad=True)
    index = torch.randint(count, (N, P), dtype=torch.int32)
    mine = linear_of_rows(rows, index, weight)
    plain = nn.functional.linear(rows[index].flatten(1), weight)
    for got, wanted in zip(
        (mine, *gradients(mine, rows, weight)),
        (plain, *gradients(plain, rows, weight)),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


SIZES = [3, 1, 4, 2]
FIRST, SEGMENT = torch.tensor([0, 3, 4, 8]), torch.repeat_interleave(torch.tensor(SIZES))


def equal(mine: Tensor, plain: Tensor, *of: Tensor) -> None:
    """Result and gradients are the same."""
    assert mine.dtype == plain.dtype
    torch.testing.assert_close(mine, plain)
    torch.testing.assert_close(gradients(mine, *of), gradients(plain, *of))


def rows_of(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_gathered_rows_have_the_gradient_of_all_that_they_were_gathered_for() -> None:
    torch.manual_seed(0)
    rows, index = rows_of(5, 3), torch.tensor([4, 0, 0, 2, 4, 4])
    equal(gathered_rows(rows, index), rows[index], rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_summed_products_are_sums_of_segments(dtype: torch.dtype) -> None:
    left = torch.arange(30, dtype=dtype).view(10, 3).requires_grad_()
    right = torch.arange(30, 0, -1).to(dtype).view(10, 3).requires_grad_()
    plain = torch.stack([part.sum(0) for part in torch.split(left * right, SIZES)])
    equal(summed_products(left, right, FIRST, SEGMENT), plain, left, right)


# with scores so large that they are cut off, too
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_attention_to_segments_is_a_softmax_over_each(scale: float) -> None:
    torch.manual_seed(0)
    heads, size = 2, 3
    query, keys, values = (rows_of(rows, heads * size) for rows in (4, 10, 10))
    plain = []
    parts = zip(query, torch.split(keys, SIZES), torch.split(values, SIZES), strict=True)
    for asking, key, value in parts:
        by_head = (key * asking * scale).view(-1, heads, size).sum(2) / size**0.5
        weight = by_head.clamp(max=40).exp()
        weight = weight / (weight.sum(0) + 1e-6)
        plain.append((weight[..., None] * value.view(-1, heads, size)).sum(0).flatten())
    mine = attended(query * scale, keys, values, FIRST, SEGMENT, heads)
    equal(mine, torch.stack(plain), query, keys, values)
