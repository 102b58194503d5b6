"""The Functions of a linear head with a loss, around the block loops of `blocks.py`.

`HeadLoss` is one number, the loss; forward computes its gradients too, and backward scales them. `HeadStats` are
numbers per row; backward goes through the blocks again. A compiler sees each loop as one operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import _torch
from .._backends import advise_huge_pages
from .._records import RowSpec, Stats, Upstream, compute_dtype
from .._rows.functions import OnceDifferentiable, once_differentiable, upstream_of
from .._rows.operators import SPEC, UPSTREAM, define, differentiate
from . import blocks
from .blocks import HeadOptions, Needs

INSTEAD = "use xent.cross_entropy(torch.nn.functional.linear(input, linear_weight), target)"
GONE = f"double backward of a linear head with its loss: its logits are gone; for higher derivatives {INSTEAD}"


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    factor: Tensor,
    class_weight: Tensor | None,
    options: HeadOptions,
) -> Tensor:
    """factor * sum_n loss_n (0-d, in the statistics' dtype) of the rows (N, D) and their targets."""
    tensors = (hidden, weight, bias, target)
    needs = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors)
    arguments = (*tensors, factor, class_weight)
    if torch.compiler.is_compiling():
        return torch.ops.xent.head_loss(*arguments, *flatten(options), list(needs))[0]  # type: ignore[no-any-return]
    return HeadLoss.apply(*arguments, options, needs)[0]  # type: ignore[no-any-return, no-untyped-call]


def head_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    options: HeadOptions,
) -> Stats:
    """Differentiable `Stats` of the rows (N, D), (1, N) each."""
    arguments = (hidden, weight, bias, target, class_weight)
    if torch.compiler.is_compiling():
        found = torch.ops.xent.head_statistics(*arguments, *flatten(options))
    else:
        found = HeadStats.apply(*arguments, options)  # type: ignore[no-untyped-call]
    return options.wanted.unpack(found, target.is_floating_point())


