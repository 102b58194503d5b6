"""A linear head whose rows, the classes, are spread over the ranks of a group; the hidden states are the same on all.

Forward goes through the blocks of logits of this rank, and then all ranks share the numbers per row, once for all
blocks (see `combine`). A gradient in the same pass, as `HeadLoss` has it, would need the lse of all classes block by
block, and so one exchange for each. Instead backward computes the logits again, a fourth matrix product.

The hidden states take part in the logits of every rank, so their gradient is a sum over the ranks: one all-reduce in
backward, of all rows at once. (One for each block would send as many bytes in more messages.) Half-precision parts are
added up in float32. The head's own gradient needs no communication.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import _torch
from .._head import blocks
from .._head.blocks import HeadOptions
from .._head.functions import GONE, OPTIONS, ROWS, NoTransforms, flatten, options_of, stats_backward
from .._records import Stats, compute_dtype
from .._rows.functions import once_differentiable
from .._rows.objective import ClassTerms
from .._rows.operators import define, differentiate
from .combine import Gathered, combine, empty_gathered, gather


def rank_head_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    options: HeadOptions,
    group: ProcessGroup,
) -> tuple[Stats, ClassTerms]:
    """Differentiable `Stats` over the classes of all ranks, from the rows (N, D) and this rank's part of the head."""
    arguments = (hidden, weight, bias, target, class_weight)
    if torch.compiler.is_compiling():
        found = torch.ops.xent.rank_head_statistics(*arguments, group.group_name, *flatten(options))
    else:
        found = RankHeadStats.apply(*arguments, group.group_name, options)  # type: ignore[no-untyped-call]
    ignored, weighted = _ignored(target, options), class_weight is not None
    return combine(Gathered.unpack(found), target[None], ignored, weighted, options.wanted)


class RankHeadStats(NoTransforms, torch.autograd.Function):
    """(hidden, weight, bias, target, class_weight) -> `Gathered`; backward goes through the blocks again."""

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        class_weight: Tensor | None,
        group: str,
        options: HeadOptions,
    ) -> tuple[Tensor, ...]:
        arguments = (hidden, weight, bias, target, class_weight)
        if _torch.is_traced(*arguments):
            return tuple(torch.ops.xent.rank_head_statistics(*arguments, group, *flatten(options)))
        return tuple(_statistics(*arguments, group, options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, _, ctx.group, ctx.options = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *Gathered.unpack(output))

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 7
        hidden, weight, bias, target, *found = ctx.saved_tensors
        gathered, group, options = Gathered(*found), _torch.process_group(ctx.group), ctx.options
        ignore_index, needs, C = options.spec.ignore_index, ctx.needs_input_grad[:4], len(weight)
        y, own, flowing = gathered.of_rank(group.rank(), g, target, ignore_index, C, options.wanted)
        local = options._replace(spec=options.spec._replace(ignore_index=-1, classes=C + 1))
        saved = (hidden, weight, bias, y, gathered.part, own.top, own.lse, own.entropy)
        with torch.no_grad():
            grads = stats_backward(saved, flowing, local, needs)
            if needs[0] and grads[0] is not None and group.size() > 1:
                total = _torch.all_reduce(grads[0].to(compute_dtype(grads[0])), ctx.group)
                grads[0] = total.to(hidden.dtype)
        sources = (hidden, weight, bias, target)
        return *[once_differentiable(grad, sources, GONE) for grad in grads], *[None] * 3


def _ignored(target: Tensor, options: HeadOptions) -> Tensor | None:
    """The rows that do not count, (1, N)."""
    if not target.is_floating_point():
        return target[None] == options.spec.ignore_index
    if options.shift:  # the last of each sequence
        return torch.arange(len(target), device=target.device)[None] % options.shift == options.shift - 1
    return None


def _statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    group: str,
    options: HeadOptions,
) -> list[Tensor]:
    def local(start: int, total: int, part: Tensor | None) -> Stats:
        own = options._replace(spec=options.spec._replace(start=start, classes=total))
        found = blocks.stats_of(hidden, weight, bias, target, part, own)
        return options.wanted.unpack(found, target.is_floating_point())

    ignore_index, scale, softcap, *_ = options.spec
    note = f"{len(hidden)} rows of {hidden.shape[1]} {options.dtype}, {ignore_index=}, logit_scale={scale}, {softcap=}"
    held, ignored = (len(weight), options.weight_dtype), _ignored(target, options)
    return gather(group, note, target[None], ignored, class_weight, held, options.wanted, local).pack()


# ---------------------------------------------------------------------------------------------------- operators


def _run(*flat: Any) -> list[Tensor]:
    return _statistics(*flat[:6], options_of(flat[6:]))  # type: ignore[call-arg]


def _empty(h: Tensor, W: Tensor, b: Any, y: Tensor, w: Tensor | None, group: str, *flat: Any) -> list[Tensor]:
    options, ranks = options_of(flat), _torch.process_group(group).size()
    return empty_gathered(y[None], (len(W), options.weight_dtype), w is not None, ranks, options.wanted)


_SCHEMA = f"({ROWS}, Tensor? class_weight, str group, {OPTIONS}) -> Tensor[]"
define("rank_head_statistics", _SCHEMA, _run, _empty)
differentiate("rank_head_statistics", RankHeadStats, lambda *flat: (*flat[:6], options_of(flat[6:])))
