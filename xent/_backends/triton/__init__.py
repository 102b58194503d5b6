"""The primitives of `_rows/dispatch.py` as Triton kernels, for CUDA and ROCm: what is made, chosen and launched.

plan.py chooses the tiles, forward.py and backward.py are the kernels, tiles.py is what they share. samples.py is the
sampling pass of a sparse gradient, whose products are torch's own, as `eager` has them.

Roofline. Nothing but the logits and their gradient is as long as a row, and every byte of them crosses the bus once:

    bytes per logit                              float64    float32    bfloat16, float16
    forward: reads                                     8          4                    2
    backward: reads, and writes the gradient          16          8                    4
    both (a copy of the logits: 16, 8, 4)             24         12                    6

A probability adds its own bytes to either direction, class weights (which stay in the caches) nothing. At the bandwidth
of the data sheet, picoseconds per logit for both directions, and the share of that bandwidth that is expected:

    A100 80 GB, 2.0 TB/s                              12        6.0                  3.0      85 to 90 %
    H100 SXM, 3.35 TB/s                              7.2        3.6                  1.8      85 to 90 %

The shares are EXPECTED, NOT MEASURED: no device was at hand. `python benchmarks/bench.py --device cuda` measures them,
beside what a copy of the same size reaches, which is the limit. They rest on

- arithmetic: in bfloat16 an H100 (132 multiprocessors of 128 lanes, 1.7 GHz) has time for 17 instructions per logit in
  forward and 34 in backward before arithmetic is the limit, and for 2 and 4 exps; an A100 for 19 and 39. The compiled
  loops have 9 and 13, and one exp: tests/backends/test_triton_compile.py counts them. Least room is left for softcap;
- bytes on their way: a latency of 700 ns asks an H100 for 18 KB per multiprocessor at all times. Eight programs of 128
  threads with 64 registers each fit, and have 64 KB on their way whenever they wait.

float64 is bound by memory only where the device is made for it: others have a 32nd or 64th of the arithmetic.
"""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from torch import Tensor

from ..._records import RowNumbers, RowSpec, Samples, Stats, Wanted, compute_dtype
from .. import assert_on_device, check_range, refusal_to_read

try:
    import triton
except ImportError as error:
    raise ImportError(
        f"triton cannot be imported ({error}); `pip install triton`: 3.7.1 is for torch 2.13, 3.8.0 for torch 2.14"
    ) from error

from .backward import row_gradient_kernel
from .forward import combine_kernel, row_statistics_kernel
from .plan import FUSED, WARPS, batch, compile_options, configure, processors, row_strides, share, stretches
from .samples import row_samples_kernel

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ABOUT = f"Triton {triton.__version__}, " + ("interpreted: slow, for tests" if INTERPRETED else "for CUDA and ROCm")
FIELDS = 9  # of a state in forward.py
SLOTS = 1 << 20  # for the entries of rows that are sampled by one launch


def refusal(logits: Tensor, target: Tensor) -> str | None:
    """Why this backend cannot take these tensors."""
    if target.device != logits.device:
        return f"takes tensors on one device, got logits on {logits.device} and target on {target.device}"
    if logits.device.type != ("cpu" if INTERPRETED else "cuda"):  # which is what torch calls ROCm, too
        return f"takes CUDA and ROCm tensors (under TRITON_INTERPRET=1 only the CPU's), got logits on {logits.device}"
    if INTERPRETED and os.environ.get("XENT_BACKEND") != "triton":
        return "is a hundred times slower in the interpreter: only where XENT_BACKEND=triton asks for it"
    return refusal_to_read(logits, target)


