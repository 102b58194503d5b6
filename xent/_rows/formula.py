"""A whole loss and its gradient, for whoever needs no graph, by the formula of `objective`.

Evaluated by torch, the formula takes an operation for each of its terms, which is most of what a small batch takes, and
of rows of few classes, too. A backend may therefore have the same two functions, which evaluate it row by row.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._records import Layout, LossOptions, Objective, RowOptions, compute_dtype
from . import objective, operators


def losses(
    input: Tensor, target: Tensor, weight: Tensor | None, normalizer: float | Tensor | None, options: LossOptions
) -> tuple[Any, ...]:
    """The loss of logits and a target in their own shapes, of each row or reduced; the divisor; tensors to save."""
    layout, spec, formula, _ = options
    y, class_weight, terms = of_rows(input, target, layout, weight, formula)
    stats = operators.row_statistics(input, y, class_weight, RowOptions(layout, spec, formula.wanted))
    value, divisor = objective.evaluate(stats, terms, y, normalizer, formula)
    return layout.shaped(value, input.shape), divisor, stats.top, stats.lse, stats.mass


def losses_gradient(input: Tensor, target: Tensor, *rest: Any) -> Tensor:
    """The gradient of sum(g * losses) / divisor with respect to the raw logits, in their shape; or in their memory."""
    top, lse, mass, weight, g, divisor, options = rest
    layout, spec, formula, inplace = options
    y, class_weight, terms = of_rows(input, target, layout, weight, formula)
    share = (g.reshape(layout.A, layout.B) if g.dim() else g).to(lse.dtype)
    share = share if divisor is None else share / divisor
    numbers = objective.numbers_of_loss(top, lse, mass, terms, formula, share)
    return operators.row_gradient(input, y, numbers, class_weight, layout, spec, inplace)


def of_rows(
    input: Tensor, target: Tensor, layout: Layout, weight: Tensor | None, formula: Objective
) -> tuple[Tensor, Tensor | None, objective.ClassTerms]:
    """The target and the class weights as the primitives take them, and what the formula needs besides."""
    y = layout.targets(target, input.dim())
    class_weight = objective.class_weight(weight, target, formula.label_smoothing, compute_dtype(input))
    return y, class_weight, objective.class_terms(y, weight, input.shape[layout.axis], formula)