class NoTransforms:
    """Forward mode and vmap would need the blocks' logits in ways that this path does not have."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> NoReturn:
        raise NotImplementedError(f"vmap of a linear head with its loss would hold the logits; {INSTEAD}")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        raise NotImplementedError(
            f"forward-mode differentiation of a linear head with its loss would hold the logits; {INSTEAD}"
        )


class HeadLoss(NoTransforms, torch.autograd.Function):
    """The loss, with its gradients computed in forward; backward multiplies them by the upstream number."""

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        factor: Tensor,
        class_weight: Tensor | None,
        options: HeadOptions,
        needs: Needs,
    ) -> tuple[Tensor, ...]:
        arguments = (hidden, weight, bias, target, factor, class_weight)
        if _torch.is_traced(*arguments):
            return tuple(torch.ops.xent.head_loss(*arguments, *flatten(options), list(needs)))
        return tuple(blocks.loss_and_grads(*arguments, options, needs))

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


def _scaled(grad: Tensor, g: Tensor, dtype: torch.dtype, sources: Sequence[Tensor | None]) -> Tensor | None:
    """g * grad in dtype. A graph that is used once gives its buffers away; one that is kept needs them again."""
    if torch.is_grad_enabled():
        return once_differentiable((grad * g).to(dtype), sources, GONE)
    if _torch.needs_operator(grad, g) or _torch.graph_is_kept():
        return (grad * g).to(dtype)
    if g.device.type != "cpu" or g != 1:  # elsewhere, to look at it would make the host wait
        grad.mul_(g)
    return grad if grad.dtype == dtype else advise_huge_pages(torch.empty_like(grad, dtype=dtype)).copy_(grad)


class HeadStats(NoTransforms, torch.autograd.Function):
    """Those of `Stats` that are wanted, for each row."""

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        class_weight: Tensor | None,
        options: HeadOptions,
    ) -> tuple[Tensor, ...]:
        arguments = (hidden, weight, bias, target, class_weight)
        if _torch.is_traced(*arguments):
            return tuple(torch.ops.xent.head_statistics(*arguments, *flatten(options)))
        return tuple(blocks.stats_of(*arguments, options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.options = inputs
        stats = ctx.options.wanted.unpack(output, inputs[3].is_floating_point())
        ctx.mark_non_differentiable(stats.top, *[] if stats.argmax is None else [stats.argmax])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, stats.top, stats.lse, stats.entropy)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(g is None for g in grads):
            return (None,) * 6
        saved = ctx.saved_tensors
        found = stats_backward(saved, grads, ctx.options, ctx.needs_input_grad[:4])
        return *[once_differentiable(grad, saved[:4], GONE) for grad in found], None, None


def stats_backward(
    saved: tuple[Any, ...], grads: Sequence[Tensor | None], options: HeadOptions, needs: Needs
) -> list[Tensor | None]:
    """The gradients of hidden, weight, bias and target that are wanted, without a graph of their own."""
    hidden, weight, bias, target, class_weight, top, lse, entropy = saved
    if any(map(_torch.is_batched_gradient, grads)):
        raise NotImplementedError(
            "is_grads_batched=True of the statistics of a linear head: each gradient of the batch would need the "
            "blocks of logits once more; call torch.autograd.grad in a loop"
        )
    with torch.no_grad():
        g = options.wanted.unpack(grads, target.is_floating_point())
        upstream = upstream_of(g, lse, entropy, target[None])
        rows, rest = (hidden, weight, bias, target, top, lse), (g.mass, class_weight)
        if _torch.is_traced(*rows, *upstream, *rest):
            found = torch.ops.xent.head_gradients(*rows, *upstream, *rest, *flatten(options), list(needs))
        else:
            found = blocks.stats_grads(*rows, upstream, *rest, options, needs)
        left = iter(found)
        return [next(left).to(t.dtype) if needed else None for t, needed in zip(rows[:4], needs, strict=True)]


# ---------------------------------------------------------------------------------------------------- operators

OPTIONS = (
    f"{SPEC}, ScalarType dtype, SymInt max_bytes, SymInt shift, float label_smoothing, float z_loss, "
    "bool entropy, bool argmax, float? resolution"
)
ROWS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor target"
PER_ROW = f"Tensor top, Tensor lse, {UPSTREAM}, Tensor? g_mass, Tensor? class_weight"


def flatten(options: HeadOptions) -> tuple[Any, ...]:
    """As OPTIONS has it."""
    return (*options.spec, *options[1:])


def options_of(flat: Sequence[Any]) -> HeadOptions:
    """The inverse of `flatten`."""
    return HeadOptions(RowSpec(*flat[:5]), *flat[5:])


def _loss(*flat: Any) -> list[Tensor]:
    return blocks.loss_and_grads(*flat[:6], options_of(flat[6:-1]), flat[-1])  # type: ignore[call-arg]


def _statistics(*flat: Any) -> list[Tensor]:
    return blocks.stats_of(*flat[:5], options_of(flat[5:]))  # type: ignore[call-arg]


def _gradients(*flat: Any) -> list[Tensor]:
    rows, upstream, rest = flat[:6], Upstream(*flat[6:10]), flat[10:12]
    return blocks.stats_grads(*rows, upstream, *rest, options_of(flat[12:-1]), flat[-1])  # type: ignore[call-arg]


def _empty_gradients(hidden: Tensor, weight: Tensor, _: Any, target: Tensor, *flat: Any) -> list[Tensor]:
    """The gradients without numbers, as the blocks make them."""
    options, needs = options_of(flat[8:-1]), flat[-1]
    made = (
        (hidden.shape, options.dtype),
        (weight.shape, options.weight_dtype),
        (weight.shape[:1], options.weight_dtype),
        (target.shape, compute_dtype(target)),
    )
    return [hidden.new_empty(shape, dtype=d) for (shape, d), needed in zip(made, needs, strict=True) if needed]


def _empty_loss(h: Tensor, W: Tensor, b: Tensor | None, y: Tensor, factor: Tensor, w: Any, *flat: Any) -> list[Tensor]:
    return [torch.empty_like(factor), *_empty_gradients(h, W, b, y, *[None] * 8, *flat)]


def _empty_statistics(h: Tensor, W: Tensor, b: Any, y: Tensor, w: Any, *flat: Any) -> list[Tensor]:
    return options_of(flat).wanted.empty(h[None], y[None])


_LOSS = f"({ROWS}, Tensor factor, Tensor? class_weight, {OPTIONS}, bool[] needs) -> Tensor[]"
define("head_loss", _LOSS, _loss, _empty_loss)
define("head_statistics", f"({ROWS}, Tensor? class_weight, {OPTIONS}) -> Tensor[]", _statistics, _empty_statistics)
define("head_gradients", f"({ROWS}, {PER_ROW}, {OPTIONS}, bool[] needs) -> Tensor[]", _gradients, _empty_gradients)
differentiate("head_loss", HeadLoss, lambda *flat: (*flat[:6], options_of(flat[6:-1]), tuple(flat[-1])))
differentiate("head_gradients", OnceDifferentiable, lambda *flat: (flat[0], GONE))
differentiate("head_statistics", HeadStats, lambda *flat: (*flat[:5], options_of(flat[5:])))
