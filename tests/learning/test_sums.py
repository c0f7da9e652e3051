"""Sums over rows, and their gradients, are those of the plain formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trainer.learning.networks.sums import linear_of_rows, segment_sums


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_segment_sums_are_sums_of_segments(dtype: torch.dtype) -> None:
    sizes = [3, 1, 4, 2]
    segment = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))
    rows = torch.arange(30, dtype=dtype).view(10, 3).requires_grad_()
    mine = segment_sums(rows, torch.tensor([0, 3, 4, 8]), segment)
    plain = torch.stack([part.sum(0) for part in torch.split(rows, sizes)])
    assert mine.dtype == dtype
    torch.testing.assert_close(mine, plain)
    torch.testing.assert_close(gradients(mine, rows), gradients(plain, rows))
