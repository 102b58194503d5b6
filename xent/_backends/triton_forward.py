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

from .triton_rows import VARYING, address, cut, edges, exp, interior, read_target, scores

NEVER = tl.constexpr(2**31 - 1)  # a column that no row has
MINUS_INFINITY = tl.constexpr(float("-inf"))


@triton.jit
def nothing(how: tl.constexpr):
    """The state (R, K) of lanes that have not seen a score."""
    zero = tl.full([how.R, how.K], 0.0, how.real)
    m, where = tl.full([how.R, how.K], how.lowest, how.real), tl.full([how.R, how.K], NEVER, tl.int32)
    return m, zero, zero, zero, zero, zero, zero, zero + MINUS_INFINITY, where


@triton.jit
def weighed(total, mass, move, k, u):
    """`total` with sum k u, `mass` with sum k. A coefficient of 0 adds 0, even where u is infinite."""
    return total + mass * move + tl.sum(tl.where(k == 0, 0.0, k * u), 2), mass + tl.sum(k, 2)


@triton.jit
def absorb(state, z, w, t, column, how: tl.constexpr):
    """The state after a tile of scores. Where there is none, z is -inf, and w and t are 0."""
    m, s, eu, wu, wk, tu, tk, top, where = state
    peak = tl.maximum(m, tl.max(z, 2))
    shrink, move = exp(m - peak, how), tl.maximum(m - peak, how.lowest)  # not -inf: of an empty sum that made 0 * -inf
    u = z - peak[:, :, None]
    e = exp(u, how)
    if how.entropy:
        eu = shrink * eu + shrink * s * move + tl.sum(tl.where(e == 0, 0.0, e * u), 2)
    s = shrink * s + tl.sum(e, 2)
    if w is not None:
        wu, wk = weighed(wu, wk, move, w, u)
    if t is not None:
        tu, tk = weighed(tu, tk, move, t, u)
    if how.argmax:  # for torch, NaN is above +inf
        key = tl.where(z == z, tl.minimum(z, -how.lowest), -MINUS_INFINITY)
        best = tl.max(key, 2)
        first = tl.min(tl.where(key == best[:, :, None], column, NEVER), 2)
        where = tl.where(best > top, first, tl.where(best == top, tl.minimum(where, first), where))
        top = tl.maximum(top, best)
    return peak, s, eu, wu, wk, tu, tk, top, where


@triton.jit
def collapse(state, how: tl.constexpr):
    """The state (R,) of rows from the states (R, K) of their lanes."""
    m, s, eu, wu, wk, tu, tk, top, where = state
    peak, best = tl.max(m, 1), tl.max(top, 1)
    shrink, move = exp(m - peak[:, None], how), tl.maximum(m - peak[:, None], how.lowest)
    eu = tl.sum(shrink * eu + shrink * s * move, 1)
    wu, tu = tl.sum(wu + wk * move, 1), tl.sum(tu + tk * move, 1)
    where = tl.min(tl.where(top == best[:, None], where, NEVER), 1)
    return peak, tl.sum(shrink * s, 1), eu, wu, tl.sum(wk, 1), tu, tl.sum(tk, 1), best, where


@triton.jit
def finish(state, rows, inside, counts, here, z_y, top, lse, picked, mass, wsum, entropy, argmax):
    """Write the statistics of rows, relative to their largest score, where that is finite. z_y where it is `here`."""
    m, s, eu, wu, _, tu, tk, _, where = state
    finite = (s > 0) & (m < -MINUS_INFINITY)  # m is the lowest number, not -inf, where no score was above that
    log_s = tl.log(s.to(tl.float64))
    tl.store(top + rows, tl.where(counts & finite, m, 0.0).to(tl.float64), inside)
    tl.store(lse + rows, tl.where(counts, log_s, 0.0), inside)
    if mass is None:
        tl.store(
            picked + rows, tl.where(here, z_y.to(tl.float64) - tl.where(finite, m, 0.0).to(tl.float64), 0.0), inside
        )
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
def read(state, x, q, w, offset, column, there, c_stride, q_stride, bend,
         aligned: tl.constexpr, how: tl.constexpr):  # fmt: skip
    """The state after the tile at `offset` from x, q and w, as far as it is `there`."""
    x = tl.load(address(x, offset, c_stride, how.x_align, aligned), there, MINUS_INFINITY)
    z, _ = scores(x, bend, how)
    if how.scaled or how.capped:
        z = tl.where(there, z, MINUS_INFINITY)
    k, t = None, None
    if w is not None:
        k = tl.load(address(w, offset, 1, how.w_align, aligned), there, 0.0)
    if q is not None:
        t = tl.load(address(q, offset, q_stride, how.q_align, aligned), there, 0.0).to(how.real)
        t = t if w is None else t * k
    if not how.wsum:
        k = None
    elif w is None:
        k = tl.where(there, tl.zeros_like(z) + 1, 0.0)
    return absorb(state, z, k, t, column, how)


