"""The statistics of all rows of a linear head, and their gradient: exact, or sparse and unbiased.

With P the softmax of all rows, dh = G W and dW = G^T h multiply by

    G = diag(g_lse) P  +  one entry per row, the target's  +  g_wsum w^T

and of P nearly all is dust. `row_samples` keeps a probability p >= r as it is and rounds a smaller one to r or to 0, at
random, so that it is p on average: at most 1 / r + 2 entries per row. The other two terms are as they are: one entry,
computed in float64, and a matrix of rank one.

Forward saves these entries, so that no logits are needed again and none are held. A row's random number is a hash of
the call's seed and the row's number: neither threads nor blocks change it.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from .._backends import slope
from .._records import HeadRows, RowNumbers, compute_dtype, statistics_dtype
from .._rows import dispatch
from .blocks import Blocks, HeadOptions, Needs, exact_grads, in_their_dtypes

CHUNK = 1 << 20  # entries that are worked on at a time, in torch operations
GOLDEN, FIRST, SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # of splitmix64


class Entries(NamedTuple):
    """The sparse softmax: of row n the entries from ends[n - 1] to ends[n]. All are None if the gradient is exact."""

    picked: Tensor  #   (1, N) of the target, whose own entry is computed from it
    ends: Tensor  #     (N,) int64
    classes: Tensor  #  (E,) int32
    p: Tensor  #        (E,) probabilities, in `compute_dtype`; those below the resolution count as that


def uniform(seed: Tensor, rows: Tensor) -> Tensor:
    """A number in [0, 1) for each row number: splitmix64 (Steele, Lea & Flood, 2014) at that place of its sequence."""

    def shifted(x: Tensor, bits: int) -> Tensor:
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    x = seed + (rows + 1) * GOLDEN
    x = (x ^ shifted(x, 30)) * FIRST
    x = (x ^ shifted(x, 27)) * SECOND
    dtype = statistics_dtype(x.device)
    bits = 53 if dtype == torch.float64 else 24
    return shifted(x ^ shifted(x, 31), 64 - bits).to(dtype) * 2.0**-bits


@in_their_dtypes
def stats_of(rows: HeadRows, options: HeadOptions) -> list[Tensor]:
    """The statistics that are wanted, (1, N) each; for a row that is left out what the primitives say of one.

    With a seed the `Entries` come behind them.
    """
    blocks, hidden = Blocks(rows, options), rows.hidden
    found = options.wanted.empty(hidden[None], rows.target[None])
    for whole in found:
        whole.fill_(0 if whole.is_floating_point() else -1)
    numbers = torch.arange(len(hidden), device=hidden.device)
    counts, parts = torch.zeros_like(numbers), []
    for block in blocks:
        stats = blocks.stats(block)
        for whole, part in zip(found, stats.pack(), strict=True):
            whole[:, block.rows] = part
        if rows.seed is not None:
            u, r = uniform(rows.seed, numbers[block.rows]), options.resolution or 0
            samples = dispatch.row_samples(block.logits, block.target, stats.top, stats.lse, u, options.spec, r)
            counts[block.rows] = samples.counts
            parts.append(samples)
    if rows.seed is None:
        return found
    del blocks, block  # the buffer of logits, before the entries are there twice for a moment
    return [*found, counts.cumsum(0), torch.cat([p.classes for p in parts]), torch.cat([p.p for p in parts])]


@in_their_dtypes
def stats_grads(
    rows: HeadRows, entries: Entries, numbers: RowNumbers, g_mass: Tensor | None, options: HeadOptions, needs: Needs
) -> list[Tensor]:
    """Those gradients of `HeadRows.sources` that are wanted, each in its tensor's dtype; with entries, sparse."""
    tensors = [t for t, needed in zip(rows.sources, needs, strict=True) if needed and t is not None]
    sparse, rest = entries.ends is not None, numbers
    if sparse:  # of probabilities all but p is dense: it takes its products, and the logits once more
        rest = numbers._replace(g_lse=torch.zeros_like(numbers.lse), g_entropy=None)
    dense = not sparse or rows.target.is_floating_point()
    exact = exact_grads(rows, rest, g_mass, options, needs) if dense else []
    found = _sparse_part(rows, entries, numbers, options, needs) if sparse else []
    for part, other in zip(found, exact, strict=False):
        part += other
    found += exact[len(found) :]
    return [grad.to(t.dtype) for grad, t in zip(found, tensors, strict=True)]


