"""The door: every argument is checked here, once, and any layout becomes rows (N, C) with the class dimension last."""

from __future__ import annotations

import functools
import itertools
import math
import numbers
from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

P = ParamSpec("P")
R = TypeVar("R")

REDUCTIONS = ("none", "mean", "sum")
INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Rows(NamedTuple):
    """A batch as the primitives read it."""

    logits: Tensor  #     (N, C), a view of the input wherever its strides allow one
    target: Tensor  #     (N,) int64 or int32, or (N, C) probabilities
    shape: torch.Size  #  of a result with one number per row


def overridable(function: Callable[P, R]) -> Callable[P, R]:
    """Let an argument's `__torch_function__`, or a mode's, take the call over, as torch does for its own functions."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        everything = (*args, *kwargs.values())
        if has_torch_function(everything):
            return handle_torch_function(wrapper, everything, *args, **kwargs)
        return function(*args, **kwargs)

    return wrapper


def check_options(
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    normalizer: float | Tensor | None,
    on_empty: str,
    z_loss: float,
    loss_dtype: torch.dtype | None,
) -> None:
    """The options of a loss that do not depend on any tensor's shape; called by functions and module constructors."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    check_ignore_index(ignore_index)
    _check_number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
    if normalizer is not None:
        if reduction != "mean":
            raise ValueError(f"normalizer: only reduction='mean' divides by one, got reduction={reduction!r}")
        if not isinstance(normalizer, Tensor):
            _check_number("normalizer", normalizer)
        elif normalizer.dim() != 0:
            raise ValueError(f"normalizer: expected a number or a 0-d tensor, got shape {tuple(normalizer.shape)}")
        elif normalizer.is_complex():
            raise TypeError(f"normalizer: expected a real number, got {normalizer.dtype}")
    if on_empty not in ("nan", "zero"):
        raise ValueError(f"on_empty: expected 'nan' or 'zero', got {on_empty!r}")
    _check_number("z_loss", z_loss)
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss: expected a finite number >= 0, got {z_loss}")
    if loss_dtype is not None and not (isinstance(loss_dtype, torch.dtype) and loss_dtype.is_floating_point):
        raise ValueError(f"loss_dtype: expected None or a floating torch.dtype, got {loss_dtype!r}")


def check_ignore_index(ignore_index: int) -> None:
    """An int, and not a float or a bool that happens to compare equal to some target."""
    if type(ignore_index) is not int:
        raise TypeError(f"ignore_index: expected an int, got {ignore_index!r}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index: expected a number that int64 holds, got {ignore_index}")


def check_normalizer_device(normalizer: float | Tensor | None, input: Tensor) -> None:
    """A 0-d tensor on the CPU goes with any device; one without numbers only with logits without numbers."""
    if isinstance(normalizer, Tensor) and normalizer.device != input.device and normalizer.device.type != "cpu":
        raise RuntimeError(
            f"normalizer: expected a tensor on {input.device} or the CPU, got one on {normalizer.device}"
        )


def check_transform(logit_scale: float, softcap: float | None) -> None:
    """The two options that change the logits themselves."""
    _check_number("logit_scale", logit_scale)
    if not -math.inf < logit_scale < math.inf:
        raise ValueError(f"logit_scale: expected a finite number, got {logit_scale}")
    if softcap is not None:
        _check_number("softcap", softcap)
        if not 0 < softcap < math.inf:
            raise ValueError(f"softcap: expected None or a finite number > 0, got {softcap}")


def check_weight(weight: Tensor | None, classes: int, logits: Tensor, soft: bool, sharded: bool = False) -> None:
    """A class weight is floating and of shape (C,); beside index targets a constant.

    Where the classes are spread over ranks, C is known only later, and a weight is a constant always.
    """
    if weight is None:
        return
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a Tensor or None, got {type(weight).__name__}")
    if weight.shape != (classes,) and not (sharded and weight.dim() == 1):
        raise ValueError(f"weight: expected shape ({classes},), one number per class, got {tuple(weight.shape)}")
    if not weight.is_floating_point():
        raise RuntimeError(f"weight: expected a floating dtype, got {weight.dtype}")
    if weight.device != logits.device:
        raise RuntimeError(f"weight: expected a tensor on {logits.device} like input, got one on {weight.device}")
    if not (weight.requires_grad and torch.is_grad_enabled()):
        return
    if sharded:
        raise RuntimeError("weight: is not differentiated over a group and may not require grad; detach it")
    if not soft:
        raise RuntimeError("weight: is not differentiated with class indices and may not require grad; detach it")


