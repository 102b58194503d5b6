"""The configuration of a kernel: the tile for the rows at hand, and how far memory may be read in vectors."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._records import compute_dtype

VECTOR = 16  # bytes: the most that a thread loads at once
WARPS = 4
TILE = 512  # vectors: 4 for each thread of 4 warps, all on their way at once
MIN_VECTORS = 4  # of a row in a tile
CLASSES = 4  # of a row in a tile, where each lane has rows of its own
PROGRAMS = 8  # for each multiprocessor: with fewer, rows are shared
FUSED = {"enable_fp_fusion": True}  # a * b + c in one instruction. Triton's own default will change to False in 3.10


@dataclass(frozen=True)
class KernelConfig:
    """What a kernel knows at compile time. Each distinct one is a compilation."""

    R: int  # rows of a tile
    K: int  # vectors of a row in a tile
    V: int  # logits of a vector; or that a lane takes of its row
    across: bool  # whether each lane has rows of its own
    side_by_side: bool  # whether these lie side by side, and a program's rows are all of one a
    together: int  # rows of a vector, then
    real: Any  # dtype of arithmetic on single logits, and its lowest finite number
    lowest: float
    tanh_terms: int  # see tiles.tanh
    edges: bool  # whether a row may begin or end within a vector
    x_align: int  # bytes that vectors of logits are multiples of, in memory; 0 where there are none
    out_align: int = 0
    q_align: int = 0
    w_align: int = 0
    soft: bool = False
    scaled: bool = False
    capped: bool = False
    wsum: bool = False
    entropy: bool = False
    argmax: bool = False


def configure(
    logits: Tensor, target: Tensor, w: Tensor | None, scale: float, softcap: float | None, out: Tensor | None = None
) -> KernelConfig:
    """The tile for these rows, and how far memory may be read in vectors."""
    C = logits.shape[2]
    double = logits.dtype is torch.float64
    soft = target.is_floating_point()
    V = VECTOR // logits.itemsize
    across = C < V or logits.stride(2) != 1
    if across:
        R, K, edges = TILE * V // CLASSES, 1, False
        side_by_side = logits.stride(1) == 1 and 2 * logits.shape[1] > R
        R, V = R if side_by_side else TILE // CLASSES, CLASSES
        align = functools.partial(_align_of_rows, side_by_side)
    else:
        side_by_side, edges = False, not (C % V == 0 and _begins_on_vectors(logits))
        least = max(MIN_VECTORS, 2 * V if edges else 0)  # the edges must find room in a tile of single logits
        K = min(max(triton.next_power_of_2(C // V), least), TILE)
        R, align = TILE // K, functools.partial(_align, logits, V)
    x_align = align(logits)
    return KernelConfig(
        R=R,
        K=K,
        V=V,
        across=across,
        side_by_side=side_by_side,
        together=x_align // logits.itemsize if side_by_side else 1,
        real=tl.float64 if double else tl.float32,
        lowest=torch.finfo(compute_dtype(logits)).min,
        tanh_terms=19 if double else 11,
        edges=edges,
        x_align=x_align,
        out_align=0 if out is None else align(out),
        q_align=align(target) if soft else 0,
        w_align=0 if w is None or across else _align(logits, V, w.expand(logits.shape)),
        soft=soft,
        scaled=scale != 1,
        capped=softcap is not None,
    )


def row_strides(x: Tensor) -> tuple[int, int]:
    """From one a to the next, and from one b to the next. Where there is one b only, the a are taken as such."""
    return (0, x.stride(0)) if x.shape[1] == 1 else (x.stride(0), x.stride(1))


def batch(*tensors: Tensor | None) -> int | None:
    """B, where rows need both of `row_strides`; None where, in each tensor, the second leads from each to the next."""
    A, B = next(x.shape for x in tensors if x is not None)[:2]
    one_stride = min(A, B) == 1 or all(x is None or x.stride(0) == B * x.stride(1) for x in tensors)
    return None if one_stride else B


def stretches(config: KernelConfig, A: int, B: int) -> int:
    """How many programs the rows take."""
    runs, length = (A, B) if config.side_by_side else (1, A * B)
    return runs * -(-length // config.R)


def share(config: KernelConfig, programs: int, C: int, processors: int) -> tuple[int, int]:
    """How many programs (a power of two) share each row, and how many vectors each of them takes.

    One, unless there are too few rows to occupy the device. Then no more than there are tiles.
    """
    tiles = triton.cdiv(triton.cdiv(C, config.V) if config.across else C // config.V, config.K)
    missing = PROGRAMS * processors // programs
    splits = max(1, min(triton.next_power_of_2(missing + 1) // 2, triton.next_power_of_2(tiles + 1) // 2))
    return splits, triton.cdiv(tiles, splits) * config.K


def compile_options(config: KernelConfig) -> dict[str, int]:
    """Fused products, and room enough for registers that the loads of a tile are all on their way at once.

    Left alone, NVIDIA's assembler prefers to load a vector, work on it, load the next; or even spills to stay small.
    """
    extras = config.soft + config.wsum + config.capped + (config.entropy or config.argmax)
    out_of_step = 0 < config.out_align < config.x_align
    lean = extras == 0 and config.w_align == 0 and config.R == 1
    alone = config.side_by_side and config.together == 1  # logits of odd images: as many addresses as numbers
    many = alone or extras + config.side_by_side + (config.real == tl.float64) > 1
    limit = 255 if out_of_step or many else 64 if lean else 128
    found = {"num_warps": WARPS, "num_stages": 1, **FUSED}
    return found if torch.version.hip else {**found, "maxnreg": limit}


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the device. The interpreter, where all run in turn, has none for whom to share rows."""
    if device.type == "cpu":
        return 0
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _begins_on_vectors(x: Tensor) -> bool:
    """Whether each row begins with a whole vector."""
    return x.data_ptr() % VECTOR == 0 and all(x.shape[d] == 1 or x.stride(d) * x.itemsize % VECTOR == 0 for d in (0, 1))


def _align_of_rows(side_by_side: bool, x: Tensor) -> int:
    """The bytes that x is aligned to wherever a vector of rows begins; 0 if its rows do not lie side by side."""
    if not side_by_side or x.stride(1) != 1:
        return 0
    steps = [x.shape[1], *(x.stride(d) for d in (0, 2) if x.shape[d] != 1)]
    return math.gcd(VECTOR, x.data_ptr(), *(step * x.itemsize for step in steps))


def _align(logits: Tensor, V: int, other: Tensor) -> int:
    """The bytes that `other` is aligned to wherever a vector of V logits begins; 0 if its classes lie apart."""
    if other.stride(2) != 1 and other.shape[2] != 1:
        return 0
    if V == 1 or other.shape[2] == 1:
        return other.itemsize
    bytes = min(VECTOR, V * other.itemsize)
    step = bytes // other.itemsize  # numbers: both must be off the boundary by as many, in every row
    in_step = (other.data_ptr() // other.itemsize - logits.data_ptr() // logits.itemsize) % step == 0
    same = all(other.shape[d] == 1 or (other.stride(d) - logits.stride(d)) % step == 0 for d in (0, 1))
    return bytes if in_step and same else other.itemsize
