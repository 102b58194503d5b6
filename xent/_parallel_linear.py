"""A linear head whose rows, the classes, are spread over the ranks of a group; the hidden states are the same on all.

Forward goes through the blocks of logits of this rank, and then all ranks share the numbers per row, once for all
blocks (see `_shards`). A gradient in the same pass, as `_linear.LinearLoss` has it, would need the lse of all classes
block by block, and so one exchange for each. Instead backward computes the logits again, a fourth matrix product.

The hidden states take part in the logits of every rank, so their gradient is a sum over the ranks: one all-reduce in
backward, of all rows at once. (One for each block would send as many bytes in more messages.) Half-precision parts are
added up in float32. The head's own gradient needs no communication.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import _blocks, _shards, _torch
from ._blocks import Head, Maybe, Needs
from ._linear import (
    HEAD,
    PER_ROW,
    ROWS,
    LinearGrads,
    empty_grads,
    head_of,
    once_differentiable,
    refuse_transforms,
    upstream_of,
)
from ._ops import define, differentiate
from ._parallel import Global
from ._records import Stats, Upstream, compute_dtype
from ._shards import Shared


def parallel_linear_stats(
    hidden: Tensor, weight: Tensor, bias: Maybe, target: Tensor, class_weight: Maybe, head: Head, group: ProcessGroup
) -> Global:
    """Differentiable `Stats` over the classes of all ranks, from the rows (N, D) and this rank's part of the head."""
    refuse_transforms(hidden, weight, bias)
    arguments = (hidden, weight, bias, target, class_weight, head, group.group_name)
    found = ParallelLinearStats.apply(*arguments)  # type: ignore[no-untyped-call]
    return Global.of(Shared.unpack(found, head.wanted, target.is_floating_point(), class_weight is not None))


class ParallelLinearStats(torch.autograd.Function):
    """`Shared` for a head, packed; backward goes through the blocks again."""

    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, bias: Maybe, target: Tensor, class_weight: Maybe, head: Head, group: str
    ) -> tuple[Tensor, ...]:
        arguments = (hidden, weight, bias, target, class_weight)
        if _torch.is_traced(*arguments):
            return tuple(torch.ops.xent.parallel_linear_stats(*arguments, group, *head.spec, *head[1:]))
        return tuple(_stats(*arguments, group, head).pack())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, weight, bias, target, class_weight, ctx.head, ctx.group = inputs
        shared = Shared.unpack(output, ctx.head.wanted, target.is_floating_point(), class_weight is not None)
        stats = shared.stats
        without = (stats.top, stats.argmax, *shared[1:])
        ctx.mark_non_differentiable(*[tensor for tensor in without if tensor is not None])
        ctx.set_materialize_grads(False)
        per_row = (stats.top, stats.lse, stats.entropy)
        ctx.save_for_backward(hidden, weight, bias, target, shared.part, *per_row, shared.layout)

    @staticmethod
    def backward(ctx: Any, *grads: Maybe) -> tuple[Tensor | None, ...]:
        if all(g is None for g in grads):
            return (None,) * 7
        hidden, weight, bias, target, class_weight, top, lse, entropy, layout = ctx.saved_tensors
        wanted, soft, needs = ctx.head.wanted, target.is_floating_point(), ctx.needs_input_grad[:4]
        upstream, g_mass = upstream_of(wanted, soft, grads[: wanted.number(soft)], lse, entropy)
        rows, rest = (hidden, weight, bias, target, top, lse), (g_mass, class_weight, layout, ctx.group)
        with torch.no_grad():
            if _torch.is_traced(*rows, *upstream, g_mass, class_weight):
                flat = (*upstream, *rest, *ctx.head.spec, *ctx.head[1:], list(needs))
                found = torch.ops.xent.parallel_linear_grads(*rows, *flat)
            else:
                found = _grads(*rows, upstream, *rest, ctx.head, needs)
            sources, left = rows[:4], iter(found)
            found = [next(left).to(t.dtype) if needed else None for t, needed in zip(sources, needs, strict=True)]
        return *[None if grad is None else once_differentiable(grad, sources) for grad in found], *[None] * 3


