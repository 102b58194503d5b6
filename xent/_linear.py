"""The Functions of a linear head with a loss, around the block loops of `_blocks.py`.

`LinearLoss` is one number, the loss; forward computes its gradients too, and backward scales them. `LinearStats` are
numbers per row; backward goes through the blocks again. A compiler sees each loop as one opaque operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _blocks, _torch
from ._backends import advise_huge_pages
from ._blocks import Head, Maybe, Needs
from ._ops import SPEC, UPSTREAM, define, differentiate
from ._records import RowSpec, Stats, Upstream, Wanted, compute_dtype

TWICE = (
    "double backward of a linear head with its loss: its logits are gone; for higher derivatives use "
    "xent.cross_entropy(torch.nn.functional.linear(input, linear_weight), target)"
)


def linear_loss(
    hidden: Tensor, weight: Tensor, bias: Maybe, target: Tensor, factor: Tensor, class_weight: Maybe, head: Head
) -> Tensor:
    """factor * sum_n loss_n (0-d, in the statistics' dtype) of the rows (N, D) and their targets."""
    refuse_transforms(hidden, weight, bias)
    needs = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias, target))
    found: Tensor = LinearLoss.apply(hidden, weight, bias, target, factor, class_weight, head, needs)[0]  # type: ignore[no-untyped-call]
    return found


def linear_stats(hidden: Tensor, weight: Tensor, bias: Maybe, target: Tensor, class_weight: Maybe, head: Head) -> Stats:
    """Differentiable `Stats` of the rows (N, D)."""
    refuse_transforms(hidden, weight, bias)
    found = LinearStats.apply(hidden, weight, bias, target, class_weight, head)  # type: ignore[no-untyped-call]
    return head.wanted.unpack(found, target.is_floating_point())


def refuse_transforms(*tensors: Maybe) -> None:
    """Forward mode and vmap would need the blocks' logits in ways that this path does not have."""
    if torch.compiler.is_compiling():
        return
    kind, levels = _torch.TransformType, _torch.transforms()
    dual = _torch.forward_mode_is_on() and any(
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
        factor: Tensor,
        class_weight: Maybe,
        head: Head,
        needs: Needs,
    ) -> tuple[Tensor, ...]:
        arguments = (hidden, weight, bias, target, factor, class_weight)
        if _torch.is_traced(*arguments):
            return tuple(torch.ops.xent.linear_loss(*arguments, *head.spec, *head[1:], list(needs)))
        return tuple(_blocks.loss_and_grads(*arguments, head, needs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.dtypes = [t.dtype if needed else None for t, needed in zip(inputs[:4], inputs[7], strict=True)]
        ctx.unscaled = inputs[6].dtype == torch.float16
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:5], *output[1:])

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 8
        if any(wanted and dtype is None for wanted, dtype in zip(ctx.needs_input_grad, ctx.dtypes, strict=False)):
            raise RuntimeError(
                "a linear head with its loss computes its gradients in forward, and this graph was traced for tensors "
                "of which fewer require grad: trace it again"
            )
        hidden, weight, bias, target, factor, *grads = ctx.saved_tensors
        sources, left = (hidden, weight, bias, target), iter(grads)
        if ctx.unscaled:
            g = g * torch.where(factor.isinf(), 0, factor)  # 1 / 0 where no row counts
        found = [None if dtype is None else _scaled(next(left), g, dtype, sources) for dtype in ctx.dtypes]
        return *found, *[None] * 4


def _scaled(grad: Tensor, g: Tensor, dtype: torch.dtype, sources: Sequence[Maybe]) -> Tensor:
    """g * grad in dtype. A graph that is used once gives its buffers away; one that is kept needs them again."""
    if torch.is_grad_enabled():
        return once_differentiable((grad * g).to(dtype), sources)
    if _torch.is_redirected(grad, g) or _torch.graph_is_kept():
        return (grad * g).to(dtype)
    if g.device.type != "cpu" or g != 1:  # elsewhere, to look at it would make the host wait
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
    wanted: Wanted, soft: bool, grads: tuple[Maybe, ...], lse: Tensor, entropy: Maybe
) -> tuple[Upstream, Maybe]:
    """What `row_gradient` takes, from the gradients of the wanted statistics; and that of the mass."""
    if any(map(_torch.is_batched_gradient, grads)):
        raise NotImplementedError(
            "is_grads_batched=True of the statistics of a linear head: each gradient of the batch would need the "
            "blocks of logits once more; call torch.autograd.grad in a loop"
        )
    g = wanted.unpack(grads, soft)
    g_lse = torch.zeros_like(lse) if g.lse is None else g.lse
    g_picked = torch.zeros_like(lse) if g.picked is None else g.picked
    if g.entropy is not None and entropy is not None:  # the part of its gradient that is one number per row
        g_lse = g_lse - g.entropy * entropy
    return Upstream(g_lse, g_picked, g.wsum, g.entropy), g.mass


class LinearStats(torch.autograd.Function):
    """Those of `Stats` that are wanted, for each row."""

    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, bias: Maybe, target: Tensor, class_weight: Maybe, head: Head
    ) -> tuple[Tensor, ...]:
        arguments = (hidden, weight, bias, target, class_weight)
        if _torch.is_traced(*arguments):
            return tuple(torch.ops.xent.linear_stats(*arguments, *head.spec, *head[1:]))
        return tuple(_blocks.stats_of(*arguments, head))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.head = inputs
        stats = ctx.head.wanted.unpack(output, inputs[3].is_floating_point())
        ctx.mark_non_differentiable(stats.top, *[] if stats.argmax is None else [stats.argmax])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, stats.top, stats.lse, stats.entropy)

    @staticmethod
    def backward(ctx: Any, *grads: Maybe) -> tuple[Tensor | None, ...]:
        if all(g is None for g in grads):
            return (None,) * 6
        hidden, weight, bias, target, class_weight, top, lse, entropy = ctx.saved_tensors
        upstream, g_mass = upstream_of(ctx.head.wanted, target.is_floating_point(), grads, lse, entropy)
        rows, needs = (hidden, weight, bias, target, top, lse), ctx.needs_input_grad[:4]
        left = iter(LinearGrads.apply(*rows, *upstream, g_mass, class_weight, ctx.head, needs))  # type: ignore[no-untyped-call]
        return *[next(left) if needed else None for needed in needs], None, None


