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
from .._records import HeadRows, RowSpec, Stats, Upstream, compute_dtype
from .._rows.functions import OnceDifferentiable, once_differentiable, upstream_of
from .._rows.operators import SPEC, UPSTREAM, define, differentiate
from . import blocks
from .blocks import HeadOptions, Needs

INSTEAD = "use xent.cross_entropy(torch.nn.functional.linear(input, linear_weight), target)"
GONE = f"double backward of a linear head with its loss: its logits are gone; for higher derivatives {INSTEAD}"


def head_loss(rows: HeadRows, factor: Tensor, options: HeadOptions) -> Tensor:
    """factor * sum_n loss_n (0-d, in the statistics' dtype)."""
    needs = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in rows.sources)
    if torch.compiler.is_compiling():
        return torch.ops.xent.head_loss(*rows, factor, *flatten(options), list(needs))[0]  # type: ignore[no-any-return]
    return HeadLoss.apply(*rows, factor, options, needs)[0]  # type: ignore[no-any-return, no-untyped-call]


def head_stats(rows: HeadRows, options: HeadOptions) -> Stats:
    """Differentiable `Stats`, (1, N) each."""
    if torch.compiler.is_compiling():
        found = torch.ops.xent.head_statistics(*rows, *flatten(options))
    else:
        found = HeadStats.apply(*rows, options)  # type: ignore[no-untyped-call]
    return options.wanted.unpack(found, rows.target.is_floating_point())


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
    def forward(*flat: Any) -> tuple[Tensor, ...]:
        rows, (factor, options, needs) = HeadRows.split(flat)
        if _torch.is_traced(*rows, factor):
            return tuple(torch.ops.xent.head_loss(*rows, factor, *flatten(options), list(needs)))
        return tuple(blocks.loss_and_grads(rows, factor, options, needs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        rows, (factor, options, needs) = HeadRows.split(inputs)
        ctx.dtypes = [t.dtype if t is not None and n else None for t, n in zip(rows.sources, needs, strict=True)]
        ctx.unscaled = options.dtype == torch.float16
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*rows.sources, factor, *output[1:])

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 9
        if any(wanted and dtype is None for wanted, dtype in zip(ctx.needs_input_grad, ctx.dtypes, strict=False)):
            raise RuntimeError(
                "a linear head with its loss computes its gradients in forward, and this graph was traced for tensors "
                "of which fewer require grad: trace it again"
            )
        saved = ctx.saved_tensors  # once: a hook may have packed them for one use
        sources, factor, left = saved[:5], saved[5], iter(saved[6:])
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
    def forward(*flat: Any) -> tuple[Tensor, ...]:
        rows, (options,) = HeadRows.split(flat)
        if _torch.is_traced(*rows):
            return tuple(torch.ops.xent.head_statistics(*rows, *flatten(options)))
        return tuple(blocks.stats_of(rows, options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        rows, (ctx.options,) = HeadRows.split(inputs)
        stats = ctx.options.wanted.unpack(output, rows.target.is_floating_point())
        ctx.mark_non_differentiable(stats.top, *[] if stats.argmax is None else [stats.argmax])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*rows, stats.top, stats.lse, stats.entropy)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(g is None for g in grads):
            return (None,) * 7
        rows, (top, lse, entropy) = HeadRows.split(ctx.saved_tensors)
        needs = ctx.needs_input_grad[: len(rows.sources)]
        found = stats_backward(rows, top, lse, entropy, grads, ctx.options, needs)
        return *[once_differentiable(grad, rows.sources, GONE) for grad in found], None, None


def stats_backward(
    rows: HeadRows,
    top: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    grads: Sequence[Tensor | None],
    options: HeadOptions,
    needs: Needs,
) -> list[Tensor | None]:
    """The gradients of `HeadRows.sources` that are wanted, without a graph of their own."""
    if any(map(_torch.is_batched_gradient, grads)):
        raise NotImplementedError(
            "is_grads_batched=True of the statistics of a linear head: each gradient of the batch would need the "
            "blocks of logits once more; call torch.autograd.grad in a loop"
        )
    with torch.no_grad():
        g = options.wanted.unpack(grads, rows.target.is_floating_point())
        upstream = upstream_of(g, lse, entropy, rows.target[None])
        numbers = (*rows, top, lse, *upstream, g.mass)
        if _torch.is_traced(*numbers):
            found = torch.ops.xent.head_gradients(*numbers, *flatten(options), list(needs))
        else:
            found = blocks.stats_grads(rows, top, lse, upstream, g.mass, options, needs)
        left = iter(found)
        wanted = zip(rows.sources, needs, strict=True)
        return [next(left).to(t.dtype) if t is not None and needed else None for t, needed in wanted]


# ---------------------------------------------------------------------------------------------------- operators

OPTIONS = (
    f"{SPEC}, ScalarType dtype, SymInt max_bytes, SymInt shift, float label_smoothing, float z_loss, "
    "bool entropy, bool argmax, float? resolution"
)
ROWS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? prob, Tensor? class_weight"
PER_ROW = f"Tensor top, Tensor lse, {UPSTREAM}, Tensor? g_mass"


def flatten(options: HeadOptions) -> tuple[Any, ...]:
    """As OPTIONS has it."""
    return (*options.spec, *options[1:])


def options_of(flat: Sequence[Any]) -> HeadOptions:
    """The inverse of `flatten`."""
    return HeadOptions(RowSpec(*flat[:5]), *flat[5:])


def _loss(*flat: Any) -> list[Tensor]:
    rows, (factor, *rest, needs) = HeadRows.split(flat)
    return blocks.loss_and_grads(rows, factor, options_of(rest), needs)


def _statistics(*flat: Any) -> list[Tensor]:
    rows, rest = HeadRows.split(flat)
    return blocks.stats_of(rows, options_of(rest))


def _gradients(*flat: Any) -> list[Tensor]:
    rows, (top, lse, *rest, needs) = HeadRows.split(flat)
    return blocks.stats_grads(rows, top, lse, Upstream(*rest[:4]), rest[4], options_of(rest[5:]), needs)


def _made(rows: HeadRows, options: HeadOptions, needs: Needs) -> list[Tensor]:
    """The gradients without numbers, as the blocks make them."""
    hidden, weight, _, target, prob, _ = rows
    q = target if prob is None else prob
    made = (
        (hidden.shape, options.dtype),
        (weight.shape, options.weight_dtype),
        (weight.shape[:1], options.weight_dtype),
        *[(q.shape, compute_dtype(q))] * 2,  # of the target or of `prob`
    )
    return [hidden.new_empty(shape, dtype=d) for (shape, d), needed in zip(made, needs, strict=True) if needed]


def _empty_gradients(*flat: Any) -> list[Tensor]:
    rows, (*rest, needs) = HeadRows.split(flat)
    return _made(rows, options_of(rest[7:]), needs)


def _empty_loss(*flat: Any) -> list[Tensor]:
    rows, (factor, *rest, needs) = HeadRows.split(flat)
    return [torch.empty_like(factor), *_made(rows, options_of(rest), needs)]


def _empty_statistics(*flat: Any) -> list[Tensor]:
    rows, rest = HeadRows.split(flat)
    return options_of(rest).wanted.empty(rows.hidden[None], rows.target[None])


define("head_loss", f"({ROWS}, Tensor factor, {OPTIONS}, bool[] needs) -> Tensor[]", _loss, _empty_loss)
define("head_statistics", f"({ROWS}, {OPTIONS}) -> Tensor[]", _statistics, _empty_statistics)
define("head_gradients", f"({ROWS}, {PER_ROW}, {OPTIONS}, bool[] needs) -> Tensor[]", _gradients, _empty_gradients)
differentiate("head_loss", HeadLoss, lambda *flat: (*flat[:7], options_of(flat[7:-1]), tuple(flat[-1])))
differentiate("head_gradients", OnceDifferentiable, lambda *flat: (flat[0], GONE))
differentiate("head_statistics", HeadStats, lambda *flat: (*flat[:6], options_of(flat[6:])))
