"""Row statistics: each logit of the rows that count is read once, and nothing is written but one number per row.

A state is what each lane knows of the scores it has seen:

    m, s        the largest, and sum exp(z - m)
    eu          sum exp(z - m) (z - m)                         for the entropy
    wu, wk      sum w (z - m), sum w                           for wsum
    tu, tk      sum t (z - m), sum t, with t = q w             for probabilities: picked and mass
    top, where  the largest in the order of argmax, and its first column

m begins at the lowest finite number, since from -inf a lane that sees nothing but -inf would make NaN of -inf - -inf.
Sums are taken of z - m, whose decimals survive a common offset of the logits; when m moves, they follow.

Nothing crosses from one lane to another until the row is over, and so a logit costs one exp and a handful of cheap
operations. Where programs share a row, each writes down its state, and `combine_kernel` does the rest.
"""

import triton
import triton.language as tl

from . import tiles

NO_COLUMN = tl.constexpr(2**31 - 1)  # a column that no row has
MINUS_INFINITY = tl.constexpr(float("-inf"))


@triton.jit
def empty_state(config: tl.constexpr):
    """The state (R, K) of lanes that have not seen a score."""
    zero = tl.full([config.R, config.K], 0.0, config.real)
    m = tl.full([config.R, config.K], config.lowest, config.real)
    where = tl.full([config.R, config.K], NO_COLUMN, tl.int32)
    return m, zero, zero, zero, zero, zero, zero, zero + MINUS_INFINITY, where


@triton.jit
def add_weighted(total, mass, move, k, u):
    """`total` with sum k u, `mass` with sum k. A coefficient of 0 adds 0, even where u is infinite."""
    return total + mass * move + tl.sum(tl.where(k == 0, 0.0, k * u), 2), mass + tl.sum(k, 2)


@triton.jit
def update(state, z, w, t, column, config: tl.constexpr):
    """The state after a tile of scores. Where there is none, z is -inf, and w and t are 0."""
    m, s, eu, wu, wk, tu, tk, top, where = state
    peak = tl.maximum(m, tl.max(z, 2))
    shrink = tiles.exp(m - peak, config)
    move = tl.maximum(m - peak, config.lowest)  # not -inf: of an empty sum that made 0 * -inf
    u = z - peak[:, :, None]
    e = tiles.exp(u, config)
    if config.entropy:
        eu = shrink * eu + shrink * s * move + tl.sum(tl.where(e == 0, 0.0, e * u), 2)
    s = shrink * s + tl.sum(e, 2)
    if w is not None:
        wu, wk = add_weighted(wu, wk, move, w, u)
    if t is not None:
        tu, tk = add_weighted(tu, tk, move, t, u)
    if config.argmax:  # for torch, NaN is above +inf
        key = tl.where(z == z, tl.minimum(z, -config.lowest), -MINUS_INFINITY)
        best = tl.max(key, 2)
        first = tl.min(tl.where(key == best[:, :, None], column, NO_COLUMN), 2)
        where = tl.where(best > top, first, tl.where(best == top, tl.minimum(where, first), where))
        top = tl.maximum(top, best)
    return peak, s, eu, wu, wk, tu, tk, top, where


@triton.jit
def merge_lanes(state, config: tl.constexpr):
    """The state (R,) of rows from the states (R, K) of their lanes."""
    m, s, eu, wu, wk, tu, tk, top, where = state
    peak, best = tl.max(m, 1), tl.max(top, 1)
    shrink, move = tiles.exp(m - peak[:, None], config), tl.maximum(m - peak[:, None], config.lowest)
    eu = tl.sum(shrink * eu + shrink * s * move, 1)
    wu, tu = tl.sum(wu + wk * move, 1), tl.sum(tu + tk * move, 1)
    where = tl.min(tl.where(top == best[:, None], where, NO_COLUMN), 1)
    return peak, tl.sum(shrink * s, 1), eu, wu, tl.sum(wk, 1), tu, tl.sum(tk, 1), best, where


@triton.jit
def write_statistics(state, rows, inside, counts, held, z_y, top, lse, picked, mass, wsum, entropy, argmax):
    """Write the statistics of rows, relative to their largest score, where that is finite. z_y where it is `held`."""
    m, s, eu, wu, _, tu, tk, _, where = state
    finite = (s > 0) & (m < -MINUS_INFINITY)  # m is the lowest number, not -inf, where no score was above that
    log_s = tl.log(s.to(tl.float64))
    tl.store(top + rows, tl.where(counts & finite, m, 0.0).to(tl.float64), inside)
    tl.store(lse + rows, tl.where(counts, log_s, 0.0), inside)
    if mass is None:
        base = tl.where(finite, m, 0.0).to(tl.float64)
        tl.store(picked + rows, tl.where(held, z_y.to(tl.float64) - base, 0.0), inside)
    else:
        tl.store(mass + rows, tk.to(tl.float64), inside)
        tl.store(picked + rows, tu.to(tl.float64), inside)
    if wsum is not None:
        tl.store(wsum + rows, tl.where(counts, wu, 0.0).to(tl.float64), inside)
    if entropy is not None:  # -sum_c p_c (u_c - log s)
        tl.store(entropy + rows, tl.where(counts, log_s - eu / s, 0.0), inside)
    if argmax is not None:
        tl.store(argmax + rows, tl.where(counts, where, -1).to(tl.int64), inside)


@triton.jit
def load_coefficient(pointers, mask):
    """0 where nothing is loaded, by a select and not by the load.

    Where a loop adds up what a load returns, as it is, Triton 3.7 moves the sum out of the loop: within it, where
    `add_weighted` reads the sum, it is 0, or else the compiler fails.
    """
    k = tl.load(pointers, mask, 0.0)
    return tl.where(k == 0, 0.0, k)


