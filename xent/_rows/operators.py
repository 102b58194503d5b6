"""The two primitives, called directly or as operators of torch.

A compiler, a mode, a FakeTensor or a batched tensor cannot follow a kernel that works on memory. For them the
primitives are registered with `torch.library`: operators whose results have known shapes, and which run the primitives
when there is memory at last. Where nobody stands between a call and memory, the dispatcher's time is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from .._records import HeadRows, Layout, RowNumbers, RowOptions, RowSpec, Stats, Wanted
from . import dispatch


def _tensors(record: type) -> tuple[str, ...]:
    """The fields of a record of tensors, as a schema has them."""
    return tuple(f"Tensor{'?' * ('None' in str(kind))} {name}" for name, kind in record.__annotations__.items())


# An operator has no records but their fields, one by one: their types and names, in their order.
FIELDS: dict[type, tuple[Any, ...]] = {
    Layout: ("int axis", "SymInt A", "SymInt B"),
    RowSpec: ("int ignore_index", "float scale", "float? softcap", "SymInt start", "SymInt? classes"),
    Wanted: ("bool wsum", "bool entropy", "bool argmax"),
    RowNumbers: _tensors(RowNumbers),
    RowOptions: (Layout, RowSpec, Wanted, "bool inplace"),
    HeadRows: _tensors(HeadRows),
}
PARAMETERS: dict[str, tuple[Any, ...]] = {}  # of each operator: records, or types and names


def row_statistics(input: Tensor, target: Tensor, class_weight: Tensor | None, options: RowOptions) -> Stats:
    """`dispatch.row_statistics` of logits in their own shape; by way of the operator where there is no memory yet."""
    layout, spec, wanted, _ = options
    if not _torch.needs_operator(input, target, class_weight):
        return dispatch.row_statistics(layout.rows(input), target, spec, wanted, class_weight)
    found = torch.ops.xent.row_statistics(*flatten(input, target, class_weight, options._replace(inplace=False)))
    return wanted.unpack(found, target.is_floating_point())


def row_gradient(
    input: Tensor,
    target: Tensor,
    numbers: RowNumbers,
    class_weight: Tensor | None,
    layout: Layout,
    spec: RowSpec,
    inplace: bool = False,
) -> Tensor:
    """`dispatch.row_gradient` in the shape of the logits: fresh, or in their memory."""
    if inplace and torch.is_grad_enabled():
        raise RuntimeError(
            "inplace_backward=True: the gradient replaces the logits, so it cannot be differentiated again; "
            "use inplace_backward=False with create_graph=True and torch.func"
        )
    out = input.detach() if inplace else None
    if not _torch.needs_operator(input, target, *numbers, class_weight):
        return _gradient(input, target, numbers, class_weight, layout, spec, out=out)
    flat = (target, *numbers, class_weight, *layout, *spec)
    if out is None:
        return torch.ops.xent.row_gradient(input, *flat)  # type: ignore[no-any-return]
    if any(map(_torch.is_batched_gradient, numbers[2:])):
        raise RuntimeError(
            "inplace_backward: expected one gradient, which replaces the logits; got is_grads_batched=True"
        )
    torch.ops.xent.row_gradient_(out, *flat)
    return out


def apply(name: str, function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """The Function of these arguments; for a compiler xent::name, which has its derivative."""
    if torch.compiler.is_compiling():
        return getattr(torch.ops.xent, name)(*flatten(*arguments))
    return function.apply(*_of_function(arguments))  # type: ignore[no-untyped-call]


def run(name: str, function: Callable[..., list[Tensor]], *arguments: Any) -> list[Tensor]:
    """The function of these arguments; where a tracer looks on, xent::name, which runs it."""
    flat = flatten(*arguments)
    if _torch.is_traced(*[argument for argument in flat if isinstance(argument, Tensor)]):
        return getattr(torch.ops.xent, name)(*flat)  # type: ignore[no-any-return]
    return function(*arguments)


def define(
    name: str, parameters: tuple[Any, ...], result: str, function: Callable[..., Any], fake: Callable[..., Any]
) -> None:
    """The operator xent::name, which runs `function` and has results shaped like those of `fake`."""
    PARAMETERS[name] = parameters
    torch.library.define(f"xent::{name}", f"({', '.join(map(_schema, parameters))}) -> {result}")
    torch.library.impl(f"xent::{name}", "default", torch.no_grad()(lambda *flat: function(*_arguments(name, flat))))
    torch.library.register_fake(f"xent::{name}", lambda *flat: fake(*_arguments(name, flat)))


def differentiate(name: str, function: type[torch.autograd.Function], *given: Any) -> None:
    """Give xent::name the derivative of `function`, whose arguments are the operator's, or these.

    A compiler traces the operator; it would refuse a Function that knows forward mode.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.count = len(inputs)
        arguments = given or _of_function(_arguments(name, inputs))
        function.setup_context(ctx, tuple(arguments), tuple(output) if isinstance(output, list) else output)

    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        found = function.backward(ctx, *(grads[0] if isinstance(grads[0], (list, tuple)) else grads))
        return (*found, *[None] * ctx.count)[: ctx.count]

    _torch.differentiate(name, backward, setup_context)


