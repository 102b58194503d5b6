"""The two primitives, called directly or as operators of torch.

A compiler, a mode, a FakeTensor or a batched tensor cannot follow a kernel that works on memory. For them the
primitives are registered with `torch.library`: opaque operators whose results have known shapes, and which run
`_primitives` when there is memory at last. Where nobody stands between a call and memory, the dispatcher's time is
saved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _primitives, _torch
from ._records import RowSpec, Stats, Upstream, Wanted

# How the records are flattened, in the order of their fields.
SPEC = "int ignore_index, float scale, float? softcap, SymInt start, SymInt? classes"
WANTED = "bool wsum, bool entropy, bool argmax"
UPSTREAM = "Tensor g_lse, Tensor g_picked, Tensor? g_wsum, Tensor? g_entropy"

_GRADIENT = f"Tensor target, Tensor top, Tensor lse, {UPSTREAM}, Tensor? class_weight, {SPEC}"


def row_statistics(logits: Tensor, target: Tensor, spec: RowSpec, wanted: Wanted, class_weight: Tensor | None) -> Stats:
    """`_primitives.row_statistics`, by way of the operator where somebody looks on."""
    if not _torch.is_redirected(logits, target, class_weight):
        return _primitives.row_statistics(logits, target, spec, wanted, class_weight)
    found = torch.ops.xent.row_statistics(logits, target, class_weight, *spec, *wanted)
    return wanted.unpack(found, target.is_floating_point())


def row_gradient(
    logits: Tensor,
    target: Tensor,
    top: Tensor,
    lse: Tensor,
    upstream: Upstream,
    spec: RowSpec,
    class_weight: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """`_primitives.row_gradient`, by way of the operator, or of the one that overwrites the logits."""
    if not _torch.is_redirected(logits, target, *upstream, class_weight):
        return _primitives.row_gradient(logits, target, top, lse, upstream, spec, class_weight, out)
    arguments = (target, top, lse, *upstream, class_weight, *spec)
    if out is None:
        return torch.ops.xent.row_gradient(logits, *arguments)  # type: ignore[no-any-return]
    if any(map(_torch.is_batched_gradient, upstream)):
        raise RuntimeError(
            "inplace_backward: expected one gradient, which replaces the logits; got is_grads_batched=True"
        )
    torch.ops.xent.row_gradient_(out, *arguments)
    return out


def define(name: str, schema: str, run: Any, fake: Any) -> None:
    """The operator xent::name, opaque to autograd, which runs `run` and has results shaped like those of `fake`."""
    torch.library.define(f"xent::{name}", schema)
    torch.library.impl(f"xent::{name}", "default", torch.no_grad()(run))
    torch.library.register_fake(f"xent::{name}", fake)


def differentiate(name: str, function: Any, tensors: int, record: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> None:
    """Give xent::name the derivative of a Function, for graphs of operators alone, as torch.export makes them.

    Both take the same tensors first; `record` makes the Function's other arguments of the operator's.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        whole = tuple(output) if isinstance(output, list) else output
        function.setup_context(ctx, (*inputs[:tensors], *record(inputs[tensors:])), whole)

    def backward(ctx: Any, grads: Any) -> tuple[Any, ...]:
        found = function.backward(ctx, *grads) if isinstance(grads, list) else function.backward(ctx, grads)
        return *found[:tensors], *[None] * (len(ctx.needs_input_grad) - tensors)

    torch.library.register_autograd(f"xent::{name}", backward, setup_context=setup_context)


def _statistics(logits: Tensor, target: Tensor, class_weight: Tensor | None, *flat: Any) -> list[Tensor]:
    spec, wanted = RowSpec(*flat[:5]), Wanted(*flat[5:])
    return _primitives.row_statistics(logits, target, spec, wanted, class_weight).pack()


def _empty_statistics(logits: Tensor, target: Tensor, class_weight: Tensor | None, *flat: Any) -> list[Tensor]:
    return Wanted(*flat[5:]).empty(logits, target.is_floating_point())


def _gradient(
    logits: Tensor, target: Tensor, top: Tensor, lse: Tensor, *rest: Any, out: Tensor | None = None
) -> Tensor:
    upstream, class_weight, spec = Upstream(*rest[:4]), rest[4], RowSpec(*rest[5:])
    return _primitives.row_gradient(logits, target, top, lse, upstream, spec, class_weight, out)


def _gradient_(logits: Tensor, *rest: Any) -> None:
    _gradient(logits, *rest, out=logits)


def empty_gradient(logits: Tensor, *rest: Any) -> Tensor:
    """A fresh gradient, without numbers."""
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def nothing(*arguments: Any) -> None:
    """Of an operator that writes over an argument."""


_STATISTICS = f"(Tensor logits, Tensor target, Tensor? class_weight, {SPEC}, {WANTED}) -> Tensor[]"
define("row_statistics", _STATISTICS, _statistics, _empty_statistics)
define("row_gradient", f"(Tensor logits, {_GRADIENT}) -> Tensor", _gradient, empty_gradient)
define("row_gradient_", f"(Tensor(a!) logits, {_GRADIENT}) -> ()", _gradient_, nothing)
