"""The primitives of `_rows/dispatch.py`, and those of `_rows/loss.py`, in compiled C++ for CPU tensors: native.cpp.

The compiled part checks what it is given, and writes into memory that is made here. It says NotImplemented where more
than two strides lead to the rows of a tensor, and where a product is torch's affair.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from typing import Any

import torch
from torch import Tensor

from ... import _torch
from ..._records import Layout, LossOptions, RowNumbers, RowSpec, Samples, Stats, Wanted, compute_dtype, has_candidates
from .. import LOGITS, advise_huge_pages, check_range, eager, elements_are_apart, refusal_to_read

try:
    _native: Any = importlib.import_module("._native", __name__)
    _native.use_tensors(torch.Tensor)
except (ImportError, AttributeError) as error:
    raise ImportError(
        f"the compiled extension does not load from {__path__[0]} ({error}). pip builds it where there is a C++17 "
        "compiler. In a checkout, install with `pip install -e .`; or start Python elsewhere after `pip install .`"
    ) from error

ABOUT = f"compiled C++ for CPU tensors, {_native.instruction_sets()[0]}, on the threads of torch"
FLOAT64 = torch.float64
SLOTS = 1 << 18  # entries of the rows that are sampled in one call
TAKES_CANDIDATES = True  # several classes per row, (A, B, K)


def refusal(logits: Tensor, target: Tensor) -> str | None:
    """Why this backend cannot take these tensors."""
    if not (logits.is_cpu and target.is_cpu):
        return f"takes CPU tensors, got logits on {logits.device} and target on {target.device}"
    return refusal_to_read(logits, target)


def row_statistics(logits: Tensor, target: Tensor, spec: RowSpec, wanted: Wanted, class_weight: Tensor | None) -> Stats:
    stats = wanted.unpack(wanted.empty(logits, target), target.is_floating_point())
    if _native.statistics(*_read(logits, target, spec), _plain(class_weight), *stats):
        check_range(target, spec.classes or 0, spec.ignore_index)  # raises
    return stats


def row_gradient(
    logits: Tensor, target: Tensor, numbers: RowNumbers, spec: RowSpec, class_weight: Tensor | None, out: Tensor | None
) -> Tensor:
    given = [_plain(x) for x in numbers]
    if has_candidates(target):
        given[3] = numbers.g_picked.resolve_neg().to(FLOAT64).contiguous()
    fresh, out = out is None, _memory(out, logits, target)
    _native.gradient(*_read(logits, target, spec), _plain(class_weight), *given, out, fresh)
    return out


def losses(
    input: Tensor, target: Tensor, weight: Tensor | None, normalizer: float | None, options: LossOptions
) -> tuple[Tensor, float, Tensor]:
    """The numbers: lse, of probabilities mass, and in the logits' own digits top and, of indices, z_y."""
    layout, spec, formula, _ = options
    N, soft, dtype = layout.A * layout.B, target.is_floating_point(), formula.dtype
    each = N if input.dtype is FLOAT64 else (N + 1) // 2
    numbers = torch.empty(N * (1 + soft) + each * (2 - soft), dtype=FLOAT64)
    written = dtype if dtype in LOGITS else FLOAT64
    if formula.reduction == "none":
        value = torch.empty(layout.positions(input.shape), dtype=written)
    else:
        value = torch.empty_strided((), (), dtype=written)  # sooner there than torch.empty(())
    weight, threads = _readable(weight), torch.get_num_threads()
    divisor = _native.losses(input, target, layout, spec, threads, formula, weight, normalizer, numbers, value)
    if divisor is None:
        check_range(target, input.shape[layout.axis], spec.ignore_index)  # raises
    if divisor is NotImplemented:
        rows, options = _as_rows(input, target, options)
        value, divisor, numbers = losses(*rows, weight, normalizer, options)
        return layout.shaped(value, input.shape), divisor, numbers
    return value if written is dtype else value.to(dtype), divisor, numbers


def losses_gradient(
    input: Tensor, target: Tensor, saved: Tensor, weight: Tensor | None, g: Tensor, divisor: float, options: LossOptions
) -> Tensor:
    layout, spec, formula, inplace = options
    memory = _memory(input.detach() if inplace else None, input, target)
    saved, threads = saved.contiguous(), torch.get_num_threads()
    weight, g = _readable(weight), _readable(g)
    done = _native.losses_gradient(
        input, target, layout, spec, threads, formula, weight, saved, g, divisor, memory, not inplace
    )
    if done is NotImplemented:
        rows, options = _as_rows(input, target, options)
        g = g.reshape(layout.A, layout.B) if g.dim() else g
        memory = losses_gradient(*rows, saved, weight, g, divisor, options)
        return layout.restore(memory, input.shape).data
    return memory


