"""The gradient: each logit of the rows that count is read once, and each gradient written once, 0 to the other rows.

Logits and gradient may be the same memory: a program reads a tile, the target's logit with it, before it writes it,
and nobody else touches what is in it.
"""

import triton
import triton.language as tl

from . import tiles


@triton.jit
def load_number(tensor, a_stride, b_stride, place, counts):
    """One float64 for each row that counts."""
    return tl.load(tiles.row_at(tensor, place, a_stride, b_stride), counts, 0.0)


@triton.jit
def coefficients(top, lse, g_lse, g_entropy, config: tl.constexpr):
    """top, a and h, so that p (g_lse - g_entropy log p) = exp(t) (a - h t) with t = z - top.

    lse is in the two factors of the row, which are taken in float64 and rounded once.
    """
    factor, h = tl.exp(-lse), None
    if g_entropy is not None:
        g_lse += g_entropy * lse
        h = (g_entropy * factor).to(config.real)[:, None, None]
    return top.to(config.real)[:, None, None], (g_lse * factor).to(config.real)[:, None, None], h


@triton.jit
def write_tile(x, out, q, w, offset, column, mask, of_weights, read, counts, y, numbers, h, b, strides, score_options,
               aligned: tl.constexpr, config: tl.constexpr):  # fmt: skip
    """The gradient at `offset` from out: z' (exp(t) (a - h t) + g [c = y] + b w) with t = z - top, rounded once."""
    top, a, g = numbers
    x_c, out_c, target_c = strides
    tile = tiles.tile_at(x, offset, x_c, config.x_align, aligned, config)
    x = tiles.load_logits(tile, mask, counts, read, 0.0, config)
    z, slope = tiles.scores(x, score_options, config)
    t = z - top
    if h is not None:
        a = a - h * tl.maximum(t, -1e4)  # p log p is 0 where p is 0: no 0 * -inf
    d = tiles.exp(t, config) * a
    if w is not None:
        w = tl.load(tiles.tile_at(w, offset, 1, config.w_align, aligned, config), of_weights, 0.0)
    if q is None:
        d += tl.where(column == y, g, 0.0)
    else:
        q = tl.load(tiles.tile_at(q, offset, target_c, config.q_align, aligned, config), mask, 0.0).to(config.real)
        d += g * q if w is None else g * (q * w)
    if b is not None:
        d += b if w is None else b * w
    if config.scaled or config.capped:
        d *= slope
    # Of a row that does not count every number is 0, and with them d.
    tl.store(tiles.tile_at(out, offset, out_c, config.out_align, aligned, config), d.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=tiles.VARYING)
def row_gradient_kernel(
    x, x_a, x_b, x_c, out, out_a, out_b, out_c,  # (A, B, C) each, and their strides; out may be x
    target, target_a, target_b, target_c,  # (A, B) indices, or (A, B, C) probabilities
    w,  # (C,) class weights
    top, top_a, top_b, lse, lse_a, lse_b,  # (A, B) each, and so are these:
    g_lse, gl_a, gl_b, g_picked, gp_a, gp_b, g_wsum, gw_a, gw_b, g_entropy, ge_a, ge_b,
    N, B,  # rows, and how many of them each a has; B is None where one stride leads from row to row
    C, start, ignore_index, scale: tl.float64, softcap: tl.float64,
    span,  # vectors of a row for each program, whole tiles
    config: tl.constexpr,
):  # fmt: skip
    """Reads each logit of the rows that count once, and writes each gradient once; to the others it writes 0."""
    rows, inside, place = tiles.rows_of_program(N, B, config)
    split = tl.program_id(1)
    row = tiles.logits_at(x, place, x_a, x_b, config.x_align, config)
    result = tiles.logits_at(out, place, out_a, out_b, config.out_align, config)
    targets = tiles.logits_at(target, place, target_a, target_b, config.q_align, config)
    counts, y = tiles.read_target(targets, inside, C, start, ignore_index, config)
    h = None if g_entropy is None else load_number(g_entropy, ge_a, ge_b, place, counts)
    base, log_sum = load_number(top, top_a, top_b, place, counts), load_number(lse, lse_a, lse_b, place, counts)
    base, a, h = coefficients(base, log_sum, load_number(g_lse, gl_a, gl_b, place, counts), h, config)
    g = load_number(g_picked, gp_a, gp_b, place, counts).to(config.real)[:, None, None]
    b = None if g_wsum is None else load_number(g_wsum, gw_a, gw_b, place, counts).to(config.real)[:, None, None]
    numbers, strides, score_options = (base, a, g), (x_c, out_c, target_c), (scale, softcap)

    head, vectors = tiles.whole_vectors(row, C, config)
    q = targets if config.soft else None
    k = tiles.weights_at(w, rows, config)
    read = tiles.to_be_read(counts, config)[:, None, None]
    y, inside, counts = y[:, None, None], inside[:, None, None], counts[:, None, None]
    if config.edges:
        single, mask = tiles.edge_tile(head, vectors, C, config)
        mask &= inside & (rows * 0 + split == 0)[:, None, None]  # as in `row_statistics_kernel`
        write_tile(row, result, q, k, single, single, mask, mask, read, counts, y, numbers, h, b, strides,
                   score_options, False, config)  # fmt: skip
        row, result = row + head, result + head.to(tl.int64) * out_c
        q, k = None if q is None else q + head.to(tl.int64) * target_c, None if k is None else k + head
    head, vectors = head[:, None, None], vectors[:, None, None]
    for first in range(split * span, tl.minimum(split * span + span, tl.max(vectors)), config.K):
        vector, offset = tiles.vector_tile(first, config)
        there = tiles.within(vector, offset, vectors, C, config)
        mask = inside & there
        of_weights = there if config.across else mask
        column = head + offset
        write_tile(row, result, q, k, offset, column, mask, of_weights, read, counts, y, numbers, h, b, strides,
                   score_options, True, config)  # fmt: skip
