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

    def targets(self, target: Tensor, ndim: int) -> Tensor:
        """The target of logits of `ndim` dimensions as rows: (A, B), or with K indices or C probabilities for each."""
        return self.rows(target) if target.dim() == ndim else target.reshape(self.A, self.B)

    def positions(self, shape: torch.Size) -> torch.Size:
        """The shape of one number per row."""
        return shape[: self.axis] + shape[self.axis + 1 :]

    def restore(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """(A, B, n) in the shape of the logits, with n numbers in the place of the classes."""
        positions = self.positions(shape)
        found = rows.reshape(*positions, rows.shape[2])
        return found if self.axis == len(positions) else found.movedim(-1, self.axis)

    def shaped(self, numbers: Tensor, shape: torch.Size) -> Tensor:
        """Numbers of rows, (A, B) or (A, B, K), in the shape of logits of this shape; one in all as it is.

        K numbers per position lie where the logits have their classes.
        """
        if not numbers.dim():
            return numbers
        return self.restore(numbers, shape) if numbers.dim() == 3 else numbers.view(self.positions(shape))


class RowSpec(NamedTuple):
    """What is read: which rows count, how a logit becomes a score, and which of all the classes are held here."""

    ignore_index: int = -100
    scale: float = 1
    softcap: float | None = None
    start: int = 0  #  the first class held here
    classes: int | None = None  #  of all ranks; None where all are held here

    def words(self) -> str:
        """What the ranks must agree on, in the same words for 1 and for 1.0."""
        softcap = None if self.softcap is None else float(self.softcap)
        return f"ignore_index={self.ignore_index}, logit_scale={float(self.scale)}, {softcap=}"


class Stats(NamedTuple):
    """One number per row, each float64 (A, B) but for `argmax`, int64. None where it was not asked for.

    All scores are relative to `top`, so that no common offset of the logits eats digits. `top` counts as a constant:
    it has no derivative, and the others' are those of the absolute numbers.
    """

    top: Tensor  #            the largest z_c; 0 where that is not finite
    lse: Tensor  #            log sum_c exp(z_c - top)
    picked: Tensor  #         z_y - top, for each of K candidates; 0 where another shard holds y.
    #                         For probabilities sum_c q_c w_c (z_c - top)
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
        top, lse, picked, *rest = found
        left = iter(rest)
        return Stats(top, lse, picked, *[next(left) if there else None for there in (soft, *self)])

    def empty(self, rows: Tensor, target: Tensor) -> list[Tensor]:
        """Packed results without numbers, one for each row of `rows` (A, B, C): what a fake operator returns."""
        soft = target.is_floating_point()
        top = rows.new_empty(tuple(rows.shape[:-1]), dtype=statistics_dtype(rows.device))
        picked = top.new_empty(target.shape) if has_candidates(target) else torch.empty_like(top)
        found = [top, torch.empty_like(top), picked]
        found += [torch.empty_like(top) for _ in range(soft + self.wsum + self.entropy)]
        return [*found, torch.empty_like(top, dtype=torch.int64)] if self.argmax else found


class Objective(NamedTuple):
    """The options of a loss that are no tensors: what is asked of the statistics, once they are there."""

    reduction: str = "mean"
    label_smoothing: float = 0
    z_loss: float = 0
    on_empty: str = "nan"
    ignore_index: int = -100
    dtype: torch.dtype = torch.float32  # of the result

    @property
    def wanted(self) -> Wanted:
        """The optional statistics that the formula reads."""
        return Wanted(wsum=self.label_smoothing > 0)


class RowOptions(NamedTuple):
    """What the statistics of some rows are asked for with, besides their tensors."""

    layout: Layout
    spec: RowSpec
    wanted: Wanted
    inplace: bool = False  # whether the derivative may write over the logits


class LossOptions(NamedTuple):
    """The same of their loss."""

    layout: Layout
    spec: RowSpec
    formula: Objective
    inplace: bool


class RowNumbers(NamedTuple):
    """What the gradient of a row is made of, besides its logits: p_c = exp(z_c - top - lse), and what flows back.

    That is the gradient of a loss for each statistic, one number per row (and candidate, for `g_picked`).
    """

    top: Tensor
    lse: Tensor
    g_lse: Tensor
    g_picked: Tensor
    g_wsum: Tensor | None = None
    g_entropy: Tensor | None = None


class HeadRows(NamedTuple):
    """The tensors of some rows of a linear head. The operators have them first, in this order."""

    hidden: Tensor  #               (N, D)
    weight: Tensor  #               (C, D), the head
    bias: Tensor | None  #          (C,)
    target: Tensor  #               (N,), (N, K) or (N, C)
    prob: Tensor | None  #          (N, K), what each of K classes counts in a loss
    class_weight: Tensor | None  #  (C,)
    seed: Tensor | None = None  #   one number, of a sparse gradient

    @property
    def sources(self) -> tuple[Tensor | None, ...]:
        """Those that may be differentiated."""
        return self[:5]

    @classmethod
    def split(cls, flat: Sequence[Any]) -> tuple[HeadRows, Any]:
        """The first of some arguments, and the others."""
        count = len(cls._fields)
        return cls(*flat[:count]), flat[count:]


class Samples(NamedTuple):
    """What `row_samples` keeps of some rows, one after the other."""

    counts: Tensor  #   (B,) int64: how many entries each row has
    classes: Tensor  #  (E,) int32, ascending within a row
    p: Tensor  #        (E,) their probabilities, in `compute_dtype` of the logits


def has_candidates(target: Tensor) -> bool:
    """Whether a target has K classes per row, (A, B, K), and neither one, (A, B), nor probabilities, (A, B, C)."""
    return target.dim() == 3 and not target.is_floating_point()


def rows_that_count(target: Tensor, ignore_index: int) -> Tensor:
    """(A, B): the rows of an index target that are not ignored, with any of their candidates."""
    counts = target != ignore_index
    return counts.any(2) if target.dim() == 3 else counts


def statistics_dtype(device: torch.device) -> torch.dtype:
    """float64, but for the one kind of device that has no such thing."""
    return torch.float32 if device.type == "mps" else torch.float64


def compute_dtype(logits: Tensor) -> torch.dtype:
    """The dtype of arithmetic on single logits: float64 for float64, else float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
