"""The two primitives, called directly or as operators of torch.

A compiler, a mode, a FakeTensor or a batched tensor cannot follow a kernel that works on memory. For them the
primitives are registered with `torch.library`: operators whose results have known shapes, and which run the primitives
when there is memory at last. Where nobody stands between a call and memory, the dispatcher's time is saved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from .._records import Layout, RowSpec, Stats, Upstream, Wanted
from . import dispatch

# How the records are flattened, in the order of their fields.
LAYOUT = "int axis, SymInt A, SymInt B"
SPEC = "int ignore_index, float scale, float? softcap, SymInt start, SymInt? classes"
WANTED = "bool wsum, bool entropy, bool argmax"
UPSTREAM = "Tensor g_lse, Tensor g_picked, Tensor? g_wsum, Tensor? g_entropy"

_GRADIENT = f"Tensor target, Tensor top, Tensor lse, {UPSTREAM}, Tensor? class_weight, {LAYOUT}, {SPEC}"


def row_statistics(
    input: Tensor, target: Tensor, layout: Layout, spec: RowSpec, wanted: Wanted, class_weight: Tensor | None
) -> Stats:
    """`dispatch.row_statistics` of logits in their own shape; by way of the operator where there is no memory yet."""
    if not _torch.needs_operator(input, target, class_weight):
        return dispatch.row_statistics(layout.rows(input), target, spec, wanted, class_weight)
    found = torch.ops.xent.row_statistics(input, target, class_weight, *layout, *spec, *wanted, False)
    return wanted.unpack(found, target.is_floating_point())


def row_gradient(
    input: Tensor,
    target: Tensor,
    top: Tensor,
    lse: Tensor,
    upstream: Upstream,
    class_weight: Tensor | None,
    layout: Layout,
    spec: RowSpec,
    inplace: bool = False,
) -> Tensor:
    """`dispatch.row_gradient` in the shape of the logits: fresh, or in their memory."""
    out = input.detach() if inplace else None
    flat = (target, top, lse, *upstream, class_weight, *layout, *spec)
    if not _torch.needs_operator(input, target, *upstream, class_weight):
        return _run_gradient(input, *flat, out=out)
    if out is None:
        return torch.ops.xent.row_gradient(input, *flat)  # type: ignore[no-any-return]
    if any(map(_torch.is_batched_gradient, upstream)):
        raise RuntimeError(
            "inplace_backward: expected one gradient, which replaces the logits; got is_grads_batched=True"
        )
    torch.ops.xent.row_gradient_(out, *flat)
    return out


def define(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """The operator xent::name, which runs `run` and has results shaped like those of `fake`."""
    torch.library.define(f"xent::{name}", schema)
    torch.library.impl(f"xent::{name}", "default", torch.no_grad()(run))
    torch.library.register_fake(f"xent::{name}", fake)


def differentiate(name: str, function: type[torch.autograd.Function], pack: Callable[..., tuple[Any, ...]]) -> None:
    """Give xent::name the derivative of `function`, whose arguments are `pack` of the operator's.

    A compiler traces the operator; it would refuse a Function that knows forward mode.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.count = len(inputs)
        function.setup_context(ctx, pack(*inputs), tuple(output) if isinstance(output, list) else output)

    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        found = function.backward(ctx, *(grads[0] if isinstance(grads[0], (list, tuple)) else grads))
        return (*found, *[None] * ctx.count)[: ctx.count]

    torch.library.register_autograd(f"xent::{name}", backward, setup_context=setup_context)


def _statistics(input: Tensor, target: Tensor, class_weight: Tensor | None, *flat: Any) -> list[Tensor]:
    layout, spec, wanted = Layout(*flat[:3]), RowSpec(*flat[3:8]), Wanted(*flat[8:11])
    return dispatch.row_statistics(layout.rows(input), target, spec, wanted, class_weight).pack()


def _empty_statistics(input: Tensor, target: Tensor, class_weight: Tensor | None, *flat: Any) -> list[Tensor]:
    return Wanted(*flat[8:11]).empty(input.new_empty(*flat[1:3], 0), target)


def _run_gradient(input: Tensor, *flat: Any, out: Tensor | None = None) -> Tensor:
    (target, top, lse), upstream, class_weight = flat[:3], Upstream(*flat[3:7]), flat[7]
    layout, spec = Layout(*flat[8:11]), RowSpec(*flat[11:16])
    rows = None if out is None else layout.rows(out)
    found = dispatch.row_gradient(layout.rows(input), target, top, lse, upstream, spec, class_weight, rows)
    # A tensor of its own and no view, so that autograd may add the next gradient to it in place.
    return layout.restore(found, input.shape).data if out is None else out


def _run_gradient_(input: Tensor, *flat: Any) -> None:
    _run_gradient(input, *flat, out=input)
    torch.autograd.graph.increment_version(input)  # in an operator, a view has a version of its own


def _empty_gradient(input: Tensor, *flat: Any) -> Tensor:
    layout = Layout(*flat[8:11])
    return layout.restore(torch.empty_like(layout.rows(input)), input.shape)


def _nothing(*arguments: Any) -> None:
    """Of an operator that writes over an argument."""


# `inplace` is for the derivative, which may write over the logits.
STATISTICS = f"{LAYOUT}, {SPEC}, {WANTED}, bool inplace) -> Tensor[]"
define(
    "row_statistics",
    f"(Tensor input, Tensor target, Tensor? class_weight, {STATISTICS}",
    _statistics,
    _empty_statistics,
)
define("row_gradient", f"(Tensor input, {_GRADIENT}) -> Tensor", _run_gradient, _empty_gradient)
define("row_gradient_", f"(Tensor(a!) input, {_GRADIENT}) -> ()", _run_gradient_, _nothing)
