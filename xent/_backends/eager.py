"""The primitives in torch operations: the specification, for any device and dtype.

Rows are taken in blocks, so that nothing else of the size of the logits ever exists; on the CPU in blocks whose scores
fit in the cache, so that the passes over a block (maximum, subtraction, exp, sum) read DRAM once between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._records import RowSpec, Samples, Stats, Upstream, Wanted, compute_dtype, statistics_dtype
from . import advise_huge_pages, blocks, check_range, rows_of_block, scores, slope

CACHE_BYTES = 2 << 20  # of scores per block: what the second-level caches of a few cores hold twice


ABOUT = "torch operations on blocks of rows, for any device and dtype"


def refusal(logits: Tensor, target: Tensor) -> str | None:
    """Why this backend cannot take these tensors: it takes all."""
    return None


def row_statistics(logits: Tensor, target: Tensor, spec: RowSpec, wanted: Wanted, class_weight: Tensor | None) -> Stats:
    """See `xent._rows.dispatch.row_statistics`."""
    dtype = statistics_dtype(logits.device)
    zeros = torch.zeros(logits.shape[:2], dtype=dtype, device=logits.device)
    soft = target.is_floating_point()
    if not soft:
        check_range(target, spec.classes or 0, spec.ignore_index)
        y, here = _local(target, spec.start, logits.shape[2])

    top, s = zeros.clone(), zeros + 1  # a row that is never read has lse = log 1
    picked, mass = zeros.clone(), zeros.clone() if soft else None
    wsum = zeros.clone() if wanted.wsum else None
    eu = zeros.clone() if wanted.entropy else None
    argmax = torch.full_like(zeros, -1, dtype=torch.int64) if wanted.argmax else None
    for rows in _blocks(logits, target, spec.ignore_index):
        z = scores(logits[rows], spec.scale, spec.softcap)
        peak = z.amax(-1)
        peak = torch.where(peak.isfinite(), peak, 0)  # a row of -inf: exp(-inf - 0), not exp(-inf - -inf)
        top[rows] = peak.to(dtype)
        u = z - peak[..., None]
        if mass is None:
            picked[rows] = u.gather(-1, y[rows][..., None])[..., 0].to(dtype)
        else:
            q = _weighted(target[rows].to(u.dtype), class_weight)
            mass[rows] = q.sum(-1, dtype=dtype)
            picked[rows] = _dot(q, u, dtype)
        if wsum is not None:
            wsum[rows] = u.sum(-1, dtype=dtype) if class_weight is None else _dot(class_weight, u, dtype)
        if argmax is not None:
            argmax[rows] = z.argmax(-1)
        e = u.exp_() if eu is None else u.exp()
        s[rows] = e.sum(-1).to(dtype)
        if eu is not None:
            eu[rows] = _dot(e, u, dtype)
        del z, u, e  # so that the next block gets the same memory, which is in the cache and need not be faulted in

    lse = s.log().masked_fill_(s.isposinf(), torch.nan)  # of a row with +inf
    entropy = None if eu is None else lse - eu / s  # -sum_c p_c (u_c - log s)
    if mass is not None:
        return Stats(top, lse, picked, mass, wsum, entropy, argmax)

    stats = Stats(top, lse, torch.where(here, picked, 0), None, wsum, entropy, argmax)
    ignored = target == spec.ignore_index
    return Stats(*[None if n is None else n.masked_fill(ignored, -1 if n is argmax else 0) for n in stats])  # type: ignore[arg-type]


def row_gradient(
    logits: Tensor,
    target: Tensor,
    top: Tensor,
    lse: Tensor,
    upstream: Upstream,
    spec: RowSpec,
    class_weight: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """See `xent._rows.dispatch.row_gradient`."""
    if out is None:
        out = advise_huge_pages(torch.empty_like(logits))
    dtype = compute_dtype(logits)

    def column(numbers: Tensor) -> Tensor:
        return numbers.to(dtype)[..., None]

    # p (g_lse - g_entropy log p) = exp(t) (a - h t) with t = z - top, and lse in the two numbers of the row.
    base, factor = column(top), torch.exp(-lse)
    g_entropy = upstream.entropy
    a = column((upstream.lse + (0 if g_entropy is None else g_entropy * lse)) * factor)
    h = None if g_entropy is None else column(g_entropy * factor)
    g = column(upstream.picked)
    b = None if upstream.wsum is None else column(upstream.wsum)
    soft = target.is_floating_point()
    if not soft:
        y, here = _local(target, spec.start, logits.shape[2])
        y, g = y[..., None], g.masked_fill(~here[..., None], 0)
    ignored = None if soft else (target == spec.ignore_index)[..., None]
    plain = spec.scale == 1 and spec.softcap is None
    drop = soft or _can_drop(logits)
    for rows in _blocks(logits, target, spec.ignore_index):
        z = scores(logits[rows], spec.scale, spec.softcap)
        # Straight into the result where its rows are at hand and z is not needed again: no copy at the end.
        direct = drop and plain and h is None and out.dtype == dtype and isinstance(rows[0], slice)
        t = torch.sub(z, base[rows], out=out[rows] if direct else None)
        if h is None:
            d = t.exp_().mul_(a[rows])
        else:  # p log p is 0 where p is 0: the clamp keeps 0 * -inf out
            d = t.exp().mul_(a[rows] - h[rows] * t.clamp(min=-1e4))
        if soft:
            d += g[rows] * _weighted(target[rows].to(dtype), class_weight)
        else:
            d.scatter_add_(-1, y[rows], g[rows])
        if b is not None:
            d += _weighted(b[rows], class_weight)
        if not plain:
            d *= slope(z, spec.scale, spec.softcap)
        if ignored is not None and not drop:
            d = torch.where(ignored[rows], 0, d)
        if not direct:
            out[rows] = d.to(out.dtype)
        del z, t, d
    if ignored is not None and drop:
        out[ignored[..., 0].nonzero(as_tuple=True)] = 0
    return out


def row_samples(
    logits: Tensor, target: Tensor, top: Tensor, lse: Tensor, uniform: Tensor, spec: RowSpec, resolution: float
) -> Samples:
    """See `xent._rows.dispatch.row_samples`."""
    C, dtype, soft = logits.shape[2], statistics_dtype(logits.device), target.is_floating_point()
    counts = torch.zeros(logits.shape[1], dtype=torch.int64, device=logits.device)
    classes, kept = [counts.new_empty(0, dtype=torch.int32)], [logits.new_empty(0, dtype=compute_dtype(logits))]
    for rows in _blocks(logits, target, spec.ignore_index):
        z = scores(logits[rows], spec.scale, spec.softcap).view(-1, C)
        base, factor = (x[rows].to(z.dtype).view(-1, 1) for x in (top, torch.exp(-lse)))
        p, u = torch.exp(z - base) * factor, uniform[rows[1]].to(dtype)[:, None]
        small, keep = p < resolution, p >= resolution
        if not soft:
            y, here = _local(target[rows].view(-1, 1), spec.start, C)
            small.scatter_(1, y, small.gather(1, y) & ~here)
            keep.scatter_(1, y, keep.gather(1, y) | here)
        steps = (torch.where(small, p, 0).cumsum(1, dtype=dtype) / resolution + u).floor_()
        keep |= steps.diff(dim=1, prepend=u.floor()) > 0
        if not soft:
            keep &= (target[rows] != spec.ignore_index).view(-1, 1)
        counts[rows[1]] = keep.sum(1)
        classes.append(keep.nonzero()[:, 1].int())
        kept.append(p[keep])
    return Samples(counts, torch.cat(classes), torch.cat(kept))


def transpose(ends: Tensor, classes: Tensor, coefficient: Tensor, C: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `xent._rows.dispatch.transpose`."""
    found, order = classes.sort(stable=True)
    rows = torch.searchsorted(ends, order, right=True, out_int32=True)
    return torch.searchsorted(found, torch.arange(C, device=ends.device), right=True), rows, coefficient[order]


