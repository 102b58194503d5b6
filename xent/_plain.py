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

from . import _objective, _primitives, _torch
from ._autograd import row_stats
from ._records import RowSpec, Upstream, Wanted


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


def plain_loss(logits: Tensor, target: Tensor, mean: Mean, spec: RowSpec, inplace: bool) -> Tensor:
    """The loss (0-d) of rows with index targets. Not for those who look on: see `_torch.is_redirected`."""
    return _torch.call_function(PlainLoss, logits, target, mean, spec, inplace)  # type: ignore[no-any-return]


class PlainLoss(torch.autograd.Function):
    """See `plain_loss`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, mean: Mean, spec: RowSpec, inplace: bool) -> Tensor:
        ctx.mean, ctx.spec, ctx.inplace = mean, spec, inplace
        loss, top, lse, divisor = _of_few(logits, target, mean, spec), None, None, mean.normalizer
        if loss is None:
            top, lse, picked, *_ = _primitives.row_statistics(logits, target, spec, Wanted())
            divisor = mean.divisor(target, spec.ignore_index)
            loss = (lse - picked).sum() / divisor
        # A normalizer that is a tensor is saved even where it is not needed, to be seen if it changes.
        ctx.save_for_backward(logits, target, top, lse, divisor if isinstance(divisor, Tensor) else None)
        return loss.to(mean.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, top, lse, divisor = ctx.saved_tensors
        if torch.is_grad_enabled() or _torch.is_redirected(g):  # create_graph=True, or somebody looks on
            with torch.enable_grad():
                stats = row_stats(logits, target, None, ctx.spec, Wanted(), ctx.inplace)
                divisor = ctx.mean.divisor(target, ctx.spec.ignore_index) if divisor is None else divisor
                loss = (stats.lse - stats.picked).sum() / divisor
            again = torch.is_grad_enabled()
            (d_logits,) = torch.autograd.grad(loss, logits, g.to(loss.dtype), create_graph=again)
            return d_logits, None, None, None, None
        out = logits.detach() if ctx.inplace else None
        if lse is None:
            d_logits = _of_few(logits, target, ctx.mean, ctx.spec, float(g), out)
        else:
            share = g.to(lse.dtype) / (ctx.mean.normalizer if divisor is None else divisor)
            upstream = Upstream(share.expand(len(lse)), (-share).expand(len(lse)))
            d_logits = _primitives.row_gradient(logits, target, top, lse, upstream, ctx.spec, None, out)
        return d_logits, None, None, None, None


def _of_few(
    logits: Tensor,
    target: Tensor,
    mean: Mean,
    spec: RowSpec,
    upstream: float | None = None,
    out: Tensor | None = None,
) -> Tensor | None:
    """`mean_of_few`. On other devices not even tried: float(normalizer) would make the host wait."""
    if not logits.is_cpu:
        return None
    return _primitives.mean_of_few(
        logits,
        target,
        spec,
        divisor=None if mean.normalizer is None else float(mean.normalizer),
        least=int(mean.on_empty == "zero"),
        upstream=upstream,
        out=out,
    )