@triton.jit(do_not_specialize=VARYING)
def row_statistics_kernel(
    x, x_stride, c_stride,  # (N, C) logits
    target, t_stride, q_stride,  # (N,) indices, or (N, C) probabilities
    w,  # (C,) class weights
    top, lse, picked, mass, wsum, entropy, argmax,  # (N,) results; None where not wanted
    parts,  # (9, N, splits) states, where more than one program shares a row
    in_range,  # set to 0 by an index that is not
    N, C, start, classes, ignore_index, scale: tl.float64, softcap: tl.float64,
    span,  # vectors of a row for each program, whole tiles
    how: tl.constexpr,
):  # fmt: skip
    """Reads each logit of the rows that count once."""
    rows = tl.program_id(0).to(tl.int64) * how.R + tl.arange(0, how.R)
    split = tl.program_id(1)
    first_split = rows * 0 + split == 0  # for each row, as are all masks: the interpreter takes none made from a scalar
    inside = rows < N
    counts, y = read_target(target, t_stride, rows, inside, C, start, ignore_index, how)
    row, bend = x + rows * x_stride, (scale, softcap)
    here, z_y = counts & (y >= 0), None
    if not how.soft:
        index = tl.load(target + rows * t_stride, inside, ignore_index).to(tl.int64)
        tl.store(in_range + rows * 0, 0, (index != ignore_index) & ((index < 0) | (index >= classes)))
        z_y, _ = scores(tl.load(row + y.to(tl.int64) * c_stride, here, 0.0), bend, how)

    head, vectors = cut(row, C, how)
    q = target + rows * t_stride if how.soft else None
    k = None if w is None else w + tl.zeros_like(rows)
    state = nothing(how)
    if how.edges:
        single, there = edges(head, vectors, C, how)
        there &= (counts & first_split)[:, None, None]
        state = read(state, row, q, k, single, single, there, c_stride, q_stride, bend, False, how)
        row, q, k = row + head, None if q is None else q + head.to(tl.int64) * q_stride, None if k is None else k + head
    begin = split * span
    end = tl.minimum(begin + span, tl.max(tl.where(counts, vectors, 0), 0))  # none to read if no row counts
    for first in range(begin, end, how.K):
        vector, offset = interior(first, how)
        there = counts[:, None, None] & (vector < vectors[:, None, None])
        column = head[:, None, None] + offset
        state = read(state, row, q, k, offset, column, there, c_stride, q_stride, bend, True, how)

    state = collapse(state, how)
    if parts is None:
        finish(state, rows, inside, counts, here, z_y, top, lse, picked, mass, wsum, entropy, argmax)
    else:
        if not how.soft:  # as it is: the largest score is not known yet
            tl.store(picked + rows, z_y.to(tl.float64), inside & first_split)
        part = parts + rows * tl.num_programs(1) + split
        for field in tl.static_range(9):
            tl.store(part + field * N * tl.num_programs(1), state[field].to(tl.float64), inside)


@triton.jit(do_not_specialize=VARYING)
def combine_kernel(parts, target, t_stride, top, lse, picked, mass, wsum, entropy, argmax,
                   N, C, start, ignore_index, how: tl.constexpr):  # fmt: skip
    """One row for each program: the states of its K parts as its statistics."""
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, how.R)
    counts, y = read_target(target, t_stride, rows, rows < N, C, start, ignore_index, how)
    here = counts & (y >= 0)
    z_y = None if how.soft else tl.load(picked + rows, here, 0.0)
    part = parts + rows[:, None] * how.K + tl.arange(0, how.K)[None, :]
    state = ()
    for field in tl.static_range(9):
        number = tl.load(part + field * N * how.K)
        state += (number.to(tl.int32 if field == 8 else how.real),)
    finish(collapse(state, how), rows, rows < N, counts, here, z_y, top, lse, picked, mass, wsum, entropy, argmax)
