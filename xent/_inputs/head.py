"""The inputs of the linear losses: hidden states, head and targets are checked here, and become rows (N, D)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _torch
from .._records import HeadRows
from .options import check_dtype_and_device, check_target_prob
from .rows import as_index, check_probabilities

MAX_BYTES = 72 << 20  # of logits at a time: products of full speed, and no more than a few per cent of a training step


class LinearRows(NamedTuple):
    """A batch as the blocks read it; several heads only where `linear_weight` has further dimensions."""

    heads: list[HeadRows]
    shape: torch.Size  #    of a result with one number per position
    dtype: torch.dtype  #   of the products
    shift: int  #           T, where row n predicts what row n + 1 holds

    @property
    def targets(self) -> Tensor:
        """Those that count as targets, of all heads together."""
        found = torch.cat([head.target for head in self.heads]) if len(self.heads) > 1 else self.heads[0].target
        if self.shift and found.is_floating_point():
            found = found[: len(found) // self.shift * (self.shift - 1)]
        return found

    def shaped(self, numbers: Tensor) -> Tensor:
        """One number per position (or K), without the last one of each sequence, which predicts nothing."""
        numbers = numbers.view((*self.shape, *numbers.shape[2:]))
        return numbers.narrow(len(self.shape) - 1, 0, self.shape[-1] - 1) if self.shift else numbers


def check_max_bytes(max_bytes: int | None) -> int:
    """The budget, or the default."""
    if max_bytes is None:
        return MAX_BYTES
    if type(max_bytes) is not int:
        raise TypeError(f"max_bytes: expected an int or None, got {max_bytes!r}")
    if max_bytes <= 0:
        raise ValueError(f"max_bytes: expected a number of bytes > 0, got {max_bytes}")
    return max_bytes


def to_linear_rows(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    shift: bool,
    ignore_index: int,
    candidates: bool = False,
    target_prob: Tensor | None = None,
) -> LinearRows:
    """Check all against each other and lay them out as rows, without a copy of the hidden states.

    `candidates`: the target has K indices in the place of the classes.
    """
    dtype = _check_tensors(input, linear_weight, target, linear_bias)
    C, D, K = linear_weight.shape[0], linear_weight.shape[-1], linear_weight.shape[1:-1]
    if input.shape[-1] != D:
        raise ValueError(f"input: expected {D} features like linear_weight, got shape {tuple(input.shape)}")
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise ValueError(
            f"linear_bias: expected shape {tuple(linear_weight.shape[:-1])}, got {tuple(linear_bias.shape)}"
        )
    batch = input.shape[:-1]
    if K and len(batch) != 1:
        raise ValueError(
            f"input: expected shape (N, {D}) beside a head of {len(K)} more dimensions, got {tuple(input.shape)}"
        )
    index, axis = batch + K, 1 if K else len(batch)
    soft = _check_shape_of_target(target, index, axis, C, candidates)
    if target_prob is not None:
        check_target_prob(target_prob, target)
    if soft:
        check_probabilities(target, ignore_index)
    else:
        target = as_index(target, ignore_index)
    T = 0
    if shift:
        if not batch or K:
            raise ValueError(
                f"shift: expected input of shape (..., T, {D}) and a head (C, {D}), got {tuple(input.shape)}"
            )
        T = batch[-1]
        if not soft:
            target = _next(target, len(batch) - 1, ignore_index)
            target_prob = None if target_prob is None else _next(target_prob, len(batch) - 1, 0)
    hidden, N = input.reshape(math.prod(batch), D), math.prod(batch)
    if not K:
        y, q = target.reshape(N, *target.shape[axis:]), target_prob
        q = None if q is None else q.reshape(y.shape)
        return LinearRows([HeadRows(hidden, linear_weight, linear_bias, y, q, weight)], index, dtype, T)

    def each(tensor: Tensor | None, at: int) -> Sequence[Tensor | None]:
        return [None] * math.prod(K) if tensor is None else tensor.flatten(at).unbind(at)

    at = 2 if soft or candidates else 1
    weights, targets = linear_weight.flatten(1, -2).unbind(1), target.flatten(at).unbind(at)
    heads = zip(weights, each(linear_bias, 1), targets, each(target_prob, 2), strict=True)
    return LinearRows([HeadRows(hidden, W, b, y, q, weight) for W, b, y, q in heads], index, dtype, T)


def _check_shape_of_target(target: Tensor, index: torch.Size, axis: int, C: int, candidates: bool) -> bool:
    """Whether it holds probabilities; `index`: the shape of indices, into which classes come at `axis`."""
    if candidates:
        n = target.shape[axis] if target.dim() > len(index) else 0
        if n == 0 or target.shape != (*index[:axis], n, *index[axis:]):
            shape = str((*index[:axis], "K", *index[axis:])).replace("'", "")
            raise ValueError(
                f"target: expected shape {shape} for K >= 1 class indices per position, got {tuple(target.shape)}"
            )
        return False
    probabilities = (*index[:axis], C, *index[axis:])
    if target.shape not in (index, probabilities):
        raise ValueError(
            f"target: expected shape {tuple(index)} for indices or {probabilities} for probabilities, "
            f"got {tuple(target.shape)}"
        )
    return target.shape == probabilities


def _next(x: Tensor, dim: int, filler: int) -> Tensor:
    """What the next position holds; the last one predicts nothing."""
    return torch.cat([x.narrow(dim, 1, x.shape[dim] - 1), torch.full_like(x.narrow(dim, 0, 1), filler)], dim)


def _check_tensors(input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None) -> torch.dtype:
    """The dtype of the products: autocast's where it is on, as for `torch.nn.functional.linear`; else that of all."""
    tensors = {"input": input, "linear_weight": linear_weight, "target": target, "linear_bias": linear_bias}
    for name, tensor in tensors.items():
        if name == "linear_bias" and tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
        if type(tensor).__name__ == "DTensor":
            raise TypeError(
                f"{name}: expected the whole tensor, got a DTensor with placements {tensor.placements}; call it inside "  # type: ignore[attr-defined]
                "the forward of the module that owns the parameter, where FSDP has gathered it, or pass full_tensor()"
            )
        check_dtype_and_device(name, tensor, input, "input", floating=name != "target")
    if input.dim() == 0:
        raise ValueError("input: expected at least one dimension, the features, got a 0-d tensor")
    if linear_weight.dim() < 2:
        raise ValueError(f"linear_weight: expected shape (C, D), got {tuple(linear_weight.shape)}")
    if input.dtype != torch.float64 and _torch.autocasts(input.device):
        return torch.get_autocast_dtype(input.device.type)
    for name, tensor in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if tensor is not None and tensor.dtype != input.dtype:
            raise RuntimeError(f"{name}: expected {input.dtype} like input, got {tensor.dtype}")
    return input.dtype
