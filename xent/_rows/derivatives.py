"""Derivatives beyond the first backward, in plain differentiable torch: forward mode, and that of the gradient.

Forward mode. With u_c = dz_c/dx_c * (tangent of x_c), the tangents of the statistics of a row are

    lse: sum_c p_c u_c        picked: u_y        wsum: sum_c w_c u_c        entropy: -sum_c p_c (log p_c + entropy) u_c

The gradient. `dispatch.row_gradient` gives, for each logit z = z(x) of a row with log p = z - lse,

    dx = z' S      with      S = p (g_lse - g_entropy log p)  +  g_picked t  +  g_wsum w

where t is the one-hot target or q w. lse, absolute, comes in as a number of its own (its `top` is a constant), so S is
a function of this one logit and of its row's numbers, and its derivative is elementwise:

    dS/dz = e      dS/dlse = -e      with      e = p (g_lse - g_entropy (log p + 1))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._backends import blocks, rows_of_block, scores, slope
from .._records import RowSpec, Stats, compute_dtype, rows_that_count

CACHE_BYTES = 256 << 10  # of each term: they stay in a second-level cache


class RowTerms:
    """What each derivative needs: z, z', u = z - top, log p, p, and the target as a linear map over the classes."""

    def __init__(
        self, logits: Tensor, target: Tensor, top: Tensor, lse: Tensor, class_weight: Tensor | None, spec: RowSpec
    ) -> None:
        """Ignored rows get harmless logits, whatever they hold: nothing of them may reach a result."""
        self.logits, self.spec = logits, spec
        self.dtype, self.sum_dtype = compute_dtype(logits), lse.dtype
        self.w: Any = 1.0 if class_weight is None else class_weight
        self.z = scores(logits, spec.scale, spec.softcap)
        self.q: Tensor | None = target if target.is_floating_point() else None
        self.counts: Tensor | None = None
        self.single = target.dim() == 2
        if self.q is None:
            y = target[..., None] if self.single else target
            self.counts = rows_that_count(target, spec.ignore_index)[..., None]
            local, C = y.long() - spec.start, logits.shape[-1]
            self.here = (local >= 0) & (local < C) & (y != spec.ignore_index)
            self.y = local.clamp(0, C - 1)
        self.z = self.mask(self.z)
        self.z1 = slope(self.z, spec.scale, spec.softcap)
        self.u = self.z - self.column(top)
        self.log_p = (self.u - self.column(lse)).clamp(min=-1e4)  # p log p is 0 where p is 0
        self.p = self.log_p.exp()

    def mask(self, terms: Tensor) -> Tensor:
        """terms (..., C) with the rows that do not count set to 0."""
        return terms if self.counts is None else torch.where(self.counts, terms, 0)

    def column(self, row_numbers: Tensor) -> Tensor:
        """(...) -> (..., 1) in the dtype of single logits."""
        return row_numbers.to(self.dtype)[..., None]

    def sum(self, terms: Tensor) -> Tensor:
        """(..., C) -> (...) in the dtype of statistics."""
        return terms.sum(-1, dtype=self.sum_dtype)

    def pick(self, terms: Tensor) -> Tensor:
        """sum_c t_c terms_c, for each candidate."""
        if self.q is not None:
            return self.sum(self.q * self.w * terms)
        picked = torch.where(self.here, terms.gather(-1, self.y), 0).to(self.sum_dtype)
        return picked[..., 0] if self.single else picked

    def place(self, terms: Tensor, row_numbers: Tensor) -> Tensor:
        """terms_c + row_number * t_c, of all candidates."""
        if self.q is not None:
            placed: Tensor = terms + self.column(row_numbers) * self.q * self.w
            return placed
        numbers = self.column(row_numbers) if self.single else row_numbers.to(self.dtype)
        return terms.scatter_add(-1, self.y, torch.where(self.here, numbers, 0))


def stats_jvp(rows: RowTerms, dx: Tensor | None, dq: Tensor | None, dw: Tensor | None, entropy: Tensor | None) -> Stats:
    """The tangents of all statistics, from those of the logits, the probabilities and the class weights."""
    u = torch.zeros_like(rows.z) if dx is None else rows.mask(dx.to(rows.dtype) * rows.z1)
    lse, picked, mass = rows.sum(rows.p * u), rows.pick(u), None
    wsum = rows.sum(u * rows.w)
    if rows.q is not None:
        dt = torch.zeros_like(rows.z)  # the tangent of t = q w
        dt = dt if dq is None else dt + dq * rows.w
        dt = dt if dw is None else dt + rows.q * dw
        picked, mass = picked + rows.sum(dt * rows.u), rows.sum(dt)
    if dw is not None:
        wsum = wsum + rows.sum(dw * rows.u)
    if entropy is not None:
        entropy = -rows.sum(rows.p * (rows.log_p + rows.column(entropy)) * u)
    return Stats(None, lse, picked, mass, wsum, entropy, None)  # type: ignore[arg-type]


def coefficient_gradient(logits: Tensor, top: Tensor, g_picked: Tensor, g_mass: Tensor | None, spec: RowSpec) -> Tensor:
    """(A, B, C) in `compute_dtype`: g_mass + g_picked (z_c - top), the gradient of the coefficients k_c = q_c w_c.

    They enter mass = sum_c k_c and picked = sum_c k_c (z_c - top) linearly.
    """
    dtype = compute_dtype(logits)
    d = (scores(logits, spec.scale, spec.softcap) - top.to(dtype)[..., None]) * g_picked.to(dtype)[..., None]
    return d if g_mass is None else d + g_mass.to(dtype)[..., None]


