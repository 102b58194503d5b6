"""The mean of the plain loss as one Function, for the sake of small inputs.

What it computes is the formula of `_objective.py` with every option left out:

    loss = sum_n (lse_n - picked_n) / divisor          d loss / d lse_n = 1 / divisor = -d loss / d picked_n

Written with autograd, as the rest is, these few numbers cost more time than a small batch's logits: a node of the
graph for each operation. Where the logits are so few that even the calls of the primitives do, one call computes the
loss, and one in backward all of it again and the gradient. Whatever needs more than a first derivative goes the way of
the rest.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _objective, _primitives
from ._autograd import RowGrad, RowStats, Wanted, row_stats
from ._backends import Reading


class Mean(NamedTuple):
    """What the sum is divided by, and in which dtype the quotient is wanted."""

    normalizer: float | Tensor | None
    on_empty: str
    dtype: torch.dtype

    def divisor(self, target: Tensor, ignore_index: int) -> float | Tensor:
        """As `_objective.mean_divisor`, or as given."""
        if self.normalizer is not None:
            return self.normalizer
        return _objective.mean_divisor(target, None, ignore_index, self.on_empty)


def plain_loss(logits: Tensor, target: Tensor, mean: Mean, reading: Reading, wanted: Wanted) -> Tensor:
    """The loss (0-d) of rows with index targets. Not for those who look on: see `_autograd.watched`."""
    apply = super(torch.autograd.Function, PlainLoss).apply  # without torch's inspection of the signature
    return apply(logits, target, mean, reading, wanted)  # type: ignore[no-any-return, no-untyped-call]


class PlainLoss(torch.autograd.Function):
    """See `plain_loss`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, mean: Mean, reading: Reading, wanted: Wanted) -> Tensor:
        ctx.mean, ctx.reading, ctx.wanted = mean, reading, wanted
        loss, lse, divisor = _of_few(logits, target, mean, reading), None, mean.normalizer
        if loss is None:
            lse, picked = RowStats.forward(logits, target, None, reading, wanted)
            divisor = mean.divisor(target, reading.ignore_index)
            loss = (lse - picked).sum() / divisor
        # A normalizer that is a tensor is saved even where it is not needed, to be seen if it changes.
        ctx.save_for_backward(logits, target, lse, divisor if isinstance(divisor, Tensor) else None)
        return loss.to(mean.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, lse, divisor = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            stats = row_stats(logits, target, None, ctx.reading, ctx.wanted)
            divisor = ctx.mean.divisor(target, ctx.reading.ignore_index) if divisor is None else divisor
            loss = (stats.lse - stats.picked).sum() / divisor
            (d_logits,) = torch.autograd.grad(loss, logits, g.to(loss.dtype), create_graph=True)
        elif lse is None:
            out = logits.detach() if ctx.wanted.inplace else None
            d_logits = _of_few(logits, target, ctx.mean, ctx.reading, float(g), out)
            if out is not None:  # as in `RowGrad`
                torch.autograd.graph.increment_version(logits)
        else:
            share = g.to(lse.dtype) / (ctx.mean.normalizer if divisor is None else divisor)
            g_lse, g_picked = share.expand(len(lse)), (-share).expand(len(lse))
            upstream = (lse, g_lse, g_picked, None, None)
            d_logits = RowGrad.forward(logits, target, *upstream, None, ctx.reading, ctx.wanted.inplace)
        return d_logits, None, None, None, None


def _of_few(
    logits: Tensor,
    target: Tensor,
    mean: Mean,
    reading: Reading,
    upstream: float | None = None,
    out: Tensor | None = None,
) -> Tensor | None:
    """`mean_of_few`. On other devices not even tried: float(normalizer) would make the host wait."""
    if not logits.is_cpu:
        return None
    return _primitives.mean_of_few(
        logits,
        target,
        divisor=None if mean.normalizer is None else float(mean.normalizer),
        least=int(mean.on_empty == "zero"),
        ignore_index=reading.ignore_index,
        scale=reading.scale,
        softcap=reading.softcap,
        upstream=upstream,
        out=out,
    )
