"""The Functions of a linear head with a loss, around the block loops of `_blocks.py`.

`LinearLoss` is one number, the loss; forward computes its gradients too, and backward scales them. `LinearStats` are
numbers per row; backward goes through the blocks again. A compiler sees each loop as one opaque operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _blocks, _ops
from ._backends import Reading, Stats, advise_huge_pages, statistics_dtype
from ._blocks import Head, Maybe

Needs = tuple[bool, bool, bool]
TWICE = (
    "double backward of a linear head with its loss: its logits are gone; for higher derivatives use "
    "xent.cross_entropy(torch.nn.functional.linear(input, linear_weight), target)"
)


def linear_loss(
    hidden: Tensor, weight: Tensor, bias: Maybe, target: Tensor, scale: Tensor, class_weight: Maybe, head: Head
) -> Tensor:
    """scale * sum_n loss_n (0-d, in the statistics' dtype) of the rows (N, D) and their targets."""
    refuse_transforms(hidden, weight, bias)
    needs = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias))
    found: Tensor = LinearLoss.apply(hidden, weight, bias, target, scale, class_weight, head, needs)[0]  # type: ignore[no-untyped-call]
    return found


def linear_stats(hidden: Tensor, weight: Tensor, bias: Maybe, target: Tensor, class_weight: Maybe, head: Head) -> Stats:
    """Differentiable `Stats` of the rows (N, D)."""
    refuse_transforms(hidden, weight, bias)
    found = iter(LinearStats.apply(hidden, weight, bias, target, class_weight, head))  # type: ignore[no-untyped-call]
    asked = (True, True, target.is_floating_point(), head.label_smoothing > 0, head.entropy, head.argmax)
    return Stats(*[next(found) if yes else None for yes in asked])  # type: ignore[arg-type]


def refuse_transforms(*tensors: Maybe) -> None:
    """Forward mode and vmap would need the blocks' logits in ways that this path does not have."""
    if torch.compiler.is_compiling():
        return
    kind = torch._C._functorch.TransformType
    levels = [level.key() for level in torch._C._functorch.get_interpreter_stack() or ()]
    dual = torch.autograd.forward_ad._current_level >= 0 and any(
        torch.autograd.forward_ad.unpack_dual(t).tangent is not None  # type: ignore[no-untyped-call]
        for t in tensors
        if t is not None
    )
    for unfit, name in ((kind.Vmap in levels, "vmap"), (kind.Jvp in levels or dual, "forward-mode differentiation")):
        if unfit:
            raise NotImplementedError(
                f"{name} of a linear head with its loss: there is no rule for it that would not hold the logits; "
                "use xent.cross_entropy(torch.nn.functional.linear(input, linear_weight), target)"
            )


class LinearLoss(torch.autograd.Function):
    """The loss, with its gradients computed in forward; backward multiplies them by the upstream number."""

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Maybe,
        target: Tensor,
        scale: Tensor,
        class_weight: Maybe,
        head: Head,
        needs: Needs,
    ) -> tuple[Tensor, ...]:
        arguments = (hidden, weight, bias, target, scale, class_weight)
        if _ops.observed(hidden) or _ops.observed(weight):
            return tuple(torch.ops.xent.linear_loss(*arguments, *head.reading, *head[1:], list(needs)))
        return tuple(_blocks.loss_and_grads(*arguments, head, needs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.dtypes = [t.dtype if needed else None for t, needed in zip(inputs[:3], inputs[7], strict=True)]
        ctx.unscaled = inputs[6].dtype == torch.float16
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:3], inputs[4], *output[1:])

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 8
        hidden, weight, bias, scale, *grads = ctx.saved_tensors
        sources, left = (hidden, weight, bias), iter(grads)
        if ctx.unscaled:
            g = g * torch.where(scale.isinf(), 0, scale)  # 1 / 0 where no row counts
        found = [None if dtype is None else _scaled(next(left), g, dtype, sources) for dtype in ctx.dtypes]
        return *found, *[None] * 5


