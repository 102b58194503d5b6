"""The two primitives as Triton kernels, for CUDA and ROCm: what is chosen, made and launched.

TO BE WRITTEN
"""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from torch import Tensor

from . import Stats, assert_on_device, check_range

try:
    import triton
except ImportError as error:
    raise ImportError(f"triton cannot be imported ({error}); install the one that belongs to this torch") from error

from .triton_backward import logits_grad_kernel
from .triton_forward import combine_kernel, lse_and_pick_kernel
from .triton_plan import choose, options, processors, share

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ABOUT = f"Triton {triton.__version__}, " + ("interpreted: slow, for tests" if INTERPRETED else "for CUDA and ROCm")
LOGITS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TARGETS = (torch.int64, torch.int32, *LOGITS)
FIELDS = 9  # of a state in triton_forward.py


def refusal(logits: Tensor, target: Tensor) -> str | None:
    """Why this backend cannot take these tensors."""
    if target.device != logits.device:
        return f"takes tensors on one device, got logits on {logits.device} and target on {target.device}"
    if logits.device.type != ("cpu" if INTERPRETED else "cuda"):  # which is what torch calls ROCm, too
        return f"takes CUDA and ROCm tensors (under TRITON_INTERPRET=1 only the CPU's), got logits on {logits.device}"
    if INTERPRETED and os.environ.get("XENT_BACKEND") != "triton":
        return "is a hundred times slower in the interpreter: only where XENT_BACKEND=triton asks for it"
    if logits.layout is not torch.strided or target.layout is not torch.strided:
        return f"takes strided tensors, got logits {logits.layout} and target {target.layout}"
    if logits.is_neg() or target.is_neg():
        return "takes numbers as they lie in memory, got a view that is yet to be negated"
    if logits.dtype not in LOGITS:
        return f"takes float32, bfloat16, float16 and float64 logits, got {logits.dtype}"
    if target.dtype not in TARGETS:
        return f"takes int64 and int32 indices, and probabilities in the dtypes of logits, got {target.dtype} targets"
    return None


def lse_and_pick(
    logits: Tensor,
    target: Tensor,
    *,
    start: int,
    classes: int,
    ignore_index: int,
    scale: float,
    softcap: float | None,
    class_weight: Tensor | None,
    want_wsum: bool,
    want_entropy: bool,
    want_argmax: bool,
) -> Stats:
    """See `xent._primitives.lse_and_pick`."""
    N, C = logits.shape
    soft = target.is_floating_point()
    w = class_weight if soft or want_wsum else None
    w = None if w is None else w.contiguous()
    how = replace(choose(logits, target, w, scale, softcap), wsum=want_wsum, entropy=want_entropy, argmax=want_argmax)
    splits, span = share(how, N, C, processors(logits.device))

    lse = logits.new_empty(N, dtype=torch.float64)
    picked = torch.empty_like(lse)
    mass = torch.empty_like(lse) if soft else None
    wsum = torch.empty_like(lse) if want_wsum else None
    entropy = torch.empty_like(lse) if want_entropy else None
    argmax = torch.empty_like(lse, dtype=torch.int64) if want_argmax else None
    parts = lse.new_empty(FIELDS, N, splits) if splits > 1 else None
    w_sum = None if not want_wsum else lse.new_full((), C) if w is None else w.sum(dtype=torch.float64)
    in_range = None if soft else lse.new_ones((), dtype=torch.int32)
    results = w_sum, lse, picked, mass, wsum, entropy, argmax
    with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
        lse_and_pick_kernel[triton.cdiv(N, how.R), splits](
            logits, *logits.stride(), target, *_strides(target), w, *results, parts, in_range,
            N, C, start, classes, ignore_index, scale, softcap or 1.0, span, how, **options(how),
        )  # fmt: skip
        if parts is not None:
            how = replace(how, R=1, K=splits)
            combine_kernel[(N,)](parts, target, target.stride(0), *results, N, C, start, ignore_index, how, num_warps=1)
    if in_range is not None and logits.is_cuda:
        assert_on_device(in_range, classes, ignore_index)
    elif in_range is not None and not in_range:
        check_range(target, classes, ignore_index)  # raises
    return Stats(lse, picked, mass, wsum, entropy, argmax)


def logits_grad(
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    g_lse: Tensor,
    g_picked: Tensor,
    g_wsum: Tensor | None,
    g_entropy: Tensor | None,
    *,
    start: int,
    ignore_index: int,
    scale: float,
    softcap: float | None,
    class_weight: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """See `xent._primitives.logits_grad`."""
    N, C = logits.shape
    if out is None:
        out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    w = class_weight if target.is_floating_point() or g_wsum is not None else None
    w = None if w is None else w.contiguous()
    how = choose(logits, target, w, scale, softcap, out)
    splits, span = share(how, N, C, processors(logits.device))
    numbers = [
        part for g in (lse, g_lse, g_picked, g_wsum, g_entropy) for part in ((g, 0) if g is None else (g, g.stride(0)))
    ]
    with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
        logits_grad_kernel[triton.cdiv(N, how.R), splits](
            logits, *logits.stride(), out, *out.stride(), target, *_strides(target), w, *numbers,
            N, C, start, ignore_index, scale, softcap or 1.0, span, how, **options(how),
        )  # fmt: skip
    return out


def _strides(target: Tensor) -> tuple[int, int]:
    """Of an index target only the first counts."""
    return target.stride(0), target.stride(-1)
