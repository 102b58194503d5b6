"""The loss of a batch: as one Function for a first derivative, or as a graph of a few nodes for everything else.

Both evaluate the same formula. Written with autograd it is a node for each operation on one number per row, which costs
more time than the logits of a small batch. `Loss` takes these numbers without a graph, and in backward

    dx = row_gradient(d loss / d (lse, picked, wsum)),      which `objective.numbers_of_loss` knows

Evaluated by torch, it is still an operation for each of its terms. A backend may therefore have `losses` and
`losses_gradient` as well, and evaluate it row by row.

The graph is for higher derivatives, forward mode, torch.func and compilers, and where anything but the logits is
differentiated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _torch
from .._records import Layout, LossOptions, Objective, RowOptions, compute_dtype, statistics_dtype
from . import dispatch, objective, operators
from .functions import row_stats


def loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    normalizer: float | Tensor | None,
    target_prob: Tensor | None,
    options: LossOptions,
) -> Tensor:
    """The loss of logits and a target in their own shapes; `target_prob` as rows, (A, B, K)."""
    tensors = (input, target, weight, normalizer if isinstance(normalizer, Tensor) else None)
    if target_prob is not None or _torch.needs_operator(*tensors) or _torch.needs_graph(*tensors):
        return loss_by_graph(input, target, weight, normalizer, options, target_prob)
    return _torch.apply_to_plain(Loss, input, target, weight, normalizer, options)  # type: ignore[no-any-return]


def loss_by_graph(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    normalizer: float | Tensor | None,
    options: LossOptions,
    target_prob: Tensor | None = None,
) -> Tensor:
    """The same, differentiable any number of times in all its tensors."""
    layout, spec, formula, inplace = options
    y, w, terms = of_rows(input, target, layout, weight, formula)
    stats = row_stats(input, y, w, RowOptions(layout, spec, formula.wanted, inplace))
    if target_prob is not None:
        stats, terms = objective.of_candidates(stats, terms, y, target_prob, spec.ignore_index)
    return layout.shaped(objective.evaluate(stats, terms, y, normalizer, formula)[0], input.shape)


class Loss(torch.autograd.Function):
    """See `loss`. Without `setup_context`, for the sake of small batches: torch would inspect each call's signature."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        input, target, weight, normalizer, options = arguments
        ctx.options, dtype = options, options.formula.dtype
        tensor, given = (normalizer, 1.0) if isinstance(normalizer, Tensor) else (None, normalizer)
        if tensor is not None:  # divides at the end
            options = options._replace(formula=options.formula._replace(dtype=statistics_dtype(input.device)))
        module: Any = dispatch.backend_for(input, target)
        own = hasattr(module, "losses") and input.numel() > 0
        run, ctx.gradient = (module.losses, module.losses_gradient) if own else (losses, losses_gradient)
        value: Tensor
        value, ctx.divisor, *numbers = run(input, target, weight, given, options)
        if tensor is not None:
            value = (value / tensor).to(dtype)
        # It is saved even where it is not needed, to be seen if it changes.
        ctx.normalizer = None if tensor is not None else normalizer
        ctx.save_for_backward(input, target, weight, tensor, *numbers)
        return value

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        input, target, weight, normalizer, *numbers = ctx.saved_tensors
        again = torch.is_grad_enabled()
        if again or _torch.needs_operator(g) or _torch.needs_graph(input, g):
            given = ctx.normalizer if normalizer is None else normalizer
            if torch.compiler.is_compiling():  # which traces neither torch.autograd.grad nor a backend
                _, divisor, *found = losses(input, target, weight, given, ctx.options)
                d = losses_gradient(input, target, *found, weight, g, divisor, ctx.options)
                return d, None, None, None, None
            with torch.enable_grad():
                value = loss_by_graph(input, target, weight, given, ctx.options)
            return *torch.autograd.grad(value, input, g, create_graph=again), *[None] * 4
        if normalizer is not None:
            g = g.to(statistics_dtype(g.device)) / normalizer
        d = ctx.gradient(input, target, *numbers, weight, g, ctx.divisor, ctx.options)
        if ctx.options.inplace:
            torch.autograd.graph.increment_version(input)
        return d, None, None, None, None


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
    class_weight = objective.class_weight(weight, target, formula.wanted, compute_dtype(input))
    return y, class_weight, objective.class_terms(y, weight, input.shape[layout.axis], formula)
