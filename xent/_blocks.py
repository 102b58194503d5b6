"""The loss of logits that are never held: blocks of rows, each `hidden @ weight.T` within a budget of bytes.

For one block of n rows,

    logits = h W^T + b        (n, C), into one buffer that every block uses again
    stats  = lse_and_pick(logits)                     then the formula of `_objective.py` on n numbers
    G      = logits_grad(logits), in the same buffer
    dh     = G W              dW += G^T h             db += sum_n G

`loss_and_grads` is for a mean or a sum: all of it in one go, since only the upstream gradient of the loss is missing,
one number that every gradient is proportional to. Three matrix products. `stats_of` returns numbers per row, whose
upstream gradients are known only in backward: `stats_grads` computes the logits of each block again. Four products.

Rows that are ignored are left out before the first product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import _objective, _primitives
from ._backends import Reading, Stats, advise_huge_pages, check_range, compute_dtype
from ._products import add_outer, logits_of

Maybe = Tensor | None


class Head(NamedTuple):
    """What a call has besides its rows and its head. `dtype` is that of the products (autocast's, where it is on)."""

    reading: Reading
    dtype: torch.dtype
    max_bytes: int
    shift: int = 0  #  T > 0: of each T rows the last does not count, and row n belongs to row n + 1 of the targets
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    entropy: bool = False
    argmax: bool = False


class Block(NamedTuple):
    """Some rows, and where they come from."""

    rows: slice | Tensor
    hidden: Tensor  # (n, D)
    target: Tensor  # (n,) or (n, C)
    logits: Tensor  # (n, C), in the buffer that all blocks share


class Rows:
    """Hidden states, head and targets, cut into blocks of equal size whose logits fit the budget."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Maybe, target: Tensor, head: Head) -> None:
        """`hidden` and `target` have rows; all floating tensors but probabilities are cast to the products' dtype."""
        self.hidden, self.target, self.head = hidden, target, head
        self.weight, self.bias = weight.to(head.dtype), None if bias is None else bias.to(head.dtype)
        N, C = len(hidden), len(weight)
        self.kept: Maybe = None
        if not target.is_floating_point():
            check_range(target, head.reading.classes or C, head.reading.ignore_index)
            counts = target != head.reading.ignore_index
            self.kept = None if counts.all() else counts.nonzero()[:, 0]
        elif head.shift:
            self.kept = torch.arange(N, device=hidden.device).view(-1, head.shift)[:, :-1].flatten()
        count = N if self.kept is None else len(self.kept)
        per_row = C * head.dtype.itemsize + hidden.shape[1] * (head.dtype.itemsize + compute_dtype(weight).itemsize)
        number = max(1, math.ceil(count / max(1, head.max_bytes // max(1, per_row))))
        self.edges = [count * i // number for i in range(number + 1)]
        size = math.ceil(count / number)
        self.buffer = advise_huge_pages(torch.empty(size, C, dtype=head.dtype, device=hidden.device))

    def __iter__(self) -> Iterator[Block]:
        """Each block with its logits. The same buffer again: a block ends where the next begins."""
        for begin, end in zip(self.edges, self.edges[1:], strict=False):
            rows = slice(begin, end) if self.kept is None else self.kept[begin:end]
            targets = (
                rows + 1 if self.head.shift and isinstance(rows, Tensor) and self.target.is_floating_point() else rows
            )
            h = self.hidden[rows].to(self.head.dtype)
            logits = logits_of(h, self.weight, self.bias, out=self.buffer[: end - begin])
            yield Block(rows, h, self.target[targets], logits)

    def stats(self, block: Block, class_weight: Maybe, wsum: bool) -> Stats:
        """The statistics of a block."""
        reading, head = self.head.reading, self.head
        return _primitives.lse_and_pick(
            block.logits,
            block.target,
            start=reading.start,
            classes=reading.classes,
            ignore_index=reading.ignore_index,
            scale=reading.scale,
            softcap=reading.softcap,
            class_weight=class_weight,
            want_wsum=wsum,
            want_entropy=head.entropy,
            want_argmax=head.argmax,
        )


class Grads:
    """The gradients of hidden, weight and bias, as far as they are wanted, and how a block adds to them."""

    def __init__(self, rows: Rows, needs: tuple[bool, bool, bool]) -> None:
        """Rows that never come have a gradient of 0. The head's are summed in float32 (float64)."""
        hidden, weight, dtype = rows.hidden, rows.weight, compute_dtype(rows.weight)
        self.rows = rows
        clear = torch.zeros if rows.kept is not None else torch.empty
        self.dh = clear(hidden.shape, dtype=rows.head.dtype, device=hidden.device) if needs[0] else None
        self.dW = torch.empty(weight.shape, dtype=dtype, device=weight.device) if needs[1] else None
        self.db = torch.zeros(len(weight), dtype=dtype, device=weight.device) if needs[2] else None
        self.added = 0  # blocks
        for large in (self.dh, self.dW):
            if large is not None:
                advise_huge_pages(large)

    def add(self, block: Block, lse: Tensor, class_weight: Maybe, upstream: tuple[Maybe, ...]) -> None:
        """One block, whose logits are overwritten by their gradient. `upstream`: g_lse, g_picked, g_wsum, g_entropy."""
        reading = self.rows.head.reading
        G = _primitives.logits_grad(
            block.logits,
            block.target,
            lse,
            *upstream,  # type: ignore[arg-type]
            start=reading.start,
            ignore_index=reading.ignore_index,
            scale=reading.scale,
            softcap=reading.softcap,
            class_weight=class_weight,
            out=block.logits,
        )
        if self.dh is not None:
            if isinstance(block.rows, slice):
                torch.mm(G, self.rows.weight, out=self.dh[block.rows])
            else:
                self.dh[block.rows] = G @ self.rows.weight
        if self.db is not None:
            self.db += G.sum(0, dtype=self.db.dtype)
        if self.dW is not None:
            add_outer(self.dW, G, block.hidden, beta=min(self.added, 1))  # 0: nothing is in it yet
        self.added += 1

    def found(self) -> list[Tensor]:
        """Those that are wanted."""
        return [grad for grad in (self.dh, self.dW, self.db) if grad is not None]


def class_weights(weight: Maybe, target: Tensor, head: Head) -> Maybe:
    """The weights as the primitives want them, where they count for each class and not only for that of the target."""
    if weight is None or not (target.is_floating_point() or head.label_smoothing > 0):
        return None
    return weight.to(torch.float64 if head.dtype == torch.float64 else torch.float32)


def loss_and_grads(
    hidden: Tensor,
    weight: Tensor,
    bias: Maybe,
    target: Tensor,
    scale: Tensor,
    class_weight: Maybe,
    head: Head,
    needs: tuple[bool, bool, bool],
) -> list[Tensor]:
    """scale * sum_n loss_n (0-d), and those gradients of it that are wanted, of (hidden, weight, bias).

    With float16 the gradients are those of the sum, which `_linear.py` scales: 1 / N in each of the products
    would take small probabilities below what the format can hold.
    """
    rows, C, smooth = Rows(hidden, weight, bias, target, head), len(weight), head.label_smoothing > 0
    w = class_weights(class_weight, target, head)
    weight_sum = C if class_weight is None else class_weight.sum(dtype=scale.dtype)
    total, grads = torch.zeros_like(scale), Grads(rows, needs)
    for block in rows:
        stats = rows.stats(block, w, smooth)
        row_weight = None
        if class_weight is not None and not target.is_floating_point():
            row_weight = _objective.row_weights(block.target, class_weight, head.reading.ignore_index)
        formula = (stats, row_weight, weight_sum, C, head.label_smoothing, head.z_loss)
        total += _objective.row_losses(*formula).sum() * scale
        if any(needs):
            g = _objective.row_upstream(*formula)
            if head.dtype != torch.float16:
                g = tuple(None if part is None else part * scale for part in g)  # type: ignore[assignment]
            grads.add(block, stats.lse, w, (*g, None))
    return [total, *grads.found()]


def stats_of(
    hidden: Tensor, weight: Tensor, bias: Maybe, target: Tensor, class_weight: Maybe, head: Head
) -> list[Tensor]:
    """Those of `Stats` that are wanted, for each row; for a row that is left out what the primitives say of one."""
    rows, w = Rows(hidden, weight, bias, target, head), class_weights(class_weight, target, head)
    found: list[Tensor] = []
    for block in rows:
        stats = [stat for stat in rows.stats(block, w, head.label_smoothing > 0) if stat is not None]
        found = found or [stat.new_full((len(hidden),), 0 if stat.is_floating_point() else -1) for stat in stats]
        for whole, part in zip(found, stats, strict=True):
            whole[block.rows] = part
    return found


def stats_grads(
    hidden: Tensor,
    weight: Tensor,
    bias: Maybe,
    target: Tensor,
    lse: Tensor,
    upstream: list[Maybe],
    class_weight: Maybe,
    head: Head,
    needs: tuple[bool, bool, bool],
) -> list[Tensor]:
    """Gradients of (hidden, weight, bias), as far as they are wanted, from numbers per row."""
    rows, w = Rows(hidden, weight, bias, target, head), class_weights(class_weight, target, head)
    grads = Grads(rows, needs)
    for block in rows:
        part = tuple(None if g is None else g[block.rows] for g in upstream)
        grads.add(block, lse[block.rows], w, part)
    return grads.found()
