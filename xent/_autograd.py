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
logits of its row, autograd knows from `RowStats`. Higher derivatives follow, without an (N, C, C) anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _ops, _torch
from ._derivatives import (
    Rows,
    coefficient_gradient,
    gradient_jvp,
    gradient_vjp,
    gradient_vjp_by_blocks,
    linearise,
    stats_jvp,
)
from ._records import RowSpec, Stats, Upstream, Wanted


def row_stats(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, spec: RowSpec, wanted: Wanted, inplace: bool = False
) -> Stats:
    """Differentiable `Stats` of the rows (N, C); with `inplace`, backward may write over the logits."""
    found = apply(RowStats, RowStatsForwardMode, logits, target, class_weight, spec, wanted, inplace)
    return wanted.unpack(found, target.is_floating_point())


def apply(function: type[torch.autograd.Function], with_jvp: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply`; `with_jvp` is the subclass that knows forward mode, which Dynamo refuses.

    A backward that is not itself recorded needs no Function around its work.
    """
    if torch.compiler.is_compiling():
        return function.apply(*args)  # type: ignore[no-untyped-call]
    if transforms := _torch.transforms():
        if transforms.count(_torch.TransformType.Jvp) > 1:
            raise NotImplementedError(
                "forward mode over forward mode: torch gives a custom Function zero tangents there; "
                "take one of the two derivatives in reverse mode, as torch.func.hessian does"
            )
        return with_jvp.apply(*args)  # type: ignore[no-untyped-call]
    if _torch.forward_mode_is_on():
        function = with_jvp
    elif not torch.is_grad_enabled():
        return function.forward(*args)
    return _torch.call_function(function, *args)


def fold(batch: int, in_dims: tuple[int | None, ...], tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Under vmap the mapped dimension becomes part of the rows, (N, ...) -> (batch * N, ...): one call for it all."""
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
    """(logits, target, class_weight) -> those of `Stats` that are wanted, in its order."""

    @staticmethod
    def forward(
        logits: Tensor, target: Tensor, class_weight: Tensor | None, spec: RowSpec, wanted: Wanted, inplace: bool
    ) -> tuple[Tensor, ...]:
        return tuple(_ops.row_statistics(logits, target, spec, wanted, class_weight).pack())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, target, class_weight, ctx.spec, ctx.wanted, ctx.inplace = inputs
        stats = ctx.wanted.unpack(output, target.is_floating_point())
        ctx.mark_non_differentiable(stats.top, *[] if stats.argmax is None else [stats.argmax])
        ctx.set_materialize_grads(False)  # a statistic that nobody uses costs nothing in backward
        ctx.save_for_backward(logits, target, class_weight, stats.top, stats.lse, stats.entropy)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        def gradient(*arguments: Any) -> Tensor:
            return apply(RowGrad, RowGradForwardMode, *arguments)  # type: ignore[no-any-return]

        return *stats_backward(ctx, ctx.saved_tensors, gradient, grads), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        refuse_mapped_weight(in_dims[2])
        logits, target = fold(info.batch_size, in_dims[:2], args[:2])
        found = apply(RowStats, RowStatsForwardMode, logits, target, *args[2:])
        return tuple(stat.view(info.batch_size, -1) for stat in found), (0,) * len(found)


class RowStatsForwardMode(RowStats):
    """`RowStats` with a jvp."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        RowStats.setup_context(ctx, inputs, output)
        stats = ctx.wanted.unpack(output, inputs[1].is_floating_point())
        ctx.save_for_forward(*inputs[:3], stats.top, stats.lse, stats.entropy)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dq: Tensor | None, dw: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        logits, target, class_weight, top, lse, entropy = ctx.saved_tensors
        tangents = stats_jvp(Rows(logits, target, top, lse, class_weight, ctx.spec), dx, dq, dw, entropy)
        if not ctx.wanted.wsum:
            tangents = tangents._replace(wsum=None)
        return None, *tangents.pack(), *[None] * ctx.wanted.argmax


def stats_backward(
    ctx: Any, saved: tuple[Any, ...], gradient: Callable[..., Tensor], grads: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of logits, target and class weight; the logits' by `gradient`, as `RowGrad` has it.

    `saved` is handed over, since a checkpoint allows only one look at the saved tensors.
    """
    if all(g is None for g in grads):
        return None, None, None
    logits, target, class_weight, top, lse, entropy = saved
    g = ctx.wanted.unpack(grads, target.is_floating_point())
    g = g._replace(
        lse=torch.zeros_like(lse) if g.lse is None else g.lse,
        picked=torch.zeros_like(lse) if g.picked is None else g.picked,
    )
    d_logits = d_target = d_weight = None
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        d_target, d_weight = _coefficient_grads(ctx, saved, g)
    if ctx.needs_input_grad[0]:
        if ctx.inplace and torch.is_grad_enabled():
            raise RuntimeError(
                "inplace_backward=True: the gradient replaces the logits, so it cannot be differentiated again; "
                "use inplace_backward=False with create_graph=True and torch.func"
            )
        # Of the entropy's gradient, -p (log p + entropy), this part is one number per row.
        g_lse = g.lse if g.entropy is None else g.lse - g.entropy * entropy
        upstream = (g_lse, g.picked, g.wsum, g.entropy)
        d_logits = gradient(logits, target, top, lse, *upstream, class_weight, ctx.spec, ctx.inplace)
    return d_logits, d_target, d_weight


def _coefficient_grads(ctx: Any, saved: tuple[Any, ...], g: Stats) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of probability targets q and of the class weights w, which enter picked, mass and wsum linearly."""
    logits, q, w, top, *_ = saved
    d = coefficient_gradient(logits, top, g.picked, g.mass, ctx.spec)
    d_target = (d if w is None else d * w).to(q.dtype) if ctx.needs_input_grad[1] else None
    d_weight = None
    if ctx.needs_input_grad[2]:
        d_weight = (d * q).sum(0)
        if g.wsum is not None:
            d_weight = d_weight + coefficient_gradient(logits, top, g.wsum, None, ctx.spec).sum(0)
    return d_target, d_weight


class RowGrad(torch.autograd.Function):
    """The gradient of the logits from one upstream number per row and statistic, by `_primitives.row_gradient`."""

    @staticmethod
    def forward(
        logits: Tensor,
        target: Tensor,
        top: Tensor,
        lse: Tensor,
        g_lse: Tensor,
        g_picked: Tensor,
        g_wsum: Tensor | None,
        g_entropy: Tensor | None,
        class_weight: Tensor | None,
        spec: RowSpec,
        inplace: bool,
    ) -> Tensor:
        out = logits.detach() if inplace else None
        upstream = Upstream(g_lse, g_picked, g_wsum, g_entropy)
        return _ops.row_gradient(logits, target, top, lse, upstream, spec, class_weight, out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.spec, inplace = inputs
        if not inplace:  # then nothing is left to derive from; RowStats has refused to be asked
            ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Any, ...]:
        tensors, again = ctx.saved_tensors, torch.is_grad_enabled() or torch.compiler.is_compiling()
        if again:
            return *gradient_vjp(*linearise(tensors, ctx.spec), v), None, None
        return *gradient_vjp_by_blocks(tensors, ctx.spec, v), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        refuse_mapped_weight(in_dims[8])
        rows = fold(info.batch_size, in_dims[:8], args[:8])
        found: Tensor = apply(RowGrad, RowGradForwardMode, *rows, *args[8:])
        return found.view(info.batch_size, -1, found.shape[1]), 0


class RowGradForwardMode(RowGrad):
    """`RowGrad` with a jvp."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        RowGrad.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:9])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return gradient_jvp(*linearise(ctx.saved_tensors, ctx.spec), tangents[:9])


_ops.differentiate("row_statistics", RowStats, 3, lambda flat: (RowSpec(*flat[:5]), Wanted(*flat[5:]), False))
_ops.differentiate("row_gradient", RowGrad, 9, lambda flat: (RowSpec(*flat), False))
