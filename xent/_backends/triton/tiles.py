"""How the kernels of forward.py and backward.py find a row, walk over it, and read what is in it.

Row r of the A * B rows is (a, b) = (r // B, r % B) of a tensor (A, B, ...) of any strides. Where one stride leads from
each row to the next, B is None, and nothing is divided.

A row is cut into vectors of V logits, 16 bytes, which is what a thread loads at once where its address is a multiple
of 16:

    x_0 ... x_h-1 | V logits | V logits | ...                      | V logits | x_C-t ... x_C-1
      the edges     a vector                K vectors are a tile                  the edges

An odd C puts every row on another footing, so h differs from row to row. What lies before the first whole vector and
behind the last one, the edges, is at most 2 (V - 1) logits; they go through the same code, as a tile of single logits.
No byte outside a row is ever touched.

Where the classes lie apart, as in images, or are fewer than a vector holds, each lane has a row of its own instead, and
takes V classes of it at a time (config.across). If the rows lie side by side, and so many follow on each other, a
vector holds the same class of several rows.

A program takes R rows tile by tile, each tile (R, K, V), or its share of one row. An argument that is None compiles
away what it is for. `config` is what else is known at compile time: see `plan.KernelConfig`.
"""

import triton
import triton.language as tl

VARYING = [  # numbers that may change from call to call without a new compilation
    *("x_a", "x_b", "x_c", "out_a", "out_b", "out_c", "target_a", "target_b", "target_c"),  # strides
    *("top_a", "top_b", "lse_a", "lse_b", "gl_a", "gl_b", "gp_a", "gp_b", "gw_a", "gw_b", "ge_a", "ge_b"),
    *("N", "B", "C", "start", "classes", "ignore_index", "span", "slots"),
]


@triton.jit
def rows_of_program(N, B, config: tl.constexpr):
    """The rows of this program, whether there are so many, and (a, b) of each: of one a, where they are known to lie
    side by side."""
    program, lane = tl.program_id(0).to(tl.int64), tl.arange(0, config.R)
    if config.side_by_side:
        together: tl.constexpr = config.together
        stretches = (B + config.R - 1) // config.R
        a = program // stretches
        b = (program - a * stretches) * config.R + lane
        rows, inside, place = a * B + b, tl.max_constancy(b < B, [together]), (a, b)
    else:
        rows = program * config.R + lane
        inside, place = rows < N, locate(rows, B)
    return rows, inside, place


@triton.jit
def locate(rows, B):
    """(a, b) of these rows."""
    a = rows * 0 if B is None else rows // B
    return a, rows if B is None else rows - a * B


@triton.jit
def row_at(tensor, row, a_stride, b_stride):
    """Where these rows begin, or where their numbers are. `row` is (a, b)."""
    return tensor + row[0] * a_stride + row[1] * b_stride


@triton.jit
def logits_at(tensor, row, a_stride, b_stride, align: tl.constexpr, config: tl.constexpr):
    """The same of logits, or of what is like them, whose stride may be known. `align` is that of `tile_at`."""
    return row_at(tensor, row, a_stride, 1 if config.side_by_side and align > 0 else b_stride)


@triton.jit
def to_be_read(counts, config: tl.constexpr):
    """Rows side by side are read by vectors: all rows of a vector where one of them counts."""
    if config.together == 1:
        return counts
    together: tl.constexpr = config.together
    vectors: tl.constexpr = config.R // together
    most = tl.max(tl.reshape(counts.to(tl.int32), [vectors, together]), 1)
    most = tl.reshape(tl.broadcast_to(most[:, None], [vectors, together]), [config.R])
    return tl.max_constancy(most > 0, [together])


@triton.jit
def read_target(target, inside, C, start, ignore_index, config: tl.constexpr):
    """Whether each row counts, and the column of its target: -1 where that is not among the C held here."""
    if config.soft:
        return inside, tl.full(inside.shape, -1, tl.int32)
    y = tl.load(target, inside, ignore_index).to(tl.int64)
    held = (y >= start) & (y - start < C)
    return inside & (y != ignore_index), tl.where(held, y - start, -1).to(tl.int32)


