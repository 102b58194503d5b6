"""The two primitives in compiled C++ for CPU tensors: see native.cpp.

The compiled part takes raw addresses, so everything that it relies on is checked here first, and a tensor that was
made on the way is held in a variable until the call returns. It is meant to be cheap: one call on a small input costs
a few microseconds, most of them in making the results.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from typing import Any

import torch
from torch import Tensor

from ... import _torch
from ..._records import LossWeights, Objective, RowSpec, Samples, Stats, Upstream, Wanted, compute_dtype, has_candidates
from .. import advise_huge_pages, check_range
from .checks import (
    FLOAT64,
    LOGITS,
    SOFT,
    gradient_memory,
    kind_of,
    loss_weights,
    per_candidate,
    per_row,
    strided,
    taken,
    weight_per_class,
)

try:
    _native: Any = importlib.import_module("._native", __name__)
except ImportError as error:
    raise ImportError(
        f"the compiled extension does not load from {__path__[0]} ({error}). pip builds it where there is a C++17 "
        "compiler. In a checkout, install with `pip install -e .`; or start Python elsewhere after `pip install .`"
    ) from error

ABOUT = f"compiled C++ for CPU tensors, {_native.instruction_sets()[0]}, on the threads of torch"
NUMBERS = ("top", "lse", "g_lse", "g_picked", "g_wsum", "g_entropy")
SLOTS = 1 << 18  # entries of the rows that are sampled in one call
TAKES_CANDIDATES = True  # several classes per row, (A, B, K)
THREADED = 1 << 16  # logits: fewer are done before other threads have woken up


def refusal(logits: Tensor, target: Tensor) -> str | None:
    """Why this backend cannot take these tensors."""
    kind = kind_of(logits, target)
    return kind if isinstance(kind, str) else None


def row_statistics(logits: Tensor, target: Tensor, spec: RowSpec, wanted: Wanted, class_weight: Tensor | None) -> Stats:
    """See `xent._rows.dispatch.row_statistics`."""
    kind = taken(logits, target)
    weight = weight_per_class("class_weight", class_weight, logits, compute_dtype(logits))
    stats = wanted.unpack(wanted.empty(logits, target), kind >= SOFT)
    bad = _native.statistics(
        *_read(logits, target, kind, spec, weight), spec.classes, *map(_address, stats), *_candidates(target, None)
    )
    if bad:
        check_range(target, spec.classes or 0, spec.ignore_index)  # raises
    return stats


def row_gradient(
    logits: Tensor,
    target: Tensor,
    top: Tensor,
    lse: Tensor,
    upstream: Upstream,
    spec: RowSpec,
    class_weight: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """See `xent._rows.dispatch.row_gradient`."""
    kind, candidates = taken(logits, target), None
    if has_candidates(target):
        candidates = per_candidate(upstream.picked, target), torch.empty(target.shape, dtype=FLOAT64)
        upstream = upstream._replace(picked=candidates[0].new_zeros(1, 1).expand(logits.shape[:2]))
    weight = weight_per_class("class_weight", class_weight, logits, compute_dtype(logits))
    numbers = per_row(NUMBERS, (top, lse, *upstream), logits)
    fresh, out = out is None, gradient_memory(out, logits, target)
    _native.gradient(
        *_read(logits, target, kind, spec, weight), *strided(numbers), *_candidates(target, candidates),
        out.data_ptr(), *out.stride(), out.itemsize, fresh,
    )  # fmt: skip
    return out


def losses(
    logits: Tensor, target: Tensor, weights: LossWeights, normalizer: float | None, spec: RowSpec, formula: Objective
) -> tuple[Tensor, float, Tensor]:
    """See `xent._rows.formula.losses`. The numbers: top, lse and, of probabilities, mass."""
    kind, each, dtype = taken(logits, target), formula.reduction == "none", formula.dtype
    held, shape = loss_weights(weights, logits), logits.shape
    numbers = torch.empty((2 + (kind >= SOFT), shape[0], shape[1]), dtype=FLOAT64)
    written = dtype if dtype in LOGITS and not each else FLOAT64
    value = torch.empty(shape[:2] if each else (), dtype=written)
    divisor = _native.losses(
        *_read(logits, target, kind, spec, held[0]), *_formula(formula, held, weights), numbers.data_ptr(),
        value.data_ptr() if each else 0, 0 if each else value.data_ptr(), LOGITS[written],
        formula.reduction == "mean" and normalizer is None, formula.on_empty == "zero",
        1.0 if normalizer is None else normalizer,
    )  # fmt: skip
    if divisor is None:
        check_range(target, shape[2], spec.ignore_index)  # raises
    return value if written is dtype else value.to(dtype), divisor, numbers


def losses_gradient(
    logits: Tensor,
    target: Tensor,
    numbers: Tensor,
    weights: LossWeights,
    g: Tensor,
    divisor: float,
    spec: RowSpec,
    formula: Objective,
    out: Tensor | None,
) -> Tensor:
    """See `xent._rows.formula.losses_gradient`."""
    kind, held = taken(logits, target), loss_weights(weights, logits)
    shape = logits.shape
    if numbers.shape != (2 + (kind >= SOFT), *shape[:2]) or numbers.dtype is not FLOAT64 or not numbers.is_contiguous():
        raise ValueError(f"numbers: expected what `losses` found, got {numbers.dtype} of shape {tuple(numbers.shape)}")
    each = per_row(("g",), (g if g.dim() else None,), logits)
    fresh, out = out is None, gradient_memory(out, logits, target)
    _native.losses_gradient(
        *_read(logits, target, kind, spec, held[0]), *_formula(formula, held, weights), numbers.data_ptr(),
        *strided(each), 0.0 if g.dim() else g.item(), divisor, out.data_ptr(), *out.stride(), out.itemsize, fresh,
    )  # fmt: skip
    return out


def row_samples(
    logits: Tensor, target: Tensor, top: Tensor, lse: Tensor, uniform: Tensor, spec: RowSpec, resolution: float
) -> Samples:
    """See `xent._rows.dispatch.row_samples`. As many rows at a time as have few slots for their entries."""
    _, B, C = logits.shape
    if logits.stride(2) != 1:
        logits = logits.contiguous()
    slots, dtype = min(C, int(1 / resolution) + 3), compute_dtype(logits)
    uniform, parts = uniform.double().contiguous(), []
    step = max(1, SLOTS // slots)
    for part in (slice(at, at + step) for at in range(0, B, step)):
        x, y = logits[:, part], target[:, part]
        numbers = per_row(NUMBERS, (top[:, part], lse[:, part]), x)
        classes = torch.empty(x.shape[1] * slots, dtype=torch.int32)
        p, counts = torch.empty(len(classes), dtype=dtype), torch.empty(x.shape[1], dtype=torch.int64)
        _native.samples(
            *_read(x, y, taken(x, y), spec, None), *strided(numbers),
            uniform[part].data_ptr(), resolution, slots, classes.data_ptr(), p.data_ptr(), counts.data_ptr(),
        )  # fmt: skip
        count = int(counts.sum())
        parts.append((counts, classes[:count].clone(), p[:count].clone()))
    return Samples(*map(torch.cat, zip(*parts, strict=True)))


def transpose(ends: Tensor, classes: Tensor, coefficient: Tensor, C: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `xent._rows.dispatch.transpose`."""
    given = [t.contiguous() for t in (ends, classes, coefficient)]
    found = torch.empty(C, dtype=torch.int64), torch.empty_like(given[1]), torch.empty_like(given[2])
    addresses = [t.data_ptr() for t in (*given, *found)]
    _native.transpose(len(ends), C, coefficient.dtype is FLOAT64, *addresses)
    return found


