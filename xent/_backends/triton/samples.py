"""The entries that are kept of each row for a sparse gradient, see `_head/entries.py`: each logit is read once.

A program walks over one row, tile by tile. What it adds up are the small probabilities in units of r / 2^40, as whole
numbers: the sum has no rounding, in whatever order the lanes of a tile are added, and the sum before a class is exactly
that after it less its own. A class is kept where the sum passes a multiple of r.

    tile          units       sum in the tile                kept, and its place among the row's slots
    p_0 ... p_k   int64       only where a class is kept     the number of those before it

Most tiles keep nothing, which their total tells: it is added, and there is no cumulative sum.
"""

import triton
import triton.language as tl

from . import tiles
from .backward import load_number

LOGITS_OF_TILE = tl.constexpr(1024)
BITS = tl.constexpr(40)  # a row's sum, below 2^18 r and 2^40 units each, has room in int64
UNITS = tl.constexpr(float(2**40))


@triton.jit(do_not_specialize=tiles.VARYING)
def row_samples_kernel(
    x, x_a, x_b, x_c, target, target_a, target_b, target_c,  # as in `row_gradient_kernel`
    top, top_a, top_b, lse, lse_a, lse_b,  # (A, B)
    uniform,  # (N,) in [0, 1)
    classes, kept, counts,  # results: (N, slots) int32 and probabilities, and how many of them each row has
    B, C, start, ignore_index, scale: tl.float64, softcap: tl.float64, resolution: tl.float64, slots,
    config: tl.constexpr,
):  # fmt: skip
    """One row for each program."""
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    place, score_options = tiles.locate(rows, B), (scale, softcap)
    row, targets = tiles.row_at(x, place, x_a, x_b)[:, None], tiles.row_at(target, place, target_a, target_b)
    read, y = tiles.read_target(targets, rows >= 0, C, start, ignore_index, config)
    base = load_number(top, top_a, top_b, place, read).to(config.real)[:, None]
    factor = tl.exp(-load_number(lse, lse_a, lse_b, place, read)).to(config.real)[:, None]
    r, inverse = tl.full((), resolution, config.real), tl.full((), 1 / resolution, config.real)
    classes, kept = (classes + rows * slots)[:, None], (kept + rows * slots)[:, None]

    sum = (tl.load(uniform + rows) * UNITS).to(tl.int64)  # the first mark is (1 - u) r away
    count = tl.zeros_like(sum).to(tl.int32)
    for first in range(0, tl.max(tl.where(read, C, 0), 0), LOGITS_OF_TILE):  # none if the row does not count
        column = first + tl.arange(0, LOGITS_OF_TILE)[None, :]
        mask = read[:, None] & (column < C)
        z, _ = tiles.scores(tl.load(row + column.to(tl.int64) * x_c, mask, 0.0), score_options, config)
        p = tiles.exp(z - base, config) * factor
        own = column == y[:, None]
        large = mask & (own | (p >= r))
        small = mask & (p < r) & ~own  # not so a NaN
        units = tl.where(small, p * inverse * UNITS + 0.5, 0.0).to(tl.int64)
        later = sum + tl.sum(units, 1)
        if tl.max(tl.max(large.to(tl.int32), 1) + ((later >> BITS) > (sum >> BITS)).to(tl.int32), 0) > 0:
            after = sum[:, None] + tl.cumsum(units, 1)
            keep = large | ((after >> BITS) > ((after - units) >> BITS))
            slot = count[:, None] + tl.cumsum(keep.to(tl.int32), 1) - 1
            tl.store(classes + slot, column, keep & (slot < slots))
            tl.store(kept + slot, p, keep & (slot < slots))
            count += tl.sum(keep.to(tl.int32), 1)
        sum = later
    tl.store(counts + rows, tl.minimum(count, slots).to(tl.int64))
