"""The two primitives in compiled C++ for CPU tensors: see native.cpp.

The compiled part takes raw addresses, so everything that it relies on is checked here first, and a tensor that was
made on the way is held in a variable until the call returns. It is meant to be cheap: one call on a small input costs
a few microseconds, most of them in making the results.
"""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import Tensor

from . import Stats, check_range, compute_dtype

try:
    from . import _native  # type: ignore[attr-defined]
except ImportError as error:
    raise ImportError(
        f"the compiled extension is missing ({error}); pip builds it where there is a C++17 compiler: install one, "
        "then `pip install --force-reinstall --no-deps --no-cache-dir --no-binary torch-xent torch-xent`"
    ) from error

ABOUT = f"compiled C++ for CPU tensors, {_native.instruction_sets()[0]}, on the threads of torch"
FLOAT64 = torch.float64
LOGITS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # the order of `Kernels`
TARGETS = {torch.int64: 0, torch.int32: 1} | {dtype: 2 + i for dtype, i in LOGITS.items()}  # the order of `Target`
SOFT = 2  # the first kind of target that is probabilities
THREADED = 1 << 16  # logits: fewer are done before other threads have woken up


def refusal(logits: Tensor, target: Tensor) -> str | None:
    """Why this backend cannot take these tensors."""
    kind = _kind(logits, target)
    return kind if isinstance(kind, str) else None


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
    kind = _taken(logits, target)
    N, C = logits.shape
    row_stride, class_stride = logits.stride()
    target_strides = target.stride()  # of an index target only the first counts
    weight = None if class_weight is None else _class_weight(logits, class_weight)
    lse = logits.new_empty(N, dtype=FLOAT64)
    picked = torch.empty_like(lse)
    mass = torch.empty_like(lse) if kind >= SOFT else None
    wsum = torch.empty_like(lse) if want_wsum else None
    entropy = torch.empty_like(lse) if want_entropy else None
    argmax = logits.new_empty(N, dtype=torch.int64) if want_argmax else None
    bad = _native.statistics(
        N, C, logits.data_ptr(), row_stride, class_stride, target.data_ptr(), target_strides[0], target_strides[-1],
        kind, start, ignore_index, scale, softcap or 0.0, 0 if weight is None else weight.data_ptr(),
        LOGITS[logits.dtype], torch.get_num_threads() if N * C >= THREADED else 1, classes,
        lse.data_ptr(), picked.data_ptr(),
        0 if mass is None else mass.data_ptr(),
        0 if wsum is None else wsum.data_ptr(),
        0 if entropy is None else entropy.data_ptr(),
        0 if argmax is None else argmax.data_ptr(),
    )  # fmt: skip
    if bad >= 0:
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
    kind = _taken(logits, target)
    N, C = logits.shape
    row_stride, class_stride = logits.stride()
    target_strides = target.stride()  # of an index target only the first counts
    weight = None if class_weight is None else _class_weight(logits, class_weight)
    lse, g_lse, g_picked = _per_row("lse", lse, N), _per_row("g_lse", g_lse, N), _per_row("g_picked", g_picked, N)
    g_wsum = None if g_wsum is None else _per_row("g_wsum", g_wsum, N)
    g_entropy = None if g_entropy is None else _per_row("g_entropy", g_entropy, N)
    fresh = out is None
    if out is None:
        out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    else:
        _check_out(out, logits, target)
    out_strides = out.stride()
    _native.gradient(
        N, C, logits.data_ptr(), row_stride, class_stride, target.data_ptr(), target_strides[0], target_strides[-1],
        kind, start, ignore_index, scale, softcap or 0.0, 0 if weight is None else weight.data_ptr(),
        LOGITS[logits.dtype], torch.get_num_threads() if N * C >= THREADED else 1,
        lse.data_ptr(), lse.stride()[0], g_lse.data_ptr(), g_lse.stride()[0], g_picked.data_ptr(), g_picked.stride()[0],
        0 if g_wsum is None else g_wsum.data_ptr(), 0 if g_wsum is None else g_wsum.stride()[0],
        0 if g_entropy is None else g_entropy.data_ptr(), 0 if g_entropy is None else g_entropy.stride()[0],
        out.data_ptr(), out_strides[0], out_strides[1], out.itemsize, fresh,
    )  # fmt: skip
    return out


