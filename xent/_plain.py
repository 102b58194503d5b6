"""The mean of the plain loss as one Function, for the sake of small inputs.

What it computes is the formula of `_objective.py` with every option left out, bit for bit:

    loss = sum_n (lse_n - picked_n) / divisor          d loss / d lse_n = 1 / divisor = -d loss / d picked_n

Written with autograd, as the rest is, these few numbers cost more time than a small batch's logits: a node of the
graph for each operation. Nothing else is special here; whatever needs more than a first derivative goes that way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._autograd import RowGrad, RowStats, Wanted, row_stats
from ._backends import Reading


def plain_loss(
    logits: Tensor, target: Tensor, divisor: float | Tensor, dtype: torch.dtype, reading: Reading, wanted: Wanted
) -> Tensor:
    """The loss (0-d) of rows with index targets. Not for those who look on: see `_autograd.watched`."""
    apply = super(torch.autograd.Function, PlainLoss).apply  # without torch's inspection of the signature
    return apply(logits, target, divisor, dtype, reading, wanted)  # type: ignore[no-any-return, no-untyped-call]


class PlainLoss(torch.autograd.Function):
    """See `plain_loss`."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        divisor: float | Tensor,
        dtype: torch.dtype,
        reading: Reading,
        wanted: Wanted,
    ) -> Tensor:
        lse, picked = RowStats.forward(logits, target, None, reading, wanted)
        ctx.save_for_backward(logits, target, lse)
        ctx.divisor, ctx.reading, ctx.wanted = divisor, reading, wanted
        return ((lse - picked).sum() / divisor).to(dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        logits, target, lse = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            stats = row_stats(logits, target, None, ctx.reading, ctx.wanted)
            loss = (stats.lse - stats.picked).sum() / ctx.divisor
            (d_logits,) = torch.autograd.grad(loss, logits, g.to(loss.dtype), create_graph=True)
        else:
            share = g.to(lse.dtype) / ctx.divisor
            g_lse, g_picked = share.expand(len(lse)), (-share).expand(len(lse))
            upstream = (lse, g_lse, g_picked, None, None)
            d_logits = RowGrad.forward(logits, target, *upstream, None, ctx.reading, ctx.wanted.inplace)
        return d_logits, None, None, None, None, None
