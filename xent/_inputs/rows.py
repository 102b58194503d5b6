"""Logits and targets of any layout as rows, (A, B, C), where they lie.

The classes of a row are C numbers apart by one stride. The positions, all other dimensions, need two strides at most in
nearly every layout that there is:

    (N, C), (B, T, C)                  A = 1
    (N, C, H, W)                       A = N, B = H W, with a class stride of H W; in channels_last A = 1
    (B, T, C)[:, :-1]                  A = B, B = T - 1

Only logits whose positions need three strides are copied: three dimensions cut or permuted on their own.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .. import _torch
from .._backends import elements_are_apart
from .._records import Layout

INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def read_batch(
    input: Tensor, target: Tensor, dim: int | None, ignore_index: int, candidates: bool = False, inplace: bool = False
) -> tuple[Layout, Tensor, bool]:
    """Check input and target against each other and find their rows; `inplace` allows no copy of the logits.

    `candidates`: the target has K indices in the place of the classes. Returns it in its own shape, as int64, int32 or
    probabilities, and whether it is these.
    """
    for name, tensor in (("input", input), ("target", target)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    if not input.is_floating_point():
        raise RuntimeError(f"input: expected floating logits, got {input.dtype}")
    if input.device != target.device:
        raise RuntimeError(f"target: expected a tensor on {input.device} like input, got one on {target.device}")
    shape, strides = input.shape, input.stride()
    if not shape:
        raise ValueError("input: expected at least one dimension, the classes, got a 0-d tensor")
    soft = shape == target.shape and not candidates
    if soft:
        check_probabilities(target, ignore_index)
    else:
        target = as_index(target, ignore_index)

    try:
        find = _layout if torch.compiler.is_compiling() else _known_layout
        layout, apart = find(shape, strides, target.shape, dim, candidates)
    except TypeError:  # symbols, which have no hash; or a wrong `dim`
        layout, apart = _layout(shape, strides, target.shape, dim, candidates)
    if inplace and not (apart and elements_are_apart(input)):
        raise RuntimeError(
            "inplace_backward: expected logits that are rows in memory of their own, got strides "
            f"{strides} for shape {tuple(shape)}, classes in dimension {layout.axis}: "
            "the gradient cannot be written over them"
        )
    return layout, target, soft


def _layout(
    shape: torch.Size, strides: tuple[int, ...], target: torch.Size, dim: int | None, candidates: bool
) -> tuple[Layout, bool]:
    """Where the rows are, and whether they are so many strides apart that nothing has to be copied."""
    axis = class_dim(shape, target, dim, candidates)
    A, B, apart = _split(shape[:axis] + shape[axis + 1 :], strides[:axis] + strides[axis + 1 :])
    return Layout(axis, A, B), apart


_known_layout = functools.lru_cache(maxsize=256, typed=True)(_layout)  # `dim=True` is not 1


def _split(positions: torch.Size, strides: tuple[int, ...]) -> tuple[int, int, bool]:
    """A and B, and whether two strides do: dimensions are one where each step is as long as all steps of the next."""
    if len(positions) < 2:
        return 1, math.prod(positions), True
    A, B, step, outer = 1, 1, None, False
    for n, stride in zip(reversed(positions), reversed(strides), strict=True):
        if n == 1:
            continue
        if step is not None and stride != step:
            if outer:
                return 1, math.prod(positions), False
            outer = True
        A, B, step = (A * n, B, stride * n) if outer else (A, B * n, stride * n)
    return A, B, True


def result_dtype(input: Tensor) -> torch.dtype:
    """The dtype of the loss: input's, but float32 where autocast is on, as for torch's own losses."""
    if input.dtype not in (torch.float32, torch.float64) and _torch.autocasts(input.device):
        return torch.float32
    return input.dtype


def holds_candidates(input: Tensor, target: Tensor) -> bool:
    """Whether the target has one dimension more than one index per position would have."""
    tensors = isinstance(input, Tensor) and isinstance(target, Tensor)
    return tensors and target.dim() == input.dim() and not target.is_floating_point()


def check_probabilities(target: Tensor, ignore_index: int) -> None:
    """A target distribution is floating, and no row of it is ignored."""
    if not target.is_floating_point():
        raise RuntimeError(
            f"target: has the shape of the logits, {tuple(target.shape)}, so it must hold probabilities of a floating "
            f"dtype, got {target.dtype}; class indices come without the class dimension"
        )
    if ignore_index >= 0:
        raise ValueError(f"ignore_index: has no meaning for probability targets, got {ignore_index}")


def as_index(target: Tensor, ignore_index: int) -> Tensor:
    """int64, or int32 where that holds `ignore_index`: compared with a number beyond it, an index would wrap."""
    if target.dtype == torch.int64 or (target.dtype == torch.int32 and -(2**31) <= ignore_index < 2**31):
        return target
    if target.dtype not in INDEX_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in INDEX_DTYPES)
        raise RuntimeError(f"target: expected class indices of dtype {names}, got {target.dtype}")
    return target.long()


def class_dim(input: torch.Size, target: torch.Size, dim: int | None, candidates: bool = False) -> int:
    """The class dimension: given, or the only one that fits both shapes."""
    last = len(input) - 1
    if dim is not None:
        if type(dim) is not int:
            raise TypeError(f"dim: expected an int or None, got {dim!r}")
        if not -len(input) <= dim <= last:
            raise IndexError(
                f"dim: expected a number in [{-len(input)}, {len(input)}), got {dim} for {_pair(input, target)}"
            )
        axes: tuple[int, ...] = (dim % len(input),)
    else:
        axes = (1, last) if last > 1 else (last,)
    if candidates:
        readings = [
            axis
            for axis in axes
            if len(target) > last and target == (*input[:axis], target[axis] or 1, *input[axis + 1 :])
        ]
    else:
        readings = [axis for axis in axes if target in (_without(input, axis), input)]
    if len(readings) == 1:
        return readings[0]
    shapes = _pair(input, target)
    if not readings:
        choices = " or ".join(str(tuple(_without(input, axis))) for axis in axes)
        if candidates:
            K = " or ".join(str((*input[:axis], "K", *input[axis + 1 :])).replace("'", "") for axis in axes)
            raise ValueError(f"target: expected shape {K} for K >= 1 class indices per position, got {shapes}")
        raise ValueError(
            f"target: expected shape {choices} for indices, or that of input for probabilities, got {shapes}"
        )
    raise ValueError(
        f"dim: {shapes} can be read in two ways, with the classes in dimension 1 ({input[1]} classes, PyTorch's layout)"
        f" or in the last ({input[-1]} classes, a language model's): pass dim=1 or dim=-1"
    )


def _pair(input: torch.Size, target: torch.Size) -> str:
    return f"input {tuple(input)} and target {tuple(target)}"


def _without(shape: torch.Size, axis: int) -> torch.Size:
    return shape[:axis] + shape[axis + 1 :]