class LinearGrads(torch.autograd.Function):
    """The gradients of hidden, weight, bias and target that are wanted, from numbers per row; once only."""

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Maybe,
        target: Tensor,
        top: Tensor,
        lse: Tensor,
        g_lse: Tensor,
        g_picked: Tensor,
        g_wsum: Maybe,
        g_entropy: Maybe,
        g_mass: Maybe,
        class_weight: Maybe,
        head: Head,
        needs: Needs,
    ) -> tuple[Tensor, ...]:
        rows, upstream = (hidden, weight, bias, target, top, lse), Upstream(g_lse, g_picked, g_wsum, g_entropy)
        if _torch.is_traced(*rows, *upstream, g_mass, class_weight):
            flat = (*upstream, g_mass, class_weight, *head.spec, *head[1:], list(needs))
            grads = torch.ops.xent.linear_stats_grads(*rows, *flat)
        else:
            grads = _blocks.stats_grads(*rows, upstream, g_mass, class_weight, head, needs)
        dtypes = [t.dtype for t, needed in zip(rows[:4], needs, strict=True) if needed and t is not None]
        return tuple(grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[None, ...]:
        raise NotImplementedError(TWICE)


# ---------------------------------------------------------------------------------------------------- operators

HEAD = (
    f"{SPEC}, ScalarType dtype, SymInt max_bytes, SymInt shift, float label_smoothing, float z_loss, "
    "bool entropy, bool argmax"
)
ROWS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor target"
PER_ROW = f"Tensor top, Tensor lse, {UPSTREAM}, Tensor? g_mass, Tensor? class_weight"


def head_of(flat: tuple[Any, ...]) -> Head:
    """The inverse of `*head.spec, *head[1:]`."""
    return Head(RowSpec(*flat[:5]), *flat[5:])


def _run_loss(h: Tensor, W: Tensor, b: Maybe, y: Tensor, factor: Tensor, w: Maybe, *rest: Any) -> list[Tensor]:
    return _blocks.loss_and_grads(h, W, b, y, factor, w, head_of(rest[:-1]), rest[-1])


def _run_stats(h: Tensor, W: Tensor, b: Maybe, y: Tensor, w: Maybe, *rest: Any) -> list[Tensor]:
    return _blocks.stats_of(h, W, b, y, w, head_of(rest))


def _run_stats_grads(h: Tensor, W: Tensor, b: Maybe, y: Tensor, top: Tensor, lse: Tensor, *rest: Any) -> list[Tensor]:
    upstream, (g_mass, w), head = Upstream(*rest[:4]), rest[4:6], head_of(rest[6:-1])
    return _blocks.stats_grads(h, W, b, y, top, lse, upstream, g_mass, w, head, rest[-1])


def empty_grads(hidden: Tensor, weight: Tensor, target: Tensor, head: Head, needs: Needs) -> list[Tensor]:
    """The gradients without numbers, as the blocks make them."""
    dtype = torch.float64 if head.dtype == torch.float64 else torch.float32
    made = (
        (hidden.shape, head.dtype),
        (weight.shape, dtype),
        (weight.shape[:1], dtype),
        (target.shape, compute_dtype(target)),
    )
    return [hidden.new_empty(shape, dtype=d) for (shape, d), needed in zip(made, needs, strict=True) if needed]


def _empty_loss(h: Tensor, W: Tensor, b: Maybe, y: Tensor, factor: Tensor, w: Maybe, *rest: Any) -> list[Tensor]:
    return [torch.empty_like(factor), *empty_grads(h, W, y, head_of(rest[:-1]), rest[-1])]


def _empty_stats(h: Tensor, W: Tensor, b: Maybe, y: Tensor, w: Maybe, *rest: Any) -> list[Tensor]:
    return head_of(rest).wanted.empty(h, y.is_floating_point())


def _empty_stats_grads(h: Tensor, W: Tensor, b: Maybe, y: Tensor, *rest: Any) -> list[Tensor]:
    return empty_grads(h, W, y, head_of(rest[8:-1]), rest[-1])


_LOSS = f"({ROWS}, Tensor factor, Tensor? class_weight, {HEAD}, bool[] needs) -> Tensor[]"
define("linear_loss", _LOSS, _run_loss, _empty_loss)
define("linear_stats", f"({ROWS}, Tensor? class_weight, {HEAD}) -> Tensor[]", _run_stats, _empty_stats)
_GRADS = f"({ROWS}, {PER_ROW}, {HEAD}, bool[] needs) -> Tensor[]"
define("linear_stats_grads", _GRADS, _run_stats_grads, _empty_stats_grads)

differentiate("linear_loss", LinearLoss, 6, lambda flat: (head_of(flat[:-1]), tuple(flat[-1])))
differentiate("linear_stats", LinearStats, 5, lambda flat: (head_of(flat),))
differentiate("linear_stats_grads", LinearGrads, 12, lambda flat: (head_of(flat[:-1]), flat[-1]))
