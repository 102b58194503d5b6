"""The matrix products of a linear head in mixed precision: half in, float32 sums out, no second (C, D) beside them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

SLICE_BYTES = 8 << 20  # of the float32 copy of a part of the logits' gradient


def logits_of(h: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """h W^T + b, written to `out`."""
    return torch.mm(h, weight.t(), out=out) if bias is None else torch.addmm(bias, h, weight.t(), out=out)


def add_outer(total: Tensor, G: Tensor, h: Tensor, beta: int) -> None:
    """total (C, D) = beta * total + G^T h, summed in the dtype of `total`: G (n, C) and h (n, D) may be half of it."""
    if G.dtype == total.dtype:
        torch.addmm(total, G.t(), h, beta=beta, out=total)
    elif G.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"):
        torch.addmm(total, G.t(), h, beta=beta, out_dtype=total.dtype, out=total)
    else:
        _add_outer_in_slices(total, G, h, beta)


def _add_outer_in_slices(total: Tensor, G: Tensor, h: Tensor, beta: int) -> None:
    """By slices of the classes, each converted just before it is used.

    float32 factors that hold bfloat16 numbers may be multiplied as bfloat16 without any loss, and oneDNN does so at
    bfloat16's speed if it is allowed to: what it would round is not there.
    """
    h = h.t().to(total.dtype, memory_format=torch.contiguous_format).t()  # as oneDNN would lay it out for each slice
    width = max(1, SLICE_BYTES // (max(1, len(G)) * total.itemsize))
    with _products_of_bfloat16() if G.dtype == torch.bfloat16 else contextlib.nullcontext():
        for begin in range(0, len(total), width):
            part = total[begin : begin + width]
            torch.addmm(part, G[:, begin : begin + width].to(total.dtype).t(), h, beta=beta, out=part)


@contextlib.contextmanager
def _products_of_bfloat16() -> Iterator[None]:
    """Let float32 products on the CPU round their factors to bfloat16. Before torch 2.9 there is no such setting."""
    settings = torch.backends.mkldnn
    if not hasattr(settings, "matmul"):
        yield
        return
    before = settings.matmul.fp32_precision
    settings.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.matmul.fp32_precision = before
