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
from torch.distributed import ProcessGroup, distributed_c10d

from . import _blocks, _ops, _shards
from ._autograd import watched
from ._backends import Stats, compute_dtype, scores
from ._blocks import Head, Maybe
from ._linear import HEAD, ROWS, Needs, head_of, once_differentiable, refuse_transforms, shapes_of_grads, upstream_of
from ._parallel import Global


def parallel_linear_stats(
    hidden: Tensor, weight: Tensor, bias: Maybe, target: Tensor, class_weight: Maybe, head: Head, group: ProcessGroup
) -> Global:
    """Differentiable `Stats` over the classes of all ranks, from the rows (N, D) and this rank's part of the head."""
    refuse_transforms(hidden, weight, bias)
    arguments = (hidden, weight, bias, target, class_weight, head, group.group_name)
    found = iter(ParallelLinearStats.apply(*arguments))  # type: ignore[no-untyped-call]
    soft = target.is_floating_point()
    asked = (True, True, soft, head.label_smoothing > 0, head.entropy, head.argmax)
    stats = Stats(*[next(found) if yes else None for yes in asked])  # type: ignore[arg-type]
    classes = next(found)[1].double()
    weight_sum = classes if class_weight is None else next(found)
    row_weight = None if class_weight is None or soft else next(found)
    return Global(stats, classes, row_weight, weight_sum)


class ParallelLinearStats(torch.autograd.Function):
    """What `_shards.share` returns, for a head; backward goes through the blocks again."""

    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, bias: Maybe, target: Tensor, class_weight: Maybe, head: Head, group: str
    ) -> tuple[Tensor, ...]:
        arguments = (hidden, weight, bias, target, class_weight)
        if _ops.observed(hidden) or _ops.observed(weight):
            return tuple(torch.ops.xent.parallel_linear_stats(*arguments, group, *head.reading, *head[1:]))
        return tuple(_stats(*arguments, group, head))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, weight, bias, target, class_weight, ctx.head, ctx.group = inputs
        soft, smooth = target.is_floating_point(), ctx.head.label_smoothing > 0
        count = 2 + soft + smooth + ctx.head.entropy  # of what has a derivative
        layout, entropy = output[count + ctx.head.argmax], output[count - 1] if ctx.head.entropy else None
        part = output[-1] if class_weight is not None and (soft or smooth) else None
        ctx.mark_non_differentiable(*output[count:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, target, part, output[0], entropy, layout)

    @staticmethod
    def backward(ctx: Any, g_lse: Maybe, g_picked: Maybe, *more: Maybe) -> tuple[Tensor | None, ...]:
        if all(g is None for g in (g_lse, g_picked, *more)):
            return (None,) * 7
        hidden, weight, bias, target, class_weight, lse, entropy, layout = ctx.saved_tensors
        upstream = upstream_of(ctx.head, target, lse, entropy, g_lse, g_picked, *more)
        needs = ctx.needs_input_grad[:3]
        arguments = (hidden, weight, bias, target, lse, upstream, class_weight, layout, ctx.group)
        with torch.no_grad():
            if watched(hidden) or _ops.observed(weight):
                grads = torch.ops.xent.parallel_linear_grads(*arguments, *ctx.head.reading, *ctx.head[1:], list(needs))
            else:
                grads = _grads(*arguments, ctx.head, needs)
            sources, left = (hidden, weight, bias), iter(grads)
            found = [next(left).to(t.dtype) if needed else None for t, needed in zip(sources, needs, strict=True)]
        return *[None if grad is None else once_differentiable(grad, sources) for grad in found], *[None] * 4


def _stats(
    hidden: Tensor, weight: Tensor, bias: Maybe, target: Tensor, class_weight: Maybe, group: str, head: Head
) -> list[Tensor]:
    def local(start: int, total: int, part: Maybe) -> _shards.Local:
        own = head._replace(reading=head.reading._replace(start=start, classes=total))
        stats = _blocks.stats_of(hidden, weight, bias, target, part, own)
        return stats, _peak(hidden, weight, bias, stats[-1], head) if head.argmax else None

    wanted = (head.label_smoothing > 0, head.entropy, head.argmax)
    ignore_index, scale, softcap = head.reading[:3]
    note = f"{len(hidden)} rows of {hidden.shape[1]} {head.dtype}, {ignore_index=}, logit_scale={scale}, {softcap=}"
    ignored: Maybe = None
    if not target.is_floating_point():
        ignored = target == ignore_index
    elif head.shift:  # the last of each sequence
        ignored = torch.arange(len(hidden), device=hidden.device) % head.shift == head.shift - 1
    held = (len(weight), torch.float64 if head.dtype == torch.float64 else torch.float32)
    return _shards.share(group, note, target, ignored, class_weight, held, wanted, local)


def _peak(hidden: Tensor, weight: Tensor, bias: Maybe, argmax: Tensor, head: Head) -> Tensor:
    """The score of each row's most likely class here, by one product of two vectors: the logits are gone."""
    if len(weight) == 0:
        return torch.full_like(argmax, -torch.inf, dtype=torch.float64)
    best, dtype = argmax.clamp(min=0), compute_dtype(hidden)
    logit = (hidden.to(dtype) * weight[best].to(dtype)).sum(1)
    logit = logit if bias is None else logit + bias[best].to(dtype)
    return scores(logit.to(head.dtype), head.reading.scale, head.reading.softcap).double()


def _grads(
    hidden: Tensor,
    weight: Tensor,
    bias: Maybe,
    target: Tensor,
    lse: Tensor,
    upstream: list[Maybe],
    class_weight: Maybe,
    layout: Tensor,
    group: str,
    head: Head,
    needs: Needs,
) -> list[Tensor]:
    start, total = layout.tolist()
    own = head._replace(reading=head.reading._replace(start=start, classes=total))
    grads = _blocks.stats_grads(hidden, weight, bias, target, lse, upstream, class_weight, own, needs)
    if needs[0]:
        ranks = distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type, attr-defined]
        if ranks.size() > 1:
            collectives = torch.ops._c10d_functional
            sums = collectives.all_reduce(grads[0].to(compute_dtype(grads[0])), "sum", group)
            grads[0] = collectives.wait_tensor(sums)
    return grads


