"""From row statistics to the loss: the formula of every option, in plain differentiable torch on N-vectors.

With w the class weights, eps the label smoothing and lambda the z-loss,

    nll_n  = lse_n - z_ny
    loss_n = w_y (1 - eps) nll_n  +  eps / C (lse_n sum_c w_c - sum_c w_c z_nc)  +  lambda lse_n^2
    mean   = sum_n loss_n / sum_n w_y

A probability target q has sum_c q_c w_c (lse_n - z_nc) = lse_n mass_n - picked_n in the place of w_y nll_n, and its
mean divides by N. Rows that are ignored have lse = picked = wsum = 0: every term of theirs is 0 without a mask.

All statistics are relative to the row's largest score, `top`, which cancels in every difference; lse^2 alone needs the
absolute lse, top + lse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._records import Stats, Upstream, statistics_dtype


def row_weights(target: Tensor, weight: Tensor, ignore_index: int) -> Tensor:
    """w_y (N,): the weight of each row's target, 0 for an ignored row."""
    counts = target != ignore_index
    y = target.where(counts, 0).long()
    return weight.to(statistics_dtype(weight.device))[y].masked_fill(~counts, 0)


def row_losses(
    stats: Stats,
    row_weight: Tensor | None,
    weight_sum: float | Tensor,
    C: int | Tensor,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """loss_n (N,), in nats, in the statistics' dtype. `row_weight` is w_y, or None where all are 1."""
    top, lse, picked, mass, wsum, *_ = stats
    nll = lse - picked if mass is None else lse * mass - picked
    loss = nll if row_weight is None else row_weight * nll
    if wsum is not None:
        smooth = label_smoothing / C * (lse * weight_sum - wsum)
        gone = mass is not None and label_smoothing == 1  # q is mixed first: of a q that is gone, not even 0 * inf
        loss = smooth if gone else (1 - label_smoothing) * loss + smooth
    return loss if z_loss == 0 else loss + z_loss * (top + lse) ** 2


def row_upstream(
    stats: Stats, row_weight: Tensor | None, weight_sum: float | Tensor, C: int, label_smoothing: float, z_loss: float
) -> Upstream:
    """Derivatives of `row_losses` with respect to lse, picked and wsum, for whoever needs them without autograd."""
    top, lse, _, mass, wsum, *_ = stats
    keep = 1 - label_smoothing
    of_target = mass if mass is not None else row_weight  # None where all are 1
    g_lse = torch.full_like(lse, keep) if of_target is None else keep * of_target
    g_picked = -torch.full_like(lse, keep) if mass is not None or row_weight is None else -keep * row_weight
    g_wsum = None
    if wsum is not None:
        g_lse, g_wsum = g_lse + label_smoothing / C * weight_sum, torch.full_like(lse, -label_smoothing / C)
    if z_loss != 0:
        g_lse = g_lse + 2 * z_loss * (top + lse)
    return Upstream(g_lse, g_picked, g_wsum)


def mean_divisor(target: Tensor, row_weight: Tensor | None, ignore_index: int, on_empty: str) -> int | Tensor:
    """What the mean divides by. Where no row counts that is 0, and 0/0 is NaN; `on_empty="zero"` makes it 0/1."""
    if target.is_floating_point():
        N = target.shape[0]
        return 1 if N == 0 and on_empty == "zero" else N
    counts = target != ignore_index
    total = counts.sum() if row_weight is None else row_weight.sum()
    return total if on_empty == "nan" else total + (~counts).all()
