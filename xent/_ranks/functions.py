"""The Functions of classes that are spread over the ranks of a group: local statistics, gathered; local gradients.

Forward is `_rows`' statistics of the classes held here, one exchange of a few numbers per row, and plain torch
(`combine`). Backward has no communication at all: every rank computes the same loss from the same numbers, and calls
backward on it, so what flows back to this rank's own numbers is theirs, and the local gradient does the rest.

That the statistics and their exchange are one Function has a reason: a rank may learn only in the exchange which of
the classes it holds. The derivative of the gradient is refused, and so is forward mode: how lse depends on the logits
of other ranks is not known here.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import _torch
from .._records import RowOptions, Stats, compute_dtype
from .._rows import functions, operators
from .._rows.objective import ClassTerms
from .combine import Gathered, combine, empty_gathered, gather

WHY = (
    "of a loss whose classes are spread over ranks needs the logits of the other ranks, and would be wrong without "
    "them; gather the logits, or use a single rank"
)
REASON = f"group: a second derivative {WHY}"


def rank_stats(
    input: Tensor, target: Tensor, weight: Tensor | None, group: ProcessGroup, options: RowOptions
) -> tuple[Stats, ClassTerms]:
    """Differentiable `Stats` over the classes of all ranks, from the logits of this one.

    `weight` is over the classes held here, or over all of them.
    """
    found = operators.apply("rank_statistics", RankStats, input, target, weight, group.group_name, options)
    ignored = None if target.is_floating_point() else target == options.spec.ignore_index
    return combine(Gathered.unpack(found, target, weight is not None, options.wanted), target, ignored)


class RankStats(torch.autograd.Function):
    """(input, target, weight) -> `Gathered`."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(operators.run("rank_statistics", _statistics, *arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, target, weight, group, ctx.options = inputs
        ctx.rank = _torch.process_group(group).rank()  # which a compiler could not look up in backward
        gathered = Gathered.unpack(output, target, weight is not None, ctx.options.wanted)
        ctx.mark_non_differentiable(*gathered.constants)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, target, *operators.flatten(gathered))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if all(g is None for g in grads):
            return (None,) * 5
        input, target, *found = ctx.saved_tensors
        layout, spec, wanted, _ = ctx.options
        gathered, _ = Gathered.split(found)
        y, own, flowing = gathered.of_rank(ctx.rank, grads, target, spec.ignore_index, input.shape[layout.axis], wanted)
        saved = (input, y, gathered.part, own.top, own.lse, own.entropy)
        local = ctx.options._replace(spec=spec._replace(ignore_index=-1))
        result = functions.stats_backward(saved, flowing, local, ctx.needs_input_grad)
        return *[functions.once_differentiable(d, (input, target), REASON) for d in result[:2]], *[None] * 3

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        functions.refuse_mapped_weight(in_dims[2])
        (input, target, weight, group, options), N = args, info.batch_size
        input, layout = functions.fold_input(N, in_dims[0], input, options.layout)
        (target,) = functions.fold(N, in_dims[1:2], (target,))
        found = RankStats.apply(input, target, weight, group, options._replace(layout=layout))  # type: ignore[no-untyped-call]
        per_row = [x.dim() > 2 for x in found]
        split = [x.unflatten(1, (N, options.layout.A)) if rows else x for x, rows in zip(found, per_row, strict=True)]
        return tuple(split), tuple(1 if rows else None for rows in per_row)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        raise NotImplementedError(f"group: forward mode {WHY}")


def _statistics(input: Tensor, target: Tensor, weight: Tensor | None, group: str, options: RowOptions) -> list[Tensor]:
    (layout, spec, wanted, _), soft = options, target.is_floating_point()

    def local(start: int, total: int, class_weight: Tensor | None) -> Stats:
        own, w = spec._replace(start=start, classes=total), class_weight if soft or wanted.wsum else None
        return operators.row_statistics(input, target, w, options._replace(spec=own))

    note = f"{layout.A * layout.B} rows of {input.dtype}, {spec.words()}"
    ignored = None if soft else target == spec.ignore_index
    held = (input.shape[layout.axis], compute_dtype(input))
    return gather(group, note, target, ignored, weight, held, wanted, local)


def _empty(input: Tensor, target: Tensor, weight: Tensor | None, group: str, options: RowOptions) -> list[Tensor]:
    held, ranks = (input.shape[options.layout.axis], compute_dtype(input)), _torch.process_group(group).size()
    return empty_gathered(target, held, weight is not None, ranks, options.wanted)


_ROWS = ("Tensor input", "Tensor target", "Tensor? weight", "str group", RowOptions)
operators.define("rank_statistics", _ROWS, "Tensor[]", _statistics, _empty)
operators.differentiate("rank_statistics", RankStats)
