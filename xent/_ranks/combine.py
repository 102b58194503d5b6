"""From the statistics of each rank's classes to those of all classes, and what a rank needs to know of the others.

The statistics of a row over all classes follow from those over its parts, r = 1 ... R:

    top      = max_r top_r                                     d_r = top_r - top
    lse      = log sum_r exp(lse_r + d_r)                      picked = sum_r (picked_r + m_r d_r)
    entropy  = sum_r pi_r (entropy_r - log pi_r)               wsum   = sum_r (wsum_r + W_r d_r)
    argmax   = that of the part with the largest score, the first of equals

with pi_r = exp(lse_r + d_r - lse), the probability of part r; m_r, the mass of the target there (1 where r holds an
index target); and W_r, the sum of its class weights. So one exchange of a few numbers per row is all there is to it:
the parts' statistics are stable as they are, and need no maximum over all the ranks first.

This is plain differentiable torch. d lse / d lse_r = pi_r turns the softmax of a part into that of all classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _torch
from .._records import Stats, Wanted
from .._rows.objective import ClassTerms
from .exchange import exchange


class Gathered(NamedTuple):
    """What `gather` finds, of each rank. Differentiable: `stats`, of which this rank made its own."""

    stats: Stats  #               each (R, A, B), and `picked` of K candidates (R, A, B, K)
    row_weight: Tensor | None  #  like `picked`, of index targets with class weights: w_y where the rank holds y, else 0
    ranks: Tensor  #              (R, 2): how many classes a rank holds, and the sum of their weights
    part: Tensor | None  #        (C,): the weights of the classes held here, for probabilities or wsum

    @classmethod
    def unpack(cls, found: Sequence[Tensor], target: Tensor, weighted: bool, wanted: Wanted) -> Gathered:
        """From those that there are, the first ones of `found`."""
        soft, left = target.is_floating_point(), iter(found)
        stats = wanted.unpack([next(left) for _ in range(wanted.count(soft))], soft)
        row_weight = next(left) if weighted and not soft else None
        return cls(stats, row_weight, next(left), next(left) if weighted and (soft or wanted.wsum) else None)

    @classmethod
    def split(cls, flat: Sequence[Any]) -> tuple[Gathered, Sequence[Any]]:
        """From all of its tensors, flattened, as the first ones of `flat`; and the others."""
        count = len(Stats._fields)
        own = count + len(cls._fields) - 1
        return cls(Stats(*flat[:count]), *flat[count:own]), flat[own:]

    @property
    def constants(self) -> list[Tensor]:
        """Those that have no derivative."""
        return [x for x in (self.stats.top, self.stats.argmax, *self[1:]) if x is not None]

    def of_rank(
        self, rank: int, grads: Sequence[Tensor | None], target: Tensor, ignore_index: int, C: int, wanted: Wanted
    ) -> tuple[Tensor, Stats, Stats]:
        """For the gradient of a rank with C classes: its target, its own statistics, and what flows back to these."""
        soft, start = target.is_floating_point(), self.ranks[:rank, 0].sum().long()
        own = Stats(*[None if stat is None else stat[rank] for stat in self.stats])  # type: ignore[arg-type]
        flowing = wanted.unpack([None if g is None else g[rank] for g in grads[: wanted.count(soft)]], soft)
        # Of logits that are all -inf here: p = exp(-inf - 0) is 0, exp(-inf + inf) is not. Where the row is NaN over
        # all ranks, which the gradient of lse tells, it is NaN here as well.
        zero = 0 if flowing.lse is None else flowing.lse * 0
        own = own._replace(lse=torch.where(own.lse == -torch.inf, zero, own.lse))
        return target if soft else _local_target(target, start, C, ignore_index), own, flowing


def gather(
    group: str,
    note: str,
    target: Tensor,
    ignored: Tensor | None,
    weight: Tensor | None,
    held: tuple[int, torch.dtype],
    wanted: Wanted,
    local: Callable[[int, int, Tensor | None], Stats],
) -> list[Tensor]:
    """`Gathered`, as far as it goes, from the statistics of the classes held here, `local(start, total, class_weight)`.

    `ignored`: the rows that do not count; None where all do. `held`: how many classes these are, and the dtype of their
    weights. A rank learns in the exchange which classes it holds, and may have to begin again: see `exchange`.
    """
    (C, dtype), soft = held, target.is_floating_point()
    parts: list[Tensor] = []
    shapes: list[torch.Size] = []

    def compute(start: int, total: int) -> list[Tensor]:
        part = None if weight is None else _part(weight, C, start, total)
        class_weight = None if part is None else part.to(dtype, copy=True)
        parts[:] = [] if class_weight is None or not (soft or wanted.wsum) else [class_weight]
        stats = local(start, total, class_weight)
        if stats.argmax is not None:
            stats = stats._replace(argmax=stats.argmax + start)
        found = stats.pack()
        if part is not None and not soft:
            found.append(_row_weights(part, target, start, ignored))
        found.append(torch.full((), C, device=target.device) if part is None else part.sum(dtype=torch.float64))
        shapes[:] = [numbers.shape for numbers in found]
        return [numbers.double().flatten() for numbers in found]

    asked = [name for name, yes in zip(("wsum", "entropy", "prediction"), wanted, strict=True) if yes]
    note = f"{note}, {'probabilities' if soft else 'class indices'}, {asked + ['weight'] * (weight is not None)}"
    gathered, sizes = exchange(_torch.process_group(group), C, note, target.device, compute)

    *found, weights = [
        part.clone(memory_format=torch.contiguous_format).view(len(sizes), *shape)
        for part, shape in zip(torch.split(gathered, [shape.numel() for shape in shapes], 1), shapes, strict=True)
    ]
    return [*found, torch.stack([gathered.new_tensor(sizes), weights], 1), *parts]


def empty_gathered(
    target: Tensor, held: tuple[int, torch.dtype], weighted: bool, ranks: int, wanted: Wanted
) -> list[Tensor]:
    """`Gathered` without numbers, packed: what a fake operator returns."""
    soft, (C, dtype) = target.is_floating_point(), held
    stats = wanted.empty(target.new_empty(*target.shape[:2], 0), target)
    shapes = [(ranks, *stat.shape) for stat in stats] + [(ranks, *stats[2].shape)] * (weighted and not soft)
    part = [target.new_empty(C, dtype=dtype)] if weighted and (soft or wanted.wsum) else []
    return [*[target.new_empty(shape, dtype=torch.float64) for shape in (*shapes, (ranks, 2))], *part]


def combine(gathered: Gathered, target: Tensor, ignored: Tensor | None) -> tuple[Stats, ClassTerms]:
    """Over all classes: the statistics of the rows, each (A, B), and what the formula of the loss needs besides."""
    parts, (sizes, weights) = gathered.stats, gathered.ranks.unbind(1)
    row_weight = None if gathered.row_weight is None else gathered.row_weight.sum(0)
    terms = ClassTerms(sizes.sum(), weights.sum(), row_weight)
    tops = parts.top.detach()
    peak = tops.masked_fill(parts.lse == -torch.inf, -torch.inf)  # a part of -inf, or without classes
    top = peak.amax(0)
    top = top.masked_fill(top == -torch.inf, 0)
    d = tops - top
    lses = parts.lse + d
    lse = lses.logsumexp(0)
    mass, per_rank = parts.mass, (-1,) + (1,) * top.dim()
    if mass is None:
        ends, begins = (end.view((-1,) + (1,) * target.dim()) for end in (sizes.cumsum(0), sizes.cumsum(0) - sizes))
        mass = ((target >= begins) & (target < ends)).to(d.dtype)
        mass = mass if ignored is None else mass.masked_fill(ignored, 0)
    picked = (parts.picked + mass * (d[..., None] if mass.dim() > d.dim() else d)).sum(0)
    wsum = None if parts.wsum is None else (parts.wsum + weights.view(per_rank) * d).sum(0)
    entropy = argmax = None
    if parts.entropy is not None:
        log_pi = lses - lse
        none = log_pi == -torch.inf  # pi log pi is 0 there
        log_pi = log_pi.masked_fill(none, 0)
        pi = log_pi.exp().masked_fill(none, 0)
        entropy = (pi * (parts.entropy.masked_fill(none, 0) - log_pi)).sum(0)
    if parts.argmax is not None:
        score = peak.masked_fill(parts.lse.isnan(), torch.inf)  # +inf or NaN is in that part
        score = score.masked_fill((sizes == 0).view(per_rank), -torch.inf)
        first = (sizes > 0).int().argmax()  # of a row of -inf: the first part that has any classes
        best = torch.where(score.amax(0) == -torch.inf, first, score.argmax(0))
        argmax = parts.argmax.detach().gather(0, best[None])[0].long()
    found = Stats(top, lse, picked, None if parts.mass is None else parts.mass.sum(0), wsum, entropy, argmax)
    if ignored is None:
        return found, terms
    rows = ignored.all(2) if ignored.dim() == 3 else ignored

    def masked(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.masked_fill(ignored if x is picked else rows, -1 if x is argmax else 0)

    return Stats(*map(masked, found)), terms  # type: ignore[arg-type]


def _local_target(target: Tensor, start: Tensor, C: int, ignore_index: int) -> Tensor:
    """Class indices among the C held here; C for a class held elsewhere, and -1 for a row that does not count."""
    local = target.long() - start
    local = torch.where((local >= 0) & (local < C), local, C)
    return local.masked_fill(target == ignore_index, -1)


def _part(weight: Tensor, C: int, start: int, total: int) -> Tensor:
    """The class weights of the classes held here."""
    if len(weight) == C:
        return weight
    if len(weight) == total:
        return weight.narrow(0, start, C)
    raise ValueError(
        f"weight: expected shape ({C},), one number per class held here, or ({total},), one per class of all ranks, "
        f"got {tuple(weight.shape)}"
    )


def _row_weights(part: Tensor, target: Tensor, start: int, ignored: Tensor | None) -> Tensor:
    """w_y where y is held here, else 0."""
    local = target.long() - start
    here = (local >= 0) & (local < len(part))
    here = here if ignored is None else here & ~ignored
    if len(part) == 0:
        return here.double()
    return part.double()[local.clamp(0, len(part) - 1)].masked_fill(~here, 0)
