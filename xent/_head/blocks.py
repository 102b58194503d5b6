"""The loss of logits that are never held: blocks of rows, each `hidden @ weight.T` within a budget of bytes.

For one block of n rows,

    logits = h W^T + b        (n, C), into one buffer that every block uses again
    stats  = row_statistics(logits)                   then the formula of `objective.py` on n numbers
    G      = row_gradient(logits), in the same buffer
    dh     = G W              dW += G^T h             db += sum_n G

`loss_and_grads` is for a mean or a sum: all of it in one go, since only the upstream gradient of the loss is missing,
one number that every gradient is proportional to. Three matrix products. Those of numbers per row (`entries.stats_of`)
are known only in backward: `exact_grads` computes the logits of each block again. Four products.

Rows that are ignored are left out before the first product.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import _torch
from .._backends import advise_huge_pages, check_range
from .._records import (
    HeadRows,
    Layout,
    Objective,
    RowNumbers,
    RowOptions,
    RowSpec,
    Stats,
    Wanted,
    compute_dtype,
    rows_that_count,
)
from .._rows import objective, operators
from .._rows.derivatives import coefficient_gradient
from .products import add_outer, block_dtype, hidden_gradient, logits_of

F = TypeVar("F", bound=Callable[..., list[Tensor]])
Needs = tuple[bool, ...]  # whether a gradient of each of `HeadRows.sources` is wanted
FEW = 1 << 18  # logits: what is made of so many at a time stays in the cache
TILE = 32  # rows: two vectors of AVX-512


class HeadOptions(NamedTuple):
    """The options of a call that are no tensors. `dtype` is that of the products (autocast's, where it is on)."""

    spec: RowSpec
    dtype: torch.dtype
    max_bytes: int
    shift: int = 0  #  T > 0: of each T rows the last does not count, and row n belongs to row n + 1 of the targets
    wanted: Wanted = Wanted()
    resolution: float | None = None  # of a sparse gradient, see entries.py

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of class weights, and of the sum of the head's gradient."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def class_weight(self, rows: HeadRows) -> Tensor | None:
        """As the primitives take it."""
        return objective.class_weight(rows.class_weight, rows.target, self.wanted, self.weight_dtype)


class Block(NamedTuple):
    """Some rows, and where they come from."""

    rows: slice | Tensor
    targets: slice | Tensor  # theirs: the next ones, where the targets are shifted
    hidden: Tensor  # (n, D)
    target: Tensor  # (1, n), (1, n, K) or (1, n, C)
    prob: Tensor | None  # (1, n, K)
    logits: Tensor  # (1, n, C), in the buffer that all blocks share


class Blocks:
    """Hidden states, head and targets, cut into blocks of equal size whose logits fit the budget."""

    def __init__(self, rows: HeadRows, options: HeadOptions) -> None:
        """All floating tensors but probabilities are cast to the products' dtype."""
        hidden, weight, bias, target, self.prob, *_ = rows
        self.hidden, self.target, self.options = hidden, target, options
        self.weight, self.bias = weight.to(options.dtype), None if bias is None else bias.to(options.dtype)
        self.class_weight = options.class_weight(rows)
        N, C = len(hidden), len(weight)
        self.kept: Tensor | None = None
        if not target.is_floating_point():
            check_range(target, options.spec.classes or C, options.spec.ignore_index)
            counts = rows_that_count(target[None], options.spec.ignore_index)[0]
            kept = counts.nonzero()  # the one time that the host waits for a device
            self.kept = None if len(kept) == N else kept[:, 0]
        elif options.shift:
            self.kept = torch.arange(N, device=hidden.device).view(-1, options.shift)[:, :-1].flatten()
        count = N if self.kept is None else len(self.kept)
        dtype = block_dtype(options.dtype, hidden.device)
        per_row = C * dtype.itemsize + hidden.shape[1] * (options.dtype.itemsize + compute_dtype(weight).itemsize)
        most = max(1, options.max_bytes // max(1, per_row))
        tile = TILE if most >= 2 * TILE else 1  # what a product fills up: all blocks but the last are whole tiles
        number, tiles = max(1, math.ceil(count / (most // tile * tile))), math.ceil(count / tile)
        self.edges = [min(count, tiles * i // number * tile) for i in range(number + 1)]
        size = math.ceil(tiles / number) * tile
        self.buffer = advise_huge_pages(torch.empty(size, C, dtype=dtype, device=hidden.device))

    def __iter__(self) -> Iterator[Block]:
        """Each block with its logits. The same buffer again: a block ends where the next begins."""
        shifted = self.options.shift and self.target.is_floating_point()
        for begin, end in zip(self.edges, self.edges[1:], strict=False):
            rows = slice(begin, end) if self.kept is None else self.kept[begin:end]
            targets = rows + 1 if shifted and isinstance(rows, Tensor) else rows
            h = self.hidden[rows].to(self.options.dtype)
            logits = logits_of(h, self.weight, self.bias, out=self.buffer[: end - begin])
            prob = None if self.prob is None else self.prob[rows][None]
            yield Block(rows, targets, h, self.target[targets][None], prob, logits[None])

    def stats(self, block: Block) -> Stats:
        """The statistics of a block, each (1, n)."""
        options = RowOptions(Layout(2, *block.target.shape[:2]), self.options.spec, self.options.wanted)
        return operators.row_statistics(block.logits, block.target, self.class_weight, options)


class Grads:
    """The gradients that are wanted, and how a block adds to them: dq is that of the target or of `prob`."""

    def __init__(self, blocks: Blocks, needs: Needs) -> None:
        """Rows that never come have a gradient of 0. All but that of hidden are float32 (float64) until the end."""
        hidden, weight, dtype = blocks.hidden, blocks.weight, compute_dtype(blocks.weight)
        q = blocks.target if blocks.prob is None else blocks.prob
        self.blocks = blocks
        clear = torch.zeros if blocks.kept is not None else torch.empty
        self.dh = clear(hidden.shape, dtype=blocks.options.dtype, device=hidden.device) if needs[0] else None
        self.dW = torch.empty(weight.shape, dtype=dtype, device=weight.device) if needs[1] else None
        self.db = torch.zeros(len(weight), dtype=dtype, device=weight.device) if needs[2] else None
        self.dq = clear(q.shape, dtype=compute_dtype(q), device=hidden.device) if any(needs[3:]) else None
        self.added = 0  # blocks
        for large in (self.dh, self.dW, self.dq):
            if large is not None:
                advise_huge_pages(large)

    def add(self, block: Block, numbers: RowNumbers, g_q: Tensor | None) -> None:
        """One block, whose logits are overwritten by their gradient; all numbers per row are (1, n).

        `g_q`: the gradient of `prob`, (1, n, K); for probabilities that of their mass.
        """
        x, spec, class_weight = block.logits, self.blocks.options.spec, self.blocks.class_weight
        if self.dq is not None and block.prob is not None and g_q is not None:
            self.dq[block.rows] = g_q[0].to(self.dq.dtype)
        elif self.dq is not None:
            where = torch.arange(len(self.dq), device=x.device)[block.targets]
            count = max(1, FEW // x.shape[2])
            for part in (slice(i, i + count) for i in range(0, x.shape[1], count)):
                mass = None if g_q is None else g_q[:, part]
                top, g_picked = numbers.top[:, part], numbers.g_picked[:, part]
                d = coefficient_gradient(x[:, part], top, g_picked, mass, spec)[0]
                self.dq[where[part]] = (d if class_weight is None else d.mul_(class_weight)).to(self.dq.dtype)
        if self.dh is None and self.dW is None and self.db is None:
            return
        layout = Layout(2, *x.shape[:2])
        G = operators.row_gradient(x, block.target, numbers, class_weight, layout, spec, inplace=True)[0]
        if self.dh is not None:
            self.dh[block.rows] = hidden_gradient(G, self.blocks.weight)
        if self.db is not None:
            self.db += G.sum(0, dtype=self.db.dtype)
        if self.dW is not None:
            add_outer(self.dW, G, block.hidden, self.added)
        self.added += 1

    def found(self) -> list[Tensor]:
        """Those that are wanted."""
        return [grad for grad in (self.dh, self.dW, self.db, self.dq) if grad is not None]


def in_their_dtypes(function: F) -> F:
    """Without autocast, which `HeadOptions.dtype` has heeded: it would round once more what a product is given."""

    @functools.wraps(function)
    def run(rows: HeadRows, *args: Any) -> Any:
        device = rows.hidden.device
        with torch.autocast(device.type, enabled=False) if _torch.autocasts(device) else nullcontext():
            return function(rows, *args)

    return run  # type: ignore[return-value]


@in_their_dtypes
def loss_and_grads(
    rows: HeadRows, factor: Tensor, options: HeadOptions, formula: Objective, needs: Needs
) -> list[Tensor]:
    """factor * sum_n loss_n (0-d), and those gradients of it that are wanted, of `HeadRows.sources`.

    With float16 the gradients are those of the sum, which `functions.py` scales: 1 / N in each of the products
    would take small probabilities below what the format can hold.
    """
    blocks = Blocks(rows, options)
    losses, grads = factor.new_zeros(len(rows.hidden)), Grads(blocks, needs)
    g = torch.ones_like(factor) if options.dtype == torch.float16 else factor
    for block in blocks:
        stats = blocks.stats(block)
        terms = objective.class_terms(block.target, rows.class_weight, len(rows.weight), formula)
        whole, ignored = (stats, terms), options.spec.ignore_index
        if block.prob is not None:
            whole = objective.of_candidates(stats, terms, block.target, block.prob, ignored)
        losses[block.rows] = objective.row_losses(*whole, formula)[0]
        if any(needs):
            numbers = objective.numbers_of_loss(stats.top, stats.lse, whole[0].mass, whole[1], formula, g)
            if block.prob is None:
                g_q = -numbers.g_picked * stats.lse if needs[3] else None  # of lse mass - picked
            else:
                given = (stats, terms, block.target, block.prob, ignored)
                numbers, g_q = objective.numbers_of_candidates(numbers, *given)
            grads.add(block, numbers, g_q)
    return [losses.sum() * factor, *grads.found()]


def exact_grads(
    rows: HeadRows, numbers: RowNumbers, g_mass: Tensor | None, options: HeadOptions, needs: Needs
) -> list[Tensor]:
    """Those gradients of `HeadRows.sources` that are wanted, from numbers per row, (1, N) each."""
    blocks = Blocks(rows, options)
    grads = Grads(blocks, needs)
    for block in blocks:
        part = RowNumbers(*[None if n is None else n[:, block.rows] for n in numbers])  # type: ignore[arg-type]
        mass = None if g_mass is None else g_mass[:, block.rows]
        grads.add(block, part, mass)
    return grads.found()