class Gradient:
    """S and e, of which every derivative of the gradient is made."""

    def __init__(self, tensors: tuple[Any, ...], spec: RowSpec) -> None:
        """Of the tensors that `RowGrad` takes. Any of its numbers may carry a graph or a tangent of its own."""
        logits, target, top, lse, g_lse, self.g_picked, self.g_wsum, self.g_entropy, class_weight = tensors
        self.rows = rows = RowTerms(logits, target, top, lse, class_weight, spec)
        self.e = self.smooth = rows.p * rows.column(g_lse)  # the part of S that is not linear in z
        if self.g_entropy is not None:
            self.smooth = self.smooth - rows.column(self.g_entropy) * rows.p * rows.log_p
            self.e = self.smooth - rows.column(self.g_entropy) * rows.p

    def curvature(self) -> Tensor | None:
        """S dz'/dx, with dz'/dx = -2 s z z' / softcap^2; None where z is linear in x."""
        if self.rows.spec.softcap is None:
            return None
        S = self.rows.place(self.smooth, self.g_picked)
        if self.g_wsum is not None:
            S = S + self.rows.column(self.g_wsum) * self.rows.w
        return S * self.rows.z * self.rows.z1 * (-2 * self.rows.spec.scale / self.rows.spec.softcap**2)

    def vjp(self, v: Tensor) -> tuple[Tensor | None, ...]:
        """d sum(v * dx) with respect to logits, target, top, lse, g_lse, g_picked, g_wsum, g_entropy, class_weight."""
        rows = self.rows
        v = rows.mask(v.to(rows.dtype))
        u = v * rows.z1
        ue = u * self.e
        d_lse = -rows.sum(ue)
        own_lse = rows.spec.classes is None
        if own_lse:  # what lse passes on to these logits is at hand
            ue = ue + rows.p * rows.column(d_lse)
        curvature = self.curvature()
        d_logits = ue * rows.z1 if curvature is None else ue * rows.z1 + v * curvature
        d_target = d_weight = d_g_wsum = d_g_entropy = None
        if rows.q is not None:
            ug = u * rows.column(self.g_picked)
            d_target, d_weight = (ug * rows.w).to(rows.q.dtype), over_rows(ug * rows.q)
        if self.g_wsum is not None:
            d_g_wsum = rows.sum(u * rows.w)
            more = over_rows(u * rows.column(self.g_wsum))
            d_weight = more if d_weight is None else d_weight + more
        if self.g_entropy is not None:
            d_g_entropy = -rows.sum(u * rows.p * rows.log_p)
        if not isinstance(rows.w, Tensor):
            d_weight = None
        d_upstream = (rows.sum(u * rows.p), rows.pick(u), d_g_wsum, d_g_entropy)
        return d_logits.to(rows.logits.dtype), d_target, None, None if own_lse else d_lse, *d_upstream, d_weight

    def jvp(self, tangents: tuple[Tensor | None, ...]) -> Tensor:
        """The tangent of dx from those of the arguments, in the order of `vjp`'s results."""
        rows = self.rows
        dx, dq, _, d_lse, d_g_lse, d_g_picked, d_g_wsum, d_g_entropy, dw = tangents
        dS = torch.zeros_like(rows.z)
        if dx is not None:
            dS = dS + self.e * rows.z1 * dx.to(rows.dtype)
        if d_lse is not None:
            dS = dS - self.e * rows.column(d_lse)
        if d_g_lse is not None:
            dS = dS + rows.p * rows.column(d_g_lse)
        if d_g_entropy is not None:
            dS = dS - rows.p * rows.log_p * rows.column(d_g_entropy)
        if d_g_picked is not None:
            dS = rows.place(dS, d_g_picked)
        if rows.q is not None and dq is not None:
            dS = dS + rows.column(self.g_picked) * dq * rows.w
        if rows.q is not None and dw is not None:
            dS = dS + rows.column(self.g_picked) * rows.q * dw
        if d_g_wsum is not None:
            dS = dS + rows.column(d_g_wsum) * rows.w
        if self.g_wsum is not None and dw is not None:
            dS = dS + rows.column(self.g_wsum) * dw
        result, curvature = dS * rows.z1, self.curvature()
        if curvature is not None and dx is not None:
            result = result + curvature * dx.to(rows.dtype)
        return rows.mask(result).to(rows.logits.dtype)


def over_rows(terms: Tensor) -> Tensor:
    """(..., C) -> (C,)."""
    return terms.flatten(0, -2).sum(0)


def gradient_vjp_by_blocks(tensors: tuple[Any, ...], spec: RowSpec, v: Tensor) -> list[Tensor | None]:
    """`Gradient.vjp`, where nothing will be differentiated again: block by block, with nothing else of v's size."""
    *per_row, class_weight = tensors
    found: list[Any] = [None] * len(tensors)
    A, B, _ = v.shape
    for rows in blocks(A, B, rows_of_block(v, CACHE_BYTES)):
        part = [None if tensor is None else tensor[rows] for tensor in per_row]
        for i, grad in enumerate(Gradient((*part, class_weight), spec).vjp(v[rows])):
            if grad is None:
                continue
            if i == len(per_row):
                found[i] = grad if found[i] is None else found[i] + grad
                continue
            if found[i] is None:
                whole = grad.shape[2:] == v.shape[2:]
                found[i] = torch.empty_like(v, dtype=grad.dtype) if whole else grad.new_empty(A, B, *grad.shape[2:])
            found[i][rows] = grad
    return found
