"""The gradient: each logit of the rows that count is read once, and each gradient written once, 0 to the other rows.

Logits and gradient may be the same memory: a program reads a tile, the target's logit with it, before it writes it,
and nobody else touches what is in it.
"""

import triton
import triton.language as tl

from .triton_rows import VARYING, address, cut, edges, exp, interior, read_target, scores


@triton.jit
def number(of, stride, rows, counts):
    """One float64 for each row that counts."""
    return tl.load(of + rows * stride, counts, 0.0)


@triton.jit
def coefficients(top, lse, g_lse, g_entropy, how: tl.constexpr):
    """top, a and h, so that p (g_lse - g_entropy log p) = exp(t) (a - h t) with t = z - top.

    lse is in the two factors of the row, which are taken in float64 and rounded once.
    """
    factor, h = tl.exp(-lse), None
    if g_entropy is not None:
        g_lse += g_entropy * lse
        h = (g_entropy * factor).to(how.real)[:, None, None]
    return top.to(how.real)[:, None, None], (g_lse * factor).to(how.real)[:, None, None], h


@triton.jit
def write(x, out, q, w, offset, column, there, counts, y, numbers, h, b, strides, bend,
          aligned: tl.constexpr, how: tl.constexpr):  # fmt: skip
    """The gradient at `offset` from out: z' (exp(t) (a - h t) + g [c = y] + b w) with t = z - top, rounded once."""
    top, a, g = numbers
    c_stride, out_stride, q_stride = strides
    x = tl.load(address(x, offset, c_stride, how.x_align, aligned), there & counts, 0.0)
    z, slope = scores(x, bend, how)
    t = z - top
    if h is not None:
        a = a - h * tl.maximum(t, -1e4)  # p log p is 0 where p is 0: no 0 * -inf
    d = exp(t, how) * a
    if w is not None:
        w = tl.load(address(w, offset, 1, how.w_align, aligned), there, 0.0)
    if q is None:
        d += tl.where(column == y, g, 0.0)
    else:
        q = tl.load(address(q, offset, q_stride, how.q_align, aligned), there, 0.0).to(how.real)
        d += g * q if w is None else g * (q * w)
    if b is not None:
        d += b if w is None else b * w
    if how.scaled or how.capped:
        d *= slope
    # Of a row that does not count every number is 0, and with them d.
    tl.store(address(out, offset, out_stride, how.out_align, aligned), d.to(out.dtype.element_ty), there)


@triton.jit(do_not_specialize=VARYING)
def row_gradient_kernel(
    x, x_stride, c_stride, out, out_stride, oc_stride,  # (N, C) each; out may be x
    target, t_stride, q_stride,  # (N,) indices, or (N, C) probabilities
    w,  # (C,) class weights
    top, top_stride, lse, lse_stride,  # (N,) each, and so are these:
    g_lse, gl_stride, g_picked, gp_stride, g_wsum, gw_stride, g_entropy, ge_stride,
    N, C, start, ignore_index, scale: tl.float64, softcap: tl.float64,
    span,  # vectors of a row for each program, whole tiles
    how: tl.constexpr,
):  # fmt: skip
    """Reads each logit of the rows that count once, and writes each gradient once; to the others it writes 0."""
    rows = tl.program_id(0).to(tl.int64) * how.R + tl.arange(0, how.R)
    split = tl.program_id(1)
    inside = rows < N
    counts, y = read_target(target, t_stride, rows, inside, C, start, ignore_index, how)
    h = None if g_entropy is None else number(g_entropy, ge_stride, rows, counts)
    base, log_sum = number(top, top_stride, rows, counts), number(lse, lse_stride, rows, counts)
    base, a, h = coefficients(base, log_sum, number(g_lse, gl_stride, rows, counts), h, how)
    g = number(g_picked, gp_stride, rows, counts).to(how.real)[:, None, None]
    b = None if g_wsum is None else number(g_wsum, gw_stride, rows, counts).to(how.real)[:, None, None]
    numbers, strides, bend = (base, a, g), (c_stride, oc_stride, q_stride), (scale, softcap)

    row, result = x + rows * x_stride, out + rows * out_stride
    head, vectors = cut(row, C, how)
    q = target + rows * t_stride if how.soft else None
    k = None if w is None else w + tl.zeros_like(rows)
    y, inside, counts = y[:, None, None], inside[:, None, None], counts[:, None, None]
    if how.edges:
        single, there = edges(head, vectors, C, how)
        there &= inside & (rows * 0 + split == 0)[:, None, None]  # as in `row_statistics_kernel`
        write(row, result, q, k, single, single, there, counts, y, numbers, h, b, strides, bend, False, how)
        row, result = row + head, result + head.to(tl.int64) * oc_stride
        q, k = None if q is None else q + head.to(tl.int64) * q_stride, None if k is None else k + head
    head, vectors = head[:, None, None], vectors[:, None, None]
    for first in range(split * span, tl.minimum(split * span + span, tl.max(vectors)), how.K):
        vector, offset = interior(first, how)
        there = inside & (vector < vectors)
        column = head + offset
        write(row, result, q, k, offset, column, there, counts, y, numbers, h, b, strides, bend, True, how)
