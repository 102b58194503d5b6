"""Statistics of rows whose classes are spread over ranks, and the gradient for those held here: no autograd yet.

The statistics of a row over all classes follow from those over its parts, r = 1 ... R:

    lse      = log sum_r exp(lse_r)                   picked, mass, wsum: the sums over r
    entropy  = sum_r pi_r (entropy_r - log pi_r)      pi_r = exp(lse_r - lse), the probability of part r
    argmax   = that of the part with the largest score, the first of equals

so one exchange of a few numbers per row is all there is to it: the parts' statistics are stable as they are, and need
no maximum over all the ranks first.

Each function is an operator of torch as well, for whoever looks on (see `_ops`): the exchange between the ranks then
happens inside an opaque operator, with all its checks. So the number of the first class held here, which is not known
before the exchange, is a tensor: `layout`, [start, classes], on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import distributed_c10d

from . import _primitives
from ._backends import compute_dtype, scores
from ._exchange import exchange

Local = tuple[list[Tensor], Tensor | None]

_READING = "int ignore_index, float scale, float? softcap"
_UPSTREAM = "Tensor target, Tensor lse, Tensor g_lse, Tensor g_picked, Tensor? g_wsum, Tensor? g_entropy"


def parallel_stats(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    group: str,
    ignore_index: int,
    scale: float,
    softcap: float | None,
    want_wsum: bool,
    want_entropy: bool,
    want_argmax: bool,
) -> list[Tensor]:
    """Those of `Stats` over all classes that are wanted; layout; and with a weight, over classes held here or over all:

    its sum; of each row's target (index targets); its part for the classes held here (probabilities or wsum).
    """
    soft = target.is_floating_point()

    def local(start: int, total: int, class_weight: Tensor | None) -> Local:
        stats = _primitives.lse_and_pick(
            logits,
            target,
            start=start,
            classes=total,
            ignore_index=ignore_index,
            scale=scale,
            softcap=softcap,
            class_weight=class_weight if soft or want_wsum else None,
            want_wsum=want_wsum,
            want_entropy=want_entropy,
            want_argmax=want_argmax,
        )
        peak = None if stats.argmax is None else _peak(logits, stats.argmax, scale, softcap)
        return [stat for stat in stats if stat is not None], peak

    note = f"{len(logits)} rows of {logits.dtype}, {ignore_index=}, logit_scale={scale}, {softcap=}"
    held, wanted = (logits.shape[1], compute_dtype(logits)), (want_wsum, want_entropy, want_argmax)
    ignored = None if soft else target == ignore_index
    return share(group, note, target, ignored, weight, held, wanted, local)


def share(
    group: str,
    note: str,
    target: Tensor,
    ignored: Tensor | None,
    weight: Tensor | None,
    held: tuple[int, torch.dtype],
    wanted: tuple[bool, bool, bool],
    local: Callable[[int, int, Tensor | None], Local],
) -> list[Tensor]:
    """What `parallel_stats` returns, from the statistics of the classes held here.

    `ignored`: the rows that do not count; None where all do. `held`: how many classes these are, and the dtype of their
    weights. `local(start, total, class_weight)` gives those of `Stats` that are wanted, and the largest score of each
    row if the argmax is among them.
    """
    (C, dtype), (want_wsum, want_entropy, want_argmax) = held, wanted
    N, soft = len(target), target.is_floating_point()
    parts: list[Tensor] = []

    def compute(start: int, total: int) -> list[Tensor]:
        part = None if weight is None else _part(weight, C, start, total)
        class_weight = None if part is None else part.to(dtype, copy=True)
        parts[:] = [] if class_weight is None or not (soft or want_wsum) else [class_weight]
        stats, peak = local(start, total, class_weight)
        vectors = stats[: len(stats) - want_argmax]
        if peak is not None:
            vectors += [peak, (stats[-1] + start).double()]
        if part is not None:
            vectors += [] if soft else [_row_weights(part, target, start, ignored)]
            vectors += [part.sum(dtype=torch.float64).view(1)]
        return vectors

    names = ("wsum", "entropy", "prediction", "weight")
    asked = [name for name, yes in zip(names, (*wanted, weight is not None), strict=True) if yes]
    note = f"{note}, {'probabilities' if soft else 'class indices'}, {asked}"
    ranks = distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type, attr-defined]
    gathered, sizes = exchange(ranks, C, note, target.device, compute)

    weighted = weight is not None and not soft
    count = 2 + soft + want_wsum + want_entropy + 2 * want_argmax + weighted
    vectors = list(gathered[:, : count * N].view(len(sizes), count, N).unbind(1))
    row_weight = [vectors.pop().sum(0)] if weighted else []
    layout = torch.tensor([sum(sizes[: ranks.rank()]), sum(sizes)])
    weight_sum = [] if weight is None else [gathered[:, -1].sum()]
    found = _whole(vectors, ignored, sizes, want_entropy, want_argmax)
    return [*found, layout, *weight_sum, *row_weight, *parts]


def _whole(
    vectors: list[Tensor], ignored: Tensor | None, sizes: tuple[int, ...], has_entropy: bool, has_argmax: bool
) -> list[Tensor]:
    """From the statistics of the parts, each (R, N), those of the whole, each (N,)."""
    index, peak = (vectors.pop(), vectors.pop()) if has_argmax else (None, None)
    entropies = vectors.pop() if has_entropy else None
    lse = vectors[0].logsumexp(0)
    found = [lse, *[vector.sum(0) for vector in vectors[1:]]]
    if entropies is not None:
        pi = (vectors[0] - lse).exp()
        found.append((torch.where(pi == 0, 0, pi * entropies) + torch.special.entr(pi)).sum(0))
    if ignored is not None:  # the sums are 0 as they are
        for i in {0, len(found) - 1 if has_entropy else 0}:
            found[i] = found[i].masked_fill(ignored, 0)
    if index is not None and peak is not None:
        held = [r for r, C in enumerate(sizes) if C] or [0]  # a part without classes has no say
        first = peak[held].argmax(0, keepdim=True)
        argmax = index[held].gather(0, first)[0].long()
        found.append(argmax if ignored is None else argmax.masked_fill(ignored, -1))
    return found


def parallel_grad(
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    g_lse: Tensor,
    g_picked: Tensor,
    g_wsum: Tensor | None,
    g_entropy: Tensor | None,
    class_weight: Tensor | None,
    layout: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float | None,
    out: Tensor | None = None,
) -> Tensor:
    """`_primitives.logits_grad` for the classes held here, with the lse of all classes."""
    return _primitives.logits_grad(
        logits,
        target,
        lse,
        g_lse,
        g_picked,
        g_wsum,
        g_entropy,
        start=int(layout[0]),
        ignore_index=ignore_index,
        scale=scale,
        softcap=softcap,
        class_weight=class_weight,
        out=out,
    )


def parallel_grad_(logits: Tensor, *arguments: Any) -> None:
    """The same, written over the logits."""
    parallel_grad(*(logits, *arguments, logits))


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


def _peak(logits: Tensor, argmax: Tensor, scale: float, softcap: float | None) -> Tensor:
    """The largest score of each row; -inf where there are no classes."""
    if logits.shape[1] == 0:
        return torch.full_like(argmax, -torch.inf, dtype=torch.float64)
    return scores(logits.gather(1, argmax.clamp(min=0)[:, None])[:, 0], scale, softcap).double()


def _row_weights(part: Tensor, target: Tensor, start: int, ignored: Tensor | None) -> Tensor:
    """w_y (N,) where y is held here, else 0."""
    local = target.long() - start
    here = (local >= 0) & (local < len(part))
    here = here if ignored is None else here & ~ignored
    if len(part) == 0:
        return here.double()
    return part.double()[local.clamp(0, len(part) - 1)].masked_fill(~here, 0)


def shapes_of_stats(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    group: str,
    ignore_index: int,
    scale: float,
    softcap: float | None,
    want_wsum: bool,
    want_entropy: bool,
    want_argmax: bool,
) -> list[Tensor]:
    soft = target.is_floating_point()
    row = logits.new_empty(logits.shape[:1], dtype=torch.float64)
    found = [torch.empty_like(row) for _ in range(2 + soft + want_wsum + want_entropy)]
    found += [torch.empty_like(row, dtype=torch.int64)] * want_argmax
    found.append(torch.empty(2, dtype=torch.int64))
    if weight is not None:
        found += [row.new_empty(())] if soft else [row.new_empty(()), torch.empty_like(row)]
        found += [logits.new_empty(logits.shape[1:], dtype=compute_dtype(logits))] * (soft or want_wsum)
    return found


def _shape_of_gradient(logits: Tensor, *arguments: object) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _no_result(logits: Tensor, *arguments: object) -> None:
    return None


_REST = f"{_UPSTREAM}, Tensor? class_weight, Tensor layout, {_READING}"
for _name, _schema, _run, _shapes in (
    (
        "parallel_stats",
        f"(Tensor logits, Tensor target, Tensor? weight, str group, {_READING}, bool want_wsum, bool want_entropy, "
        "bool want_argmax) -> Tensor[]",
        parallel_stats,
        shapes_of_stats,
    ),
    ("parallel_grad", f"(Tensor logits, {_REST}) -> Tensor", parallel_grad, _shape_of_gradient),
    ("parallel_grad_", f"(Tensor(a!) logits, {_REST}) -> ()", parallel_grad_, _no_result),
):
    torch.library.define(f"xent::{_name}", _schema)
    torch.library.impl(f"xent::{_name}", "default", _run)
    torch.library.register_fake(f"xent::{_name}", _shapes)
