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
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _torch
from .._records import Stats, Wanted, has_candidates
from .._rows.objective import ClassTerms
from .exchange import exchange


class Gathered(NamedTuple):
    """What `gather` finds. Differentiable: `numbers`, of which this rank made its own row."""

    numbers: Tensor  #      (R, k, A, B): each rank's statistics, packed; behind them w_y where there is a class weight
    #                       (picked and w_y of K candidates are K of these)
    ranks: Tensor  #        (R, 2): how many classes a rank holds, and the sum of their weights
    part: Tensor | None  #  (C,): the weights of the classes held here, for probabilities or wsum

    @classmethod
    def unpack(cls, found: Sequence[Tensor]) -> Gathered:
        """From those that there are."""
        return cls(*found, *[None] * (3 - len(found)))

    def of_rank(
        self, rank: int, g: Tensor, target: Tensor, ignore_index: int, C: int, wanted: Wanted
    ) -> tuple[Tensor, Stats, Sequence[Tensor]]:
        """For the gradient of a rank with C classes: its target, its own statistics, and what flows back to these."""
        start = self.ranks[:rank, 0].sum().long()
        own, _ = _split(self.numbers[rank].unbind(0), target, wanted)
        flowing, _ = _split(g[rank].unbind(0), target, wanted)
        own = own._replace(lse=_finite_lse(own.lse, flowing.lse))
        y = target if target.is_floating_point() else _local_target(target, start, C, ignore_index)
        return y, own, flowing.pack()


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

    def compute(start: int, total: int) -> list[Tensor]:
        part = None if weight is None else _part(weight, C, start, total)
        class_weight = None if part is None else part.to(dtype, copy=True)
        parts[:] = [] if class_weight is None or not (soft or wanted.wsum) else [class_weight]
        stats = local(start, total, class_weight)
        vectors = stats.pack()
        if stats.argmax is not None:
            vectors[-1] = (stats.argmax + start).double()
        if part is not None and not soft:
            vectors.append(_row_weights(part, target, start, ignored))
        total_weight = torch.full((), C, device=target.device) if part is None else part.sum(dtype=torch.float64)
        return [
            vector.movedim(-1, 0).flatten() if vector.dim() == 3 else vector.flatten()
            for vector in (*vectors, total_weight.double())
        ]

    asked = [name for name, yes in zip(("wsum", "entropy", "prediction"), wanted, strict=True) if yes]
    note = f"{note}, {'probabilities' if soft else 'class indices'}, {asked + ['weight'] * (weight is not None)}"
    gathered, sizes = exchange(_torch.process_group(group), C, note, target.device, compute)

    shape = (len(sizes), _count(target, weight is not None, wanted), *target.shape[:2])
    numbers = gathered[:, :-1].clone(memory_format=torch.contiguous_format).view(shape)
    ranks = torch.stack([gathered.new_tensor(sizes), gathered[:, -1]], 1)
    return [numbers, ranks, *parts]


def empty_gathered(
    target: Tensor, held: tuple[int, torch.dtype], weighted: bool, ranks: int, wanted: Wanted
) -> list[Tensor]:
    """`Gathered` without numbers, packed: what a fake operator returns."""
    soft, (C, dtype), count = target.is_floating_point(), held, _count(target, weighted, wanted)
    part = [target.new_empty(C, dtype=dtype)] if weighted and (soft or wanted.wsum) else []
    numbers = target.new_empty(ranks, count, *target.shape[:2], dtype=torch.float64)
    return [numbers, target.new_empty(ranks, 2, dtype=torch.float64), *part]


def _count(target: Tensor, weighted: bool, wanted: Wanted) -> int:
    """How many numbers per row are gathered."""
    soft, K = target.is_floating_point(), target.shape[2] if has_candidates(target) else 1
    return wanted.count(soft) + K - 1 + (K if weighted and not soft else 0)


def combine(
    gathered: Gathered, target: Tensor, ignored: Tensor | None, weighted: bool, wanted: Wanted
) -> tuple[Stats, ClassTerms]:
    """Over all classes: the statistics of the rows, and what the formula of the loss needs besides."""
    parts, row_weight = _split(gathered.numbers.unbind(1), target, wanted)
    sizes, weights = gathered.ranks.unbind(1)
    stats = _over_ranks(parts, target, ignored, sizes, weights)
    return stats, ClassTerms(sizes.sum(), weights.sum(), None if row_weight is None else row_weight.detach().sum(0))


def _split(numbers: Sequence[Tensor], target: Tensor, wanted: Wanted) -> tuple[Stats, Tensor | None]:
    """The statistics, and the weights of the targets if there are any: of K candidates K numbers are one."""
    several, soft = has_candidates(target), target.is_floating_point()
    K = target.shape[2] if several else 1
    top, lse, *rest = numbers
    left = wanted.count(soft) - 3
    picked, others, weights = rest[:K], rest[K : K + left], rest[K + left :]
    of_targets = [torch.stack(part, -1) if several else part[0] for part in (picked, weights) if len(part)]
    return wanted.unpack([top, lse, of_targets[0], *others], soft), of_targets[1] if len(of_targets) > 1 else None


def _over_ranks(parts: Stats, target: Tensor, ignored: Tensor | None, sizes: Tensor, weights: Tensor) -> Stats:
    """From the statistics of the parts, each (R, A, B), those of the whole, each (A, B)."""
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
        return found
    rows = ignored.all(2) if ignored.dim() == 3 else ignored

    def masked(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.masked_fill(ignored if x is picked else rows, -1 if x is argmax else 0)

    return Stats(*map(masked, found))  # type: ignore[arg-type]


def _local_target(target: Tensor, start: Tensor, C: int, ignore_index: int) -> Tensor:
    """Class indices among the C held here; C for a class held elsewhere, and -1 for a row that does not count."""
    local = target.long() - start
    local = torch.where((local >= 0) & (local < C), local, C)
    return local.masked_fill(target == ignore_index, -1)


def _finite_lse(lse: Tensor, g_lse: Tensor) -> Tensor:
    """For the gradient of a part whose logits are all -inf: p = exp(-inf - 0) is 0 there, exp(-inf + inf) is not.

    Where the row is NaN over all ranks, which g_lse tells, it is NaN here as well.
    """
    return torch.where(lse == -torch.inf, g_lse * 0, lse)


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
