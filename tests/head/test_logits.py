"""The primitive `linear`: the logits of a head, of any shape, dtype and layout, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pairs import pairs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from xent._backends import eager
from xent._rows import dispatch

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = ["side by side", "every other row", "transposed", "a part"]
CASES = pairs(
    rows=[1, 15, 16, 17, 33, 70],
    classes=[1, 5, 6, 7, 48, 49, 103],
    width=[0, 1, 191, 192, 193, 400],
    dtype=DTYPES,
    hidden=LAYOUTS,
    head=LAYOUTS,
    out=LAYOUTS,
)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers, beside others."""
    if layout == "every other row":
        return torch.stack([x, x + 1], 1).flatten(0, 1)[::2]
    if layout == "transposed":
        return x.t().contiguous().t()
    return torch.cat([x + 1, x, x + 1], 1)[:, x.shape[1] : 2 * x.shape[1]] if layout == "a part" else x


def room(h: Tensor, W: Tensor, layout: str = "side by side") -> Tensor:
    dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
    return laid_out(torch.full((len(h), len(W)), torch.nan, dtype=dtype), layout)


def test_logits_of_every_shape(kernel: str) -> None:
    """And nothing beside them is written."""
    for rows, classes, width, dtype, hidden, head, out in CASES:
        torch.manual_seed(0)
        h, W = (torch.randn(n, width).to(dtype) for n in (rows, classes))
        found = room(h, W, out)
        dispatch.linear(laid_out(h, hidden), laid_out(W, head), found)
        h, W = h.double(), W.double()
        error = (found - h @ W.t()).abs() / (h.abs() @ W.abs().t()).clamp(min=1e-300)
        assert error.max() <= 2 * torch.finfo(found.dtype).eps, (rows, classes, width, dtype, hidden, head, out)
        assert found._base is None or found._base.isnan().sum() == found._base.numel() - found.numel()


def test_what_is_infinite_stays_in_its_row_and_class(kernel: str) -> None:
    """The rows that fill up a vector, and the classes that fill up a block, reach no others."""
    h, W = torch.randn(17, 200), torch.randn(7, 200)
    h[16, 3], W[6, 5] = torch.inf, torch.nan
    found = room(h, W)
    dispatch.linear(h, W, found)
    assert found[:16, :6].isfinite().all()
    assert found[16].isfinite().sum() == 0
    assert found[:, 6].isnan().all()


def test_factors_of_two_dtypes(kernel: str) -> None:
    torch.manual_seed(0)
    h, W = torch.randn(17, 40), torch.randn(7, 40)
    for a, b in ((h, W.bfloat16()), (h.half(), W), (h.bfloat16(), W.half())):
        found = room(a, b)
        dispatch.linear(a, b, found)
        torch.testing.assert_close(found, (a.double() @ b.double().t()).float())


def test_a_long_sum_keeps_its_digits(kernel: str) -> None:
    """Of numbers of one sign, which lose 20 units where they are added up one by one, and here 3."""
    if not kernel.startswith("native avx"):
        pytest.skip("products by torch")
    torch.manual_seed(0)
    h, W = torch.rand(17, 4000), torch.rand(7, 4000)
    found, exact = room(h, W), h.double() @ W.double().t()
    dispatch.linear(h, W, found)
    assert ((found - exact) / exact).abs().max() < 6 * torch.finfo(found.dtype).eps


def test_the_same_bits_whatever_the_block(kernel: str) -> None:
    """Of rows and classes, and whatever the threads. (torch promises no such thing of its products.)"""
    if not kernel.startswith("native avx"):
        pytest.skip("products by torch")
    h, W = torch.randn(70, 400), torch.randn(500, 400)
    whole, threads = room(h, W), torch.get_num_threads()
    dispatch.linear(h, W, whole)
    for rows, classes, count in ((slice(3, 20), slice(None), threads), (slice(None), slice(7, 300), 1)):
        part = room(h[rows], W[classes])
        torch.set_num_threads(count)
        try:
            dispatch.linear(h[rows], W[classes], part)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(part, whole[rows, classes])


class Largest(TorchDispatchMode):
    """The most bytes that any operator has returned."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and not func.is_view and "out" not in (kwargs or {}):
            self.bytes = max(self.bytes, found.nbytes)
        return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_of_the_products_of_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a head that is converted, one part at a time."""
    monkeypatch.setattr(eager, "CACHE_BYTES", 1 << 16)
    h, W = torch.randn(10, 64).to(dtype), torch.randn(5000, 64).to(dtype)
    out = room(h, W)
    with Largest() as largest:
        eager.linear(h, W, out)
    assert largest.bytes <= 1 << 16