def linear(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    if _native.linear(hidden.resolve_neg(), weight, out, torch.get_num_threads()) is NotImplemented:
        eager.linear(hidden, weight, out)
    elif _torch.needs_operator(hidden):
        # A mode looks on, perhaps a counter of FLOPs: it is shown a product of these shapes, without memory.
        torch.mm(*(torch.empty(shape, device="meta") for shape in (hidden.shape, weight.shape[::-1])))


def row_samples(
    logits: Tensor, target: Tensor, top: Tensor, lse: Tensor, uniform: Tensor, spec: RowSpec, resolution: float
) -> Samples:
    """As many rows at a time as have few slots for their entries."""
    _, B, C = logits.shape
    if logits.stride(2) != 1:
        logits = logits.contiguous()
    slots, dtype = min(C, int(1 / resolution) + 3), compute_dtype(logits)
    uniform, parts = uniform.double().contiguous(), []
    step = max(1, SLOTS // slots)
    for part in (slice(at, at + step) for at in range(0, B, step)):
        x, y = logits[:, part], target[:, part]
        classes = torch.empty(x.shape[1] * slots, dtype=torch.int32)
        p, counts = torch.empty(len(classes), dtype=dtype), torch.empty(x.shape[1], dtype=torch.int64)
        numbers = top[:, part], lse[:, part], uniform[part]
        _native.samples(*_read(x, y, spec), *numbers, resolution, slots, classes, p, counts)
        count = int(counts.sum())
        parts.append((counts, classes[:count].clone(), p[:count].clone()))
    return Samples(*map(torch.cat, zip(*parts, strict=True)))


def transpose(ends: Tensor, classes: Tensor, coefficient: Tensor, C: int) -> tuple[Tensor, Tensor, Tensor]:
    given = [t.contiguous() for t in (ends, classes, coefficient)]
    found = torch.empty(C, dtype=torch.int64), torch.empty_like(given[1]), torch.empty_like(given[2])
    _native.transpose(*given, *found)
    return found


def gather_sums(ends: Tensor, index: Tensor, coefficient: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    ends, index, coefficient = ends.contiguous(), index.int().contiguous(), coefficient.contiguous()
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = advise_huge_pages(torch.empty(len(ends), rows.shape[1], dtype=dtype))
    _native.gather_sums(ends, index, coefficient, rows, out, torch.get_num_threads())
    return out


def _as_rows(input: Tensor, target: Tensor, options: LossOptions) -> tuple[tuple[Tensor, Tensor], LossOptions]:
    """The same call of logits (A, B, C)."""
    layout = options.layout
    rows = layout.rows(input), layout.targets(target, input.dim())
    return rows, options._replace(layout=Layout(2, layout.A, layout.B))


def _read(logits: Tensor, target: Tensor, spec: RowSpec) -> tuple[Any, ...]:
    """What each call of a primitive begins with."""
    return logits, target, Layout(2, *logits.shape[:2]), spec, torch.get_num_threads()


def _readable(x: Any) -> Any:
    """Numbers of any floating dtype in one that is read."""
    return x if x is None or x.dtype in LOGITS else x.double()


def _plain(x: Tensor | None) -> Tensor | None:
    """The numbers as they lie in memory."""
    return None if x is None else x.resolve_neg()


def _memory(out: Tensor | None, logits: Tensor, target: Tensor) -> Tensor:
    """For a gradient: it may lie exactly over the logits, but over nothing else that is read, and not over itself."""
    if out is None:
        return torch.empty_like(logits)
    if out.dtype is not logits.dtype or out.shape != logits.shape or not out.is_cpu or out.is_neg():
        raise ValueError(
            f"out: expected a {logits.dtype} CPU tensor of shape {tuple(logits.shape)}, "
            f"got {out.dtype} {tuple(out.shape)} on {out.device}"
        )
    if not elements_are_apart(out):
        raise ValueError(f"out: expected elements that lie apart from each other, got strides {out.stride()}")
    same = out.data_ptr() == logits.data_ptr() and out.stride() == logits.stride()
    if (not same and _overlap(out, logits)) or (target.is_floating_point() and _overlap(out, target)):
        raise ValueError("out: expected the logits themselves, or memory of its own")
    return out


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
    if sys.platform == "win32" or not torch.backends.openmp.is_available():  # type: ignore[no-untyped-call]
        return
    everywhere = [] if sys.platform == "darwin" else [None]  # macOS binds a library to the one it was linked with
    for path in [*everywhere, _torch.library()]:
        library = ctypes.CDLL(path)  # already loaded
        for name in ("GOMP_parallel", "__kmpc_fork_call"):
            if hasattr(library, name):
                functions = library[name], library["omp_get_thread_num"]
                entry, number = (ctypes.cast(function, ctypes.c_void_p).value for function in functions)
                _native.use_openmp(entry, name == "__kmpc_fork_call", number)
                return


_use_torch_openmp()
