"""What the backends share: the row of statistics, the dtypes, the logits that count, the check of targets.

Each backend is a module beside this one, imported only when it is asked for.
"""

from __future__ import annotations

import ctypes
import sys
from typing import NamedTuple

import torch
from torch import Tensor

HUGE_PAGE, MADV_HUGEPAGE = 2 << 20, 14


class Stats(NamedTuple):
    """One number per row, each float64 (N,) but for `argmax`, int64. None where it was not asked for."""

    lse: Tensor  #            log sum_c exp(z_c)
    picked: Tensor  #         z_y; 0 where another shard holds y. For probabilities sum_c q_c w_c z_c
    mass: Tensor | None  #    sum_c q_c w_c, for probabilities only
    wsum: Tensor | None  #    sum_c w_c z_c
    entropy: Tensor | None  # -sum_c p_c log p_c
    argmax: Tensor | None  #  the first c with the largest z_c


class Reading(NamedTuple):
    """How logits and targets are read: which rows count, x -> z, and which of all the classes are held here."""

    ignore_index: int = -100
    scale: float = 1.0
    softcap: float | None = None
    start: int = 0
    classes: int | None = None


def statistics_dtype(device: torch.device) -> torch.dtype:
    """float64, but for the one kind of device that has no such thing."""
    return torch.float32 if device.type == "mps" else torch.float64


def compute_dtype(logits: Tensor) -> torch.dtype:
    """The dtype of arithmetic on single logits: float64 for float64, else float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


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


def split(lse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """lse = high + low, each as (N, 1) in `dtype`: what the dtype can hold of it, and the decimals that are left.

    z - high is then exact where it matters, and exp(z - lse) = exp(z - high) * exp(-low) costs one factor per row:
    probabilities stay exact even where the logits are so large that float32 does not hold the decimals of lse.
    """
    high = lse.to(dtype)
    low = (lse - high).to(dtype).nan_to_num(0)  # inf - inf: an infinite lse has no decimals
    return high[:, None], low[:, None]


def check_range(target: Tensor, classes: int, ignore_index: int) -> None:
    """Index targets lie in [0, classes) or are `ignore_index`: else IndexError; off the CPU a device-side assertion."""
    if target.device.type == "meta":
        return
    bad = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if target.device.type != "cpu" or torch.compiler.is_compiling():
        assert_on_device(~bad.any(), classes, ignore_index)
    elif bad.any():
        where = int(bad.nonzero()[0])
        raise IndexError(
            f"target: expected class indices in [0, {classes}) or ignore_index={ignore_index}, "
            f"got {int(target[where])} (row {where} of {target.numel()})"
        )


def advise_huge_pages(out: Tensor) -> Tensor:
    """Ask Linux for pages of 2 MB: faulting in a large fresh tensor by 4 kB takes as long as all arithmetic on it."""
    if sys.platform == "linux" and type(out) is Tensor and out.device.type == "cpu" and out.nbytes >= 8 * HUGE_PAGE:
        begin = -(-out.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        length = (out.data_ptr() + out.nbytes) // HUGE_PAGE * HUGE_PAGE - begin
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), MADV_HUGEPAGE)  # a hint: may fail
    return out


def assert_on_device(in_range: Tensor, classes: int, ignore_index: int) -> None:
    """No host sync: the assertion fires on the device, some time after the launch, as torch's own does."""
    torch._assert_async(in_range, f"target: expected class indices in [0, {classes}) or {ignore_index=}")