def row_statistics(logits: Tensor, target: Tensor, spec: RowSpec, wanted: Wanted, class_weight: Tensor | None) -> Stats:
    A, B, C = logits.shape
    ignore_index, scale, softcap, start, classes = spec
    soft = target.is_floating_point()
    w = class_weight.contiguous() if class_weight is not None and (soft or wanted.wsum) else None
    config = replace(configure(logits, target, w, scale, softcap), **wanted._asdict())
    N, batch_size = A * B, B if config.side_by_side else batch(logits, target)
    programs = stretches(config, A, B)
    splits, span = share(config, programs, C, processors(logits.device))

    stats = wanted.unpack(wanted.empty(logits, target), soft)
    parts = stats.lse.new_empty(FIELDS, N, splits) if splits > 1 else None
    in_range = None if soft else stats.lse.new_ones((), dtype=torch.int32)
    with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
        row_statistics_kernel[programs, splits](
            logits, *_strides(logits), target, *_strides(target), w, *stats, parts, in_range,
            N, batch_size, C, start, classes, ignore_index, scale, softcap or 1.0, span, config,
            **compile_options(config),
        )  # fmt: skip
        if parts is not None:
            config = replace(config, R=1, K=splits)
            combine_kernel[(N,)](
                parts, target, *row_strides(target), *stats, N, batch_size, C, start, ignore_index, config,
                num_warps=1, **FUSED,
            )  # fmt: skip
    if in_range is not None and _on_device(logits):
        assert_on_device(in_range, classes or 0, ignore_index)
    elif in_range is not None and not in_range:
        check_range(target, classes or 0, ignore_index)  # raises
    return stats


def row_gradient(
    logits: Tensor, target: Tensor, numbers: RowNumbers, spec: RowSpec, class_weight: Tensor | None, out: Tensor | None
) -> Tensor:
    A, B, C = logits.shape
    ignore_index, scale, softcap, start, _ = spec
    if out is None:
        out = torch.empty_like(logits)  # dense, in the same order of memory
    per_class = target.is_floating_point() or numbers.g_wsum is not None
    w = class_weight.contiguous() if class_weight is not None and per_class else None
    config = configure(logits, target, w, scale, softcap, out)
    N, batch_size = A * B, B if config.side_by_side else batch(logits, out, target, *numbers)
    programs = stretches(config, A, B)
    splits, span = share(config, programs, C, processors(logits.device))
    per_row = [part for g in numbers for part in ((g, 0, 0) if g is None else (g, *row_strides(g)))]
    with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
        row_gradient_kernel[programs, splits](
            logits, *_strides(logits), out, *_strides(out), target, *_strides(target), w, *per_row,
            N, batch_size, C, start, ignore_index, scale, softcap or 1.0, span, config, **compile_options(config),
        )  # fmt: skip
    return out


def row_samples(
    logits: Tensor, target: Tensor, top: Tensor, lse: Tensor, uniform: Tensor, spec: RowSpec, resolution: float
) -> Samples:
    A, B, C = logits.shape
    ignore_index, scale, softcap, start, _ = spec
    N, batch_size = A * B, batch(logits, target, top, lse)
    slots = min(C, int(1 / resolution) + 3)  # the bound, and one more for rounding
    if N * slots > SLOTS and N > 1:  # a resolution so fine that it keeps about all
        half = N // 2
        some = [
            row_samples(logits[:, part], target[:, part], top[:, part], lse[:, part], uniform[part], spec, resolution)
            for part in (slice(half), slice(half, None))
        ]
        return Samples(*map(torch.cat, zip(*some, strict=True)))
    classes = torch.empty(N, slots, dtype=torch.int32, device=logits.device)
    kept = torch.empty(N, slots, dtype=compute_dtype(logits), device=logits.device)
    counts = torch.empty(N, dtype=torch.int64, device=logits.device)
    with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
        row_samples_kernel[(N,)](
            logits, *_strides(logits), target, *_strides(target), top, *row_strides(top), lse, *row_strides(lse),
            uniform.contiguous(), classes, kept, counts, batch_size, C, start, ignore_index, scale, softcap or 1.0,
            resolution, slots, configure(logits, target, None, scale, softcap), num_warps=WARPS, **FUSED,
        )  # fmt: skip
    there = torch.arange(slots, device=logits.device) < counts[:, None]
    return Samples(counts, classes[there], kept[there])


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Of rows, and of classes, which index targets have none of."""
    return *row_strides(x), x.stride(2) if x.dim() == 3 else 0


def _on_device(logits: Tensor) -> bool:
    """Whether a look at a number would have to wait for it."""
    return not logits.is_cpu
