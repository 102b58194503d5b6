"""The Functions of a linear head with a loss, around the loops over blocks of logits; a compiler sees operators.

`HeadLoss` is one number, the loss; forward computes its gradients too, and backward scales them. `HeadStats` are
numbers per row; backward goes through the blocks again, or has what a sparse gradient takes from forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import _torch
from .._backends import advise_huge_pages
from .._inputs.head import LinearRows
from .._records import HeadRows, Objective, RowNumbers, RowSpec, Stats, Wanted, compute_dtype, statistics_dtype
from .._rows import objective
from .._rows.functions import OnceDifferentiable, numbers_of_stats, once_differentiable
from .._rows.operators import FIELDS, apply, define, differentiate, run
from .blocks import HeadOptions, Needs, loss_and_grads
from .entries import Entries, stats_grads, stats_of

SEED = 2**63 - 1
INSTEAD = "use xent.cross_entropy(torch.nn.functional.linear(input, linear_weight), target)"
GONE = f"double backward of a linear head with its loss: its logits are gone; for higher derivatives {INSTEAD}"
BATCHED = (
    "is_grads_batched=True of the statistics of a linear head: each gradient of the batch would need the "
    "blocks of logits once more; call torch.autograd.grad in a loop"
)
BATCHED_SPARSE = "is_grads_batched=True of a linear head with a sparse gradient; call torch.autograd.grad in a loop"
NO_ENTRIES = Entries(None, None, None, None)  # type: ignore[arg-type]


def with_seed(rows: HeadRows, resolution: float | None, generator: torch.Generator | None) -> HeadRows:
    """For a sparse gradient, with a number of the caller's generator, or of the device's own.

    It is drawn whether a gradient is wanted or not: so what is drawn later does not depend on that.
    """
    if resolution is None:
        return rows
    device = rows.hidden.device
    source = device if generator is None else generator.device
    return rows._replace(seed=torch.randint(SEED, (), device=source, generator=generator).to(device))


def loss_by_gradient(
    rows: LinearRows, settings: HeadOptions, formula: Objective, normalizer: float | Tensor | None
) -> Tensor:
    """The loss of all rows, each block's gradient beside it: three products."""
    targets, first, row_weight = rows.targets, rows.heads[0], None
    if first.class_weight is not None and targets.dim() == 1:
        row_weight = objective.row_weights(targets, first.class_weight, formula.ignore_index)
    divisor = objective.divisor(targets[None], row_weight, normalizer, formula)
    device, dtype = first.hidden.device, statistics_dtype(first.hidden.device)
    if isinstance(divisor, Tensor):  # perhaps one number on the CPU
        divisor = divisor.to(device, dtype, non_blocking=True)
    else:  # by a product, which a compiler traces for any number
        divisor = torch.ones((), device=device, dtype=dtype) * (1 if divisor is None else divisor)
    factor = 1 / divisor.detach()
    total = torch.stack([head_loss(head, factor, settings, formula) for head in rows.heads]).sum()
    if divisor.requires_grad:
        total = total * (divisor.detach() / divisor)
    return total.to(formula.dtype)


def head_loss(rows: HeadRows, factor: Tensor, options: HeadOptions, formula: Objective) -> Tensor:
    """factor * sum_n loss_n (0-d, in the statistics' dtype); with a seed, its gradient is sparse."""
    needs = _needs(rows)
    if rows.seed is not None and any(needs):
        terms = objective.class_terms(rows.target[None], rows.class_weight, len(rows.weight), formula)
        return objective.row_losses(head_stats(rows, options), terms, formula).sum() * factor
    return apply("head_loss", HeadLoss, rows, factor, options, formula, needs)[0]  # type: ignore[no-any-return]


def head_stats(rows: HeadRows, options: HeadOptions) -> Stats:
    """Differentiable `Stats`, (1, N) each; with a seed, their gradient is sparse."""
    rows = rows if any(_needs(rows)) else rows._replace(seed=None)
    found = apply("head_statistics", HeadStats, rows, options)
    return options.wanted.unpack(found, rows.target.is_floating_point())


