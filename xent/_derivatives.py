"""The derivative of the gradient: what double backward needs, in plain differentiable torch.

`_primitives.logits_grad` gives, for each logit z = z(x) of a row with log p = z - lse,

    dx = z' S      with      S = p (g_lse - g_entropy log p)  +  g_picked t  +  g_wsum w

where t is the one-hot target or q w. lse comes in as a number of its own, so S is a function of this one logit and of
its row's numbers, and its derivative is elementwise:

    dS/dz = e      dS/dlse = -e      with      e = p (g_lse - g_entropy (log p + 1))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._backends import Reading, compute_dtype, scores, slope, split


def logits_grad_vjp(
    v: Tensor,
    reading: Reading,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    g_lse: Tensor,
    g_picked: Tensor,
    g_wsum: Tensor | None,
    g_entropy: Tensor | None,
    class_weight: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """d sum(v * dx) with respect to each of the arguments after `reading`, in their order."""
    dtype, soft = compute_dtype(logits), target.is_floating_point()
    w: Any = 1.0 if class_weight is None else class_weight

    def column(row_numbers: Tensor) -> Tensor:
        return row_numbers.to(dtype)[:, None]

    def row_sum(terms: Tensor) -> Tensor:
        return terms.sum(1, dtype=lse.dtype)

    z, v = scores(logits, reading.scale, reading.softcap), v.to(dtype)
    if not soft:  # an ignored row has no derivative, whatever it holds
        counts = (target != reading.ignore_index)[:, None]
        z, v = torch.where(counts, z, 0), torch.where(counts, v, 0)
    z1 = slope(z, reading.scale, reading.softcap)
    u = v * z1
    high, low = split(lse, dtype)
    log_p = (z - high).sub(low)
    p = log_p.exp()
    if g_entropy is None:
        S, e = p * column(g_lse), p * column(g_lse)
    else:
        log_p = log_p.clamp(min=-1e4)  # p log p is 0 where p is 0
        S = p * (column(g_lse) - column(g_entropy) * log_p)
        e = S - p * column(g_entropy)
    d_g_entropy = None if g_entropy is None else -row_sum(u * p * log_p)

    d_target = d_weight = d_g_wsum = None
    if soft:
        d_g_picked = row_sum(u * target * w)
        d_target = (u * column(g_picked) * w).to(target.dtype)
        d_weight = None if class_weight is None else (u * column(g_picked) * target).sum(0)
        S = S + column(g_picked) * target * w
    else:
        y = (target.long() - reading.start)[:, None]
        here = (y >= 0) & (y < logits.shape[1])
        y = y.clamp(0, logits.shape[1] - 1)
        d_g_picked = row_sum(torch.where(here, u.gather(1, y), 0))
        S = S.scatter_add(1, y, torch.where(here, column(g_picked), 0))
    if g_wsum is not None:
        d_g_wsum = row_sum(u * w)
        S = S + column(g_wsum) * w
        if class_weight is not None:
            d_wsum_weight = (u * column(g_wsum)).sum(0)
            d_weight = d_wsum_weight if d_weight is None else d_weight + d_wsum_weight

    d_logits = u * e * z1
    if reading.softcap is not None:  # z' depends on x too: z'' = -2 s z z' / softcap^2
        d_logits = d_logits - 2 * reading.scale / reading.softcap**2 * z * u * S
    return (
        d_logits.to(logits.dtype),
        d_target,
        -row_sum(u * e),
        row_sum(u * p),
        d_g_picked,
        d_g_wsum,
        d_g_entropy,
        d_weight,
    )
