"""The two primitives as operators of torch, for whoever looks on and must not see addresses.

A compiler, a FakeTensor or a meta tensor cannot follow a kernel that works on memory. For them the primitives are
registered with `torch.library`: opaque operators whose results have known shapes, and which run `_primitives` when
there is memory at last. `observed` tells when they are needed; otherwise a direct call saves the dispatcher's time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _primitives
from ._backends import Stats, statistics_dtype

READING = "int start, int ignore_index, float scale, float? softcap, Tensor? class_weight"
UPSTREAM = "Tensor target, Tensor lse, Tensor g_lse, Tensor g_picked, Tensor? g_wsum, Tensor? g_entropy"
torch.library.define(
    "xent::lse_and_pick",
    f"(Tensor logits, Tensor target, *, {READING}, int? classes, bool want_wsum, bool want_entropy, bool want_argmax)"
    " -> Tensor[]",
)
torch.library.define("xent::logits_grad", f"(Tensor logits, {UPSTREAM}, *, {READING}) -> Tensor")
torch.library.define("xent::logits_grad_", f"(Tensor(a!) logits, {UPSTREAM}, *, {READING}) -> ()")


def observed(logits: Tensor) -> bool:
    """Whether these logits are being traced, or are no plain tensor with memory."""
    plain = type(logits) is Tensor or type(logits) is torch.nn.Parameter
    return not plain or logits.is_meta or torch.compiler.is_compiling()


def lse_and_pick(logits: Tensor, target: Tensor, **options: Any) -> Stats:
    """`_primitives.lse_and_pick` through the operator."""
    found = iter(torch.ops.xent.lse_and_pick(logits, target, **options))
    asked = (target.is_floating_point(), options["want_wsum"], options["want_entropy"], options["want_argmax"])
    return Stats(next(found), next(found), *[next(found) if yes else None for yes in asked])


def logits_grad(logits: Tensor, *upstream: Tensor | None, out: Tensor | None, **options: Any) -> Tensor:
    """`_primitives.logits_grad` through the operator, or through the one that overwrites the logits."""
    if out is None:
        return torch.ops.xent.logits_grad(logits, *upstream, **options)  # type: ignore[no-any-return]
    torch.ops.xent.logits_grad_(out, *upstream, **options)
    return out


def _run_lse_and_pick(logits: Tensor, target: Tensor, **options: Any) -> list[Tensor]:
    return [stat for stat in _primitives.lse_and_pick(logits, target, **options) if stat is not None]


def _run_logits_grad(logits: Tensor, *upstream: Tensor, **options: Any) -> Tensor:
    return _primitives.logits_grad(logits, *upstream, **options)


def _run_logits_grad_(logits: Tensor, *upstream: Tensor, **options: Any) -> None:
    _primitives.logits_grad(logits, *upstream, **options, out=logits)


def _shapes_of_stats(
    logits: Tensor, target: Tensor, *, want_wsum: bool, want_entropy: bool, want_argmax: bool, **reading: Any
) -> list[Tensor]:
    count = 2 + target.is_floating_point() + want_wsum + want_entropy
    dtypes = [statistics_dtype(logits.device)] * count + [torch.int64] * want_argmax
    return [logits.new_empty(logits.shape[:1], dtype=dtype) for dtype in dtypes]


def _shape_of_gradient(logits: Tensor, *upstream: Tensor, **reading: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _no_result(logits: Tensor, *upstream: Tensor, **reading: Any) -> None:
    return None


for name, run, shapes in (
    ("lse_and_pick", _run_lse_and_pick, _shapes_of_stats),
    ("logits_grad", _run_logits_grad, _shape_of_gradient),
    ("logits_grad_", _run_logits_grad_, _no_result),
):
    torch.library.impl(f"xent::{name}", "default", run)
    torch.library.register_fake(f"xent::{name}", shapes)