def _sparse_part(
    rows: HeadRows, entries: Entries, numbers: RowNumbers, options: HeadOptions, needs: Needs
) -> list[Tensor]:
    """Of hidden, weight and bias: all but what is dense in itself."""
    count = int(entries.ends[-1]) if len(entries.ends) else 0  # behind them there may be room that no row took
    entries = entries._replace(classes=entries.classes[:count], p=entries.p[:count])
    hidden, weight, _, target, *_ = rows
    soft, compute, device = target.is_floating_point(), compute_dtype(weight), hidden.device
    coefficient = coefficients(target, entries, numbers, options, compute)
    rank_one = numbers.g_wsum is not None and not soft
    exact = compute if soft or rank_one else None  # what is still added to
    dh = dW = db = None
    if needs[0]:
        dh = dispatch.gather_sums(entries.ends, entries.classes, coefficient, weight, exact or hidden.dtype)
    if needs[1] or needs[2]:
        by_class = dispatch.transpose(entries.ends, entries.classes, coefficient, len(weight))
    del coefficient
    if needs[1]:
        dW = dispatch.gather_sums(*by_class, hidden, exact or weight.dtype)
    if needs[2]:
        ones = torch.ones(len(hidden), 1, dtype=compute, device=device)
        db = dispatch.gather_sums(*by_class, ones, compute)[:, 0]
    if rank_one and numbers.g_wsum is not None:
        kept = (target != options.spec.ignore_index).nonzero()[:, 0]
        a = torch.zeros(len(hidden), dtype=compute, device=device)
        a[kept] = (numbers.g_wsum[0][kept] * options.spec.scale).to(compute)
        w = options.class_weight(rows)
        w = torch.ones(len(weight), dtype=compute, device=device) if w is None else w
        classes = torch.arange(len(weight), dtype=torch.int32, device=device)
        if dh is not None:
            dh.addr_(a, _sum(classes, w, weight))
        if dW is not None:
            dW.addr_(w, _sum(kept.int(), a[kept], hidden))
        if db is not None:
            db += w * a.sum()
    return [grad for grad in (dh, dW, db) if grad is not None]


def _sum(index: Tensor, coefficient: Tensor, rows: Tensor) -> Tensor:
    """sum_e coefficient_e rows[index_e]: one segment."""
    ends = torch.full((1,), len(index), device=index.device)
    return dispatch.gather_sums(ends, index, coefficient, rows, coefficient.dtype)[0]


def coefficients(
    target: Tensor, entries: Entries, numbers: RowNumbers, options: HeadOptions, dtype: torch.dtype
) -> Tensor:
    """Of the entries (E,): what of the logits' gradient is theirs. That of the target is computed in float64."""
    top, lse, picked = numbers.top[0], numbers.lse[0], entries.picked[0]
    _, scale, softcap, *_ = options.spec
    soft = target.is_floating_point()
    g, g_entropy = numbers.g_lse[0] * scale, None if numbers.g_entropy is None else numbers.g_entropy[0] * scale
    if not soft:
        log_p = picked - lse
        own = g if g_entropy is None else g - g_entropy * log_p.clamp(min=-1e4)
        own = log_p.exp() * own + numbers.g_picked[0] * scale
        own = own * slope(picked + top, 1, softcap)
        local = (target - options.spec.start).int()
    found, ends = torch.empty(len(entries.p), dtype=dtype, device=target.device), entries.ends
    step = max(1, int(CHUNK * (options.resolution or 1)))  # rows
    edges = [0, *ends[step - 1 :: step].tolist(), len(found)]
    for i, (begin, end) in enumerate(itertools.pairwise(edges)):
        some = torch.arange(i * step, min(len(ends), (i + 1) * step), device=ends.device)
        counts = ends[some] - torch.cat([ends.new_tensor([begin]), ends[some[:-1]]])
        rows = some.repeat_interleave(counts, output_size=end - begin)
        p, classes = entries.p[begin:end], entries.classes[begin:end]
        d = g.to(dtype)[rows]
        if g_entropy is not None:
            d = d - g_entropy.to(dtype)[rows] * p.log()
        d *= p.clamp(min=options.resolution)
        if softcap is not None:
            d *= slope(p.log() + (lse + top).to(dtype)[rows], 1, softcap)
        if not soft:
            d = torch.where(classes == local[rows], own.to(dtype)[rows], d)
        found[begin:end] = d
    return found
