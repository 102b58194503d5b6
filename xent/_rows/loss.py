"""The loss of a batch: as one Function for a first derivative, or as a graph of a few nodes for everything else.

Both evaluate the same formula. Written with autograd it is a node for each operation on one number per row, which costs
more time than the logits of a small batch. `Loss` takes these numbers without a graph, and in backward

    dx = row_gradient(upstream),     upstream = d loss / d (lse, picked, wsum)     from `objective.row_upstream`

The graph is for higher derivatives, forward mode, torch.func and compilers, and where anything but the logits is
differentiated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _torch
from .._records import Layout, RowSpec, Stats, compute_dtype
from . import objective, operators
from .functions import row_stats
from .objective import ClassTerms, Objective


class LossOptions(NamedTuple):
    """What a call has besides its tensors."""

    layout: Layout
    spec: RowSpec
    formula: Objective
    inplace: bool


def loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    normalizer: float | Tensor | None,
    target_prob: Tensor | None,
    options: LossOptions,
) -> Tensor:
    """The loss of logits of any layout, whose target is already rows: (A, B), (A, B, C), or (A, B, K) with its q."""
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
    return _evaluate(row_stats, input, target, weight, normalizer, options, target_prob)[0]


def _evaluate(
    statistics: Callable[..., Stats],
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    normalizer: float | Tensor | None,
    options: LossOptions,
    target_prob: Tensor | None = None,
) -> tuple[Tensor, Stats, ClassTerms, float | Tensor | None, Tensor | None]:
    """The loss, and what its derivative needs: the statistics, the terms of the classes, the divisor, the weights."""
    layout, spec, formula, inplace = options
    w = objective.class_weight(weight, target, formula.label_smoothing, compute_dtype(input))
    stats = statistics(input, target, layout, spec, formula.wanted, w, inplace)
    terms = objective.class_terms(target, weight, input.shape[layout.axis], formula)
    if target_prob is not None:
        stats, terms = objective.of_candidates(stats, terms, target, target_prob, spec.ignore_index)
    value, divisor = objective.evaluate(stats, terms, target, normalizer, formula)
    return layout.shaped(value, input.shape), stats, terms, divisor, w


class Loss(torch.autograd.Function):
    """See `loss`. Without `setup_context`, for the sake of small batches: torch would inspect each call's signature."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        normalizer: float | Tensor | None,
        options: LossOptions,
    ) -> Tensor:
        value, stats, *ctx.formula = _evaluate(operators.direct_statistics, input, target, weight, normalizer, options)
        # A normalizer that is a tensor is saved even where it is not needed, to be seen if it changes.
        tensor = isinstance(normalizer, Tensor)
        ctx.normalizer, ctx.options = None if tensor else normalizer, options
        ctx.save_for_backward(input, target, weight, normalizer if tensor else None, stats.top, stats.lse, stats.mass)
        return value

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        input, target, weight, normalizer, top, lse, mass = ctx.saved_tensors
        layout, spec, formula, inplace = ctx.options
        terms, divisor, class_weight = ctx.formula
        again = torch.is_grad_enabled()
        if again or _torch.needs_operator(g) or _torch.needs_graph(input, g):
            with torch.enable_grad():
                given = ctx.normalizer if normalizer is None else normalizer
                value = loss_by_graph(input, target, weight, given, ctx.options)
            return *torch.autograd.grad(value, input, g, create_graph=again), *[None] * 4
        share = g.to(lse.dtype)
        if divisor is not None:
            share = share / divisor
        if share.dim():
            share = share.reshape(lse.shape)
        upstream = objective.row_upstream(top, lse, mass, terms, formula, share)
        out = input.detach() if inplace else None
        d_input = operators.direct_gradient(input, target, top, lse, upstream, class_weight, layout, spec, out)
        return d_input, None, None, None, None
