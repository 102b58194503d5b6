"""What the backends share: the scores, the check of targets, blocks of rows, how memory is asked for.

Each backend is a module beside this one, imported only when it is asked for.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from .. import _torch
from .._records import compute_dtype

LOGITS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # what kernels read
TARGETS = (torch.int64, torch.int32, *LOGITS)
HUGE_PAGE, MADV_HUGEPAGE = 2 << 20, 14
DEVICE_BYTES = 16 << 20  # of a term of each logit, off the CPU: a pass over it takes longer than its launch


def refusal_to_read(logits: Tensor, target: Tensor) -> str | None:
    """Why code that reads the memory of tensors cannot take these, whatever its device."""
    if logits.layout is not torch.strided or target.layout is not torch.strided:
        return f"takes strided tensors, got logits {logits.layout} and target {target.layout}"
    if logits.is_neg() or target.is_neg():
        return "takes numbers as they lie in memory, got a view that is yet to be negated"
    if logits.dtype not in LOGITS:
        return f"takes float32, bfloat16, float16 and float64 logits, got {logits.dtype}"
    if target.dtype not in TARGETS:
        return f"takes int64 and int32 indices, and probabilities in the dtypes of logits, got {target.dtype} targets"
    return None


def scores(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """z: the logits that count, `softcap * tanh(scale * x / softcap)`, in `compute_dtype`. May be `logits` itself."""
    z = logits.to(compute_dtype(logits))
    if scale != 1:
        z = z * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z


def slope(z: Tensor, scale: float, softcap: float | None) -> Tensor | float:
    """dz/dx at z: the chain rule through `scores`."""
    return scale if softcap is None else scale * (1 - (z / softcap) ** 2)


def rows_of_block(logits: Tensor, cache_bytes: int, dtype: torch.dtype | None = None) -> int:
    """How many rows to take at a time: on the CPU those whose terms take so many bytes; elsewhere, enough to do."""
    budget = cache_bytes if logits.device.type == "cpu" else DEVICE_BYTES
    return max(1, budget // max(1, logits.shape[-1] * (dtype or compute_dtype(logits)).itemsize))


def slices(head: Tensor, cache_bytes: int, dtype: torch.dtype) -> Iterator[slice]:
    """The classes of a head (C, D) in parts of so many bytes in `dtype`."""
    width = rows_of_block(head, cache_bytes, dtype)
    for begin in range(0, len(head), width):
        yield slice(begin, begin + width)


def check_range(target: Tensor, classes: int, ignore_index: int) -> None:
    """Index targets lie in [0, classes) or are `ignore_index`: else IndexError; off the CPU a device-side assertion."""
    if target.device.type == "meta":
        return
    bad = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if target.device.type != "cpu" or torch.compiler.is_compiling():
        assert_on_device(~bad.any(), classes, ignore_index)
    elif bad.any():
        where = int(bad.flatten().nonzero()[0])
        raise IndexError(
            f"target: expected class indices in [0, {classes}) or ignore_index={ignore_index}, "
            f"got {int(target.flatten()[where])} (row {where} of {target.numel()})"
        )


def blocks(A: int, B: int, count: int) -> Iterator[tuple[slice, slice]]:
    """Indices of blocks of about `count` of the A x B rows: whole stretches of B, or parts of one."""
    if count < B:
        for a in range(A):
            for b in range(0, B, count):
                yield slice(a, a + 1), slice(b, b + count)
    else:
        step = count // max(1, B)
        for a in range(0, A, step):
            yield slice(a, a + step), slice(None)


def elements_are_apart(x: Tensor) -> bool:
    """Whether no two elements share memory: each step is longer than all shorter ones together."""
    steps = [(n, stride) for n, stride in zip(x.shape, x.stride(), strict=True) if n > 1]
    return all(
        stride > sum((m - 1) * other for j, (m, other) in enumerate(steps) if j != i and other <= stride)
        for i, (_, stride) in enumerate(steps)
    )


def advise_huge_pages(out: Tensor) -> Tensor:
    """Ask Linux for pages of 2 MB: faulting in a large fresh tensor by 4 kB takes as long as all arithmetic on it."""
    if sys.platform == "linux" and type(out) is Tensor and out.device.type == "cpu" and out.nbytes >= 8 * HUGE_PAGE:
        begin = -(-out.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        length = (out.data_ptr() + out.nbytes) // HUGE_PAGE * HUGE_PAGE - begin
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), MADV_HUGEPAGE)  # a hint: may fail
    return out


def assert_on_device(in_range: Tensor, classes: int, ignore_index: int) -> None:
    """The same as an assertion on the device, which does not make the host wait."""
    _torch.assert_on_device(in_range, f"target: expected class indices in [0, {classes}) or {ignore_index=}")