@triton.jit
def whole_vectors(row, C, config: tl.constexpr):
    """Of rows that begin at these addresses: the columns before the first vector, and the number of vectors."""
    head = tl.full(row.shape, 0, tl.int32)
    if config.edges:
        past = (row.to(tl.int64) & 15).to(tl.int32) // (16 // config.V)
        head = tl.minimum((config.V - past) % config.V, C)
    if config.across:
        return head, head + (C + config.V - 1) // config.V
    return head, (C - head) // config.V


@triton.jit
def vector_tile(first, config: tl.constexpr):
    """The tile (1, K, V) that begins with vector number `first`: numbers of its vectors, and of their logits."""
    vector = first + tl.arange(0, config.K)[None, :, None]
    return vector, vector * config.V + tl.arange(0, config.V)[None, None, :]


@triton.jit
def within(vector, offset, vectors, C, config: tl.constexpr):
    """Which of these vectors, or of their logits, there are."""
    return offset < C if config.across else vector < vectors


@triton.jit
def edge_tile(head, vectors, C, config: tl.constexpr):
    """The columns of the edges as a tile (R, K, 1), and which of these there are."""
    j, head, whole = tl.arange(0, config.K)[None, :, None], head[:, None, None], vectors[:, None, None] * config.V
    return tl.where(j < head, j, j + whole), j < C - whole


@triton.jit
def tile_at(row, offset, stride, align: tl.constexpr, aligned: tl.constexpr, config: tl.constexpr):
    """Of the numbers at `offset` from the row. `align`: the bytes that its vectors are multiples of, 0 if a number's
    neighbour is `stride` away; `aligned`: whether these are whole vectors."""
    if align == 0 or config.across:
        tile = row[:, None, None] + offset.to(tl.int64) * stride
        return tile if align == 0 else tl.multiple_of(tile, [align, 1, 1])
    tile = row[:, None, None] + offset
    return tl.multiple_of(tile, [1, 1, align]) if aligned else tile


@triton.jit
def weights_at(w, rows, config: tl.constexpr):
    """Where the class weights begin for each of these rows; once, where all rows are at the same class."""
    begin = tl.zeros([1], tl.int64) if config.across else tl.zeros_like(rows)
    return None if w is None else w + begin


@triton.jit
def load_logits(tile, mask, counts, read, other: tl.constexpr, config: tl.constexpr):
    """Logits of the rows that count, `other` in the place of those that are only read with their neighbours."""
    x = tl.load(tile, mask & read, other)
    return x if config.together == 1 else tl.where(counts, x.to(config.real), other)


@triton.jit
def exp(t, config: tl.constexpr):
    """Through exp2, where the compiler takes the device's instruction as it is: tl.exp spends three more on results
    below 1e-38, which are 0 here."""
    return tl.exp(t) if config.real == tl.float64 else tl.exp2(t * 1.4426950408889634)


@triton.jit
def tanh(t, config: tl.constexpr):
    """Exact near 0, too: there, Lambert's t / (1 + t²/(3 + t²/(5 + ...))), and else (1 - e) / (1 + e), e = exp(-2t).

    Each is a quotient, and so one division does for both.
    """
    a, square = tl.abs(t), t * t
    e = exp(-2 * a, config)
    above_before, above = tl.zeros_like(a), a
    below_before, below = tl.zeros_like(a) + 1, tl.zeros_like(a) + 1
    terms: tl.constexpr = config.tanh_terms
    for odd in tl.static_range(3, terms, 2):
        above_before, above = above, odd * above + square * above_before
        below_before, below = below, odd * below + square * below_before
    small = a < 0.6
    quotient = tl.where(small, above, 1 - e) / tl.where(small, below, 1 + e)
    return tl.where(t < 0, -quotient, quotient)


@triton.jit
def scores(x, score_options, config: tl.constexpr):
    """z and dz/dx; `score_options` is (scale, softcap)."""
    z = x.to(config.real)
    scale, softcap = tl.full((), score_options[0], config.real), tl.full((), score_options[1], config.real)
    slope = scale
    if config.scaled:
        z *= scale
    if config.capped:
        ratio = tanh(z * (1 / softcap), config)  # scale / softcap may be infinite
        z, slope = ratio * softcap, scale * (1 - ratio * ratio)
    return z, slope
