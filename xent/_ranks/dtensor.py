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
from torch.distributed.device_mesh import DeviceMesh
from torch.overrides import handle_torch_function, has_torch_function

from .. import _torch
from .._inputs.rows import as_index, class_dim
from .._records import statistics_dtype
from .._rows.objective import sum_of_weights

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement

    Placements = tuple[Placement, ...]

P = ParamSpec("P")
R = TypeVar("R")


def overridable(on_parts: Callable[..., Any]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let an argument's `__torch_function__`, or a mode's, take a call over, as torch does for its own functions.

    And DTensors, by way of `on_parts(function, **arguments)`: `on_logits` or `on_head`.
    """

    def decorator(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            everything = (*args, *kwargs.values())
            if has_torch_function(everything):
                return handle_torch_function(wrapper, everything, *args, **kwargs)
            possible = torch.compiler.is_compiling() or "torch.distributed.tensor" in sys.modules
            if not possible or not any(map(_is_dtensor, everything)):
                return function(*args, **kwargs)
            try:
                arguments = signature.bind(*args, **kwargs)
            except TypeError:
                return function(*args, **kwargs)  # which Python refuses, in its own words
            arguments.apply_defaults()
            if arguments.arguments.pop("group") is not None:
                raise ValueError("group: expected None beside DTensors, which know theirs")
            return on_parts(function, **arguments.arguments)  # type: ignore[no-any-return]

        return wrapper

    return decorator


def _is_dtensor(x: object) -> bool:
    """By its name: DTensor takes longer to import than torch itself, and whoever has none need not."""
    return isinstance(x, Tensor) and type(x).__name__ == "DTensor"


class Places:
    """Where all that goes with some logits lies, on each dimension of their mesh."""

    def __init__(self, mesh: DeviceMesh, logits: Placements, shape: torch.Size, axis: int) -> None:
        """`shape` and `logits`: of the logits, whether there are any or not; `axis` is their class dimension."""
        from torch.distributed.tensor import Partial, Replicate, Shard

        classes = [i for i, p in enumerate(logits) if p.is_shard(axis)]
        if len(classes) > 1 or any(type(p).__name__ not in ("Shard", "Replicate") for p in logits):
            raise ValueError(
                "input: expected a DTensor of which one mesh dimension at most shards the classes (tensor dimension "
                f"{axis}) and all others are Shard or Replicate, got {logits}; redistribute it first"
            )
        self.mesh, self.logits, self.axis, self.shape = mesh, tuple(logits), axis, shape
        self.group = mesh.get_group(classes[0]) if classes else None
        self.batch = [i for i, p in enumerate(logits) if p.is_shard() and i not in classes]
        self.replicate = (Replicate(),) * len(logits)
        self.classes = tuple(Shard(0) if i in classes else Replicate() for i in range(len(logits)))
        per_row, scalar, several = list(self.replicate), list(self.replicate), list(self.replicate)
        for i in self.batch:
            per_row[i], scalar[i] = Shard(logits[i].dim - (logits[i].dim > axis)), Partial()  # type: ignore[attr-defined, call-overload]
            several[i] = logits[i]  # type: ignore[call-overload]
        self.per_row, self.scalar, self.candidates = tuple(per_row), tuple(scalar), tuple(several)

    def part(self, name: str, x: Any, expected: Placements, grad: Placements | None = None) -> Any:
        """This rank's part of a tensor; of what is whole on each rank, without communication."""
        if not _is_dtensor(x):
            if x is None or all(p.is_replicate() for p in expected):
                return x
            raise ValueError(
                f"{name}: expected a DTensor placed {expected} beside logits placed {self.logits}, got a plain tensor, "
                "which may be a part or the whole; use DTensor.from_local or distribute_tensor"
            )
        if x.device_mesh != self.mesh:
            raise ValueError(f"{name}: expected a DTensor on the mesh of the classes, {self.mesh}, got {x.device_mesh}")
        if any(p != e and not p.is_replicate() for p, e in zip(x.placements, expected, strict=True)):
            raise ValueError(
                f"{name}: expected placements {expected} or Replicate beside logits placed {self.logits}, got "
                f"{x.placements}"
            )
        return x.redistribute(placements=expected).to_local(grad_placements=grad or expected)

    def target(self, target: Any, soft: bool, several: bool, options: dict[str, Any]) -> Any:
        """This rank's part of the target; of `target_prob` and `weight`, whole or its classes, among the options."""
        expected = self.logits if soft else self.candidates if several else self.per_row
        y = self.part("target", target, expected)
        if "target_prob" in options:
            options["target_prob"] = self.part("target_prob", options["target_prob"], expected)
        weight: Any = options.get("weight")
        if _is_dtensor(weight):
            held = self.classes if weight.placements == self.classes else self.replicate
            options["weight"] = self.part("weight", weight, held)
        return y

    def whole(self, found: Any) -> Any:
        """The results of all ranks: one number per position, or one in all; or several of them."""
        from torch.distributed.tensor import DTensor

        if found is None:
            return None
        if not isinstance(found, Tensor):
            return type(found)(*map(self.whole, found))
        shape, places = torch.Size(), self.scalar
        if found.dim() == len(self.shape):
            K = found.shape[self.axis : self.axis + 1]
            shape, places = self.shape[: self.axis] + K + self.shape[self.axis + 1 :], self.candidates
        elif found.dim():
            shape, places = self.shape[: self.axis] + self.shape[self.axis + 1 :], self.per_row
        return DTensor.from_local(
            found, self.mesh, places, run_check=False, shape=shape, stride=torch.empty(shape, device="meta").stride()
        )

    def add_divisor(self, options: dict[str, Any], y: Tensor, weight: Any, several: bool) -> None:
        """The normalizer as a plain tensor; where this rank has a part of the batch, that of the whole."""
        given: Any = options.get("normalizer")
        if _is_dtensor(given):
            options["normalizer"] = given.full_tensor(grad_placements=self.scalar)
        if not self.batch or options.get("reduction") != "mean" or given is not None:
            return
        dtype = statistics_dtype(y.device)
        if y.is_floating_point():
            positions = y.shape[: self.axis].numel() * y.shape[self.axis + 1 :].numel()
            total = count = torch.tensor(positions, device=y.device)
        else:  # targets out of range are found later, by all ranks alike
            ignored = options.get("ignore_index")
            ignore_index = -100 if ignored is None else ignored
            counts = as_index(y, ignore_index) != ignore_index
            total = count = (counts.any(self.axis) if several else counts).sum()
            if weight is not None and not several:
                w = weight.full_tensor() if _is_dtensor(weight) else weight
                total = w.to(dtype)[y.long().clamp(0, len(w) - 1)].masked_fill(~counts, 0).sum()
        numbers = torch.stack([total.to(dtype), count.to(dtype)])
        for i in self.batch:
            numbers = _torch.all_reduce(numbers, self.mesh.get_group(i).group_name)
        total, count = numbers
        if weight is not None and not y.is_floating_point():
            total = sum_of_weights(total, count, options.get("label_smoothing") or 0)
        options["normalizer"] = total + (count == 0) if options.get("on_empty") == "zero" else total


def on_logits(function: Callable[..., Any], input: Any, target: Tensor, **options: Any) -> Any:
    """Logits (and probabilities) in parts, over classes or the batch."""
    if not _is_dtensor(input):
        raise TypeError("input: expected a DTensor like the other arguments, got a plain tensor")
    if options.get("inplace_backward"):
        raise RuntimeError(
            "inplace_backward: expected plain logits: a DTensor does not see that its part on this rank is written "
            "over, so that a second use of it would be wrong in silence; pass input.to_local() and group="
        )
    several = target.dim() == input.dim() and not target.is_floating_point()
    axis = options["dim"] = class_dim(input.shape, target.shape, options.get("dim"), several)
    places = Places(input.device_mesh, input.placements, input.shape, axis)
    soft = target.shape == input.shape and not several
    x = input.to_local(grad_placements=places.logits)
    weight = options.get("weight")
    y = places.target(target, soft, several, options)
    places.add_divisor(options, y, weight, several)
    return places.whole(function(x, y, **options, group=places.group))


def on_head(
    function: Callable[..., Any], input: Any, linear_weight: Any, target: Any, linear_bias: Any, **options: Any
) -> Any:
    """Hidden states that are sharded over the ranks of the classes, a part of each sequence on each, are gathered."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    if not _is_dtensor(linear_weight):
        raise TypeError("linear_weight: expected a DTensor like the other arguments, got a plain tensor")
    mesh, axis = linear_weight.device_mesh, input.dim() - 1
    head = linear_weight.placements
    if linear_weight.dim() != 2 or any(p not in (Shard(0), Replicate()) for p in head):
        raise ValueError(f"linear_weight: expected (C, D) placed Shard(0) or Replicate, got {head}")
    if not _is_dtensor(input) and any(p.is_shard() for p in head):
        raise TypeError(
            "input: expected a DTensor beside a linear_weight that is sharded: a plain tensor could be the same on "
            "each rank (DTensor.from_local(input, mesh, [Replicate()]) says so), or each its own, where FSDP has not "
            "gathered the head: then call this in the forward of the module that owns it, or pass full_tensor()"
        )
    hidden = list(input.placements if _is_dtensor(input) else (Replicate(),) * len(head))
    if len(hidden) != len(head):
        raise ValueError(f"input: expected a DTensor on the mesh of linear_weight, {mesh}, got {input.device_mesh}")
    hidden = [Replicate() if w.is_shard() else p for p, w in zip(hidden, head, strict=True)]
    logits = tuple(Shard(axis) if w.is_shard() else p for p, w in zip(hidden, head, strict=True))
    if any(p.is_shard(axis) for p in hidden) or (options.get("shift") and any(p.is_shard(axis - 1) for p in hidden)):
        raise ValueError(f"input: expected whole features, and whole sequences beside shift, got {input.placements}")
    places = Places(mesh, logits, torch.Size((*input.shape[:-1], len(linear_weight))), axis)
    if _is_dtensor(input):
        input = input.redistribute(placements=hidden)
    per_class = target.dim() > axis  # probabilities, or K candidates
    several = per_class and not target.is_floating_point()
    of_batch = tuple(Partial() if i in places.batch else p for i, p in enumerate(places.classes))
    h = places.part("input", input, tuple(hidden))
    W = places.part("linear_weight", linear_weight, places.classes, of_batch)
    options["linear_bias"] = places.part("linear_bias", linear_bias, places.classes, of_batch)
    weight = options.get("weight")
    y = places.target(target, per_class and not several, several, options)
    shift = bool(options.get("shift"))
    counted = y[..., 1:, :] if per_class and shift else y[..., 1:] if shift else y
    places.add_divisor(options, counted, weight, several)
    places.shape = torch.Size((*input.shape[: axis - shift], *[input.shape[axis - 1] - 1] * shift, len(linear_weight)))
    return places.whole(function(h, W, y, **options, group=places.group))