def flatten(*arguments: Any) -> list[Any]:
    """The arguments of an operator: the fields of records, and of records within records."""
    flat: list[Any] = []
    for argument in arguments:
        flat += flatten(*argument) if isinstance(argument, tuple) else [argument]
    return flat


def _arguments(name: str, flat: Sequence[Any]) -> list[Any]:
    """The inverse."""
    left = iter(flat)

    def take(parameter: Any) -> Any:
        return next(left) if isinstance(parameter, str) else parameter(*map(take, FIELDS[parameter]))

    return [take(parameter) for parameter in PARAMETERS[name]]


def _of_function(arguments: Sequence[Any]) -> list[Any]:
    """Those of a Function: records too, but autograd must see each tensor."""
    return [x for given in arguments for x in (given if isinstance(given, (HeadRows, RowNumbers)) else (given,))]


def _schema(parameter: Any) -> str:
    return parameter if isinstance(parameter, str) else ", ".join(map(_schema, FIELDS[parameter]))


def _statistics(input: Tensor, target: Tensor, class_weight: Tensor | None, options: RowOptions) -> list[Tensor]:
    layout, spec, wanted, _ = options
    return dispatch.row_statistics(layout.rows(input), target, spec, wanted, class_weight).pack()


def _empty_statistics(input: Tensor, target: Tensor, _: Tensor | None, options: RowOptions) -> list[Tensor]:
    return options.wanted.empty(input.new_empty(options.layout.A, options.layout.B, 0), target)


def _gradient(input: Tensor, *arguments: Any, out: Tensor | None = None) -> Tensor:
    target, numbers, class_weight, layout, spec = arguments
    rows = None if out is None else layout.rows(out)
    found = dispatch.row_gradient(layout.rows(input), target, numbers, spec, class_weight, rows)
    # A tensor of its own and no view, so that autograd may add the next gradient to it in place.
    return layout.restore(found, input.shape).data if out is None else out


def _write_gradient(input: Tensor, *arguments: Any) -> None:
    _gradient(input, *arguments, out=input)
    torch.autograd.graph.increment_version(input)  # in an operator, a view has a version of its own


def _empty_gradient(input: Tensor, *arguments: Any) -> Tensor:
    layout: Layout = arguments[-2]
    return layout.restore(torch.empty_like(layout.rows(input)), input.shape)


_ROWS = ("Tensor input", "Tensor target", "Tensor? class_weight", RowOptions)
_NUMBERS = ("Tensor target", RowNumbers, "Tensor? class_weight", Layout, RowSpec)
define("row_statistics", _ROWS, "Tensor[]", _statistics, _empty_statistics)
define("row_gradient", ("Tensor input", *_NUMBERS), "Tensor", _gradient, _empty_gradient)
define("row_gradient_", ("Tensor(a!) input", *_NUMBERS), "()", _write_gradient, lambda *_: None)
