"""The primitives of `_rows/dispatch.py` in torch operations: the specification, for any device and dtype.

Rows are taken in blocks, so that nothing else of the size of the logits ever exists; on the CPU in blocks whose scores
fit in the cache, so that the passes over a block (maximum, subtraction, exp, sum) read DRAM once between them. What is
computed for each row stays there, too, until it is written: of few classes, that is most of the work.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._records import RowNumbers, RowSpec, Samples, Stats, Wanted, compute_dtype, statistics_dtype
from . import advise_huge_pages, blocks, check_range, rows_of_block, scores, slices, slope

CACHE_BYTES = 4 << 20  # of scores per block: in a third-level cache, and so many that operations outlast their calls

ABOUT = "torch operations on blocks of rows, for any device and dtype"


def refusal(logits: Tensor, target: Tensor) -> str | None:
    """Why this backend cannot take these tensors: it takes all."""
    return None


def row_statistics(logits: Tensor, target: Tensor, spec: RowSpec, wanted: Wanted, class_weight: Tensor | None) -> Stats:
    C, dtype, soft = logits.shape[2], statistics_dtype(logits.device), target.is_floating_point()
    all_held, kept, mask = _kept(logits, target, spec)
    if not soft and not all_held:
        check_range(target, spec.classes or 0, spec.ignore_index)
    stats = wanted.unpack(wanted.empty(logits, target), soft)
    if kept is not None:
        for all_rows in stats.pack():
            all_rows.fill_(-1 if all_rows is stats.argmax else 0)
    for rows in _blocks(logits, kept):
        z = scores(logits[rows], spec.scale, spec.softcap)
        top = z.amax(-1)
        u = z - top.clamp(min=torch.finfo(z.dtype).min)[..., None]  # of -inf: not -inf - -inf; of +inf: NaN, as due
        mass = wsum = argmax = None
        if soft:
            q = _weighted(target[rows].to(u.dtype), class_weight)
            picked, mass = _dot(q, u, dtype), q.sum(-1, dtype=dtype)
        else:
            y, here = (_index(target[rows], spec.start), None) if all_held else _local(target[rows], spec.start, C)
            picked = u.gather(-1, y[..., None])[..., 0]
            picked = picked if here is None else torch.where(here, picked, 0)
        if wanted.wsum:
            wsum = u.sum(-1, dtype=dtype) if class_weight is None else _dot(class_weight, u, dtype)
        if wanted.argmax:
            argmax = z.argmax(-1)
        e = u.exp() if wanted.entropy else u.exp_()
        s = e.sum(-1).to(dtype)
        mean = _dot(e, u, dtype) / s if wanted.entropy else None  # sum_c p_c u_c
        lse = s.log_()
        entropy = None if mean is None else lse - mean
        found = Stats(top.nan_to_num_(0, 0, 0), lse, picked, mass, wsum, entropy, argmax).pack()
        for all_rows, some in zip(stats.pack(), found, strict=True):
            if mask is not None:
                some = torch.where(mask[rows], some, -1 if some is argmax else 0)
            all_rows[rows] = some if kept is None else some.to(all_rows.dtype)
        del z, u, e  # so that the next block gets the same memory, which is in the cache and need not be faulted in
    return stats


def row_gradient(
    logits: Tensor, target: Tensor, numbers: RowNumbers, spec: RowSpec, class_weight: Tensor | None, out: Tensor | None
) -> Tensor:
    if out is None:
        out = advise_huge_pages(torch.empty_like(logits))
    C, dtype, soft = logits.shape[2], compute_dtype(logits), target.is_floating_point()
    top, lse, g_lse, g_picked, g_wsum, g_entropy = numbers
    all_held, kept, mask = _kept(logits, target, spec)
    if kept is not None:
        out[(target == spec.ignore_index).nonzero(as_tuple=True)] = 0

    def column(numbers: Tensor) -> Tensor:
        return numbers.to(dtype)[..., None]

    for rows in _blocks(logits, kept):
        z = scores(logits[rows], spec.scale, spec.softcap)
        # Straight into the result where its rows are at hand: no copy at the end.
        direct = g_entropy is None and out.dtype == dtype and isinstance(rows[0], slice)
        t = torch.sub(z, column(top[rows]), out=out[rows] if direct else None)
        # p (g_lse - g_entropy log p) = exp(t) (a - h t) with t = z - top, and lse in the two numbers of the row.
        factor = lse[rows].neg().exp_()
        if g_entropy is None:
            d = t.exp_().mul_(column(factor.mul_(g_lse[rows])))
        else:  # p log p is 0 where p is 0: the clamp keeps 0 * -inf out
            a = column((g_lse[rows] + g_entropy[rows] * lse[rows]) * factor)
            d = t.exp().mul_(a - column(g_entropy[rows] * factor) * t.clamp(min=-1e4))
        if soft:
            d += column(g_picked[rows]) * _weighted(target[rows].to(dtype), class_weight)
        else:
            y, here = (_index(target[rows], spec.start), None) if all_held else _local(target[rows], spec.start, C)
            g = g_picked[rows] if here is None else torch.where(here, g_picked[rows], 0)
            d.scatter_add_(-1, y[..., None], column(g))
        if g_wsum is not None:
            d += _weighted(column(g_wsum[rows]), class_weight)
        if spec.scale != 1 or spec.softcap is not None:
            d *= slope(z, spec.scale, spec.softcap)
        if mask is not None:
            d.masked_fill_(~mask[rows][..., None], 0)
        if not direct:
            out[rows] = d.to(out.dtype)
        del z, t, d
    return out


def linear(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """By parts of the head that stay in the cache: one product would pack all of it anew for each block of rows."""
    hidden = hidden.to(out.dtype)
    for part in slices(weight, CACHE_BYTES, out.dtype):
        torch.mm(hidden, weight[part].to(out.dtype).t(), out=out[:, part])


def row_samples(
    logits: Tensor, target: Tensor, top: Tensor, lse: Tensor, uniform: Tensor, spec: RowSpec, resolution: float
) -> Samples:
    C, dtype, soft = logits.shape[2], statistics_dtype(logits.device), target.is_floating_point()
    counts = torch.zeros(logits.shape[1], dtype=torch.int64, device=logits.device)
    classes, kept = [counts.new_empty(0, dtype=torch.int32)], [logits.new_empty(0, dtype=compute_dtype(logits))]
    for rows in _blocks(logits, _kept(logits, target, spec)[1], 4):  # some of float64
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
    """Part by part, since torch sorts with indices of int64: each entry's place is behind all that are before it."""
    found, step = torch.bincount(classes, minlength=C).cumsum(0), rows_of_block(classes[:, None], CACHE_BYTES // 4)
    rows, moved = torch.empty_like(classes), torch.empty_like(coefficient)
    next_place = torch.nn.functional.pad(found, (1, 0))[:-1]
    for at in range(0, len(classes), step):
        part, order = classes[at : at + step].sort(stable=True)
        order += at
        place = next_place[part] + torch.arange(len(part), device=part.device) - torch.searchsorted(part, part)
        rows[place] = torch.searchsorted(ends, order, right=True, out_int32=True)
        moved[place] = coefficient[order]
        next_place += torch.bincount(part, minlength=C)
    return found, rows, moved


def gather_sums(ends: Tensor, index: Tensor, coefficient: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Half-precision rows become float32 some columns at a time."""
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


def _index(target: Tensor, start: int) -> Tensor:
    return target.long() - start if start else target.long()


def _local(target: Tensor, start: int, C: int) -> tuple[Tensor, Tensor]:
    """The index among the C classes held here, safe to read through, and whether it is meant."""
    local = _index(target, start)
    return local.clamp(0, C - 1), (local >= 0) & (local < C)


def _kept(logits: Tensor, target: Tensor, spec: RowSpec) -> tuple[bool, tuple[Tensor, ...] | None, Tensor | None]:
    """Whether every row counts and has its target among the classes held here, as far as can be looked at.

    And of the rows that count the indices, or a mask: without a host sync on a device, or in a traced graph. None where
    all rows count.
    """
    if target.is_floating_point():
        return False, None, None
    if target.device.type != "cpu" or torch.compiler.is_compiling():
        return False, None, target != spec.ignore_index
    low, high = (int(y) for y in target.aminmax())
    if spec.start <= low and high < spec.start + logits.shape[2] and not low <= spec.ignore_index <= high:
        return True, None, None
    keep = target != spec.ignore_index
    count = int(keep.count_nonzero())
    if count == keep.numel():
        return False, None, None
    if 2 * count > keep.numel() and logits.stride(2) != 1:  # to copy rows whose classes lie apart takes longer
        return False, None, keep
    return False, keep.nonzero(as_tuple=True), None


def _blocks(logits: Tensor, kept: tuple[Tensor, ...] | None, terms: int = 1) -> Iterator[tuple[Any, Any]]:
    """Indices of rows in blocks that stay in cache, `terms` tensors of their size: of these rows, or of all."""
    A, B, _ = logits.shape
    count = rows_of_block(logits, CACHE_BYTES // terms)
    if kept is None:
        yield from blocks(A, B, count)
    else:
        yield from zip(*[torch.split(index, count) for index in kept], strict=True)
