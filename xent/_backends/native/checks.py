"""What the compiled part relies on, since it takes addresses: of each tensor its device, layout, dtype, shape."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._records import LossWeights, compute_dtype
from .. import elements_are_apart

FLOAT64 = torch.float64
LOGITS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # the order of `Kernels`
TARGETS = {torch.int64: 0, torch.int32: 1} | {dtype: 2 + i for dtype, i in LOGITS.items()}  # the order of `Target`
SOFT = 2  # the first kind of target that is probabilities


def kind_of(logits: Tensor, target: Tensor) -> int | str:
    """Which of the kinds of target this is, or why these tensors cannot be taken."""
    if not (logits.is_cpu and target.is_cpu):
        return f"takes CPU tensors, got logits on {logits.device} and target on {target.device}"
    if logits.layout is not torch.strided or target.layout is not torch.strided:
        return f"takes strided tensors, got logits {logits.layout} and target {target.layout}"
    if logits.is_neg() or target.is_neg():
        return "takes numbers as they lie in memory, got a view that is yet to be negated"
    dtype = logits.dtype
    if dtype not in LOGITS:
        return f"takes float32, bfloat16, float16 and float64 logits, got {dtype}"
    shape = logits.shape
    if len(shape) != 3:
        return f"takes logits of shape (A, B, C), got {tuple(shape)}"
    kind = TARGETS.get(target.dtype)
    if kind is None:
        return f"takes int64 and int32 indices, and probabilities in the dtypes of logits, got {target.dtype} targets"
    if kind >= SOFT and target.shape != shape:
        return f"takes probabilities of the shape of the logits {tuple(shape)}, got {tuple(target.shape)}"
    if kind < SOFT and (target.shape[:2] != shape[:2] or target.dim() > 3):
        return f"takes index targets of shape {tuple(shape[:2])}, or with K of them, got {tuple(target.shape)}"
    return kind


def taken(logits: Tensor, target: Tensor) -> int:
    """`kind`, of tensors that can be taken."""
    kind = kind_of(logits, target)
    if isinstance(kind, str):
        raise TypeError(kind)
    return kind


def per_row(names: Sequence[str], numbers: Sequence[Tensor | None], logits: Tensor) -> list[Tensor | None]:
    """Each (A, B), all side by side, or one number for all."""
    shape, found = logits.shape[:2], []
    for name, x in zip(names, numbers, strict=False):
        if x is not None:
            if x.shape != shape or not x.is_cpu:
                raise ValueError(
                    f"{name}: expected a CPU tensor of shape {tuple(shape)}, got {tuple(x.shape)} on {x.device}"
                )
            if x.dtype is not FLOAT64 or x.is_neg():
                x = x.resolve_neg().to(FLOAT64)
            if not (x.is_contiguous() or x.stride() == (0, 0)):
                x = x.contiguous()
        found.append(x)
    return found


def per_candidate(g_picked: Tensor, target: Tensor) -> Tensor:
    """(A, B, K), all side by side."""
    if g_picked.shape != target.shape or not g_picked.is_cpu:
        raise ValueError(
            f"g_picked: expected a CPU tensor of shape {tuple(target.shape)}, got {tuple(g_picked.shape)} "
            f"on {g_picked.device}"
        )
    return g_picked.resolve_neg().to(FLOAT64).contiguous()


def strided(numbers: list[Tensor | None]) -> list[int]:
    """Addresses, each with whether it is one number for all rows."""
    return [part for x in numbers for part in ((0, 0) if x is None else (x.data_ptr(), x.stride() == (0, 0)))]


def weight_per_class(name: str, weight: Tensor | None, logits: Tensor, dtype: torch.dtype) -> Tensor | None:
    if weight is None:
        return None
    if weight.shape != logits.shape[2:] or not weight.is_cpu:
        raise ValueError(
            f"{name}: expected a CPU tensor of shape ({logits.shape[2]},), got {tuple(weight.shape)} on {weight.device}"
        )
    return weight.resolve_neg().to(dtype).contiguous()


def loss_weights(weights: LossWeights, logits: Tensor) -> tuple[Tensor | None, Tensor | None]:
    return (
        weight_per_class("class_weight", weights.of_classes, logits, compute_dtype(logits)),
        weight_per_class("row_weight", weights.of_targets, logits, FLOAT64),
    )


def gradient_memory(out: Tensor | None, logits: Tensor, target: Tensor) -> Tensor:
    if out is None:
        return torch.empty_like(logits)
    check_out(out, logits, target)
    return out


def check_out(out: Tensor, logits: Tensor, target: Tensor) -> None:
    """The result may lie exactly over the logits, but over nothing else that is read, and not over itself."""
    if out.dtype is not logits.dtype or out.shape != logits.shape or not out.is_cpu or out.is_neg():
        raise ValueError(
            f"out: expected a {logits.dtype} CPU tensor of shape {tuple(logits.shape)}, "
            f"got {out.dtype} {tuple(out.shape)} on {out.device}"
        )
    if not elements_are_apart(out):
        raise ValueError(f"out: expected elements that lie apart from each other, got strides {out.stride()}")
    same = out.data_ptr() == logits.data_ptr() and out.stride() == logits.stride()
    if (not same and overlap(out, logits)) or (target.is_floating_point() and overlap(out, target)):
        raise ValueError("out: expected the logits themselves, or memory of its own")


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the spans of memory from the first to the last element meet."""
    (a_begin, a_end), (b_begin, b_end) = span(a), span(b)
    return a_begin < b_end and b_begin < a_end


def span(x: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    begin = x.data_ptr()
    return begin, begin + (last + 1) * x.itemsize