# ---------------------------------------------------------------------------------------------------- operators


def _run_stats(h: Tensor, W: Tensor, b: Maybe, y: Tensor, w: Maybe, group: str, *rest: Any) -> list[Tensor]:
    return _stats(h, W, b, y, w, group, head_of(rest))


def _run_grads(
    h: Tensor, W: Tensor, b: Maybe, y: Tensor, lse: Tensor, g: list[Maybe], w: Maybe, layout: Tensor, *rest: Any
) -> list[Tensor]:
    return _grads(h, W, b, y, lse, g, w, layout, rest[0], head_of(rest[1:-1]), rest[-1])


def _shapes_of_stats(h: Tensor, W: Tensor, b: Maybe, y: Tensor, w: Maybe, group: str, *rest: Any) -> list[Tensor]:
    head = head_of(rest)
    flags = (head.label_smoothing > 0, head.entropy, head.argmax)
    logits = h.new_empty((len(h), len(W)), dtype=head.dtype)
    return _shards.shapes_of_stats(logits, y, w, group, *head.reading[:3], *flags)


def _shapes_of_grads(
    h: Tensor, W: Tensor, b: Maybe, y: Tensor, lse: Tensor, g: list[Maybe], w: Maybe, layout: Tensor, *rest: Any
) -> list[Tensor]:
    head, needs = head_of(rest[1:-1]), rest[-1]
    shapes = shapes_of_grads(h, W, head, needs)
    if needs[0]:
        shapes[0] = shapes[0].to(compute_dtype(shapes[0]))
    return shapes


_GRADS = f"{ROWS}, Tensor lse, Tensor?[] upstream, Tensor? class_weight, Tensor layout, str group, {HEAD}, bool[] needs"
for _name, _schema, _run, _shapes in (
    ("parallel_linear_stats", f"{ROWS}, Tensor? class_weight, str group, {HEAD}", _run_stats, _shapes_of_stats),
    ("parallel_linear_grads", _GRADS, _run_grads, _shapes_of_grads),
):
    torch.library.define(f"xent::{_name}", f"({_schema}) -> Tensor[]")
    torch.library.impl(f"xent::{_name}", "default", _run)
    torch.library.register_fake(f"xent::{_name}", _shapes)
