"""What a Triton kernel is told: the tile for the rows at hand, and how far memory may be read in vectors."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._records import compute_dtype

VECTOR = 16  # bytes: the most that a thread loads at once
WARPS = 4
TILE = 512  # vectors: 4 for each thread of 4 warps, all on their way at once
LEAST = 4  # vectors of a row in a tile
APART = 16  # the same, where classes lie apart: then neighbours in memory are mostly rows, and a tile takes many
ENOUGH = 8  # programs for each multiprocessor: with fewer, rows are shared
FUSED = {"enable_fp_fusion": True}  # a * b + c in one instruction. Triton's own default will change to False in 3.10


@dataclass(frozen=True)
class How:
    """What a kernel knows at compile time. Each distinct one is a compilation."""

    R: int  # rows of a tile
    K: int  # vectors of a row in a tile
    V: int  # logits of a vector
    real: Any  # dtype of arithmetic on single logits, and its lowest finite number
    lowest: float
    tanh_terms: int  # see triton_rows.tanh
    edges: bool  # whether a row may begin or end within a vector
    x_align: int  # bytes that vectors of logits are multiples of, in memory; 0 where classes lie apart
    out_align: int = 0
    q_align: int = 0
    w_align: int = 0
    soft: bool = False
    scaled: bool = False
    capped: bool = False
    wsum: bool = False
    entropy: bool = False
    argmax: bool = False


def choose(
    logits: Tensor, target: Tensor, w: Tensor | None, scale: float, softcap: float | None, out: Tensor | None = None
) -> How:
    """The tile for these rows, and how far memory may be read in vectors."""
    N, C = logits.shape
    double = logits.dtype is torch.float64
    vectors = logits.stride(1) == 1 or C == 1
    V = VECTOR // logits.itemsize if vectors else 1
    edges = vectors and not (C % V == 0 and _on_vectors(logits))
    least = max(LEAST, 2 * V if edges else 0)  # the edges must find room in a tile of single logits
    K = min(max(triton.next_power_of_2(C // V), least), TILE) if vectors else APART
    soft = target.is_floating_point()
    return How(
        R=TILE // K,
        K=K,
        V=V,
        real=tl.float64 if double else tl.float32,
        lowest=torch.finfo(compute_dtype(logits)).min,
        tanh_terms=19 if double else 11,
        edges=edges,
        x_align=VECTOR if vectors else 0,
        out_align=0 if out is None else _align(out, logits, V),
        q_align=_align(target, logits, V) if soft else 0,
        w_align=0 if w is None else _align(w.expand(N, C), logits, V),
        soft=soft,
        scaled=scale != 1,
        capped=softcap is not None,
    )


def share(how: How, N: int, C: int, processors: int) -> tuple[int, int]:
    """How many programs (a power of two) share each row, and how many vectors each of them takes.

    One, unless there are too few rows to occupy the device. Then no more than there are tiles.
    """
    tiles = triton.cdiv(C // how.V, how.K)
    missing = ENOUGH * processors // triton.cdiv(N, how.R)
    splits = max(1, min(triton.next_power_of_2(missing + 1) // 2, triton.next_power_of_2(tiles + 1) // 2))
    return splits, triton.cdiv(tiles, splits) * how.K


def options(how: How) -> dict[str, int]:
    """How to compile: fused, and with room enough for registers that the loads of a tile are all on their way at once.

    Left alone, NVIDIA's assembler prefers to load a vector, work on it, load the next; or even spills to stay small.
    """
    extras = how.soft + how.wsum + how.capped + (how.entropy or how.argmax)
    out_of_step = 0 < how.out_align < how.x_align
    lean = extras == 0 and how.w_align == 0 and how.R == 1
    many = out_of_step or extras + (how.real == tl.float64) > 1
    limit = 255 if many else 64 if lean else 168 if how.wsum else 128
    found = {"num_warps": WARPS, "num_stages": 1, **FUSED}
    return found if torch.version.hip else {**found, "maxnreg": limit}


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the device. The interpreter, where all run in turn, pretends to a few."""
    if device.type == "cpu":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _on_vectors(x: Tensor) -> bool:
    """Whether each row begins with a whole vector."""
    return x.data_ptr() % VECTOR == 0 and (x.stride(0) * x.itemsize % VECTOR == 0 or len(x) == 1)


def _align(other: Tensor, logits: Tensor, V: int) -> int:
    """The bytes that `other` is aligned to wherever a vector of V logits begins; 0 if its classes lie apart."""
    if other.stride(1) != 1 and other.shape[1] != 1:
        return 0
    if V == 1 or other.shape[1] == 1:
        return other.itemsize
    bytes = min(VECTOR, V * other.itemsize)
    step = bytes // other.itemsize  # numbers: both must be off the boundary by as many, in every row
    in_step = (other.data_ptr() // other.itemsize - logits.data_ptr() // logits.itemsize) % step == 0
    same = (other.stride(0) - logits.stride(0)) % step == 0 or len(other) == 1
    return bytes if in_step and same else other.itemsize