def mean_of_few(
    logits: Tensor,
    target: Tensor,
    *,
    divisor: float | None,
    least: int,
    ignore_index: int,
    scale: float,
    softcap: float | None,
    upstream: float | None,
    out: Tensor | None,
) -> Tensor | None:
    """See `xent._primitives.mean_of_few`."""
    if logits.numel() > THREADED:
        return None
    kind = _taken(logits, target)
    if kind >= SOFT:
        raise TypeError(f"takes class indices, got {target.dtype} targets")
    N, C = logits.shape
    row_stride, class_stride = logits.stride()
    nll = None
    if upstream is None:
        nll, out = logits.new_empty(N, dtype=FLOAT64), None
    elif out is not None:
        _check_out(out, logits, target)
    else:
        out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    out_strides = (0, 1) if out is None else out.stride()
    found = _native.mean(
        N, C, logits.data_ptr(), row_stride, class_stride, target.data_ptr(), target.stride(0), 0, kind, 0,
        ignore_index, scale, softcap or 0.0, 0, LOGITS[logits.dtype], C, divisor is not None, least, divisor or 0.0,
        upstream or 0.0, 0 if nll is None else nll.data_ptr(), 0 if out is None else out.data_ptr(), *out_strides,
    )  # fmt: skip
    if found is None:
        check_range(target, C, ignore_index)  # raises
    return out if nll is None else nll.sum() / found


def _kind(logits: Tensor, target: Tensor) -> int | str:
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
    if len(shape) != 2:
        return f"takes logits of shape (N, C), got {tuple(shape)}"
    kind = TARGETS.get(target.dtype)
    if kind is None:
        return f"takes int64 and int32 indices, and probabilities in the dtypes of logits, got {target.dtype} targets"
    if kind >= SOFT and target.shape != shape:
        return f"takes probabilities of the shape of the logits {tuple(shape)}, got {tuple(target.shape)}"
    if kind < SOFT and (target.dim() != 1 or target.numel() != shape[0]):
        return f"takes index targets of shape ({shape[0]},), got {tuple(target.shape)}"
    return kind


def _taken(logits: Tensor, target: Tensor) -> int:
    """`_kind`, of tensors that can be taken."""
    kind = _kind(logits, target)
    if isinstance(kind, str):
        raise TypeError(kind)
    return kind


def _per_row(name: str, x: Tensor, N: int) -> Tensor:
    if x.dim() != 1 or x.numel() != N or not x.is_cpu:
        raise ValueError(f"{name}: expected a CPU tensor of shape ({N},), got {tuple(x.shape)} on {x.device}")
    return x if x.dtype is FLOAT64 and not x.is_neg() else x.resolve_neg().to(FLOAT64)


def _class_weight(logits: Tensor, weight: Tensor) -> Tensor:
    if weight.shape != logits.shape[1:] or not weight.is_cpu:
        raise ValueError(
            f"class_weight: expected a CPU tensor of shape ({logits.shape[1]},), "
            f"got {tuple(weight.shape)} on {weight.device}"
        )
    return weight.resolve_neg().to(compute_dtype(logits)).contiguous()


def _check_out(out: Tensor, logits: Tensor, target: Tensor) -> None:
    """The result may lie exactly over the logits, but over nothing else that is read, and not over itself."""
    if out.dtype is not logits.dtype or out.shape != logits.shape or not out.is_cpu or out.is_neg():
        raise ValueError(
            f"out: expected a {logits.dtype} CPU tensor of shape {tuple(logits.shape)}, "
            f"got {out.dtype} {tuple(out.shape)} on {out.device}"
        )
    (inner, n), (outer, m) = sorted(zip(out.stride(), out.shape, strict=True))
    if (n > 1 and inner == 0) or (m > 1 and outer <= inner * (n - 1)):
        raise ValueError(f"out: expected elements that lie apart from each other, got strides {out.stride()}")
    same = out.data_ptr() == logits.data_ptr() and out.stride() == logits.stride()
    if (not same and _overlap(out, logits)) or (target.is_floating_point() and _overlap(out, target)):
        raise ValueError("out: expected the logits themselves, or memory of its own")


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the spans of memory from the first to the last element meet."""
    (a_begin, a_end), (b_begin, b_end) = _span(a), _span(b)
    return a_begin < b_end and b_begin < a_end


def _span(x: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    begin = x.data_ptr()
    return begin, begin + (last + 1) * x.itemsize


def _use_torch_openmp() -> None:
    """Give the compiled part the parallel region of the OpenMP runtime that torch itself runs on.

    The order of search is the loader's own: first what is visible to all, so that a preloaded runtime is found, then
    what torch links. No second runtime is ever loaded, and so no second pool of threads. Where torch has none, or it
    cannot be found (Windows), one thread does the work.
    """
    if not torch._C.has_openmp or sys.platform == "win32":
        return
    everywhere = [] if sys.platform == "darwin" else [None]  # macOS binds a library to the one it was linked with
    for path in [*everywhere, torch._C.__file__]:
        library = ctypes.CDLL(path)  # already loaded
        for name in ("GOMP_parallel", "__kmpc_fork_call"):
            if hasattr(library, name):
                address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
                _native.use_openmp(address, name == "__kmpc_fork_call")
                return


_use_torch_openmp()
