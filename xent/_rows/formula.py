"""A whole loss and its gradient, for whoever needs no graph: by the backend's own formula, or by `objective`'s.

Evaluated by torch, the formula takes an operation for each of its terms, which is most of what a small batch takes, and
of rows of few classes, too. A backend may therefore have the same two functions, which evaluate it row by row.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._records import Layout, Objective, RowSpec, compute_dtype
from . import dispatch, objective, operators

Numbers = tuple[Any, ...]  # of each row: one tensor of the backend's own, or (top, lse, mass)


class Found(NamedTuple):
    """What the gradient needs besides the tensors of `Numbers`, which autograd holds."""

    backend: ModuleType | None  # None: by `objective`
    divisor: float | Tensor | None


def losses(
    input: Tensor,
    target: Tensor,
    layout: Layout,
    weight: Tensor | None,
    normalizer: float | None,
    spec: RowSpec,
    formula: Objective,
) -> tuple[Tensor, Numbers, Found]:
    """The loss of logits and a target in their own shapes, of each row or reduced; and what its gradient needs."""
    module = dispatch.backend_for(input, target)
    if hasattr(module, "losses") and input.numel() > 0:
        value, divisor, numbers = module.losses(input, target, layout, weight, normalizer, spec, formula)
        return value, (numbers,), Found(module, divisor)
    y, class_weight = layout.targets(target, input.dim()), _class_weight(input, target, weight, formula)
    stats = dispatch.row_statistics(layout.rows(input), y, spec, formula.wanted, class_weight)
    terms = objective.class_terms(y, weight, input.shape[layout.axis], formula)
    value, divisor = objective.evaluate(stats, terms, y, normalizer, formula)
    return layout.shaped(value, input.shape), (stats.top, stats.lse, stats.mass), Found(None, divisor)


def losses_gradient(
    input: Tensor,
    target: Tensor,
    numbers: Numbers,
    found: Found,
    layout: Layout,
    weight: Tensor | None,
    g: Tensor,
    spec: RowSpec,
    formula: Objective,
    inplace: bool,
) -> Tensor:
    """The gradient of sum(g * losses) / divisor with respect to the raw logits, in their shape; or in their memory."""
    module, divisor = found
    if module is not None:
        out = input.detach() if inplace else None
        grad: Tensor = module.losses_gradient(input, target, *numbers, layout, weight, g, divisor, spec, formula, out)
        if out is not None:
            torch.autograd.graph.increment_version(out)
        return grad
    top, lse, mass = numbers
    y, class_weight = layout.targets(target, input.dim()), _class_weight(input, target, weight, formula)
    share = g.reshape(layout.A, layout.B) if g.dim() else g
    share = share.to(lse.dtype) if divisor is None else share.to(lse.dtype) / divisor
    terms = objective.class_terms(y, weight, input.shape[layout.axis], formula)
    upstream = objective.row_upstream(top, lse, mass, terms, formula, share)
    return operators.row_gradient(input, y, top, lse, upstream, class_weight, layout, spec, inplace)


def _class_weight(input: Tensor, target: Tensor, weight: Tensor | None, formula: Objective) -> Tensor | None:
    return objective.class_weight(weight, target, formula.label_smoothing, compute_dtype(input))
