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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _ops, _primitives
from ._backends import Reading, Stats, scores, split
from ._derivatives import Rows, gradient_jvp, gradient_vjp, gradient_vjp_by_blocks, linearise, stats_jvp


class Wanted(NamedTuple):
    """Which of the optional statistics to compute, and whether backward may write over the logits."""

    wsum: bool = False
    entropy: bool = False
    argmax: bool = False
    inplace: bool = False


def row_stats(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    reading: Reading,
    wanted: Wanted,
) -> Stats:
    """Differentiable `Stats` of the rows (N, C)."""
    found = iter(apply(RowStats, RowStatsForwardMode, logits, target, class_weight, reading, wanted))
    asked = (
        True,
        True,
        target.is_floating_point(),
        wanted.wsum,
        wanted.entropy,
        wanted.argmax,
    )
    return Stats(*[next(found) if yes else None for yes in asked])  # type: ignore[arg-type]


def watched(logits: Tensor) -> bool:
    """Whether a compiler, a transform of torch.func, forward mode or a kind of Tensor of its own looks on."""
    return (
        _ops.observed(logits)
        or torch._C._are_functorch_transforms_active()
        or torch._C._functorch.is_functorch_wrapped_tensor(logits)  # left over from a transform that has ended
        or torch.autograd.forward_ad._current_level >= 0
    )


