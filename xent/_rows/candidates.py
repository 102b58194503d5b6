"""Index targets of K classes per position, (A, B, K): what is done besides a pass over the logits, K numbers per row.

The pass itself is that of a backend which knows one class per row. It is given one that nobody holds, so that it picks
nothing and corrects nothing. Here the K logits are gathered, before a gradient may be written over them, and the K
entries of the gradient are written again, each rounded once. A row whose candidates are all ignored is ignored.

A backend with `TAKES_CANDIDATES` does all that in its own pass, while a row is in the caches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._backends import check_range, scores, slope
from .._records import RowNumbers, RowSpec, Stats, Wanted, rows_that_count


def row_statistics(
    run: Callable[..., Stats],
    logits: Tensor,
    target: Tensor,
    spec: RowSpec,
    wanted: Wanted,
    class_weight: Tensor | None,
) -> Stats:
    """`dispatch.row_statistics` by way of `run`, that of a backend; `picked` is (A, B, K)."""
    check_range(target, spec.classes or 0, spec.ignore_index)
    stats = run(logits, *_nobody(target, spec, logits.shape[2]), wanted, class_weight)
    at, elsewhere = _local(target, spec, logits.shape[2])
    z = scores(logits.gather(2, at), spec.scale, spec.softcap).to(stats.top.dtype)
    return stats._replace(picked=(z - stats.top[..., None]).masked_fill_(elsewhere, 0))


def row_gradient(
    run: Callable[..., Tensor],
    logits: Tensor,
    target: Tensor,
    numbers: RowNumbers,
    spec: RowSpec,
    class_weight: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """`dispatch.row_gradient` by way of `run`, that of a backend; `numbers.g_picked` is (A, B, K)."""
    top, lse, g_lse, g_picked, g_wsum, g_entropy = numbers
    at, elsewhere = _local(target, spec, logits.shape[2])
    at, order = at.sort(2)
    z = scores(logits.gather(2, at), spec.scale, spec.softcap).to(lse.dtype)  # before `out` is written
    y, given = _nobody(target, spec, logits.shape[2])
    of_pass = numbers._replace(g_picked=torch.zeros_like(top[:1, :1]).expand_as(top))
    found = run(logits, y, of_pass, given, class_weight, out)

    log_p = (z - top[..., None]).sub_(lse[..., None]).clamp_(min=-1e4)  # p log p is 0 where p is 0
    g = g_lse[..., None]
    d = log_p.exp().mul_(g if g_entropy is None else g - g_entropy[..., None] * log_p)
    d += _sum_of_equals(at, g_picked.masked_fill(elsewhere, 0).gather(2, order))
    if g_wsum is not None:
        d += g_wsum[..., None] * (1 if class_weight is None else class_weight[at])
    d *= slope(z, spec.scale, spec.softcap)
    d.masked_fill_((y == spec.ignore_index)[..., None], 0)
    return found.scatter_(2, at, d.to(found.dtype))


def _nobody(target: Tensor, spec: RowSpec, C: int) -> tuple[Tensor, RowSpec]:
    """A target (A, B) that no shard holds, or the one to ignore; and a spec by which it is in range."""
    classes = spec.classes or spec.start + C
    y = classes + (classes == spec.ignore_index)
    counts = rows_that_count(target, spec.ignore_index)
    return torch.where(counts, y, spec.ignore_index), spec._replace(classes=classes + 2)


def _local(target: Tensor, spec: RowSpec, C: int) -> tuple[Tensor, Tensor]:
    """Where the candidates are among the C classes held here, and which are not: those are at 0."""
    local = target.long() - spec.start
    elsewhere = (target == spec.ignore_index) | (local < 0) | (local >= C)
    return local.masked_fill(elsewhere, 0), elsewhere


def _sum_of_equals(at: Tensor, numbers: Tensor) -> Tensor:
    """For each number the sum of those of its row with the same index; a row's indices ascend."""
    first = torch.ones_like(at, dtype=torch.bool)
    first[..., 1:] = at[..., 1:] != at[..., :-1]
    group = first.flatten().cumsum(0) - 1
    return torch.zeros_like(numbers).flatten().index_add_(0, group, numbers.flatten())[group].view_as(numbers)
