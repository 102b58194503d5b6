"""The records of the contract: what is read, what comes out, what is wanted of it, and what flows back.

They are taken as they are everywhere, and flattened, in the order of their fields, for the operators of torch alone.

The letters: logits are (A, B, C), and a row is one of A x B with C classes, so a number per row is (A, B).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Where the rows of a tensor of logits' shape are: its class dimension, and its positions as A x B."""

    axis: int
    A: int
    B: int

    def rows(self, x: Tensor) -> Tensor:
        """x as (A, B, C)."""
        C = x.shape[self.axis]
        if self.axis != x.dim() - 1:
            x = x.movedim(self.axis, -1)
        return x.reshape(self.A, self.B, C)

    def restore(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """(A, B, C) in the shape of the logits."""
        if self.axis == len(shape) - 1:
            return rows.reshape(shape)
        positions = shape[: self.axis] + shape[self.axis + 1 :]
        return rows.reshape(*positions, rows.shape[2]).movedim(-1, self.axis)

    def shaped(self, numbers: Tensor, shape: torch.Size) -> Tensor:
        """One number per row, (A, B), in the shape of the positions of logits of this shape; one in all as it is."""
        return numbers.view(shape[: self.axis] + shape[self.axis + 1 :]) if numbers.dim() else numbers


class RowSpec(NamedTuple):
    """What is read: which rows count, how a logit becomes a score, and which of all the classes are held here."""

    ignore_index: int = -100
    scale: float = 1.0
    softcap: float | None = None
    start: int = 0  #  the first class held here
    classes: int | None = None  #  of all ranks; None where all are held here


class Stats(NamedTuple):
    """One number per row, each float64 (A, B) but for `argmax`, int64. None where it was not asked for.

    All scores are relative to `top`, so that no common offset of the logits eats digits. `top` counts as a constant:
    it has no derivative, and the others' are those of the absolute numbers.
    """

    top: Tensor  #            the largest z_c; 0 where that is not finite
    lse: Tensor  #            log sum_c exp(z_c - top)
    picked: Tensor  #         z_y - top; 0 where another shard holds y. For probabilities sum_c q_c w_c (z_c - top)
    mass: Tensor | None  #    sum_c q_c w_c, for probabilities only
    wsum: Tensor | None  #    sum_c w_c (z_c - top)
    entropy: Tensor | None  # -sum_c p_c log p_c
    argmax: Tensor | None  #  the first c with the largest z_c

    def pack(self) -> list[Tensor]:
        """Those that there are. The inverse is `Wanted.unpack`."""
        return [stat for stat in self if stat is not None]


class Wanted(NamedTuple):
    """Which of the optional statistics to compute. The only place that knows which of them come back, and where."""

    wsum: bool = False
    entropy: bool = False
    argmax: bool = False

    def count(self, soft: bool) -> int:
        """How many statistics come back. Not a sum of the flags, which a compiler may hold as symbols."""
        return len([there for there in (True, True, True, soft, *self) if there])

    def unpack(self, found: Sequence[Any], soft: bool) -> Stats:
        """`Stats` from those that there are, for probabilities (`soft`) or indices; or from their gradients."""
        left = iter(found)
        return Stats(*[next(left) if there else None for there in (True, True, True, soft, *self)])  # type: ignore[arg-type]

    def empty(self, rows: Tensor, soft: bool) -> list[Tensor]:
        """Packed results without numbers, one for each row of `rows` (..., C): what a fake operator returns."""
        dtype, count = statistics_dtype(rows.device), 3 + soft + self.wsum + self.entropy
        dtypes = [dtype] * count + [torch.int64] * self.argmax
        return [rows.new_empty(rows.shape[:-1], dtype=dtype) for dtype in dtypes]


class Upstream(NamedTuple):
    """What flows back: the gradient of a loss for each statistic, one number per row."""

    lse: Tensor
    picked: Tensor
    wsum: Tensor | None = None
    entropy: Tensor | None = None


class Samples(NamedTuple):
    """What `row_samples` keeps of some rows, one after the other."""

    counts: Tensor  #   (B,) int64: how many entries each row has
    classes: Tensor  #  (E,) int32, ascending within a row
    p: Tensor  #        (E,) their probabilities, in `compute_dtype` of the logits


def statistics_dtype(device: torch.device) -> torch.dtype:
    """float64, but for the one kind of device that has no such thing."""
    return torch.float32 if device.type == "mps" else torch.float64


def compute_dtype(logits: Tensor) -> torch.dtype:
    """The dtype of arithmetic on single logits: float64 for float64, else float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