def gather_sums(ends: Tensor, index: Tensor, coefficient: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """See `xent._rows.dispatch.gather_sums`. Half-precision rows become float32 some columns at a time."""
    kind = torch.int32 if len(index) < 2**31 else torch.int64
    offsets, index = torch.nn.functional.pad(ends, (1, 0)).to(kind), index.to(kind)
    found = torch.empty(len(ends), rows.shape[1], dtype=dtype, device=rows.device)
    width = rows.shape[1] if rows.dtype == coefficient.dtype else rows_of_block(rows.T, CACHE_BYTES)
    for at in range(0, rows.shape[1], width):
        part = rows[:, at : at + width].to(coefficient.dtype)
        found[:, at : at + width] = torch.nn.functional.embedding_bag(
            index, part, offsets, mode="sum", per_sample_weights=coefficient, include_last_offset=True
        )
    return found


def _weighted(coefficient: Tensor, class_weight: Tensor | None) -> Tensor:
    return coefficient if class_weight is None else coefficient * class_weight


def _dot(coefficient: Tensor, u: Tensor, dtype: torch.dtype) -> Tensor:
    """Row sums of coefficient * u, where a coefficient of 0 contributes 0 even if u is infinite."""
    return (coefficient * u).masked_fill_(coefficient == 0, 0).sum(-1, dtype=dtype)


def _local(target: Tensor, start: int, C: int) -> tuple[Tensor, Tensor]:
    """The index among the C classes held here, safe to read through, and whether it is meant."""
    local = target.long() - start
    return local.clamp(0, C - 1), (local >= 0) & (local < C)


def _can_drop(logits: Tensor) -> bool:
    """Whether the ignored rows can be looked up: not without a host sync on a device, nor in a traced graph."""
    return logits.device.type == "cpu" and not torch.compiler.is_compiling()


def _blocks(logits: Tensor, target: Tensor, ignore_index: int) -> Iterator[tuple[Any, Any]]:
    """Indices of the rows that count, in blocks that stay in cache; of all rows where they cannot be looked up."""
    A, B, _ = logits.shape
    count = rows_of_block(logits, CACHE_BYTES)
    keep = target != ignore_index if not target.is_floating_point() and _can_drop(logits) else None
    if keep is None or keep.all():
        yield from blocks(A, B, count)
    else:
        yield from zip(*[torch.split(index, count) for index in keep.nonzero(as_tuple=True)], strict=True)
