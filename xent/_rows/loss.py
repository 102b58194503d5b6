"""The loss of a batch: as one Function for a first derivative, or as a graph of a few nodes for everything else.

Both evaluate the same formula. Written with autograd it is a node for each operation on one number per row, which costs
more time than the logits of a small batch. `Loss` takes these numbers without a graph, and in backward

    dx = row_gradient(upstream),     upstream = d loss / d (lse, picked, wsum)     from `objective.row_upstream`

The graph is for higher derivatives, forward mode, torch.func and compilers, and where anything but the logits is
differentiated.
"""

from __future__ import annotations

import functools
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


class Evaluated(NamedTuple):
    """A loss, and what its derivative needs."""

    value: Tensor
    stats: Stats
    terms: ClassTerms
    divisor: float | Tensor | None
    class_weight: Tensor | None


def loss(
    input: Tensor, target: Tensor, weight: Tensor | None, normalizer: float | Tensor | None, options: LossOptions
) -> Tensor:
    """The loss of logits of any layout, whose target is already rows, (A, B) or (A, B, C)."""
    arguments = (input, target, weight, normalizer, options)
    others = (target, weight, normalizer if isinstance(normalizer, Tensor) else None)
    if _torch.needs_operator(input, *others) or _torch.needs_graph(input, *others):
        return loss_by_graph(*arguments)
    return Loss.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]


def loss_by_graph(
    input: Tensor, target: Tensor, weight: Tensor | None, normalizer: float | Tensor | None, options: LossOptions
) -> Tensor:
    """The same, differentiable any number of times in all its tensors."""
    statistics = functools.partial(row_stats, inplace=options.inplace)
    return _evaluate(statistics, input, target, weight, normalizer, options).value


def _evaluate(
    statistics: Callable[..., Stats],
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    normalizer: float | Tensor | None,
    options: LossOptions,
) -> Evaluated:
    layout, spec, formula, _ = options
    w = objective.class_weight(weight, target, formula.label_smoothing, compute_dtype(input))
    stats = statistics(input, target, layout, spec, formula.wanted, w)
    terms = objective.class_terms(target, weight, input.shape[layout.axis], formula)
    value, divisor = objective.evaluate(stats, terms, target, normalizer, formula)
    return Evaluated(layout.shaped(value, input.shape), stats, terms, divisor, w)


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
        found = _evaluate(operators.row_statistics, input, target, weight, normalizer, options)
        ctx.options, ctx.terms, ctx.divisor, ctx.class_weight = options, found.terms, found.divisor, found.class_weight
        # A normalizer that is a tensor is saved even where it is not needed, to be seen if it changes.
        tensor = isinstance(normalizer, Tensor)
        ctx.normalizer = None if tensor else normalizer
        stats = found.stats
        ctx.save_for_backward(input, target, weight, normalizer if tensor else None, stats.top, stats.lse, stats.mass)
        return found.value

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        input, target, weight, normalizer, top, lse, mass = ctx.saved_tensors
        layout, spec, formula, inplace = ctx.options
        if torch.is_grad_enabled() or _torch.needs_operator(g) or _torch.needs_graph(input, g):
            again = torch.is_grad_enabled()
            with torch.enable_grad():
                given = ctx.normalizer if normalizer is None else normalizer
                value = loss_by_graph(input, target, weight, given, ctx.options)
            return *torch.autograd.grad(value, input, g, create_graph=again), *[None] * 4
        stats = Stats(top, lse, lse, mass, None, None, None)  # nobody asks for picked again
        share = g.to(lse.dtype)
        if ctx.divisor is not None:
            share = share / ctx.divisor
        if share.dim():
            share = share.reshape(lse.shape)
        upstream = objective.row_upstream(stats, ctx.terms, formula, share)
        d_input = operators.row_gradient(input, target, top, lse, upstream, ctx.class_weight, layout, spec, inplace)
        return d_input, *[None] * 4