@triton.jit
def read_tile(state, x, q, w, offset, column, mask, counts, read, x_c, target_c, score_options,
              aligned: tl.constexpr, config: tl.constexpr):  # fmt: skip
    """The state after the tile at `offset` from x, q and w, as far as `mask` goes."""
    tile = tiles.tile_at(x, offset, x_c, config.x_align, aligned, config)
    x, there = tiles.load_logits(tile, mask, counts, read, MINUS_INFINITY, config), mask
    mask = mask & counts
    z, _ = tiles.scores(x, score_options, config)
    if config.scaled or config.capped:
        z = tl.where(mask, z, MINUS_INFINITY)
    k, t = None, None
    if w is not None:
        weights = tiles.tile_at(w, offset, 1, config.w_align, aligned, config)
        k = load_coefficient(weights, there if config.across else mask)
    if q is not None:
        t = load_coefficient(tiles.tile_at(q, offset, target_c, config.q_align, aligned, config), mask).to(config.real)
        t = t if w is None else t * k
    if not config.wsum:
        k = None
    elif w is None:
        k = tl.where(mask, tl.zeros_like(z) + 1, 0.0)
    return update(state, z, k, t, column, config)


@triton.jit(do_not_specialize=tiles.VARYING)
def row_statistics_kernel(
    x, x_a, x_b, x_c,  # (A, B, C) logits and their strides
    target, target_a, target_b, target_c,  # (A, B) indices, or (A, B, C) probabilities
    w,  # (C,) class weights
    top, lse, picked, mass, wsum, entropy, argmax,  # results, contiguous; None where not wanted
    parts,  # (9, N, splits) states, where more than one program shares a row
    in_range,  # set to 0 by an index that is not
    N, B,  # rows, and how many of them each a has; B is None where one stride leads from row to row
    C, start, classes, ignore_index, scale: tl.float64, softcap: tl.float64,
    span,  # vectors of a row for each program, whole tiles
    config: tl.constexpr,
):  # fmt: skip
    """Reads each logit of the rows that count once."""
    rows, inside, place = tiles.rows_of_program(N, B, config)
    split = tl.program_id(1)
    first_split = rows * 0 + split == 0  # for each row, as are all masks: the interpreter takes none made from a scalar
    score_options = (scale, softcap)
    row = tiles.logits_at(x, place, x_a, x_b, config.x_align, config)
    targets = tiles.logits_at(target, place, target_a, target_b, config.q_align, config)
    counts, y = tiles.read_target(targets, inside, C, start, ignore_index, config)
    held, z_y = counts & (y >= 0), None
    if not config.soft:
        index = tl.load(targets, inside, ignore_index).to(tl.int64)
        tl.store(in_range + rows * 0, 0, (index != ignore_index) & ((index < 0) | (index >= classes)))
        z_y, _ = tiles.scores(tl.load(row + y.to(tl.int64) * x_c, held, 0.0), score_options, config)

    head, vectors = tiles.whole_vectors(row, C, config)
    q = targets if config.soft else None
    k = tiles.weights_at(w, rows, config)
    read, considered = tiles.to_be_read(counts, config)[:, None, None], counts[:, None, None]
    state = empty_state(config)
    if config.edges:
        single, mask = tiles.edge_tile(head, vectors, C, config)
        mask &= first_split[:, None, None]
        state = read_tile(state, row, q, k, single, single, mask, considered, read, x_c, target_c, score_options,
                          False, config)  # fmt: skip
        row, k = row + head, None if k is None else k + head
        q = None if q is None else q + head.to(tl.int64) * target_c
    begin = split * span
    end = tl.minimum(begin + span, tl.max(tl.where(counts, vectors, 0), 0))  # none to read if no row counts
    for first in range(begin, end, config.K):
        vector, offset = tiles.vector_tile(first, config)
        mask = tiles.within(vector, offset, vectors[:, None, None], C, config)
        column = head[:, None, None] + offset
        state = read_tile(state, row, q, k, offset, column, mask, considered, read, x_c, target_c, score_options,
                          True, config)  # fmt: skip

    state = merge_lanes(state, config)
    if parts is None:
        write_statistics(state, rows, inside, counts, held, z_y, top, lse, picked, mass, wsum, entropy, argmax)
    else:
        if not config.soft:  # as it is: the largest score is not known yet
            tl.store(picked + rows, z_y.to(tl.float64), inside & first_split)
        part = parts + rows * tl.num_programs(1) + split
        for field in tl.static_range(9):
            tl.store(part + field * N * tl.num_programs(1), state[field].to(tl.float64), inside)


@triton.jit(do_not_specialize=tiles.VARYING)
def combine_kernel(parts, target, target_a, target_b, top, lse, picked, mass, wsum, entropy, argmax,
                   N, B, C, start, ignore_index, config: tl.constexpr):  # fmt: skip
    """One row for each program: the states of its K parts as its statistics."""
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, config.R)
    inside, place = rows < N, tiles.locate(rows, B)
    targets = tiles.row_at(target, place, target_a, target_b)
    counts, y = tiles.read_target(targets, inside, C, start, ignore_index, config)
    held = counts & (y >= 0)
    z_y = None if config.soft else tl.load(picked + rows, held, 0.0)
    part = parts + rows[:, None] * config.K + tl.arange(0, config.K)[None, :]
    state = ()
    for field in tl.static_range(9):
        number = tl.load(part + field * N * config.K)
        state += (number.to(tl.int32 if field == 8 else config.real),)
    state = merge_lanes(state, config)
    write_statistics(state, rows, inside, counts, held, z_y, top, lse, picked, mass, wsum, entropy, argmax)
