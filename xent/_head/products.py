"""The three matrix products of a linear head: half-precision factors, float32 sums, no second (C, D) beside them.

What the hardware offers decides the dtype of a block of logits (and of their gradient, which overwrites them):

    float32, float64            as they are
    half on CUDA                float32: the products themselves can write and add to float32
    half on a CPU that          half, rounded once, as by torch.nn.functional.linear; each block's product for the head
      multiplies it               is rounded to half, too, and added up in float32
    half on another device      float32: slices of the head are converted just before they are used

The last costs as much as float32 does, which is several times less than what torch's own products take there.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import _torch
from .._backends import slices
from .._rows import dispatch

HALF = torch.bfloat16, torch.float16
SLICE_BYTES = 4 << 20  # of what is made of a part of the head at a time: it stays in a core's cache


def block_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """In which dtype the products with factors of `dtype` give a block of logits."""
    return torch.float32 if dtype in HALF and not (device.type == "cpu" and _torch.cpu_multiplies(dtype)) else dtype


def logits_of(h: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """h W^T + b, written to `out`, which is of `block_dtype`."""
    if out.dtype == weight.dtype and (not out.is_cpu or out.dtype in HALF):  # a half is rounded once, with its bias
        product = torch.mm if bias is None else functools.partial(torch.addmm, bias)
        return product(h, weight.t(), out=out)
    if _torch.writes_float32(weight):
        torch.mm(h, weight.t(), out_dtype=out.dtype, out=out)
    else:
        dispatch.linear(h, weight, out)
    return out if bias is None else out.add_(bias)


def hidden_gradient(G: Tensor, weight: Tensor) -> Tensor:
    """G W (n, D), in the dtype of the head."""
    if G.dtype == weight.dtype:
        return G @ weight
    if _torch.writes_float32(weight):
        return G.to(weight.dtype) @ weight
    total = G.new_zeros(len(G), weight.shape[1])
    for part in slices(weight, SLICE_BYTES, G.dtype):
        total.addmm_(G[:, part], weight[part].to(G.dtype))
    return total.to(weight.dtype)


def add_outer(total: Tensor, G: Tensor, h: Tensor, block: int) -> None:
    """total (C, D) += G^T h (or =, for block 0), summed in the dtype of `total`; G (n, C) and h (n, D) may be half."""
    beta = min(block, 1)  # 0: nothing is in it yet
    if G.dtype == h.dtype == total.dtype:
        torch.addmm(total, G.t(), h, beta=beta, out=total)
    elif _torch.writes_float32(h):
        torch.addmm(total, G.to(h.dtype).t(), h, beta=beta, out_dtype=total.dtype, out=total)
    else:
        h = h.to(G.dtype).t().contiguous().t()  # as oneDNN would lay it out for each slice
        for part in slices(total, SLICE_BYTES, G.dtype):
            G_t = G[:, part].t()
            product = G_t @ h
            total[part].copy_(product) if beta == 0 else total[part].add_(product)
            if block % 2:  # what rounding has cut off: else the blocks' roundings add up to more than the last one
                total[part].add_(torch.addmm(product, G_t, h, beta=-1))
