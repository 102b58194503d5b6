"""From row statistics to the loss: the formula of every option, in plain differentiable torch on one number per row.

With w the class weights, eps the label smoothing and lambda the z-loss,

    nll_n  = lse_n - z_ny
    loss_n = w_y (1 - eps) nll_n  +  eps / C (lse_n sum_c w_c - sum_c w_c z_nc)  +  lambda lse_n^2
    mean   = sum_n loss_n / sum_n w_y

A probability target q has sum_c q_c w_c (lse_n - z_nc) = lse_n mass_n - picked_n in the place of w_y nll_n, and its
mean divides by N. So has a target of K classes y_k with probabilities q_k; its mean divides by the rows that count.
Rows that are ignored have lse = picked = wsum = 0: every term of theirs is 0 without a mask.

All statistics are relative to the row's largest score, `top`, which cancels in every difference; lse^2 alone needs the
absolute lse, top + lse.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._records import Objective, RowNumbers, Stats, Wanted, rows_that_count, statistics_dtype


class ClassTerms(NamedTuple):
    """What the formula needs to know of all classes and of the weights of the rows' targets."""

    classes: int | Tensor
    weight_sum: float | Tensor  #   sum_c w_c
    row_weight: Tensor | None  #    w_y of each row (and candidate); None where all are 1, and for probabilities


def class_weight(weight: Tensor | None, target: Tensor, wanted: Wanted, dtype: torch.dtype) -> Tensor | None:
    """The weights as the primitives take them, where they count for each class and not only for that of the target."""
    if weight is None or not (target.is_floating_point() or wanted.wsum):
        return None
    return weight.to(dtype)


def class_terms(target: Tensor, weight: Tensor | None, classes: int, objective: Objective) -> ClassTerms:
    """Of class weights that are all held here."""
    if weight is None:
        return ClassTerms(classes, classes, None)
    rows = None if target.is_floating_point() else row_weights(target, weight, objective.ignore_index)
    smooth = objective.label_smoothing > 0  # else nobody reads the sum
    return ClassTerms(classes, weight.sum(dtype=statistics_dtype(weight.device)) if smooth else classes, rows)


def of_candidates(
    stats: Stats, terms: ClassTerms, target: Tensor, q: Tensor, ignore_index: int
) -> tuple[Stats, ClassTerms]:
    """As of a distribution with probability q_k on each of K candidates (A, B, K), and 0 on all other classes."""
    k = q.to(stats.lse.dtype).masked_fill(target == ignore_index, 0)
    k = k if terms.row_weight is None else k * terms.row_weight
    picked = stats.picked.masked_fill((k == 0) & (stats.picked == -torch.inf), 0)  # not 0 * inf
    return stats._replace(picked=(k * picked).sum(2), mass=k.sum(2)), terms._replace(row_weight=None)


def numbers_of_candidates(
    numbers: RowNumbers, stats: Stats, terms: ClassTerms, target: Tensor, q: Tensor, ignore_index: int
) -> tuple[RowNumbers, Tensor]:
    """From `numbers_of_loss` of a distribution to that of its K candidates; and the gradient of q, (A, B, K)."""
    ignored, g = target == ignore_index, numbers.g_picked[..., None]
    g = g if terms.row_weight is None else g * terms.row_weight
    g_picked = (g * q).masked_fill(ignored, 0)
    picked = stats.picked.masked_fill((g_picked == 0) & (stats.picked == -torch.inf), 0)  # as above
    return numbers._replace(g_picked=g_picked), (g * (picked - stats.lse[..., None])).masked_fill(ignored, 0)


def row_weights(target: Tensor, weight: Tensor, ignore_index: int) -> Tensor:
    """w_y: the weight of each row's target, 0 for an ignored row."""
    counts = target != ignore_index
    return weight.to(statistics_dtype(weight.device))[target.where(counts, 0)].masked_fill(~counts, 0)


def row_losses(stats: Stats, terms: ClassTerms, objective: Objective) -> Tensor:
    """loss_n, in nats, in the statistics' dtype."""
    top, lse, picked, mass, wsum, *_ = stats
    eps, z_loss = objective.label_smoothing, objective.z_loss
    nll = lse - picked if mass is None else lse * mass - picked
    loss = nll if terms.row_weight is None else terms.row_weight * nll
    if wsum is not None:
        smooth = eps / terms.classes * (lse * terms.weight_sum - wsum)
        gone = mass is not None and eps == 1  # q is mixed first: of a q that is gone, not even 0 * inf
        loss = smooth if gone else (1 - eps) * loss + smooth
    return loss if z_loss == 0 else loss + z_loss * (top + lse) ** 2


def numbers_of_loss(
    top: Tensor, lse: Tensor, mass: Tensor | None, terms: ClassTerms, objective: Objective, g: Tensor
) -> RowNumbers:
    """Derivatives of sum_n g_n loss_n with respect to lse, picked and wsum, for whoever needs them without autograd.

    `g` is one number for all rows (0-d) or one for each.
    """
    eps, z_loss = objective.label_smoothing, objective.z_loss
    of_target = mass if mass is not None else terms.row_weight  # None where all are 1
    kept = g if eps == 0 else g * (1 - eps)
    g_lse = kept if of_target is None else kept * of_target
    g_picked = -(kept if mass is not None or terms.row_weight is None else g_lse)
    g_wsum = None
    if eps > 0:
        share = g * (eps / terms.classes)
        g_lse, g_wsum = g_lse + share * terms.weight_sum, (-share).expand_as(lse)
    if z_loss != 0:
        g_lse = g_lse + g * (2 * z_loss) * (top + lse)
    return RowNumbers(top, lse, g_lse.expand_as(lse), g_picked.expand_as(lse), g_wsum)


def divisor(
    target: Tensor, row_weight: Tensor | None, normalizer: float | Tensor | None, objective: Objective
) -> float | Tensor | None:
    """What the mean divides by. Where no row counts that is 0, and 0/0 is NaN; `on_empty="zero"` makes it 0/1."""
    if objective.reduction != "mean" or normalizer is not None:
        return normalizer
    if target.is_floating_point():
        rows = math.prod(target.shape[:-1])
        return 1 if rows == 0 and objective.on_empty == "zero" else rows
    total = count = rows_that_count(target, objective.ignore_index).sum()
    if row_weight is not None:
        total = sum_of_weights(row_weight.sum(), count, objective.label_smoothing)
    return total if objective.on_empty == "nan" else total + (count == 0)


def sum_of_weights(total: Tensor, count: Tensor, label_smoothing: float) -> Tensor:
    """What a mean over so many rows divides by: where they weigh nothing, it is 0/0, whatever the smoothing adds."""
    return total.masked_fill((total == 0) & (count > 0), torch.nan) if label_smoothing > 0 else total


def evaluate(
    stats: Stats, terms: ClassTerms, target: Tensor, normalizer: float | Tensor | None, objective: Objective
) -> tuple[Tensor, float | Tensor | None]:
    """The loss of all rows, and what it was divided by."""
    found = divisor(target, terms.row_weight, normalizer, objective)
    return reduce(row_losses(stats, terms, objective), found, objective), found


def reduce(losses: Tensor, divisor: float | Tensor | None, objective: Objective) -> Tensor:
    """The losses, or their sum, over the divisor if there is one; rounded once."""
    if objective.reduction == "none":
        return losses.to(objective.dtype)
    total = losses.sum()
    return (total if divisor is None else total / divisor).to(objective.dtype)
