"""How the kernels of triton_forward.py and triton_backward.py walk over a row, and read what is in it.

A row is cut into vectors of V logits, 16 bytes, which is what a thread loads at once where its address is a multiple
of 16:

    x_0 ... x_h-1 | V logits | V logits | ...                      | V logits | x_C-t ... x_C-1
      the edges     a vector                K vectors are a tile                  the edges

An odd C puts every row on another footing, so h differs from row to row. What lies before the first whole vector and
behind the last one, the edges, is at most 2 (V - 1) logits; they go through the same code, as a tile of single logits.
No byte outside a row is ever touched. Where the classes lie apart in memory, V is 1, and there are no edges.

A program takes R rows tile by tile, each tile (R, K, V), or its share of one row. A pointer that is None compiles away
what it is for. `how` is what else is known at compile time: see `triton_plan.How`.
"""

import triton
import triton.language as tl

VARYING = [  # numbers that may change from call to call without a new compilation
    *("x_stride", "c_stride", "out_stride", "oc_stride", "t_stride", "q_stride"),
    *("top_stride", "lse_stride", "gl_stride", "gp_stride", "gw_stride", "ge_stride"),
    *("N", "C", "start", "classes", "ignore_index", "span"),
]


@triton.jit
def read_target(target, stride, rows, inside, C, start, ignore_index, how: tl.constexpr):
    """Whether each row counts, and the column of its target: -1 where that is not among the C held here."""
    if how.soft:
        return inside, tl.full(rows.shape, -1, tl.int32)
    y = tl.load(target + rows * stride, inside, ignore_index).to(tl.int64)
    here = (y >= start) & (y - start < C)
    return inside & (y != ignore_index), tl.where(here, y - start, -1).to(tl.int32)


@triton.jit
def cut(row, C, how: tl.constexpr):
    """Of rows that begin at these addresses: the columns before the first vector, and the number of vectors."""
    head = tl.full(row.shape, 0, tl.int32)
    if how.edges:
        past = (row.to(tl.int64) & 15).to(tl.int32) // (16 // how.V)
        head = tl.minimum((how.V - past) % how.V, C)
    return head, (C - head) // how.V


@triton.jit
def interior(first, how: tl.constexpr):
    """The tile (1, K, V) that begins with vector number `first`: numbers of its vectors, and of their logits."""
    vector = first + tl.arange(0, how.K)[None, :, None]
    return vector, vector * how.V + tl.arange(0, how.V)[None, None, :]


@triton.jit
def edges(head, vectors, C, how: tl.constexpr):
    """The columns of the edges as a tile (R, K, 1), and which of these there are."""
    j, head, whole = tl.arange(0, how.K)[None, :, None], head[:, None, None], vectors[:, None, None] * how.V
    return tl.where(j < head, j, j + whole), j < C - whole


@triton.jit
def address(row, offset, stride, align: tl.constexpr, aligned: tl.constexpr):
    """Of the numbers at `offset` from the row. `align`: the bytes that its vectors are multiples of, 0 if a number's
    neighbour is `stride` away; `aligned`: whether these are whole vectors."""
    if align == 0:
        return row[:, None, None] + offset.to(tl.int64) * stride
    tile = row[:, None, None] + offset
    return tl.multiple_of(tile, [1, 1, align]) if aligned else tile


@triton.jit
def exp(t, how: tl.constexpr):
    """Through exp2, where the compiler takes the device's instruction as it is: tl.exp spends three more on results
    below 1e-38, which are 0 here."""
    return tl.exp(t) if how.real == tl.float64 else tl.exp2(t * 1.4426950408889634)


@triton.jit
def tanh(t, how: tl.constexpr):
    """Exact near 0, too: there, Lambert's t / (1 + t²/(3 + t²/(5 + ...))), and else (1 - e) / (1 + e), e = exp(-2t).

    Each is a quotient, and so one division does for both.
    """
    a, square = tl.abs(t), t * t
    e = exp(-2 * a, how)
    above_before, above = tl.zeros_like(a), a
    below_before, below = tl.zeros_like(a) + 1, tl.zeros_like(a) + 1
    terms: tl.constexpr = how.tanh_terms
    for odd in tl.static_range(3, terms, 2):
        above_before, above = above, odd * above + square * above_before
        below_before, below = below, odd * below + square * below_before
    small = a < 0.6
    quotient = tl.where(small, above, 1 - e) / tl.where(small, below, 1 + e)
    return tl.where(t < 0, -quotient, quotient)


@triton.jit
def scores(x, bend, how: tl.constexpr):
    """z and dz/dx; `bend` is (scale, softcap)."""
    z, scale, softcap = x.to(how.real), tl.full((), bend[0], how.real), tl.full((), bend[1], how.real)
    slope = scale
    if how.capped:
        bent = tanh(z * (scale / softcap), how)
        z, slope = bent * softcap, scale * (1 - bent * bent)
    elif how.scaled:
        z *= scale
    return z, slope