def apply(function: type[torch.autograd.Function], with_jvp: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply`, by way of whoever looks on. `with_jvp` is the subclass that knows forward mode.

    Where nobody looks on, most of the cost of a small loss is saved: a backward that is not itself recorded needs no
    Function around its work, and torch would bind the arguments to the signature of `forward` by inspection, to fill
    in defaults that there are none of here.
    """
    if torch.compiler.is_compiling():  # Dynamo refuses a Function that has a jvp
        return function.apply(*args)  # type: ignore[no-untyped-call]
    if torch._C._are_functorch_transforms_active():
        levels = [level.key() for level in torch._C._functorch.get_interpreter_stack() or ()]
        if levels.count(torch._C._functorch.TransformType.Jvp) > 1:
            raise NotImplementedError(
                "forward mode over forward mode: torch gives a custom Function zero tangents there; "
                "take one of the two derivatives in reverse mode, as torch.func.hessian does"
            )
        return with_jvp.apply(*args)  # type: ignore[no-untyped-call]
    if torch._C._functorch.is_functorch_wrapped_tensor(args[0]):
        args = torch._functorch.utils.unwrap_dead_wrappers(args)
    if torch.autograd.forward_ad._current_level >= 0:
        function = with_jvp
    elif not torch.is_grad_enabled():
        return function.forward(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


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
        logits: Tensor,
        target: Tensor,
        class_weight: Tensor | None,
        reading: Reading,
        wanted: Wanted,
    ) -> tuple[Tensor, ...]:
        primitives = _ops if _ops.observed(logits) else _primitives
        stats = primitives.lse_and_pick(
            logits,
            target,
            start=reading.start,
            classes=reading.classes,
            ignore_index=reading.ignore_index,
            scale=reading.scale,
            softcap=reading.softcap,
            class_weight=class_weight,
            want_wsum=wanted.wsum,
            want_entropy=wanted.entropy,
            want_argmax=wanted.argmax,
        )
        return tuple(stat for stat in stats if stat is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, target, class_weight, ctx.reading, ctx.wanted = inputs
        entropy = output[-1 - ctx.wanted.argmax] if ctx.wanted.entropy else None
        if ctx.wanted.argmax:
            ctx.mark_non_differentiable(output[-1])
        ctx.set_materialize_grads(False)  # a statistic that nobody uses costs nothing in backward
        ctx.save_for_backward(logits, target, class_weight, output[0], entropy)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        def gradient(*arguments: Any) -> Tensor:
            return apply(RowGrad, RowGradForwardMode, *arguments)  # type: ignore[no-any-return]

        return *stats_backward(ctx, gradient, *grads), None, None

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
        ctx.save_for_forward(*ctx.to_save)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dq: Tensor | None, dw: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        logits, target, class_weight, lse, entropy = ctx.saved_tensors
        tangents = stats_jvp(Rows(logits, target, lse, class_weight, ctx.reading), dx, dq, dw, entropy)
        if not ctx.wanted.wsum:
            tangents = tangents._replace(wsum=None)
        return *[tangent for tangent in tangents if tangent is not None], *[None] * ctx.wanted.argmax


def stats_backward(
    ctx: Any, gradient: Callable[..., Tensor], g_lse: Tensor | None, g_picked: Tensor | None, *more: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of logits, target and class weight; the logits' by `gradient`, as `RowGrad` has it."""
    if all(g is None for g in (g_lse, g_picked, *more)):
        return None, None, None
    logits, target, class_weight, lse, entropy = ctx.saved_tensors[:5]
    others = iter(more)
    g_mass = next(others) if target.is_floating_point() else None
    g_wsum = next(others) if ctx.wanted.wsum else None
    g_entropy = next(others) if ctx.wanted.entropy else None
    g_lse = torch.zeros_like(lse) if g_lse is None else g_lse
    g_picked = torch.zeros_like(lse) if g_picked is None else g_picked

    d_logits = d_target = d_weight = None
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        d_target, d_weight = _coefficient_grads(ctx, g_mass, g_picked, g_wsum)
    if ctx.needs_input_grad[0]:
        if g_entropy is not None:  # the part of the entropy's gradient that is one number per row
            g_lse = g_lse - g_entropy * entropy
        if ctx.wanted.inplace and torch.is_grad_enabled():
            raise RuntimeError(
                "inplace_backward=True: the gradient replaces the logits, so it cannot be differentiated again; "
                "use inplace_backward=False with create_graph=True and torch.func"
            )
        upstream = (lse, g_lse, g_picked, g_wsum, g_entropy)
        d_logits = gradient(logits, target, *upstream, class_weight, ctx.reading, ctx.wanted.inplace)
    return d_logits, d_target, d_weight


def _coefficient_grads(
    ctx: Any, g_mass: Tensor | None, g_picked: Tensor, g_wsum: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of probability targets q and of the class weights w, which enter picked, mass and wsum linearly.

    dq_c = w_c (g_mass + g_picked z_c), where z_c is measured from lse so that the large numbers cancel per row.
    """
    logits, q, w, lse, _ = ctx.saved_tensors[:5]
    z = scores(logits, ctx.reading.scale, ctx.reading.softcap)
    high, low = split(lse.detach(), z.dtype)
    g = g_picked.to(z.dtype)[:, None]
    level = lse.detach() * g_picked if g_mass is None else lse.detach() * g_picked + g_mass
    d = (z - high - low) * g + level.to(z.dtype)[:, None]
    d_target = (d if w is None else d * w).to(q.dtype) if ctx.needs_input_grad[1] else None
    d_weight = None
    if ctx.needs_input_grad[2]:
        d_weight = (d * q).sum(0)
        if g_wsum is not None:
            d_weight = d_weight + (z * g_wsum.to(z.dtype)[:, None]).sum(0)
    return d_target, d_weight


class RowGrad(torch.autograd.Function):
    """The gradient of the logits from one upstream number per row and statistic, by `_primitives.logits_grad`."""

    @staticmethod
    def forward(
        logits: Tensor,
        target: Tensor,
        lse: Tensor,
        g_lse: Tensor,
        g_picked: Tensor,
        g_wsum: Tensor | None,
        g_entropy: Tensor | None,
        class_weight: Tensor | None,
        reading: Reading,
        inplace: bool,
    ) -> Tensor:
        out = logits.detach() if inplace else None
        primitives = _ops if _ops.observed(logits) else _primitives
        d_logits: Tensor = primitives.logits_grad(
            logits,
            target,
            lse,
            g_lse,
            g_picked,
            g_wsum,
            g_entropy,
            start=reading.start,
            ignore_index=reading.ignore_index,
            scale=reading.scale,
            softcap=reading.softcap,
            class_weight=class_weight,
            out=out,
        )
        if inplace:  # whoever saved the old values for backward finds out, as after any in-place operation
            torch.autograd.graph.increment_version(logits)
        return d_logits

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.reading, inplace = inputs
        if not inplace:  # then nothing is left to derive from; RowStats has refused to be asked
            ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Any, ...]:
        tensors, again = ctx.saved_tensors, torch.is_grad_enabled() or torch.compiler.is_compiling()
        if again:
            return *gradient_vjp(*linearise(tensors, ctx.reading), v), None, None
        return *gradient_vjp_by_blocks(tensors, ctx.reading, v), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        refuse_mapped_weight(in_dims[7])
        rows = fold(info.batch_size, in_dims[:7], args[:7])
        found: Tensor = apply(RowGrad, RowGradForwardMode, *rows, *args[7:])
        return found.view(info.batch_size, -1, found.shape[1]), 0


class RowGradForwardMode(RowGrad):
    """`RowGrad` with a jvp."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        RowGrad.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:8])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return gradient_jvp(*linearise(ctx.saved_tensors, ctx.reading), tangents[:8])
