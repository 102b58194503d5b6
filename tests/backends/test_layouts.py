"""Rows with any three strides: the numbers of contiguous ones, and a gradient in the memory order of the logits."""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
import torch
from interpreter import fewer
from pairs import pairwise
from torch import Tensor

from xent._backends import eager
from xent._records import RowNumbers, RowSpec, Wanted
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


def problem(dtype: torch.dtype, soft: bool) -> tuple[Tensor, Tensor]:
    x, y = oracle.rows(dtype, N=A * B, C=C, soft=soft)
    if not soft:
        y[[0, 8, 20]] = -100
    return x.view(A, B, C), y.view(A, B, -1) if soft else y.view(A, B)


@pairwise(layout=LAYOUTS, soft=[False, True], dtype=oracle.ALL_DTYPES, inplace=[False, True])
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

    numbers = RowNumbers(expected.top, expected.lse, *torch.randn(4, A, B, dtype=torch.float64))
    grad = dispatch.row_gradient(x, y, numbers, spec, w)
    out = z if inplace else None
    result = dispatch.row_gradient(z, target, numbers, spec, w, out)
    oracle.assert_grad(result.flatten(0, 1), grad.double().flatten(0, 1))
    assert result.stride() == (z if inplace else torch.empty_like(z)).stride()
    assert (result.data_ptr() == z.data_ptr()) == inplace


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_one_number_for_all_rows(backend: str, soft: bool) -> None:
    """Upstream numbers may be expanded, or lie apart."""
    x, y = problem(torch.float64, soft)
    stats = dispatch.row_statistics(x, y, RowSpec(), Wanted())
    one, apart = torch.tensor(0.5).double(), torch.randn(B, A).double()
    for g in (one.expand(A, B), apart.T, apart.T.float()):
        grads = [
            dispatch.row_gradient(x, y, RowNumbers(stats.top, stats.lse, h, -h), RowSpec()) for h in (g, g.contiguous())
        ]
        assert grads[0].equal(grads[1])


BLOCKS: dict[str, tuple[tuple[int, int, int], str]] = {  # (A, B, C) for which native takes many rows at a time
    "two classes": ((1, 600, 2), "contiguous"),
    "one class": ((2, 20, 1), "images"),
    "short rows": ((1, 300, 10), "contiguous"),
    "just short": ((3, 30, 32), "cut sequences"),
    "images": ((2, fewer(40, 300), 21), "images"),
    "images, some pages of each class": ((2, fewer(40, 4500), 11), "images"),
    "small images": ((9, 5, 7), "images"),
    "a tile and a few classes": ((1, fewer(70, 300), 207), "images"),
    "more classes than a tile": ((1, 70, fewer(90, 700)), "images"),
    "few positions, many classes": ((1, 3, fewer(300, 3000)), "images"),
    "classes first": ((5, 40, 19), "classes first"),
    "every second": ((2, 40, 50), "every second"),
}


@pairwise(block=BLOCKS, dtype=oracle.ALL_DTYPES, soft=[False, True], softcap=[None, 5.0], inplace=[False, True])
def test_blocks(
    kernel: str,
    block: tuple[tuple[int, int, int], str],
    dtype: torch.dtype,
    soft: bool,
    softcap: float | None,
    inplace: bool,
) -> None:
    """With everything that can be asked for, against eager; ignored rows hold NaN, and -inf is anywhere."""
    shape, layout = block
    generator = torch.Generator().manual_seed(3)
    x = (torch.randn(shape, generator=generator, dtype=torch.float64) * 4).to(dtype)
    C = shape[2]
    x[..., C // 2][torch.rand(shape[:2], generator=generator) < 0.2] = -torch.inf
    y = torch.randint(C, shape[:2], generator=generator)
    if soft:
        y = torch.rand(shape, generator=generator).to(dtype)
    else:
        y[torch.rand(shape[:2], generator=generator) < 0.2] = -100
        x[y == -100] = torch.nan
    x = LAYOUTS[layout](x)
    spec, wanted = RowSpec(scale=0.5, softcap=softcap, classes=C), Wanted(True, True, True)
    w = torch.rand(C, generator=generator, dtype=torch.float64)
    w = w if dtype == torch.float64 else w.float()
    found, truth = (module.row_statistics(x, y, spec, wanted, w) for module in (dispatch, eager))
    rough = {"rtol": 1e-5, "atol": 1e-5} if dtype != torch.float64 else {"rtol": 1e-12, "atol": 1e-12}
    for stat, expected in zip(found.pack(), truth.pack(), strict=True):
        torch.testing.assert_close(stat, expected, equal_nan=True, **rough)
    g = torch.randn(4, *shape[:2], generator=generator, dtype=torch.float64)
    numbers = RowNumbers(truth.top, truth.lse, *g)
    expected = eager.row_gradient(x, y, numbers, spec, w, None)
    grad = dispatch.row_gradient(x, y, numbers, spec, w, x if inplace else None)
    torch.testing.assert_close(
        grad.double(), expected.double(), equal_nan=True, rtol=oracle.TOLERANCE[dtype] * 8, atol=oracle.TOLERANCE[dtype]
    )
