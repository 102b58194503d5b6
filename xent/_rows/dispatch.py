"""The contract of the primitives, and the choice of the backend that runs them.

Every loss of this package is a function of a few numbers per row, so every pass over the logits is one of the first two
functions; a linear head has four of its own, see `_head/`. A backend is a module with the first two at least, plus
`refusal`, which says why it cannot take a given pair of tensors; what it lacks, `eager` does.

The letters, here and in every backend: logits (A, B, C) with any three strides, so that no layout has to be copied; a
row is one (a, b), with C classes held here. `x` the raw logits of one row, `z = softcap * tanh(scale * x / softcap)`
(or just `scale * x`) the logits that count, `y` the target, `q` a target distribution, `w` the class weights,
`p = softmax(z)`.

    row_statistics  reads every logit once, writes nothing but one number per row
    row_gradient    reads every logit once, writes every gradient once
    linear          the product of hidden states and head, which gives logits
    row_samples     reads every logit once, writes a few probabilities per row: the others are rounded, at random, to 0
    transpose, gather_sums    the products of a sparse matrix, which has such entries, with a dense one

All keep these promises:

- Statistics and upstream gradients are float64 (float32 where the device has none). Scores are relative to the row's
  largest, `top`: `lse - picked` stays exact to the last bit of the logits however far from 0 they all lie.
- A row whose index target equals `ignore_index` is never read: its statistics are 0, its argmax is -1, and its
  gradient is exactly 0, whatever it holds. The work is proportional to the rows that count.
- A row, or a part of one, that is -inf does not make NaN out of a finite result. A whole row of -inf has
  lse = -inf. A +inf or NaN that counts makes the row's lse NaN.
- A coefficient (probability or class weight) of exactly 0 contributes 0, even where the logit is infinite.
- Index targets are checked against [0, classes) before anything is read through them.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._backends import check_range
from .._records import RowNumbers, RowSpec, Samples, Stats, Wanted, compute_dtype, has_candidates, rows_that_count
from . import candidates

BACKENDS = ("native", "triton", "eager")  # in order of preference
FORCED_BACKEND = os.environ.get("XENT_BACKEND")


def row_statistics(
    logits: Float[Tensor, "A B C"],
    target: Int[Tensor, "A B"] | Int[Tensor, "A B K"] | Float[Tensor, "A B C"],
    spec: RowSpec,
    wanted: Wanted,
    class_weight: Float[Tensor, " C"] | None = None,
) -> Stats:
    """Row statistics in one pass, each (A, B).

    A target in [0, spec.classes) but outside the classes held here, [start, start + C), picks 0. `class_weight` is in
    `compute_dtype(logits)` and counts in `wsum` and, for probabilities, in `picked` and `mass`; an index target's
    own weight is the caller's affair, being one number per row. `argmax` is local to the classes held here.

    Raises IndexError for an index target outside [0, classes) other than `ignore_index` (on CUDA: an asynchronous
    device-side assertion).
    """
    if spec.classes is None:
        spec = spec._replace(classes=logits.shape[2] + spec.start)
    if logits.numel() == 0:
        return _no_logits(logits, target, spec, wanted)
    return _function("row_statistics", logits, target)(logits, target, spec, wanted, class_weight)  # type: ignore[no-any-return]


def row_gradient(
    logits: Float[Tensor, "A B C"],
    target: Int[Tensor, "A B"] | Int[Tensor, "A B K"] | Float[Tensor, "A B C"],
    numbers: RowNumbers,
    spec: RowSpec,
    class_weight: Float[Tensor, " C"] | None = None,
    out: Float[Tensor, "A B C"] | None = None,
) -> Float[Tensor, "A B C"]:
    """The gradient with respect to the raw logits, given one upstream number per row and statistic.

        dz_c = p_c (g_lse - g_entropy log p_c)  +  g_picked t_c  +  g_wsum w_c        t_c = [c = y - start] or q_c w_c
        dx_c = dz_c * dz_c/dx_c

    where log p_c = z_c - top - lse. (The entropy H has the gradient -p_c (log p_c + H): the caller folds the part that
    is one number per row, -g_entropy H, into `g_lse`.) The sum is taken in `compute_dtype` and rounded once, since
    p - 1 at a confident target has no bits left in half precision. `out` may be `logits` itself, which is then
    overwritten: the caller's explicit choice. A fresh result is dense, in the dtype and the memory order of the logits.
    """
    if logits.numel() == 0:
        return torch.empty_like(logits) if out is None else out
    run = _function("row_gradient", logits, target)
    found: Tensor = run(logits, target, numbers, spec, class_weight, out)
    if out is not None:  # whoever saved the old values for backward finds out, as after any in-place operation
        torch.autograd.graph.increment_version(out)
    return found


def linear(hidden: Float[Tensor, "N D"], weight: Float[Tensor, "C D"], out: Float[Tensor, "N C"]) -> None:
    """out = hidden weight^T: the logits of a head, summed in the dtype of `out`."""
    _function("linear", weight[None], hidden.new_zeros(1, 1, dtype=torch.int64))(hidden, weight, out)


def row_samples(
    logits: Float[Tensor, "1 B C"],
    target: Int[Tensor, "1 B"] | Float[Tensor, "1 B C"],
    top: Float[Tensor, "1 B"],
    lse: Float[Tensor, "1 B"],
    uniform: Float[Tensor, " B"],
    spec: RowSpec,
    resolution: float,
) -> Samples:
    """The entries that are kept of each row of p = exp(z - top - lse), its classes in ascending order.

    An index target's own class is kept if it is held here; a class with p >= r; and of the rest, those at which
    floor(S / r + u) steps up, S the sum of p over the rest so far and u the row's number in [0, 1), uniform at random:
    so each with probability p / r, at most 1 / r + 2 in all. Where p is NaN nothing else is kept.
    """
    if logits.numel() == 0:
        counts = logits.new_zeros(logits.shape[1], dtype=torch.int64)
        return Samples(counts, logits.new_empty(0, dtype=torch.int32), logits.new_empty(0, dtype=compute_dtype(logits)))
    run = _function("row_samples", logits, target)
    return run(logits, target, top, lse, uniform, spec, resolution)  # type: ignore[no-any-return]


def transpose(
    ends: Int[Tensor, " N"], classes: Int[Tensor, " E"], coefficient: Float[Tensor, " E"], C: int
) -> tuple[Int[Tensor, " C"], Int[Tensor, " E"], Float[Tensor, " E"]]:
    """The entries of rows, the n-th from ends[n - 1] to ends[n], as entries of C classes: (ends, rows, coefficient).

    Those of a class keep the order of their rows.
    """
    run = _function("transpose", coefficient.view(1, 1, -1), ends.new_zeros(1, 1))
    return run(ends, classes, coefficient, C)  # type: ignore[no-any-return]


def gather_sums(
    ends: Int[Tensor, " S"],
    index: Int[Tensor, " E"],
    coefficient: Float[Tensor, " E"],
    rows: Float[Tensor, "R D"],
    dtype: torch.dtype,
) -> Float[Tensor, "S D"]:
    """out_s = sum of coefficient_e rows[index_e] over the entries e from ends[s - 1] to ends[s], in that order.

    Summed in the dtype of the coefficients, which is `compute_dtype`, and rounded once, to `dtype`.
    """
    if len(index) == 0 or rows.numel() == 0:
        return rows.new_zeros(len(ends), rows.shape[1], dtype=dtype)
    run = _function("gather_sums", rows[None], index[:1].expand(1, len(rows)))
    return run(ends, index, coefficient, rows, dtype)  # type: ignore[no-any-return]


def _function(name: str, logits: Tensor, target: Tensor) -> Callable[..., Any]:
    """That of the backend, or of `eager` if it has none.

    By way of `candidates` if it knows one class per row, and the target has several.
    """
    several = has_candidates(target)
    module = backend_for(logits, target[..., 0] if several else target)
    run = getattr(module, name, None) or getattr(load("eager"), name)
    aside = several and not hasattr(module, "TAKES_CANDIDATES")
    return functools.partial(getattr(candidates, name), run) if aside else run


def _no_logits(logits: Tensor, target: Tensor, spec: RowSpec, wanted: Wanted) -> Stats:
    """No rows, or a shard without classes: an empty sum has lse = log 0. No backend needs to think of it."""
    soft = target.is_floating_point()
    stats = wanted.unpack([part.zero_() for part in wanted.empty(logits, target)], soft)
    if soft:
        stats.lse.fill_(-torch.inf)
    else:
        check_range(target, spec.classes or 0, spec.ignore_index)
        stats.lse.masked_fill_(rows_that_count(target, spec.ignore_index), -torch.inf)
    return stats if stats.argmax is None else stats._replace(argmax=stats.argmax.fill_(-1))


@functools.cache
def load(name: str) -> ModuleType | str:
    """The backend module, imported only now, or the reason why this machine does not have it."""
    try:
        return importlib.import_module(f"xent._backends.{name}")
    except ImportError as error:
        return str(error)


def backend_for(logits: Tensor, target: Tensor) -> ModuleType:
    """The first of `BACKENDS` that takes these tensors; with XENT_BACKEND set, that one or an error."""
    if FORCED_BACKEND and FORCED_BACKEND not in BACKENDS:
        raise ValueError(f"XENT_BACKEND: expected one of {', '.join(BACKENDS)}, got {FORCED_BACKEND!r}")
    reasons = []
    for name in (FORCED_BACKEND,) if FORCED_BACKEND else BACKENDS:
        module = load(name)
        reason = module if isinstance(module, str) else module.refusal(logits, target)
        if reason is None:
            return module  # type: ignore[return-value]
        reasons.append(f"{name}: {reason}")
    raise RuntimeError(f"no backend for {logits.dtype} logits on {logits.device}: {'; '.join(reasons)}")