def gather_sums(ends: Tensor, index: Tensor, coefficient: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """See `xent._rows.dispatch.gather_sums`."""
    ends, index, coefficient = ends.contiguous(), index.int().contiguous(), coefficient.contiguous()
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = advise_huge_pages(torch.empty(len(ends), rows.shape[1], dtype=dtype))
    _native.gather_sums(
        len(ends), len(index), rows.shape[1], ends.data_ptr(), index.data_ptr(), coefficient.data_ptr(),
        rows.data_ptr(), rows.stride(0), out.data_ptr(), LOGITS[dtype], LOGITS[rows.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _read(logits: Tensor, target: Tensor, kind: int, spec: RowSpec, weight: Tensor | None) -> tuple[Any, ...]:
    """What each call begins with. An index target has no class stride."""
    A, B, C = logits.shape
    return (
        A, B, C, logits.data_ptr(), *logits.stride(), target.data_ptr(), *target.stride()[:2], target.stride(-1),
        kind, spec.start, spec.ignore_index, spec.scale, spec.softcap or 0.0, _address(weight), LOGITS[logits.dtype],
        torch.get_num_threads() if A * B * C >= THREADED else 1,
    )  # fmt: skip


def _candidates(target: Tensor, of_gradient: tuple[Tensor, Tensor] | None) -> tuple[int, ...]:
    """How many, and for a gradient what flows back to each and memory for their scores; nothing for one class a row."""
    return (target.shape[2], *map(_address, of_gradient or ())) if has_candidates(target) else ()


def _formula(formula: Objective, held: tuple[Tensor | None, Tensor | None], weights: LossWeights) -> tuple[Any, ...]:
    return formula.label_smoothing, formula.z_loss, float(weights.sum), _address(held[1])


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
                address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
                _native.use_openmp(address, name == "__kmpc_fork_call")
                return


_use_torch_openmp()