def _stats(
    hidden: Tensor, weight: Tensor, bias: Maybe, target: Tensor, class_weight: Maybe, group: str, head: Head
) -> Shared:
    def local(start: int, total: int, part: Maybe) -> Stats:
        own = head._replace(spec=head.spec._replace(start=start, classes=total))
        found = _blocks.stats_of(hidden, weight, bias, target, part, own)
        return head.wanted.unpack(found, target.is_floating_point())

    ignore_index, scale, softcap, *_ = head.spec
    note = f"{len(hidden)} rows of {hidden.shape[1]} {head.dtype}, {ignore_index=}, logit_scale={scale}, {softcap=}"
    ignored: Maybe = None
    if not target.is_floating_point():
        ignored = target == ignore_index
    elif head.shift:  # the last of each sequence
        ignored = torch.arange(len(hidden), device=hidden.device) % head.shift == head.shift - 1
    held = (len(weight), torch.float64 if head.dtype == torch.float64 else torch.float32)
    return _shards.share(group, note, target, ignored, class_weight, held, head.wanted, local)


def _grads(
    hidden: Tensor,
    weight: Tensor,
    bias: Maybe,
    target: Tensor,
    top: Tensor,
    lse: Tensor,
    upstream: Upstream,
    g_mass: Maybe,
    class_weight: Maybe,
    layout: Tensor,
    group: str,
    head: Head,
    needs: Needs,
) -> list[Tensor]:
    start, total = layout.tolist()
    own = head._replace(spec=head.spec._replace(start=start, classes=total))
    grads = _blocks.stats_grads(hidden, weight, bias, target, top, lse, upstream, g_mass, class_weight, own, needs)
    if needs[0]:
        grads[0] = grads[0].to(compute_dtype(grads[0]))
        if _torch.process_group(group).size() > 1:
            grads[0] = _torch.all_reduce(grads[0], group)
    return grads


# ---------------------------------------------------------------------------------------------------- operators


def _run_stats(h: Tensor, W: Tensor, b: Maybe, y: Tensor, w: Maybe, group: str, *rest: Any) -> list[Tensor]:
    return _stats(h, W, b, y, w, group, head_of(rest)).pack()


def _empty_stats(h: Tensor, W: Tensor, b: Maybe, y: Tensor, w: Maybe, group: str, *rest: Any) -> list[Tensor]:
    head, soft = head_of(rest), y.is_floating_point()
    dtype = torch.float64 if head.dtype == torch.float64 else torch.float32
    found = Shared.empty(h, len(W), dtype, head.wanted, soft)
    return found if w is not None else found[: head.wanted.number(soft) + 1]


def _run_grads(h: Tensor, W: Tensor, b: Maybe, y: Tensor, top: Tensor, lse: Tensor, *rest: Any) -> list[Tensor]:
    upstream, (g_mass, w, layout, group), head = Upstream(*rest[:4]), rest[4:8], head_of(rest[8:-1])
    return _grads(h, W, b, y, top, lse, upstream, g_mass, w, layout, group, head, rest[-1])


def _empty_grads(h: Tensor, W: Tensor, b: Maybe, y: Tensor, *rest: Any) -> list[Tensor]:
    found = empty_grads(h, W, y, head_of(rest[10:-1]), rest[-1])
    return [found[0].to(compute_dtype(h)), *found[1:]] if rest[-1][0] else found


_STATS = f"({ROWS}, Tensor? class_weight, str group, {HEAD}) -> Tensor[]"
_GRADS = f"({ROWS}, {PER_ROW}, Tensor layout, str group, {HEAD}, bool[] needs) -> Tensor[]"
define("parallel_linear_stats", _STATS, _run_stats, _empty_stats)
define("parallel_linear_grads", _GRADS, _run_grads, _empty_grads)
differentiate("parallel_linear_stats", ParallelLinearStats, 5, lambda flat: (head_of(flat[1:]), flat[0]))
differentiate("parallel_linear_grads", LinearGrads, 0, lambda flat: ())
