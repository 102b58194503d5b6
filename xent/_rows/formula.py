"""A whole loss and its gradient, for whoever needs no graph: by the backend's own formula, or by `objective`'s.

Evaluated by torch, the formula takes an operation for each of its terms, which is most of what a small batch takes, and
of rows of few classes, too. A backend may therefore have the same two functions, which evaluate it row by row.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._records import LossWeights, Objective, RowSpec, statistics_dtype
from . import dispatch, objective
from .objective import ClassTerms

Numbers = tuple[Any, ...]  # of each row: one tensor of the backend's own, or (top, lse, mass)


class Found(NamedTuple):
    """What the gradient needs besides the tensors of `Numbers`, which autograd holds."""

    backend: ModuleType | None  # None: by `objective`
    divisor: float | Tensor | None
    weights: LossWeights


def loss_weights(
    weight: Tensor | None, target: Tensor, classes: int, formula: Objective, dtype: torch.dtype
) -> LossWeights:
    """The class weights as the formula reads them; `dtype`: of the logits' arithmetic."""
    if weight is None:
        return LossWeights(None, None, classes)
    weight = weight.detach()
    of_targets = None if target.is_floating_point() else weight.to(statistics_dtype(weight.device))
    of_classes = objective.class_weight(weight, target, formula.label_smoothing, dtype)
    return LossWeights(of_classes, of_targets, objective.weight_sum(weight, classes, formula))


def losses(
    logits: Float[Tensor, "A B C"],
    target: Int[Tensor, "A B"] | Float[Tensor, "A B C"],
    weights: LossWeights,
    normalizer: float | None,
    spec: RowSpec,
    formula: Objective,
) -> tuple[Tensor, Numbers, Found]:
    """The loss, (A, B) or reduced, and what its gradient needs."""
    module = dispatch.backend_for(logits, target)
    if hasattr(module, "losses") and logits.numel() > 0:
        value, divisor, numbers = module.losses(logits, target, weights, normalizer, spec, formula)
        return value, (numbers,), Found(module, divisor, weights)
    stats = dispatch.row_statistics(logits, target, spec, formula.wanted, weights.of_classes)
    value, divisor = objective.evaluate(stats, _terms(logits, target, weights, formula), target, normalizer, formula)
    return value, (stats.top, stats.lse, stats.mass), Found(None, divisor, weights)


def losses_gradient(
    logits: Float[Tensor, "A B C"],
    target: Int[Tensor, "A B"] | Float[Tensor, "A B C"],
    numbers: Numbers,
    found: Found,
    g: Float[Tensor, "A B"] | Float[Tensor, ""],
    spec: RowSpec,
    formula: Objective,
    out: Float[Tensor, "A B C"] | None,
) -> Float[Tensor, "A B C"]:
    """The gradient of sum(g * losses) / divisor with respect to the raw logits; `out` as in `dispatch.row_gradient`."""
    module, divisor, weights = found
    if module is not None:
        grad = module.losses_gradient(logits, target, *numbers, weights, g, divisor, spec, formula, out)
        if out is not None:
            torch.autograd.graph.increment_version(out)
        return grad  # type: ignore[no-any-return]
    top, lse, mass = numbers
    share = g.to(lse.dtype) if divisor is None else g.to(lse.dtype) / divisor
    upstream = objective.row_upstream(top, lse, mass, _terms(logits, target, weights, formula), formula, share)
    return dispatch.row_gradient(logits, target, top, lse, upstream, spec, weights.of_classes, out)


def _terms(logits: Tensor, target: Tensor, weights: LossWeights, formula: Objective) -> ClassTerms:
    of_targets = weights.of_targets
    rows = None if of_targets is None else objective.row_weights(target, of_targets, formula.ignore_index)
    return ClassTerms(logits.shape[2], weights.sum, rows)
