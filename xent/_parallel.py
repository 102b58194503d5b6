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

from . import _shards, _torch
from ._autograd import apply, fold, refuse_mapped_weight, stats_backward
from ._ops import differentiate
from ._records import RowSpec, Stats, Upstream, Wanted
from ._shards import Shared


class Global(NamedTuple):
    """What a loss needs to know of the rows and of all classes."""

    stats: Stats
    classes: Tensor  #            0-d, float64: how many there are
    row_weight: Tensor | None  #  (N,): w_y, for a class weight and index targets
    weight_sum: Tensor  #         0-d: sum_c w_c

    @classmethod
    def of(cls, shared: Shared) -> Global:
        """From the results of the exchange."""
        classes = shared.layout[1].double()
        weight_sum = classes if shared.weight_sum is None else shared.weight_sum
        return cls(shared.stats, classes, shared.row_weight, weight_sum)


def parallel_stats(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    group: ProcessGroup,
    spec: RowSpec,
    wanted: Wanted,
    inplace: bool = False,
) -> Global:
    """Differentiable `Stats` over the classes of all ranks, from the rows (N, C) of this one.

    `weight` is over the classes held here, or over all of them.
    """
    arguments = (logits, target, weight, group.group_name, spec, wanted, inplace)
    found = apply(ParallelStats, ParallelStatsForwardMode, *arguments)
    return Global.of(Shared.unpack(found, wanted, target.is_floating_point(), weight is not None))


class ParallelStats(torch.autograd.Function):
    """(logits, target, weight) -> `Shared`, packed."""

    @staticmethod
    def forward(
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        group: str,
        spec: RowSpec,
        wanted: Wanted,
        inplace: bool,
    ) -> tuple[Tensor, ...]:
        if _torch.is_traced(logits, target, weight):
            return tuple(torch.ops.xent.parallel_stats(logits, target, weight, group, *spec, *wanted))
        return tuple(_shards.parallel_stats(logits, target, weight, group, spec, wanted).pack())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, target, weight, _, ctx.spec, ctx.wanted, ctx.inplace = inputs
        shared = Shared.unpack(output, ctx.wanted, target.is_floating_point(), weight is not None)
        stats = shared.stats
        without = (stats.top, stats.argmax, *shared[1:])
        ctx.mark_non_differentiable(*[tensor for tensor in without if tensor is not None])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, target, shared.part, stats.top, stats.lse, stats.entropy, shared.layout)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        *saved, layout = ctx.saved_tensors
        count = ctx.wanted.number(saved[1].is_floating_point())

        def gradient(*arguments: Any) -> Tensor:
            return apply(ParallelGrad, ParallelGradForwardMode, *arguments, layout)  # type: ignore[no-any-return]

        d_logits, d_target, _ = stats_backward(ctx, tuple(saved), gradient, grads[:count])
        if d_target is not None and torch.is_grad_enabled():
            d_target = apply(Final, FinalForwardMode, d_target)
        return d_logits, d_target, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        refuse_mapped_weight(in_dims[2])
        logits, target = fold(info.batch_size, in_dims[:2], args[:2])
        found = apply(ParallelStats, ParallelStatsForwardMode, logits, target, *args[2:])
        soft, weighted, wanted = args[1].is_floating_point(), args[2] is not None, args[5]
        dims: list[int | None] = [0] * wanted.number(soft) + [None]
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
        top: Tensor,
        lse: Tensor,
        g_lse: Tensor,
        g_picked: Tensor,
        g_wsum: Tensor | None,
        g_entropy: Tensor | None,
        class_weight: Tensor | None,
        spec: RowSpec,
        inplace: bool,
        layout: Tensor,
    ) -> Tensor:
        rows, upstream = (target, top, lse), Upstream(g_lse, g_picked, g_wsum, g_entropy)
        out = logits.detach() if inplace else None
        if not _torch.is_traced(logits, *rows, *upstream, class_weight):
            return _shards.parallel_grad(logits, *rows, upstream, class_weight, layout, spec, out)
        if out is None:
            return torch.ops.xent.parallel_grad(logits, *rows, *upstream, class_weight, layout, *spec)  # type: ignore[no-any-return]
        torch.ops.xent.parallel_grad_(out, *rows, *upstream, class_weight, layout, *spec)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> NoReturn:
        _refuse("a second derivative")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        rows = fold(info.batch_size, in_dims[:8], args[:8])
        found: Tensor = apply(ParallelGrad, ParallelGradForwardMode, *rows, *args[8:])
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


def _stats_arguments(flat: tuple[Any, ...]) -> tuple[Any, ...]:
    group, *rest = flat
    return group, RowSpec(*rest[:5]), Wanted(*rest[5:]), False


differentiate("parallel_stats", ParallelStats, 3, _stats_arguments)
differentiate("parallel_grad", ParallelGrad, 9, lambda flat: (RowSpec(*flat[1:]), False, flat[0]))
