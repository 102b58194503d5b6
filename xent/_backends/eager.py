"""The two primitives in torch operations: the specification, for any device and dtype.

Rows are taken in blocks whose scores fit in the cache, so that the passes over a block (maximum, subtraction, exp,
sum) read DRAM once between them, and no second (N, C) tensor ever exists.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import Stats, advise_huge_pages, check_range, compute_dtype, scores, slope, split, statistics_dtype

CACHE_BYTES = 2 << 20  # of scores per block: what the second-level caches of a few cores hold twice


ABOUT = "torch operations on blocks of rows, for any device and dtype"


def refusal(logits: Tensor, target: Tensor) -> str | None:
    """Why this backend cannot take these tensors: it takes all."""
    return None


def lse_and_pick(
    logits: Tensor,
    target: Tensor,
    *,
    start: int,
    classes: int,
    ignore_index: int,
    scale: float,
    softcap: float | None,
    class_weight: Tensor | None,
    want_wsum: bool,
    want_entropy: bool,
    want_argmax: bool,
) -> Stats:
    """See `xent._primitives.lse_and_pick`."""
    N, C = logits.shape
    dtype = statistics_dtype(logits.device)
    zeros = torch.zeros(N, dtype=dtype, device=logits.device)
    soft = target.is_floating_point()
    if not soft:
        check_range(target, classes, ignore_index)
        y, here = _local(target, start, C)

    m, s = zeros.clone(), zeros + 1  # a row that is never read has lse = log 1 + 0
    picked, mass = zeros.clone(), zeros.clone() if soft else None
    wsum = zeros.clone() if want_wsum else None
    eu = zeros.clone() if want_entropy else None
    argmax = torch.full_like(zeros, -1, dtype=torch.int64) if want_argmax else None
    for rows in _blocks(logits, target, ignore_index):
        z = scores(logits[rows], scale, softcap)
        peak = z.amax(1)
        peak = peak.masked_fill_(peak == -torch.inf, 0)  # a row of -inf: exp(-inf - 0), not exp(-inf - -inf)
        m[rows] = peak.to(dtype)
        u = z - peak[:, None]
        # Weighted sums are taken of u, whose decimals survive a common offset of the logits; m is added at the end.
        if mass is None:
            picked[rows] = z.gather(1, y[rows, None])[:, 0].to(dtype)
        else:
            q = _weighted(target[rows].to(u.dtype), class_weight)
            mass[rows] = q.sum(1, dtype=dtype)
            picked[rows] = _dot(q, u, dtype)
        if wsum is not None:
            wsum[rows] = u.sum(1, dtype=dtype) if class_weight is None else _dot(class_weight, u, dtype)
        if argmax is not None:
            argmax[rows] = z.argmax(1)
        e = u.exp_() if eu is None else u.exp()
        s[rows] = e.sum(1).to(dtype)
        if eu is not None:
            eu[rows] = _dot(e, u, dtype)
        del z, u, e  # so that the next block gets the same memory, which is in the cache and need not be faulted in

    lse = s.log() + m
    if wsum is not None:
        wsum += m * (C if class_weight is None else class_weight.sum(dtype=dtype))
    entropy = None if eu is None else s.log() - eu / s  # -sum_c p_c (u_c - log s)
    if mass is not None:
        return Stats(lse, picked + m * mass, mass, wsum, entropy, argmax)

    stats = Stats(lse, torch.where(here, picked, 0), None, wsum, entropy, argmax)
    ignored = target == ignore_index
    return Stats(*[None if n is None else n.masked_fill(ignored, -1 if n is argmax else 0) for n in stats])  # type: ignore[arg-type]


def logits_grad(
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    g_lse: Tensor,
    g_picked: Tensor,
    g_wsum: Tensor | None,
    g_entropy: Tensor | None,
    *,
    start: int,
    ignore_index: int,
    scale: float,
    softcap: float | None,
    class_weight: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """See `xent._primitives.logits_grad`."""
    if out is None:
        out = advise_huge_pages(torch.empty_like(logits, memory_format=torch.contiguous_format))
    dtype = compute_dtype(logits)
    high, low = split(lse, dtype)
    # p (g_lse - g_entropy log p) = exp(t) (a - h t) with t = z - high and all of low in the two row vectors.
    h = None if g_entropy is None else g_entropy.to(dtype)[:, None]
    a = (g_lse.to(dtype)[:, None] + (0 if h is None else h * low)) * torch.exp(-low)
    h = None if h is None else h * torch.exp(-low)
    g = g_picked.to(dtype)[:, None]
    b = None if g_wsum is None else g_wsum.to(dtype)[:, None]
    soft = target.is_floating_point()
    if not soft:
        y, here = _local(target, start, logits.shape[1])
        y, g = y[:, None], g.masked_fill(~here[:, None], 0)
    plain = scale == 1 and softcap is None
    drop = soft or _can_drop(logits)
    for rows in _blocks(logits, target, ignore_index):
        z = scores(logits[rows], scale, softcap)
        # Straight into the result where its rows are at hand and z is not needed again: no copy at the end.
        direct = drop and plain and h is None and out.dtype == dtype and isinstance(rows, slice)
        t = torch.sub(z, high[rows], out=out[rows] if direct else None)
        if h is None:
            d = t.exp_().mul_(a[rows])
        else:  # p log p is 0 where p is 0: the clamp keeps 0 * -inf out
            d = t.exp().mul_(a[rows] - h[rows] * t.clamp(min=-1e4))
        if soft:
            d += g[rows] * _weighted(target[rows].to(dtype), class_weight)
        else:
            d.scatter_add_(1, y[rows], g[rows])
        if b is not None:
            d += _weighted(b[rows], class_weight)
        if not plain:
            d *= slope(z, scale, softcap)
        if not drop:
            d = torch.where((target == ignore_index)[:, None], 0, d)
        if not direct:
            out[rows] = d.to(out.dtype)
        del z, t, d
    if not soft and drop:
        out[(target == ignore_index).nonzero()[:, 0]] = 0
    return out


def _weighted(coefficient: Tensor, class_weight: Tensor | None) -> Tensor:
    return coefficient if class_weight is None else coefficient * class_weight


def _dot(coefficient: Tensor, u: Tensor, dtype: torch.dtype) -> Tensor:
    """Row sums of coefficient * u, where a coefficient of 0 contributes 0 even if u is infinite."""
    return (coefficient * u).masked_fill_(coefficient == 0, 0).sum(1, dtype=dtype)


def _local(target: Tensor, start: int, C: int) -> tuple[Tensor, Tensor]:
    """The index among the C classes held here, safe to read through, and whether it is meant."""
    local = target.long() - start
    return local.clamp(0, C - 1), (local >= 0) & (local < C)


def _can_drop(logits: Tensor) -> bool:
    """Whether the ignored rows can be looked up: not without a host sync on a device, nor in a traced graph."""
    return logits.device.type == "cpu" and not torch.compiler.is_compiling()


def _blocks(logits: Tensor, target: Tensor, ignore_index: int) -> Iterator[slice | Tensor]:
    """The rows that count, in blocks that stay in cache; where they cannot be looked up, all rows at once."""
    N, C = logits.shape
    if not _can_drop(logits):
        yield slice(None)
        return
    count = max(1, CACHE_BYTES // (C * compute_dtype(logits).itemsize))
    keep = None if target.is_floating_point() else target != ignore_index
    if keep is None or keep.all():
        for i in range(0, N, count):
            yield slice(i, i + count)
    else:
        yield from torch.split(keep.nonzero()[:, 0], count)
