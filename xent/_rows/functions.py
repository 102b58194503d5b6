"""The core: one autograd Function from logits to row statistics, and one for the gradient.

A row of logits z with target y has

    lse     = log sum_c exp(z_c)           d lse     / dz_c = p_c,  p = softmax(z)
    picked  = z_y                          d picked  / dz_c = [c = y]
    wsum    = sum_c w_c z_c                d wsum    / dz_c = w_c
    entropy = -sum_c p_c log p_c           d entropy / dz_c = -p_c (log p_c + entropy)

so with one upstream number per row and statistic, the gradient is

    dz_c = g_lse p_c  +  g_picked [c = y]  +  g_wsum w_c  -  g_entropy p_c (log p_c + entropy)

For the mean of nll = lse - picked over N rows, autograd delivers g_lse = 1/N and g_picked = -1/N:

    dz = (softmax - one-hot) / N

`RowStats` computes the statistics, `RowGrad` that gradient. Saved for backward: the logits, which the caller holds
anyway, and one number per row, lse (two with the entropy). The softmax is recomputed from them, never stored.

`RowGrad` is a Function too, and takes lse as an input like any other. What is left to differentiate is a function of
each single logit and of its row's numbers, so its own derivative is elementwise; the rest, how lse depends on all the
logits of its row, autograd knows from `RowStats`. Higher derivatives follow, without C numbers per logit anywhere.

Each is there twice with one derivative: as a Function for eager mode, forward mode and torch.func, and as an operator
for compilers, which refuse a Function with a `jvp`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import _torch
from .._records import Layout, RowNumbers, RowOptions, Stats, has_candidates
from . import operators
from .derivatives import Gradient, RowTerms, coefficient_gradient, gradient_vjp_by_blocks, over_rows, stats_jvp


def row_stats(input: Tensor, target: Tensor, class_weight: Tensor | None, options: RowOptions) -> Stats:
    """Differentiable `Stats` of logits in their own shape."""
    found = operators.apply("row_statistics", RowStats, input, target, class_weight, options)
    return options.wanted.unpack(found, target.is_floating_point())


def fold(batch: int, in_dims: tuple[int | None, ...], tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Under vmap the mapped dimension becomes a part of A, (batch, A, B, ...) -> (batch A, B, ...): one call."""
    folded: list[Tensor | None] = []
    for dim, tensor in zip(in_dims, tensors, strict=True):
        if tensor is not None:
            tensor = tensor.expand(batch, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            tensor = tensor.flatten(0, 1)
        folded.append(tensor)
    return folded


def refuse_mapped_weight(dim: int | None) -> None:
    """All rows of a call share the class weights, so they cannot differ along the mapped dimension."""
    if dim is not None:
        raise NotImplementedError("weight: cannot be mapped by vmap, since all rows share it; map in a loop")


class RowStats(torch.autograd.Function):
    """(input, target, class_weight) -> those of `Stats` that are wanted, in its order."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(operators.row_statistics(*arguments).pack())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, target, class_weight, ctx.options = inputs
        stats = ctx.options.wanted.unpack(output, target.is_floating_point())
        ctx.mark_non_differentiable(stats.top, *[] if stats.argmax is None else [stats.argmax])
        ctx.set_materialize_grads(False)  # a statistic that nobody uses costs nothing in backward
        ctx.save_for_backward(input, target, class_weight, stats.top, stats.lse, stats.entropy)
        ctx.save_for_forward(input, target, class_weight, stats.top, stats.lse, stats.entropy)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if all(g is None for g in grads):
            return (None,) * 4
        saved = ctx.saved_tensors
        g = ctx.options.wanted.unpack(grads, saved[1].is_floating_point())
        return *stats_backward(saved, g, ctx.options, ctx.needs_input_grad), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        refuse_mapped_weight(in_dims[2])
        (input, target, class_weight, options), N = args, info.batch_size
        input, layout = fold_input(N, in_dims[0], input, options.layout)
        (target,) = fold(N, in_dims[1:2], (target,))
        found = RowStats.apply(input, target, class_weight, options._replace(layout=layout))  # type: ignore[no-untyped-call]
        return tuple(stat.unflatten(0, (N, options.layout.A)) for stat in found), (0,) * len(found)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dq: Tensor | None, dw: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        input, target, class_weight, top, lse, entropy = ctx.saved_tensors
        layout, spec, wanted, _ = ctx.options
        _torch.refuse_nested_forward_mode(input)
        dx = None if dx is None else layout.rows(dx)
        tangents = stats_jvp(RowTerms(layout.rows(input), target, top, lse, class_weight, spec), dx, dq, dw, entropy)
        if not wanted.wsum:
            tangents = tangents._replace(wsum=None)
        return None, *tangents.pack(), *[None] * wanted.argmax


def fold_input(batch: int, dim: int | None, input: Tensor, layout: Layout) -> tuple[Tensor, Layout]:
    """`fold` of logits in their own shape."""
    x = input.expand(batch, *input.shape) if dim is None else input.movedim(dim, 0)
    x = x.movedim(layout.axis + 1, -1)
    x = x.reshape(batch * layout.A, layout.B, x.shape[-1])
    return x, Layout(2, batch * layout.A, layout.B)


def stats_backward(
    saved: tuple[Any, ...], g: Stats, options: RowOptions, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, target and class weight. `saved`: unpacked once, since a checkpoint allows no more."""
    input, target, class_weight, top, lse, entropy = saved
    layout, spec, _, inplace = options
    numbers = numbers_of_stats(g, top, lse, entropy, target)
    d_input = d_target = d_weight = None
    if needs[1] or needs[2]:  # of probabilities q and class weights w, which enter picked, mass and wsum linearly
        logits = layout.rows(input)
        d = coefficient_gradient(logits, top, numbers.g_picked, g.mass, spec)
        if needs[1]:
            d_target = (d if class_weight is None else d * class_weight).to(target.dtype)
        if needs[2]:
            d_weight = over_rows(d * target)
            if g.wsum is not None:
                d_weight = d_weight + over_rows(coefficient_gradient(logits, top, g.wsum, None, spec))
    if needs[0] and inplace:
        d_input = operators.row_gradient(input, target, numbers, class_weight, layout, spec, inplace)
    elif needs[0]:
        arguments = (input, target, *numbers, class_weight, layout, spec)
        # A compiler that traces the backward refuses a Function with a jvp, as above.
        d_input = RowGrad.forward(*arguments) if torch.compiler.is_compiling() else RowGrad.apply(*arguments)  # type: ignore[no-untyped-call]
    return d_input, d_target, d_weight


def numbers_of_stats(g: Stats, top: Tensor, lse: Tensor, entropy: Tensor | None, target: Tensor) -> RowNumbers:
    """What `row_gradient` takes, from the gradients of the statistics, of which any may be missing."""
    g_lse = torch.zeros_like(lse) if g.lse is None else g.lse
    g_picked = g.picked
    if g_picked is None:
        g_picked = lse.new_zeros(target.shape) if has_candidates(target) else torch.zeros_like(lse)
    if g.entropy is not None and entropy is not None:
        g_lse = g_lse - g.entropy * entropy  # of -p (log p + entropy), the part that is one number per row
    return RowNumbers(top, lse, g_lse, g_picked, g.wsum, g.entropy)


class RowGrad(torch.autograd.Function):
    """(input, target, *RowNumbers, class_weight) -> the gradient of the logits, by `dispatch.row_gradient`."""

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        input, target, *numbers, class_weight, layout, spec = arguments
        return operators.row_gradient(input, target, RowNumbers(*numbers), class_weight, layout, spec)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.layout, ctx.spec = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Any, ...]:
        (input, *rest), layout, spec = ctx.saved_tensors, ctx.layout, ctx.spec
        tensors, v = (layout.rows(input), *rest), layout.rows(v)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            d_logits, *others = Gradient(tensors, spec).vjp(v)
            return layout.restore(d_logits, input.shape), *others, None, None
        d_logits, *others = gradient_vjp_by_blocks(tensors, spec, v)
        return layout.restore(d_logits, input.shape).data, *others, None, None  # as of `operators.row_gradient`

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        refuse_mapped_weight(in_dims[8])
        input, layout = fold_input(info.batch_size, in_dims[0], args[0], args[9])
        rest = fold(info.batch_size, in_dims[1:8], args[1:8])
        found = RowGrad.apply(input, *rest, args[8], layout, args[10])  # type: ignore[no-untyped-call]
        shape = args[0].shape if in_dims[0] is None else args[0].movedim(in_dims[0], 0).shape[1:]
        return layout._replace(axis=args[9].axis + 1).restore(found, torch.Size((info.batch_size, *shape))), 0

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, *tangents: Any) -> Tensor:
        input, *rest = ctx.saved_tensors
        _torch.refuse_nested_forward_mode(input)
        dx = None if dx is None else ctx.layout.rows(dx)
        found = Gradient((ctx.layout.rows(input), *rest), ctx.spec).jvp((dx, *tangents[:8]))
        restored: Tensor = ctx.layout.restore(found, input.shape)
        return restored


def once_differentiable(grad: Tensor | None, sources: Sequence[Tensor | None], reason: str) -> Tensor | None:
    """With create_graph=True: the same gradient, which refuses to forget what it depends on."""
    if grad is None or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return grad
    return OnceDifferentiable.apply(grad, reason, *sources)  # type: ignore[no-any-return, no-untyped-call]


class OnceDifferentiable(torch.autograd.Function):
    """See `once_differentiable`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, reason: str, *sources: Tensor | None) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.reason = inputs[1]

    @staticmethod
    def backward(ctx: Any, *v: Tensor) -> NoReturn:
        raise NotImplementedError(ctx.reason)


operators.differentiate("row_statistics", RowStats)
operators.differentiate("row_gradient", RowGrad)