def to_rows(input: Tensor, target: Tensor, dim: int | None, ignore_index: int, inplace: bool = False) -> Rows:
    """Check input and target against each other and lay them out as rows; `inplace` allows no copy of the logits."""
    for name, tensor in (("input", input), ("target", target)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    if not input.is_floating_point():
        raise RuntimeError(f"input: expected floating logits, got {input.dtype}")
    if input.device != target.device:
        raise RuntimeError(f"target: expected a tensor on {input.device} like input, got one on {target.device}")
    if input.dim() == 0:
        raise ValueError("input: expected at least one dimension, the classes, got a 0-d tensor")
    soft = input.shape == target.shape
    _check_target_dtype(target, soft, ignore_index)

    axis = class_dim(input.shape, target.shape, dim)
    C = input.shape[axis]
    if input.dim() == 2 and axis == 1 and not inplace:  # already rows
        return Rows(input, target if soft else as_index(target, ignore_index), target.shape[:1])
    if axis != input.dim() - 1:
        input, target = input.movedim(axis, -1), target.movedim(axis, -1) if soft else target
    shape = input.shape[:-1]
    N = math.prod(shape)
    y = target.reshape(N, C) if soft else as_index(target, ignore_index).reshape(N)
    return Rows(_as_rows(input, N, C, inplace), y, shape)


def result_dtype(input: Tensor) -> torch.dtype:
    """The dtype of the loss: input's, but float32 where autocast is on, as for torch's own losses."""
    kind = input.device.type
    if input.dtype != torch.float64 and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.float32
    return input.dtype


def _as_rows(input: Tensor, N: int, C: int, inplace: bool) -> Tensor:
    """(..., C) as (N, C): a view where its strides allow one. The gradient may be written over nothing but a view."""
    if inplace and not (_dimensions_merge(input) and _elements_are_apart(input)):
        raise RuntimeError(
            "inplace_backward: expected logits that are rows in memory of their own, got strides "
            f"{input.stride()} for shape {tuple(input.shape)}, classes last: the gradient cannot be written over them"
        )
    return input.reshape(N, C)


def _dimensions_merge(input: Tensor) -> bool:
    """Whether all dimensions but the last are one in memory: each step of one is as long as all steps of the next."""
    outer = [(n, stride) for n, stride in zip(input.shape[:-1], input.stride(), strict=False) if n != 1]
    return all(step == stride * n for (_, step), (n, stride) in itertools.pairwise(outer))


def _elements_are_apart(input: Tensor) -> bool:
    return all(n <= 1 or stride != 0 for n, stride in zip(input.shape, input.stride(), strict=True))


def _check_number(name: str, value: object) -> None:
    if type(value) is not float and not isinstance(value, numbers.Real):  # an abstract class takes its time
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def _check_target_dtype(target: Tensor, soft: bool, ignore_index: int) -> None:
    if soft:
        if not target.is_floating_point():
            raise RuntimeError(
                f"target: has the shape of input, {tuple(target.shape)}, so it must hold probabilities of a floating "
                f"dtype, got {target.dtype}; class indices come without the class dimension"
            )
        if ignore_index >= 0:
            raise ValueError(f"ignore_index: has no meaning for probability targets, got {ignore_index}")
    elif target.dtype not in INDEX_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in INDEX_DTYPES)
        raise RuntimeError(f"target: expected class indices of dtype {names}, got {target.dtype}")


def class_dim(input: torch.Size, target: torch.Size, dim: int | None) -> int:
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
    readings = [axis for axis in axes if target in (_without(input, axis), input)]
    if len(readings) == 1:
        return readings[0]
    shapes = _pair(input, target)
    if not readings:
        choices = " or ".join(str(tuple(_without(input, axis))) for axis in axes)
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
    return shape[:-1] if axis == len(shape) - 1 else shape[:axis] + shape[axis + 1 :]


def as_index(target: Tensor, ignore_index: int) -> Tensor:
    """int64, or int32 where that holds `ignore_index`: compared with a number beyond it, an index would wrap."""
    if target.dtype == torch.int64 or (target.dtype == torch.int32 and -(2**31) <= ignore_index < 2**31):
        return target
    return target.long()
