"""DTensor arguments: the same call on each rank's part of them, and its results as DTensors again.

The mesh dimension that shards the classes becomes `group=`, and over it the results are the same on all ranks:
Replicate. A mesh dimension that shards the batch leaves a result per position where it is, and makes a sum Partial.
For a mean the counts are added up over these dimensions first, an all-reduce of two numbers for each, so that it is
the mean over the whole batch.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import _layout

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

    Placements = tuple[Placement, ...]

P = ParamSpec("P")
R = TypeVar("R")


def distributed(function: Callable[P, R]) -> Callable[P, R]:
    """Let `function(input, target, ...)` take DTensors."""
    names = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if not (torch.compiler.is_compiling() or "torch.distributed.tensor" in sys.modules):
            return function(*args, **kwargs)
        if not any(_is_dtensor(value) for value in (*args, *kwargs.values())):
            return function(*args, **kwargs)
        options: dict[str, Any] = dict(zip(names, args, strict=False)) | kwargs
        if "reduction" in names:
            options.setdefault("reduction", "mean")
        return _on_parts(function, **options)  # type: ignore[no-any-return]

    return wrapper


def _is_dtensor(x: object) -> bool:
    """By its name: DTensor takes longer to import than torch itself, and whoever has none need not."""
    return isinstance(x, Tensor) and type(x).__name__ == "DTensor"


def _on_parts(function: Callable[..., Any], input: DTensor, target: Tensor, **options: Any) -> Any:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    if not _is_dtensor(input):
        raise TypeError(
            "input: expected a DTensor like the other arguments, got a plain tensor; use DTensor.from_local"
        )
    if options.get("group") is not None:
        raise ValueError("group: expected None beside DTensor logits, which know theirs")
    mesh = input.device_mesh
    axis = options["dim"] = _layout.class_dim(input.shape, target.shape, options.get("dim"))
    placements = input.placements
    group = _class_group(input, axis)
    batch = [i for i, p in enumerate(placements) if p.is_shard() and not p.is_shard(axis)]
    replicate: list[Placement] = [Replicate() for _ in placements]
    per_row, scalar, classes = list(replicate), list(replicate), list(replicate)
    for i, p in enumerate(placements):
        if i in batch:
            per_row[i], scalar[i] = Shard(p.dim - (p.dim > axis)), Partial()  # type: ignore[attr-defined]
        elif p.is_shard():
            classes[i] = Shard(0)

    soft = target.shape == input.shape
    x = input.to_local(grad_placements=placements)
    y = _part("target", target, input, placements if soft else tuple(per_row))
    weight: Any = options.get("weight")
    if _is_dtensor(weight):
        sharded = weight.placements == tuple(classes)
        options["weight"] = _part("weight", weight, input, weight.placements if sharded else tuple(replicate))
    if batch and options.get("reduction") == "mean" and options.get("normalizer") is None:
        options["normalizer"] = _divisor(x, y, weight, axis, [mesh.get_group(i) for i in batch], options)

    def whole(result: Tensor) -> DTensor:
        shape = input.shape[:axis] + input.shape[axis + 1 :] if result.dim() else torch.Size()
        return DTensor.from_local(
            result,
            mesh,
            per_row if result.dim() else scalar,
            run_check=False,
            shape=shape,
            stride=torch.empty(shape, device="meta").stride(),
        )

    found = function(x, y, **options, group=group)
    if isinstance(found, Tensor):
        return whole(found)
    return type(found)(*[None if part is None else whole(part) for part in found])


def _class_group(input: DTensor, axis: int) -> ProcessGroup | None:
    """The group over which the classes are sharded: none, or that of one mesh dimension."""
    mesh, placements = input.device_mesh, input.placements
    known = all(type(p).__name__ in ("Shard", "Replicate") for p in placements)
    dims = [i for i, p in enumerate(placements) if p.is_shard(axis)]
    if not known or len(dims) > 1:
        raise ValueError(
            "input: expected a DTensor of which one mesh dimension at most shards the classes (tensor dimension "
            f"{axis}) and all others are Shard or Replicate, got {placements}; redistribute it first"
        )
    return mesh.get_group(dims[0]) if dims else None


def _part(name: str, x: Any, input: DTensor, expected: Placements) -> Any:
    """This rank's part of a tensor that goes with the logits; of what is whole on each rank, without communication."""
    if not _is_dtensor(x):
        if all(p.is_replicate() for p in expected):
            return x
        raise ValueError(
            f"{name}: expected a DTensor placed {expected} beside logits placed {input.placements}, got a plain "
            "tensor, which may be a part or the whole; use DTensor.from_local or distribute_tensor"
        )
    if x.device_mesh != input.device_mesh:
        raise ValueError(f"{name}: expected a DTensor on the mesh of input, {input.device_mesh}, got {x.device_mesh}")
    if any(p != e and not p.is_replicate() for p, e in zip(x.placements, expected, strict=True)):
        raise ValueError(
            f"{name}: expected placements {expected} or Replicate beside logits placed {input.placements}, got "
            f"{x.placements}"
        )
    return x.redistribute(placements=expected).to_local(grad_placements=expected)


def _divisor(x: Tensor, y: Tensor, weight: Any, axis: int, groups: list[ProcessGroup], options: Any) -> Tensor:
    """What the mean over the whole batch divides by. Targets out of range are found later, by all ranks alike."""
    if x.shape == y.shape:
        total = count = torch.tensor(x.shape[:axis].numel() * x.shape[axis + 1 :].numel(), device=x.device)
    else:
        counts = y != options.get("ignore_index", -100)
        total = count = counts.sum()
        if weight is not None:
            w = weight.full_tensor() if _is_dtensor(weight) else weight
            total = w.double()[y.long().clamp(0, len(w) - 1)].masked_fill(~counts, 0).sum()
    numbers = torch.stack([total.double(), count.double()])
    collectives = torch.ops._c10d_functional
    for group in groups:
        numbers = collectives.wait_tensor(collectives.all_reduce(numbers, "sum", group.group_name))
    return numbers[0] + (numbers[1] == 0) if options.get("on_empty") == "zero" else numbers[0]
