"""The Function of a linear head with a sparse gradient, around the loops of `entries.py`; a compiler sees operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from .._inputs.head import LinearRows
from .._records import HeadRows, Objective, Stats, Upstream, compute_dtype, statistics_dtype
from .._rows import objective
from .._rows.functions import OnceDifferentiable, once_differentiable, upstream_of
from .._rows.operators import UPSTREAM, define, differentiate
from . import functions
from .blocks import HeadOptions, Needs
from .entries import Entries, sparse_forward, sparse_grads
from .functions import GONE, OPTIONS, ROWS, NoTransforms, flatten, options_of

SEED = 2**63 - 1


def draw_seed(device: torch.device, generator: torch.Generator | None) -> Tensor:
    """One number of the caller's generator, or of the device's own."""
    if generator is None:
        return torch.randint(SEED, (), device=device)
    return torch.randint(SEED, (), device=generator.device, generator=generator).to(device)


def loss_by_gradient(
    rows: LinearRows,
    heads: list[tuple[HeadRows, Tensor | None]],
    settings: HeadOptions,
    formula: Objective,
    normalizer: float | Tensor | None,
) -> Tensor:
    """The loss of all rows, each block's gradient beside it: three products."""
    targets, first, row_weight = rows.targets, rows.heads[0], None
    if first.class_weight is not None and targets.dim() == 1:
        row_weight = objective.row_weights(targets, first.class_weight, formula.ignore_index)
    divisor = objective.divisor(targets[None], row_weight, normalizer, formula)
    device, dtype = first.hidden.device, statistics_dtype(first.hidden.device)
    if isinstance(divisor, Tensor):  # perhaps one number on the CPU
        divisor = divisor.to(device, dtype, non_blocking=True)
    else:
        divisor = torch.full((), 1 if divisor is None else divisor, device=device, dtype=dtype)
    factor = 1 / divisor.detach()
    total = torch.stack([head_loss(head, factor, seed, settings) for head, seed in heads]).sum()
    if divisor.requires_grad:
        total = total * (divisor.detach() / divisor)
    return total.to(formula.dtype)


def head_loss(rows: HeadRows, factor: Tensor, seed: Tensor | None, options: HeadOptions) -> Tensor:
    """`functions.head_loss`, with a seed of a sparse gradient."""
    if seed is None or not _differentiated(rows):
        return functions.head_loss(rows, factor, options)
    return _sparse_head(rows, factor, seed, options)[0]


def head_stats(rows: HeadRows, seed: Tensor | None, options: HeadOptions) -> Stats:
    """`functions.head_stats`, with a seed of a sparse gradient."""
    if seed is None or not _differentiated(rows):
        return functions.head_stats(rows, options)
    return options.wanted.unpack(_sparse_head(rows, None, seed, options), rows.target.is_floating_point())


def _differentiated(rows: HeadRows) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in rows.sources)


def _sparse_head(rows: HeadRows, factor: Tensor | None, seed: Tensor, options: HeadOptions) -> Sequence[Tensor]:
    if torch.compiler.is_compiling():
        found = torch.ops.xent.sparse_head(*rows, factor, seed, *flatten(options))
    else:
        found = SparseHead.apply(*rows, factor, seed, options)  # type: ignore[no-untyped-call]
    return found  # type: ignore[no-any-return]


