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
from .._head.blocks import HeadOptions
from .._head.entries import Entries, stats_of
from .._head.functions import GONE, NO_ENTRIES, NoTransforms, empty_entries, stats_backward, with_room
from .._records import HeadRows, Stats, compute_dtype
from .._rows.functions import numbers_of_stats, once_differentiable
from .._rows.objective import ClassTerms
from .._rows.operators import apply, define, differentiate, flatten, run
from .combine import Gathered, combine, empty_gathered, gather


def rank_head_stats(rows: HeadRows, options: HeadOptions, group: ProcessGroup) -> tuple[Stats, ClassTerms]:
    """Differentiable `Stats` over the classes of all ranks, from the rows and this rank's part of the head."""
    found = apply("rank_head_statistics", RankHeadStats, rows, group.group_name, options)
    gathered = Gathered.unpack(found, rows.target[None], rows.class_weight is not None, options.wanted)
    return combine(gathered, rows.target[None], _ignored(rows.target, options))


class RankHeadStats(NoTransforms, torch.autograd.Function):
    """(hidden, weight, bias, target, class_weight) -> `Gathered`; backward goes through the blocks again.

    With a seed, `Entries` too: of the rank's own softmax, whose share of the whole is in what flows back.
    """

    @staticmethod
    def forward(*flat: Any) -> tuple[Tensor, ...]:
        rows, (group, options) = HeadRows.split(flat)
        return tuple(run("rank_head_statistics", _statistics, rows, group, options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        rows, (ctx.group, ctx.options) = HeadRows.split(inputs)
        ctx.rank = _torch.process_group(ctx.group).rank()  # which a compiler could not look up in backward
        gathered = Gathered.unpack(output, rows.target[None], rows.class_weight is not None, ctx.options.wanted)
        entries = NO_ENTRIES[1:] if rows.seed is None else output[-3:]
        ctx.mark_non_differentiable(*gathered.constants, *[entry for entry in entries if entry is not None])
        ctx.set_materialize_grads(False)
        saved = rows._replace(class_weight=None)  # in `Gathered`: the part of the classes held here
        ctx.save_for_backward(*saved, *flatten(gathered), *entries)

    @staticmethod
    def backward(ctx: Any, *flow: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(g is None for g in flow):
            return (None,) * 9
        rows, found = HeadRows.split(ctx.saved_tensors)
        gathered, entries = Gathered.split(found)
        options = ctx.options
        ignore_index, needs, C = options.spec.ignore_index, ctx.needs_input_grad[: len(rows.sources)], len(rows.weight)
        (y,), own, g = gathered.of_rank(ctx.rank, flow, rows.target[None], ignore_index, C, options.wanted)
        part = rows._replace(target=y, class_weight=gathered.part)
        local = options._replace(spec=options.spec._replace(ignore_index=-1, classes=C + 1))
        with torch.no_grad():
            numbers = numbers_of_stats(g, own.top, own.lse, own.entropy, y[None])
            grads = stats_backward(part, Entries(own.picked, *entries), numbers, g.mass, local, needs)
            if needs[0] and grads[0] is not None and len(gathered.ranks) > 1:
                total = _torch.all_reduce(grads[0].to(compute_dtype(grads[0])), ctx.group)
                grads[0] = total.to(rows.hidden.dtype)
        return *[once_differentiable(grad, rows.sources, GONE) for grad in grads], *[None] * 4


def _ignored(target: Tensor, options: HeadOptions) -> Tensor | None:
    """The rows that do not count, (1, N)."""
    if not target.is_floating_point():
        return target[None] == options.spec.ignore_index
    if options.shift:  # the last of each sequence
        return torch.arange(len(target), device=target.device)[None] % options.shift == options.shift - 1
    return None


def _statistics(rows: HeadRows, group: str, options: HeadOptions) -> list[Tensor]:
    entries: list[Tensor] = []
    hidden, weight, _, target, _, class_weight, seed = rows

    def local(start: int, total: int, part: Tensor | None) -> Stats:
        own = options._replace(spec=options.spec._replace(start=start, classes=total))
        # All ranks draw the same seed, and each needs another one.
        here = rows._replace(class_weight=part, seed=None if seed is None else seed + start)
        found = stats_of(here, own)
        entries[:] = [] if seed is None else found[-3:]
        return options.wanted.unpack(found, target.is_floating_point())

    note = f"{len(hidden)} rows of {hidden.shape[1]} {options.dtype}, {options.spec.words()}"
    held, ignored = (len(weight), options.weight_dtype), _ignored(target, options)
    return gather(group, note, target[None], ignored, class_weight, held, options.wanted, local) + entries


# ---------------------------------------------------------------------------------------------------- operators


def _padded(rows: HeadRows, group: str, options: HeadOptions) -> list[Tensor]:
    return with_room(_statistics(rows, group, options), rows, options)


def _empty(rows: HeadRows, group: str, options: HeadOptions) -> list[Tensor]:
    held, weighted = (len(rows.weight), options.weight_dtype), rows.class_weight is not None
    ranks = _torch.process_group(group).size()
    found = empty_gathered(rows.target[None], held, weighted, ranks, options.wanted)
    return found + empty_entries(rows, options)


define("rank_head_statistics", (HeadRows, "str group", HeadOptions), "Tensor[]", _padded, _empty)
differentiate("rank_head_statistics", RankHeadStats)
