"""Rows with any three strides: the numbers of contiguous ones, and a gradient in the memory order of the logits."""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
import torch
from oracle import every_dtype
from torch import Tensor

from xent._records import RowSpec, Upstream, Wanted
from xent._rows import dispatch

A, B, C = 3, 7, 37
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {  # the same numbers (A, B, C), in another order of memory
    "contiguous": lambda x: x,
    "images": lambda x: x.mT.contiguous().mT,
    "images, channels last": lambda x: x.clone(),
    "cut sequences": lambda x: torch.cat([x, x[:, :1]], 1)[:, :-1],
    "sequences first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "classes first": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "cut classes": lambda x: torch.cat([x, x], 2)[:, :, :C],
    "every second": lambda x: x.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, ::2, ::2],
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
every_target = pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])


def problem(dtype: torch.dtype, soft: bool) -> tuple[Tensor, Tensor]:
    x, y = oracle.rows(dtype, N=A * B, C=C, soft=soft)
    if not soft:
        y[[0, 8, 20]] = -100
    return x.view(A, B, C), y.view(A, B, -1) if soft else y.view(A, B)


@every_layout
@every_target
@every_dtype
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "in place"])
def test_layout(
    backend: str, layout: Callable[[Tensor], Tensor], soft: bool, dtype: torch.dtype, inplace: bool
) -> None:
    x, y = problem(dtype, soft)
    z, target, spec, wanted = layout(x), layout(y) if soft else y, RowSpec(scale=0.5), Wanted(True, True, True)
    w = torch.rand(C, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    assert z.equal(x)
    expected = dispatch.row_statistics(x, y, spec, wanted, w)
    found = dispatch.row_statistics(z, target, spec, wanted, w)
    for stat, truth in zip(found.pack(), expected.pack(), strict=True):
        torch.testing.assert_close(stat, truth, rtol=1e-5 if dtype != torch.float64 else 1e-13, atol=1e-6)

    numbers = torch.randn(4, A, B, dtype=torch.float64)
    upstream = Upstream(*numbers)
    grad = dispatch.row_gradient(x, y, expected.top, expected.lse, upstream, spec, w)
    out = z if inplace else None
    result = dispatch.row_gradient(z, target, expected.top, expected.lse, upstream, spec, w, out)
    oracle.assert_grad(result.flatten(0, 1), grad.double().flatten(0, 1))
    assert result.stride() == (z if inplace else torch.empty_like(z)).stride()
    assert (result.data_ptr() == z.data_ptr()) == inplace


@every_target
def test_one_number_for_all_rows(backend: str, soft: bool) -> None:
    """Upstream numbers may be expanded, or lie apart."""
    x, y = problem(torch.float64, soft)
    stats = dispatch.row_statistics(x, y, RowSpec(), Wanted())
    one, apart = torch.tensor(0.5).double(), torch.randn(B, A).double()
    for g in (one.expand(A, B), apart.T):
        grads = [
            dispatch.row_gradient(x, y, stats.top, stats.lse, Upstream(h, -h), RowSpec()) for h in (g, g.contiguous())
        ]
        assert grads[0].equal(grads[1])