def _needs(rows: HeadRows) -> list[bool]:
    return [torch.is_grad_enabled() and t is not None and t.requires_grad for t in rows.sources]


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
        rows, rest = HeadRows.split(flat)
        return tuple(run("head_loss", loss_and_grads, rows, *rest))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        rows, (factor, options, _, needs) = HeadRows.split(inputs)
        ctx.dtypes = [t.dtype if t is not None and n else None for t, n in zip(rows.sources, needs, strict=True)]
        ctx.unscaled = options.dtype == torch.float16
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*rows.sources, factor, *output[1:])

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 11
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
        return *found, *[None] * 6


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
    """Those of `Stats` that are wanted, for each row; `Entries` if there is a seed."""

    @staticmethod
    def forward(*flat: Any) -> tuple[Tensor, ...]:
        rows, (options,) = HeadRows.split(flat)
        return tuple(run("head_statistics", stats_of, rows, options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        rows, (ctx.options,) = HeadRows.split(inputs)
        stats = ctx.options.wanted.unpack(output, rows.target.is_floating_point())
        entries = NO_ENTRIES if rows.seed is None else Entries(stats.picked, *output[-3:])
        constants = [constant for constant in (stats.top, stats.argmax, *entries[1:]) if constant is not None]
        ctx.mark_non_differentiable(*constants)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*rows, stats.top, stats.lse, stats.entropy, *entries)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(g is None for g in grads):
            return (None,) * 8
        options = ctx.options
        rows, (top, lse, entropy, *entries) = HeadRows.split(ctx.saved_tensors)
        g, needs = options.wanted.unpack(grads, rows.target.is_floating_point()), ctx.needs_input_grad
        with torch.no_grad():
            numbers = numbers_of_stats(g, top, lse, entropy, rows.target[None])
        found = stats_backward(rows, Entries(*entries), numbers, g.mass, options, needs[: len(rows.sources)])
        return *[once_differentiable(grad, rows.sources, GONE) for grad in found], *[None] * 3


def stats_backward(
    rows: HeadRows, entries: Entries, numbers: RowNumbers, g_mass: Tensor | None, options: HeadOptions, needs: Needs
) -> list[Tensor | None]:
    """The gradients of `HeadRows.sources` that are wanted, without a graph of their own."""
    if any(map(_torch.is_batched_gradient, (*numbers, g_mass))):
        raise NotImplementedError(BATCHED if entries.ends is None else BATCHED_SPARSE)
    with torch.no_grad():
        found = iter(run("head_gradients", stats_grads, rows, entries, numbers, g_mass, options, list(needs)))
        return [next(found) if needed else None for needed in needs]


# ---------------------------------------------------------------------------------------------------- operators


def with_room(found: list[Tensor], rows: HeadRows, options: HeadOptions) -> list[Tensor]:
    """The same; where there is a seed, with zeros behind the entries: of the size that `empty_entries` says."""
    if rows.seed is not None:
        size = _capacity(rows, options)
        found[-2:] = [torch.cat([part, part.new_zeros(size - len(part))]) for part in found[-2:]]
    return found


def empty_entries(rows: HeadRows, options: HeadOptions) -> list[Tensor]:
    """`Entries` without numbers, where there is a seed: what a fake operator returns."""
    if rows.seed is None:
        return []
    size, hidden = _capacity(rows, options), rows.hidden
    shapes = ((len(hidden), torch.int64), (size, torch.int32), (size, compute_dtype(hidden)))
    return [hidden.new_empty(count, dtype=dtype) for count, dtype in shapes]


def _capacity(rows: HeadRows, options: HeadOptions) -> int:
    """Entries that there may be: the bound of `row_samples`, and one more in each row for rounding."""
    per_row = int(1 / (options.resolution or 1)) + 3
    return len(rows.hidden) * torch.sym_min(len(rows.weight), per_row)  # type: ignore[no-any-return, no-untyped-call]


def _statistics(rows: HeadRows, options: HeadOptions) -> list[Tensor]:
    return with_room(stats_of(rows, options), rows, options)


def _empty_statistics(rows: HeadRows, options: HeadOptions) -> list[Tensor]:
    return [*options.wanted.empty(rows.hidden[None], rows.target[None]), *empty_entries(rows, options)]


def _empty_loss(rows: HeadRows, factor: Tensor, options: HeadOptions, *rest: Any) -> list[Tensor]:
    """The gradients as the blocks make them."""
    hidden, weight, _, target, prob, *_ = rows
    q = target if prob is None else prob
    made = (
        (hidden.shape, options.dtype),
        (weight.shape, options.weight_dtype),
        (weight.shape[:1], options.weight_dtype),
        *[(q.shape, compute_dtype(q))] * 2,  # of the target or of `prob`
    )
    grads = [hidden.new_empty(shape, dtype=d) for (shape, d), needed in zip(made, rest[-1], strict=True) if needed]
    return [torch.empty_like(factor), *grads]


def _empty_gradients(rows: HeadRows, *rest: Any) -> list[Tensor]:
    return [torch.empty_like(t) for t, needed in zip(rows.sources, rest[-1], strict=True) if needed and t is not None]


FIELDS[Objective] = (
    *("str reduction", "float label_smoothing", "float z_loss", "str on_empty"),
    *("int loss_ignore_index", "ScalarType loss_dtype"),
)
FIELDS[HeadOptions] = (RowSpec, "ScalarType dtype", "SymInt max_bytes", "SymInt shift", Wanted, "float? resolution")
FIELDS[Entries] = tuple(f"Tensor? entry_{name}" for name in Entries._fields)
_LOSS = (HeadRows, "Tensor factor", HeadOptions, Objective, "bool[] needs")
_GRADIENTS = (HeadRows, Entries, RowNumbers, "Tensor? g_mass", HeadOptions, "bool[] needs")
define("head_loss", _LOSS, "Tensor[]", loss_and_grads, _empty_loss)
define("head_statistics", (HeadRows, HeadOptions), "Tensor[]", _statistics, _empty_statistics)
define("head_gradients", _GRADIENTS, "Tensor[]", stats_grads, _empty_gradients)
differentiate("head_loss", HeadLoss)
differentiate("head_statistics", HeadStats)
differentiate("head_gradients", OnceDifferentiable, None, GONE)
