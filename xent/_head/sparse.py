"""The Function of a linear head with a sparse gradient, around the loops of `entries.py`; a compiler sees operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from .._records import Stats, Upstream, compute_dtype
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


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    factor: Tensor,
    class_weight: Tensor | None,
    seed: Tensor | None,
    options: HeadOptions,
) -> Tensor:
    """`functions.head_loss`, with a seed of a sparse gradient."""
    if seed is None or not _differentiated(hidden, weight, bias, target):
        return functions.head_loss(hidden, weight, bias, target, factor, class_weight, options)
    return _sparse_head(hidden, weight, bias, target, factor, class_weight, seed, options)[0]


def head_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    seed: Tensor | None,
    options: HeadOptions,
) -> Stats:
    """`functions.head_stats`, with a seed of a sparse gradient."""
    if seed is None or not _differentiated(hidden, weight, bias, target):
        return functions.head_stats(hidden, weight, bias, target, class_weight, options)
    found = _sparse_head(hidden, weight, bias, target, None, class_weight, seed, options)
    return options.wanted.unpack(found, target.is_floating_point())


def _differentiated(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _sparse_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    factor: Tensor | None,
    class_weight: Tensor | None,
    seed: Tensor,
    options: HeadOptions,
) -> Sequence[Tensor]:
    arguments = (hidden, weight, bias, target, factor, class_weight, seed)
    if torch.compiler.is_compiling():
        found = torch.ops.xent.sparse_head(*arguments, *flatten(options))
    else:
        found = SparseHead.apply(*arguments, options)  # type: ignore[no-untyped-call]
    return found  # type: ignore[no-any-return]


class SparseHead(NoTransforms, torch.autograd.Function):
    """The loss if there is a factor; the statistics; `Entries`."""

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        factor: Tensor | None,
        class_weight: Tensor | None,
        seed: Tensor,
        options: HeadOptions,
    ) -> tuple[Tensor, ...]:
        arguments = (hidden, weight, bias, target, factor, class_weight, seed)
        if _torch.is_traced(*arguments):
            return tuple(torch.ops.xent.sparse_head(*arguments, *flatten(options)))
        return tuple(sparse_forward(*arguments, options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, weight, bias, target, factor, class_weight, _, ctx.options = inputs
        losses = 0 if factor is None else 1
        stats = ctx.options.wanted.unpack(output[losses:-3], target.is_floating_point())
        constants = [stats.top] if stats.argmax is None else [stats.top, stats.argmax]
        ctx.mark_non_differentiable(*(output[1:] if losses else [*constants, *output[-3:]]))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, target, factor, class_weight, *output[losses:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(g is None for g in grads):
            return (None,) * 8
        options = ctx.options
        hidden, weight, bias, target, factor, class_weight, *numbers = ctx.saved_tensors
        stats = options.wanted.unpack(numbers[:-3], target.is_floating_point())
        with torch.no_grad():
            if factor is None:
                g = options.wanted.unpack(grads, target.is_floating_point())
                upstream, g_mass = upstream_of(g, stats.lse, stats.entropy, target[None]), g.mass
            else:
                terms = objective.class_terms(target[None], class_weight, len(weight), options.objective)
                upstream = objective.row_upstream(
                    stats.top, stats.lse, stats.mass, terms, options.objective, grads[0] * factor
                )
                g_mass = -upstream.picked * stats.lse if target.is_floating_point() else None  # of lse mass - picked
        saved = (hidden, weight, bias, target)
        found = sparse_backward(
            saved, stats, Entries(*numbers[-3:]), upstream, g_mass, class_weight, options, ctx.needs_input_grad[:4]
        )
        return *[once_differentiable(grad, saved, GONE) for grad in found], *[None] * 4


def sparse_backward(
    saved: Sequence[Any],
    stats: Stats,
    entries: Entries,
    upstream: Upstream,
    g_mass: Tensor | None,
    class_weight: Tensor | None,
    options: HeadOptions,
    needs: Needs,
) -> list[Tensor | None]:
    """The gradients of hidden, weight, bias and target that are wanted, without a graph of their own."""
    if any(map(_torch.is_batched_gradient, upstream)):
        raise NotImplementedError(
            "is_grads_batched=True of a linear head with a sparse gradient; call torch.autograd.grad in a loop"
        )
    rest = (g_mass, class_weight)
    with torch.no_grad():
        numbers = (*saved, stats.top, stats.lse, stats.picked, *entries)
        if _torch.is_traced(*numbers, *upstream, *rest):
            found = torch.ops.xent.sparse_head_gradients(*numbers, *upstream, *rest, *flatten(options), list(needs))
        else:
            found = sparse_grads(*saved, stats, entries, upstream, *rest, options, needs)  # type: ignore[call-arg]
    left = iter(found)
    return [next(left) if needed else None for needed in needs]


# ---------------------------------------------------------------------------------------------------- operators


def _run(*flat: Any) -> list[Tensor]:
    return with_room(sparse_forward(*flat[:7], options_of(flat[7:])), *flat[:2], flat[-1])  # type: ignore[call-arg]


def with_room(found: list[Tensor], hidden: Tensor, weight: Tensor, resolution: Any) -> list[Tensor]:
    """The same, with zeros behind the entries: of the size that `empty_entries` says."""
    size = _capacity(len(hidden), len(weight), resolution)
    for i, part in enumerate(found[-2:], len(found) - 2):
        found[i] = part.new_zeros(size)
        found[i][: len(part)] = part
    return found


def _capacity(N: int, C: int, resolution: float) -> int:
    """Entries that there may be: the bound of `row_samples`, and one more in each row for rounding."""
    return N * torch.sym_min(C, int(1 / resolution) + 3)  # type: ignore[no-any-return, no-untyped-call]


def _empty(
    h: Tensor, W: Tensor, b: Any, y: Tensor, factor: Tensor | None, w: Any, seed: Any, *flat: Any
) -> list[Tensor]:
    total = [] if factor is None else [torch.empty_like(factor)]
    return [*total, *options_of(flat).wanted.empty(h[None], y[None]), *empty_entries(h, W, flat[-1])]


def empty_entries(hidden: Tensor, weight: Tensor, resolution: float) -> list[Tensor]:
    """`Entries` without numbers: what a fake operator returns."""
    size = _capacity(len(hidden), len(weight), resolution)
    shapes = ((len(hidden), torch.int64), (size, torch.int32), (size, compute_dtype(hidden)))
    return [hidden.new_empty(count, dtype=dtype) for count, dtype in shapes]


def _gradients(*flat: Any) -> list[Tensor]:
    rows, (top, lse, picked), entries, upstream = flat[:4], flat[4:7], Entries(*flat[7:10]), Upstream(*flat[10:14])
    stats = Stats(top, lse, picked, None, None, None, None)
    return sparse_grads(*rows, stats, entries, upstream, *flat[14:16], options_of(flat[16:-1]), flat[-1])  # type: ignore[call-arg]


def _empty_gradients(*flat: Any) -> list[Tensor]:
    return [torch.empty_like(t) for t, needed in zip(flat[:4], flat[-1], strict=True) if needed]


_ENTRIES = "Tensor entry_ends, Tensor entry_classes, Tensor entry_p"  # the spec has `classes`, too
_GIVEN = f"{ROWS}, Tensor top, Tensor lse, Tensor picked, {_ENTRIES}, {UPSTREAM}, Tensor? g_mass, Tensor? class_weight"
_HEAD = f"({ROWS}, Tensor? factor, Tensor? class_weight, Tensor seed, {OPTIONS}) -> Tensor[]"
define("sparse_head", _HEAD, _run, _empty)
define("sparse_head_gradients", f"({_GIVEN}, {OPTIONS}, bool[] needs) -> Tensor[]", _gradients, _empty_gradients)
differentiate("sparse_head", SparseHead, lambda *flat: (*flat[:7], options_of(flat[7:])))
differentiate("sparse_head_gradients", OnceDifferentiable, lambda *flat: (flat[0], GONE))
