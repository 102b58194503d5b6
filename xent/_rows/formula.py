"""A whole loss and its gradient, for whoever needs no graph: by the backend's own formula, or by `objective`'s.

Evaluated by torch, the formula takes an operation for each of its terms, which is most of what a small batch takes, and
of rows of few classes, too. A backend may therefore have the same two functions, which evaluate it row by row.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._records import LossWeights, Objective, RowSpec, statistics_dtype
from . import dispatch, objective
from .objective import ClassTerms

Divisor = float | Tensor | None
Numbers = tuple[Any, ...]  # of each row: one tensor of the backend's own, or (top, lse, mass)


def loss_weights(
    weight: Tensor | None, target: Tensor, classes: int, formula: Objective, dtype: torch.dtype
) -> LossWeights:
    """The class weights as the formula reads them; `dtype`: of the logits' arithmetic."""
    if weight is None:
        return LossWeights(None, None, classes)
    weight = weight.detach()
    total: float | Tensor = classes
    if formula.label_smoothing > 0:  # else nothing asks for it
        total = weight.sum(dtype=statistics_dtype(weight.device))
    of_classes = objective.class_weight(weight, target, formula.label_smoothing, dtype)
    return LossWeights(of_classes, None if target.is_floating_point() else weight, total)


def losses(
    logits: Float[Tensor, "A B C"],
    target: Int[Tensor, "A B"] | Float[Tensor, "A B C"],
    weights: LossWeights,
    normalizer: float | None,
    spec: RowSpec,
    formula: Objective,
) -> tuple[Tensor, Divisor, Numbers]:
    """The loss, (A, B) or reduced, what it was divided by, and what the gradient needs of the rows."""
    module = dispatch.backend_for(logits, target)
    if hasattr(module, "losses") and logits.numel() > 0:
        return module.losses(logits, target, weights, normalizer, spec, formula)  # type: ignore[no-any-return]
    stats = dispatch.row_statistics(logits, target, spec, formula.wanted, weights.of_classes)
    value, divisor = objective.evaluate(stats, _terms(logits, target, weights, formula), target, normalizer, formula)
    return value, divisor, (stats.top, stats.lse, stats.mass)


def losses_gradient(
    logits: Float[Tensor, "A B C"],
    target: Int[Tensor, "A B"] | Float[Tensor, "A B C"],
    numbers: Numbers,
    weights: LossWeights,
    g: Float[Tensor, "A B"] | Float[Tensor, ""],
    divisor: Divisor,
    spec: RowSpec,
    formula: Objective,
    out: Float[Tensor, "A B C"] | None,
) -> Float[Tensor, "A B C"]:
    """The gradient of sum(g * losses) / divisor with respect to the raw logits; `out` as in `dispatch.row_gradient`."""
    if len(numbers) == 1:
        module = dispatch.backend_for(logits, target)
        found = module.losses_gradient(logits, target, numbers, weights, g, divisor, spec, formula, out)
        if out is not None:
            torch.autograd.graph.increment_version(out)
        return found  # type: ignore[no-any-return]
    top, lse, mass = numbers
    share = g.to(lse.dtype) if divisor is None else g.to(lse.dtype) / divisor
    upstream = objective.row_upstream(top, lse, mass, _terms(logits, target, weights, formula), formula, share)
    return dispatch.row_gradient(logits, target, top, lse, upstream, spec, weights.of_classes, out)


def _terms(logits: Tensor, target: Tensor, weights: LossWeights, formula: Objective) -> ClassTerms:
    of_targets = weights.of_targets
    rows = None if of_targets is None else objective.row_weights(target, of_targets, formula.ignore_index)
    return ClassTerms(logits.shape[2], weights.sum, rows)