class SparseHead(NoTransforms, torch.autograd.Function):
    """The loss if there is a factor; the statistics; `Entries`."""

    @staticmethod
    def forward(*flat: Any) -> tuple[Tensor, ...]:
        rows, (factor, seed, options) = HeadRows.split(flat)
        if _torch.is_traced(*rows, factor, seed):
            return tuple(torch.ops.xent.sparse_head(*rows, factor, seed, *flatten(options)))
        return tuple(sparse_forward(rows, factor, seed, options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        rows, (factor, _, ctx.options) = HeadRows.split(inputs)
        losses = 0 if factor is None else 1
        stats = ctx.options.wanted.unpack(output[losses:-3], rows.target.is_floating_point())
        constants = [stats.top] if stats.argmax is None else [stats.top, stats.argmax]
        ctx.mark_non_differentiable(*(output[1:] if losses else [*constants, *output[-3:]]))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*rows, factor, *output[losses:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(g is None for g in grads):
            return (None,) * 9
        options = ctx.options
        rows, (factor, *numbers) = HeadRows.split(ctx.saved_tensors)
        target, soft = rows.target, rows.target.is_floating_point()
        stats = options.wanted.unpack(numbers[:-3], soft)
        with torch.no_grad():
            if factor is None:
                g = options.wanted.unpack(grads, soft)
                upstream, g_mass = upstream_of(g, stats.lse, stats.entropy, target[None]), g.mass
            else:
                terms = objective.class_terms(target[None], rows.class_weight, len(rows.weight), options.objective)
                upstream = objective.row_upstream(
                    stats.top, stats.lse, stats.mass, terms, options.objective, grads[0] * factor
                )
                g_mass = -upstream.picked * stats.lse if soft else None  # of lse mass - picked
        needs = ctx.needs_input_grad[: len(rows.sources)]
        found = sparse_backward(rows, stats, Entries(*numbers[-3:]), upstream, g_mass, options, needs)
        return *[once_differentiable(grad, rows.sources, GONE) for grad in found], *[None] * 4


def sparse_backward(
    rows: HeadRows,
    stats: Stats,
    entries: Entries,
    upstream: Upstream,
    g_mass: Tensor | None,
    options: HeadOptions,
    needs: Needs,
) -> list[Tensor | None]:
    """The gradients of `HeadRows.sources` that are wanted, without a graph of their own."""
    if any(map(_torch.is_batched_gradient, upstream)):
        raise NotImplementedError(
            "is_grads_batched=True of a linear head with a sparse gradient; call torch.autograd.grad in a loop"
        )
    with torch.no_grad():
        numbers = (*rows, stats.top, stats.lse, stats.picked, *entries, *upstream, g_mass)
        if _torch.is_traced(*numbers):
            found = torch.ops.xent.sparse_head_gradients(*numbers, *flatten(options), list(needs))
        else:
            found = sparse_grads(rows, stats, entries, upstream, g_mass, options, needs)
    left = iter(found)
    return [next(left) if needed else None for needed in needs]


# ---------------------------------------------------------------------------------------------------- operators


def _run(*flat: Any) -> list[Tensor]:
    rows, (factor, seed, *rest) = HeadRows.split(flat)
    options = options_of(rest)
    return with_room(sparse_forward(rows, factor, seed, options), rows, options)


def with_room(found: list[Tensor], rows: HeadRows, options: HeadOptions) -> list[Tensor]:
    """The same, with zeros behind the entries: of the size that `empty_entries` says."""
    size = _capacity(rows, options)
    for i, part in enumerate(found[-2:], len(found) - 2):
        found[i] = part.new_zeros(size)
        found[i][: len(part)] = part
    return found


def _capacity(rows: HeadRows, options: HeadOptions) -> int:
    """Entries that there may be: the bound of `row_samples`, and one more in each row for rounding."""
    per_row = int(1 / (options.resolution or 1)) + 3
    return len(rows.hidden) * torch.sym_min(len(rows.weight), per_row)  # type: ignore[no-any-return, no-untyped-call]


def _empty(*flat: Any) -> list[Tensor]:
    rows, (factor, _, *rest) = HeadRows.split(flat)
    total, options = [] if factor is None else [torch.empty_like(factor)], options_of(rest)
    return [*total, *options.wanted.empty(rows.hidden[None], rows.target[None]), *empty_entries(rows, options)]


def empty_entries(rows: HeadRows, options: HeadOptions) -> list[Tensor]:
    """`Entries` without numbers: what a fake operator returns."""
    size, hidden = _capacity(rows, options), rows.hidden
    shapes = ((len(hidden), torch.int64), (size, torch.int32), (size, compute_dtype(hidden)))
    return [hidden.new_empty(count, dtype=dtype) for count, dtype in shapes]


def _gradients(*flat: Any) -> list[Tensor]:
    rows, (top, lse, picked, *rest, needs) = HeadRows.split(flat)
    stats, entries, upstream = Stats(top, lse, picked, None, None, None, None), Entries(*rest[:3]), Upstream(*rest[3:7])
    return sparse_grads(rows, stats, entries, upstream, rest[7], options_of(rest[8:]), needs)


def _empty_gradients(*flat: Any) -> list[Tensor]:
    sources = HeadRows.split(flat)[0].sources
    return [torch.empty_like(t) for t, needed in zip(sources, flat[-1], strict=True) if needed and t is not None]


_ENTRIES = "Tensor entry_ends, Tensor entry_classes, Tensor entry_p"  # the spec has `classes`, too
_GIVEN = f"{ROWS}, Tensor top, Tensor lse, Tensor picked, {_ENTRIES}, {UPSTREAM}, Tensor? g_mass"
_HEAD = f"({ROWS}, Tensor? factor, Tensor seed, {OPTIONS}) -> Tensor[]"
define("sparse_head", _HEAD, _run, _empty)
define("sparse_head_gradients", f"({_GIVEN}, {OPTIONS}, bool[] needs) -> Tensor[]", _gradients, _empty_gradients)
differentiate("sparse_head", SparseHead, lambda *flat: (*flat[:8], options_of(flat[8:])))
differentiate("sparse_head_gradients", OnceDifferentiable, lambda *flat: (flat[0], GONE))
