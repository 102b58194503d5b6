"""Statistics of rows whose classes are spread over ranks, and the gradient for those held here: no autograd yet.

The statistics of a row over all classes follow from those over its parts, r = 1 ... R:

    top      = max_r top_r                                     d_r = top_r - top
    lse      = log sum_r exp(lse_r + d_r)                      picked = sum_r (picked_r + m_r d_r)
    entropy  = sum_r pi_r (entropy_r - log pi_r)               wsum   = sum_r (wsum_r + W_r d_r)
    argmax   = that of the part with the largest score, the first of equals

with pi_r = exp(lse_r + d_r - lse), the probability of part r; m_r, the mass of the target there (1 where r holds an
index target); and W_r, the sum of its class weights. So one exchange of a few numbers per row is all there is to it:
the parts' statistics are stable as they are, and need no maximum over all the ranks first.

Each function is an operator of torch as well, for whoever looks on (see `_ops`): the exchange between the ranks then
happens inside an opaque operator, with all its checks. So the number of the first class held here, which is not known
before the exchange, is a tensor: `layout`, [start, classes], on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _ops, _torch
from ._exchange import exchange
from ._ops import SPEC, UPSTREAM, WANTED, define, empty_gradient, nothing
from ._records import RowSpec, Stats, Upstream, Wanted, compute_dtype


class Shared(NamedTuple):
    """What each rank knows after the exchange."""

    stats: Stats  #               over all classes
    layout: Tensor  #             (2,): the first class held here, and how many there are
    weight_sum: Tensor | None  #  0-d: sum_c w_c, with class weights
    row_weight: Tensor | None  #  (N,): w_y, with class weights and index targets
    part: Tensor | None  #        (C,): the weights of the classes held here, for probabilities or wsum

    def pack(self) -> list[Tensor]:
        """All tensors that there are."""
        return [*self.stats.pack(), *[tensor for tensor in self[1:] if tensor is not None]]

    @classmethod
    def unpack(cls, found: Sequence[Tensor], wanted: Wanted, soft: bool, weighted: bool) -> Shared:
        """The inverse."""
        count = wanted.number(soft)
        left = iter(found[count:])
        there = (True, weighted, weighted and not soft, weighted and (soft or wanted.wsum))
        return cls(wanted.unpack(found[:count], soft), *[next(left) if yes else None for yes in there])  # type: ignore[arg-type]

    @classmethod
    def empty(cls, rows: Tensor, classes: int, dtype: torch.dtype, wanted: Wanted, soft: bool) -> list[Tensor]:
        """Packed, without numbers, where there are class weights, whose dtype is `dtype`."""
        number = rows.new_empty((), dtype=torch.float64)
        row_weight = [] if soft else [rows.new_empty(rows.shape[:1], dtype=torch.float64)]
        part = [rows.new_empty(classes, dtype=dtype)] if soft or wanted.wsum else []
        return [*wanted.empty(rows, soft), torch.empty(2, dtype=torch.int64), number, *row_weight, *part]


def parallel_stats(
    logits: Tensor, target: Tensor, weight: Tensor | None, group: str, spec: RowSpec, wanted: Wanted
) -> Shared:
    """Statistics over all classes; `weight` is over the classes held here or over all."""
    soft = target.is_floating_point()

    def local(start: int, total: int, class_weight: Tensor | None) -> Stats:
        own, w = spec._replace(start=start, classes=total), class_weight if soft or wanted.wsum else None
        return _ops.row_statistics(logits, target, own, wanted, w)

    ignore_index, scale, softcap, *_ = spec
    note = f"{len(logits)} rows of {logits.dtype}, {ignore_index=}, logit_scale={scale}, {softcap=}"
    ignored = None if soft else target == ignore_index
    return share(group, note, target, ignored, weight, (logits.shape[1], compute_dtype(logits)), wanted, local)


def share(
    group: str,
    note: str,
    target: Tensor,
    ignored: Tensor | None,
    weight: Tensor | None,
    held: tuple[int, torch.dtype],
    wanted: Wanted,
    local: Callable[[int, int, Tensor | None], Stats],
) -> Shared:
    """What all ranks know, from the statistics of the classes held here, `local(start, total, class_weight)`.

    `ignored`: the rows that do not count; None where all do. `held`: how many classes these are, and the dtype of their
    weights.
    """
    (C, dtype), N, soft = held, len(target), target.is_floating_point()
    parts: list[Tensor] = []

    def compute(start: int, total: int) -> list[Tensor]:
        part = None if weight is None else _part(weight, C, start, total)
        class_weight = None if part is None else part.to(dtype, copy=True)
        parts[:] = [] if class_weight is None or not (soft or wanted.wsum) else [class_weight]
        stats = local(start, total, class_weight)
        vectors = stats.pack()
        if stats.argmax is not None:
            vectors[-1] = (stats.argmax + start).double()
        if part is not None:
            vectors += [] if soft else [_row_weights(part, target, start, ignored)]
            vectors += [part.sum(dtype=torch.float64).view(1)]
        return vectors

    asked = [name for name, yes in zip(("wsum", "entropy", "prediction"), wanted, strict=True) if yes]
    note = f"{note}, {'probabilities' if soft else 'class indices'}, {asked + ['weight'] * (weight is not None)}"
    ranks = _torch.process_group(group)
    gathered, sizes = exchange(ranks, C, note, target.device, compute)

    weighted = weight is not None and not soft
    count = wanted.number(soft) + weighted
    vectors = list(gathered[:, : count * N].view(len(sizes), count, N).unbind(1))
    row_weight = vectors.pop().sum(0) if weighted else None
    layout = torch.tensor([sum(sizes[: ranks.rank()]), sum(sizes)])
    weights = gathered.new_tensor(sizes) if weight is None else gathered[:, -1]
    weight_sum = None if weight is None else weights.sum()
    stats = _whole(wanted.unpack(vectors, soft), target, ignored, sizes, weights[:, None])
    return Shared(stats, layout, weight_sum, row_weight, parts[0] if parts else None)


def _whole(parts: Stats, target: Tensor, ignored: Tensor | None, sizes: tuple[int, ...], weights: Tensor) -> Stats:
    """From the statistics of the parts, each (R, N), those of the whole, each (N,). `weights`: (R, 1), W_r."""
    peak = parts.top.masked_fill(parts.lse == -torch.inf, -torch.inf)  # a part of -inf, or without classes
    top = peak.amax(0)
    top = top.masked_fill(top == -torch.inf, 0)
    d = parts.top - top
    lses = parts.lse + d
    lse = lses.logsumexp(0)
    mass = parts.mass
    if mass is None:
        ends = [sum(sizes[: r + 1]) for r in range(len(sizes))]
        mass = torch.stack([(target >= end - C) & (target < end) for C, end in zip(sizes, ends, strict=True)]).double()
        mass = mass if ignored is None else mass.masked_fill(ignored, 0)
    picked = (parts.picked + mass * d).sum(0)
    wsum = None if parts.wsum is None else (parts.wsum + weights * d).sum(0)
    entropy = argmax = None
    if parts.entropy is not None:
        pi = (lses - lse).exp()
        entropy = (torch.where(pi == 0, 0, pi * parts.entropy) + torch.special.entr(pi)).sum(0)
    if parts.argmax is not None:
        score = peak.masked_fill(parts.lse.isnan(), torch.inf)  # +inf or NaN is in that part
        held = [r for r, C in enumerate(sizes) if C] or [0]  # a part without classes has no say
        argmax = parts.argmax[held].gather(0, score[held].argmax(0, keepdim=True))[0].long()
    found = Stats(top, lse, picked, None if parts.mass is None else parts.mass.sum(0), wsum, entropy, argmax)
    if ignored is None:
        return found
    return Stats(*[None if x is None else x.masked_fill(ignored, -1 if x is argmax else 0) for x in found])  # type: ignore[arg-type]


def parallel_grad(
    logits: Tensor,
    target: Tensor,
    top: Tensor,
    lse: Tensor,
    upstream: Upstream,
    class_weight: Tensor | None,
    layout: Tensor,
    spec: RowSpec,
    out: Tensor | None = None,
) -> Tensor:
    """`row_gradient` for the classes held here, with the lse of all classes."""
    own = spec._replace(start=int(layout[0]))
    return _ops.row_gradient(logits, target, top, lse, upstream, own, class_weight, out)


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
    """w_y (N,) where y is held here, else 0."""
    local = target.long() - start
    here = (local >= 0) & (local < len(part))
    here = here if ignored is None else here & ~ignored
    if len(part) == 0:
        return here.double()
    return part.double()[local.clamp(0, len(part) - 1)].masked_fill(~here, 0)


# ---------------------------------------------------------------------------------------------------- operators


def _run_stats(logits: Tensor, target: Tensor, weight: Tensor | None, group: str, *flat: Any) -> list[Tensor]:
    return parallel_stats(logits, target, weight, group, RowSpec(*flat[:5]), Wanted(*flat[5:])).pack()


def _empty_stats(logits: Tensor, target: Tensor, weight: Tensor | None, group: str, *flat: Any) -> list[Tensor]:
    wanted, soft = Wanted(*flat[5:]), target.is_floating_point()
    found = Shared.empty(logits, logits.shape[1], compute_dtype(logits), wanted, soft)
    return found if weight is not None else found[: wanted.number(soft) + 1]


def _run_grad(
    logits: Tensor, target: Tensor, top: Tensor, lse: Tensor, *rest: Any, out: Tensor | None = None
) -> Tensor:
    upstream, (class_weight, layout), spec = Upstream(*rest[:4]), rest[4:6], RowSpec(*rest[6:])
    return parallel_grad(logits, target, top, lse, upstream, class_weight, layout, spec, out)


def _run_grad_(logits: Tensor, *rest: Any) -> None:
    _run_grad(logits, *rest, out=logits)


_STATS = f"(Tensor logits, Tensor target, Tensor? weight, str group, {SPEC}, {WANTED}) -> Tensor[]"
_REST = f"Tensor target, Tensor top, Tensor lse, {UPSTREAM}, Tensor? class_weight, Tensor layout, {SPEC}"
define("parallel_stats", _STATS, _run_stats, _empty_stats)
define("parallel_grad", f"(Tensor logits, {_REST}) -> Tensor", _run_grad, empty_gradient)
define("parallel_grad_", f"(Tensor(a!) logits, {_REST}) -> ()", _run_grad_, nothing)