def _scaled(grad: Tensor, g: Tensor, dtype: torch.dtype, sources: Sequence[Maybe]) -> Tensor:
    """g * grad in dtype. A graph that is used once gives its buffers away; one that is kept needs them again."""
    if torch.compiler.is_compiling():
        return (grad * g).to(dtype)
    if torch.is_grad_enabled():
        return once_differentiable((grad * g).to(dtype), sources)
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    if keeps is None or keeps():
        return (grad * g).to(dtype)
    if g.device.type != "cpu" or _ops.observed(g) or g != 1:  # elsewhere, to look at it would make the host wait
        grad.mul_(g)
    return grad if grad.dtype == dtype else advise_huge_pages(torch.empty_like(grad, dtype=dtype)).copy_(grad)


def once_differentiable(grad: Tensor, sources: Sequence[Maybe]) -> Tensor:
    """With create_graph=True: the same gradient, which refuses to forget what it depends on."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return grad
    return OnceDifferentiable.apply(grad, *sources)  # type: ignore[no-any-return, no-untyped-call]


class OnceDifferentiable(torch.autograd.Function):
    """See `once_differentiable`."""

    @staticmethod
    def forward(grad: Tensor, *sources: Maybe) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[None, ...]:
        raise NotImplementedError(TWICE)


def upstream_of(
    head: Head, target: Tensor, lse: Tensor, entropy: Maybe, g_lse: Maybe, g_picked: Maybe, *more: Maybe
) -> list[Maybe]:
    """g_lse, g_picked, g_wsum, g_entropy as `logits_grad` takes them, from the gradients of the wanted statistics."""
    others = iter(more[target.is_floating_point() :])  # that of the mass belongs to the probabilities
    g_wsum = next(others) if head.label_smoothing > 0 else None
    g_entropy = next(others) if head.entropy else None
    g_lse = torch.zeros_like(lse) if g_lse is None else g_lse
    g_picked = torch.zeros_like(lse) if g_picked is None else g_picked
    if g_entropy is not None and entropy is not None:  # the part of its gradient that is one number per row
        g_lse = g_lse - g_entropy * entropy
    return [g_lse, g_picked, g_wsum, g_entropy]


class LinearStats(torch.autograd.Function):
    """Those of `Stats` that are wanted, for each row."""

    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, bias: Maybe, target: Tensor, class_weight: Maybe, head: Head
    ) -> tuple[Tensor, ...]:
        arguments = (hidden, weight, bias, target, class_weight)
        if _ops.observed(hidden) or _ops.observed(weight):
            return tuple(torch.ops.xent.linear_stats(*arguments, *head.reading, *head[1:]))
        return tuple(_blocks.stats_of(*arguments, head))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.head = inputs
        entropy = output[-1 - ctx.head.argmax] if ctx.head.entropy else None
        if ctx.head.argmax:
            ctx.mark_non_differentiable(output[-1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output[0], entropy)

    @staticmethod
    def backward(ctx: Any, g_lse: Maybe, g_picked: Maybe, *more: Maybe) -> tuple[Tensor | None, ...]:
        if all(g is None for g in (g_lse, g_picked, *more)):
            return (None,) * 6
        hidden, weight, bias, target, class_weight, lse, entropy = ctx.saved_tensors
        upstream = upstream_of(ctx.head, target, lse, entropy, g_lse, g_picked, *more)
        sources, needs = (hidden, weight, bias), ctx.needs_input_grad[:3]
        left = iter(LinearGrads.apply(*sources, target, lse, *upstream, class_weight, ctx.head, needs))  # type: ignore[no-untyped-call]
        return *[next(left) if needed else None for needed in needs], None, None, None


class LinearGrads(torch.autograd.Function):
    """The gradients of hidden, weight and bias that are wanted, from numbers per row; not differentiable again."""

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Maybe,
        target: Tensor,
        lse: Tensor,
        g_lse: Tensor,
        g_picked: Tensor,
        g_wsum: Maybe,
        g_entropy: Maybe,
        class_weight: Maybe,
        head: Head,
        needs: Needs,
    ) -> tuple[Tensor, ...]:
        arguments = (hidden, weight, bias, target, lse, [g_lse, g_picked, g_wsum, g_entropy], class_weight)
        if _ops.observed(hidden) or _ops.observed(weight):
            grads = torch.ops.xent.linear_stats_grads(*arguments, *head.reading, *head[1:], list(needs))
        else:
            grads = _blocks.stats_grads(*arguments, head, needs)
        dtypes = [t.dtype for t, needed in zip((hidden, weight, bias), needs, strict=True) if needed and t is not None]
        return tuple(grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[None, ...]:
        raise NotImplementedError(TWICE)


# ---------------------------------------------------------------------------------------------------- operators

HEAD = (
    "int ignore_index, float scale_, float? softcap, SymInt start, SymInt? classes, ScalarType dtype, "
    "SymInt max_bytes, SymInt shift, float label_smoothing, float z_loss, bool entropy, bool argmax"
)
ROWS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor target"


def head_of(fields: tuple[Any, ...]) -> Head:
    count = len(Reading._fields)
    return Head(Reading(*fields[:count]), *fields[count:])


def _run_loss(h: Tensor, W: Tensor, b: Maybe, y: Tensor, scale: Tensor, w: Maybe, *rest: Any) -> list[Tensor]:
    return _blocks.loss_and_grads(h, W, b, y, scale, w, head_of(rest[:-1]), rest[-1])


def _run_stats(h: Tensor, W: Tensor, b: Maybe, y: Tensor, w: Maybe, *rest: Any) -> list[Tensor]:
    return _blocks.stats_of(h, W, b, y, w, head_of(rest))


def _run_stats_grads(
    h: Tensor, W: Tensor, b: Maybe, y: Tensor, lse: Tensor, upstream: list[Maybe], w: Maybe, *rest: Any
) -> list[Tensor]:
    return _blocks.stats_grads(h, W, b, y, lse, upstream, w, head_of(rest[:-1]), rest[-1])


def shapes_of_grads(hidden: Tensor, weight: Tensor, head: Head, needs: Needs) -> list[Tensor]:
    dtype = torch.float64 if head.dtype == torch.float64 else torch.float32
    shapes = ((hidden.shape, head.dtype), (weight.shape, dtype), (weight.shape[:1], dtype))
    return [hidden.new_empty(shape, dtype=d) for (shape, d), needed in zip(shapes, needs, strict=True) if needed]


def _shapes_of_loss(h: Tensor, W: Tensor, b: Maybe, y: Tensor, scale: Tensor, w: Maybe, *rest: Any) -> list[Tensor]:
    return [torch.empty_like(scale), *shapes_of_grads(h, W, head_of(rest[:-1]), rest[-1])]


def _shapes_of_stats(hidden: Tensor, weight: Tensor, bias: Maybe, target: Tensor, *rest: Any) -> list[Tensor]:
    head = head_of(rest[1:])
    count = 2 + target.is_floating_point() + (head.label_smoothing > 0) + head.entropy
    dtypes = [statistics_dtype(hidden.device)] * count + [torch.int64] * head.argmax
    return [hidden.new_empty(hidden.shape[:1], dtype=dtype) for dtype in dtypes]


def _shapes_of_stats_grads(h: Tensor, W: Tensor, b: Maybe, y: Tensor, lse: Tensor, *rest: Any) -> list[Tensor]:
    return shapes_of_grads(h, W, head_of(rest[2:-1]), rest[-1])


for name, schema, run, shapes in (
    ("linear_loss", f"{ROWS}, Tensor scale, Tensor? class_weight, {HEAD}, bool[] needs", _run_loss, _shapes_of_loss),
    ("linear_stats", f"{ROWS}, Tensor? class_weight, {HEAD}", _run_stats, _shapes_of_stats),
    (
        "linear_stats_grads",
        f"{ROWS}, Tensor lse, Tensor?[] upstream, Tensor? class_weight, {HEAD}, bool[] needs",
        _run_stats_grads,
        _shapes_of_stats_grads,
    ),
):
    torch.library.define(f"xent::{name}", f"({schema}) -> Tensor[]")
    torch.library.impl(f"xent::{name}", "default", run)
    torch.library.register_fake(f"xent::{name}", shapes)
