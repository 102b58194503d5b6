"""Row statistics where the classes are spread over the ranks of a group, each holding some that follow each other.

Forward is one exchange of a few numbers per row (see `_shards`). Backward has no communication at all: with the lse
of all classes,

    dz_c = g_lse p_c  +  g_picked [c = y]  +  g_wsum w_c  -  g_entropy p_c (log p_c + entropy)

is for each c what it is on one device. That takes the upstream numbers to be those of the whole loss: every rank
computes the same loss from the same statistics, and calls backward on it.

The derivative of that gradient is another matter: how lse depends on the logits of other ranks is not known here. It
is refused, and so is forward mode.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import _ops, _shards
from ._autograd import Wanted, apply, fold, refuse_mapped_weight, stats_backward
from ._backends import Reading, Stats


class Global(NamedTuple):
    """What the whole group knows of the rows."""

    stats: Stats  #               over all classes
    classes: Tensor  #            0-d, float64: how many there are
    row_weight: Tensor | None  #  (N,): w_y, for a class weight and index targets
    weight_sum: Tensor  #         0-d: sum_c w_c


def parallel_stats(
    logits: Tensor, target: Tensor, weight: Tensor | None, group: ProcessGroup, reading: Reading, wanted: Wanted
) -> Global:
    """Differentiable `Stats` over the classes of all ranks, from the rows (N, C) of this one.

    `weight` is over the classes held here, or over all of them.
    """
    arguments = (logits, target, weight, group.group_name, reading, wanted)
    found = iter(apply(ParallelStats, ParallelStatsForwardMode, *arguments))
    soft = target.is_floating_point()
    stats = Stats(*[next(found) if yes else None for yes in (True, True, soft, *wanted[:3])])  # type: ignore[arg-type]
    classes = next(found)[1].double()
    weight_sum = classes if weight is None else next(found)
    row_weight = None if weight is None or soft else next(found)
    return Global(stats, classes, row_weight, weight_sum)


class ParallelStats(torch.autograd.Function):
    """(logits, target, weight) -> those of `Stats` that are wanted, then the numbers that have no derivative.

    These are [start, classes] and, with a weight: its sum; of each row (index targets); its part for the classes held
    here (for probabilities and wsum).
    """

    @staticmethod
    def forward(
        logits: Tensor, target: Tensor, weight: Tensor | None, group: str, reading: Reading, wanted: Wanted
    ) -> tuple[Tensor, ...]:
        run = torch.ops.xent.parallel_stats if _ops.observed(logits) else _shards.parallel_stats
        return tuple(run(logits, target, weight, group, *reading[:3], *wanted[:3]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, target, weight, _, ctx.reading, ctx.wanted = inputs
        soft, (wsum, has_entropy, argmax, _) = target.is_floating_point(), ctx.wanted
        count = 2 + soft + wsum + has_entropy  # of what has a derivative
        layout, entropy = output[count + argmax], output[count - 1] if has_entropy else None
        class_weight = output[-1] if weight is not None and (soft or wsum) else None
        ctx.mark_non_differentiable(*output[count:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, target, class_weight, output[0], entropy, layout)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        layout = ctx.saved_tensors[5]

        def gradient(*arguments: Any) -> Tensor:
            return apply(ParallelGrad, ParallelGradForwardMode, *arguments, layout)  # type: ignore[no-any-return]

        d_logits, d_target, _ = stats_backward(ctx, gradient, *grads)
        if d_target is not None and torch.is_grad_enabled():
            d_target = apply(Final, FinalForwardMode, d_target)
        return d_logits, d_target, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        refuse_mapped_weight(in_dims[2])
        logits, target = fold(info.batch_size, in_dims[:2], args[:2])
        found = apply(ParallelStats, ParallelStatsForwardMode, logits, target, *args[2:])
        soft, weighted, wanted = args[1].is_floating_point(), args[2] is not None, args[5]
        count = 2 + soft + sum(wanted[:3])
        dims: list[int | None] = [0] * count + [None]
        if weighted:
            dims += [None] if soft else [None, 0]
            dims += [None] * (soft or wanted.wsum)
        split = [x if dim is None else x.view(info.batch_size, -1) for x, dim in zip(found, dims, strict=True)]
        return tuple(split), tuple(dims)


class ParallelGrad(torch.autograd.Function):
    """`RowGrad` for the classes held here, which is not differentiated again."""

    @staticmethod
    def forward(
        logits: Tensor,
        target: Tensor,
        lse: Tensor,
        g_lse: Tensor,
        g_picked: Tensor,
        g_wsum: Tensor | None,
        g_entropy: Tensor | None,
        class_weight: Tensor | None,
        reading: Reading,
        inplace: bool,
        layout: Tensor,
    ) -> Tensor:
        rest = (target, lse, g_lse, g_picked, g_wsum, g_entropy, class_weight, layout, *reading[:3])
        observed = _ops.observed(logits)
        if not inplace:
            run = torch.ops.xent.parallel_grad if observed else _shards.parallel_grad
            return run(logits, *rest)
        out = logits.detach()
        write = torch.ops.xent.parallel_grad_ if observed else _shards.parallel_grad_
        write(out, *rest)
        torch.autograd.graph.increment_version(logits)  # as in `RowGrad`
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> NoReturn:
        _refuse("a second derivative")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        rows = fold(info.batch_size, in_dims[:7], args[:7])
        found: Tensor = apply(ParallelGrad, ParallelGradForwardMode, *rows, *args[7:])
        return found.view(info.batch_size, -1, found.shape[1]), 0


class Final(torch.autograd.Function):
    """The identity, which is not differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> NoReturn:
        _refuse("a second derivative")


class NoForwardMode:
    """A jvp that says why there is none."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        _refuse("forward mode")


class ParallelStatsForwardMode(NoForwardMode, ParallelStats):
    """See `apply`."""


class ParallelGradForwardMode(NoForwardMode, ParallelGrad):
    """See `apply`."""


class FinalForwardMode(NoForwardMode, Final):
    """See `apply`."""


def _refuse(what: str) -> NoReturn:
    raise NotImplementedError(
        f"group: {what} of a loss whose classes are spread over ranks needs the logits of the other ranks, "
        "and would be wrong without them; gather the logits, or use a single rank"
    )
