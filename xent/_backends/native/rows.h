// The two passes over the logits, for one instruction set: native.cpp includes this file once for each, inside a
// namespace, with LOOP defined as the attributes of a function that is compiled for it, and NAME as its name.
//
//     statistics  reads each logit from memory once; writes a few numbers per row
//     gradient    reads each logit once, writes each gradient once; `out` may lie over the logits
//
// Neither stores a probability. A row is taken in pieces that stay in the first-level cache, so that several loops
// over a piece read memory once between them. T is a type in memory, F that of the arithmetic on it: double for
// double, float for the others. Numbers per row are double.

constexpr int CHUNK = 512;        // classes whose sums are taken in F: each of the lanes adds 32
constexpr int PIECE = 2 * CHUNK;  // classes that are gone over several times
constexpr int AHEAD = 8192;  // bytes

template <class T>
using Compute = decltype(widen(T{}));

#include "loops.h"
#include "tiles.h"
#include "lanes.h"
#include "numbers.h"
#include "blocks.h"
#include "candidates.h"

// ------------------------------------------------------------------------------------------------- pieces

template <class T, class F>
INLINE const F* converted(const Matrix& x, int64_t row, int64_t at, int n, F* buffer) {
    T t_buffer[PIECE];
    const T* t = x.at<T>(row, at);
    if constexpr (std::is_same_v<T, F>) {
        if (x.class_stride == 1) return t;
    }
    if (x.class_stride != 1) {
        gather(t, x.class_stride, n, t_buffer);
        t = t_buffer;
    }
    convert(t, n, F(1), buffer);
    return buffer;
}

template <class F>
INLINE const F* probabilities(const Call& c, int64_t row, int64_t at, int n, F* buffer) {
    if (c.target_kind == FLOAT32) return converted<float>(c.target, row, at, n, buffer);
    if (c.target_kind == BFLOAT16) return converted<BFloat16>(c.target, row, at, n, buffer);
    if (c.target_kind == FLOAT16) return converted<Float16>(c.target, row, at, n, buffer);
    return converted<double>(c.target, row, at, n, buffer);
}

// exp is taken relative to the maximum so far, which is nearly always that of the whole row after the first pieces.
template <class T, class F>
INLINE void add_exp(const Call& c, Found& found, const T* x, const F* z, int n, int64_t at) {
    const F top = maximum(z, n);
    if (top > found.max) {
        rebase(found, top);
        if (c.argmax) found.argmax = at + find(z, n, top);
    }
    const F base = found.max == -INF ? 0 : F(found.max);  // only -inf yet: exp(-inf - 0), not exp(-inf - -inf)
    const char* logits = reinterpret_cast<const char*>(x);
    const Sums s = c.entropy ? sum_exp<true>(z, n, base, logits, sizeof(T)) : sum_exp<false>(z, n, base, logits, sizeof(T));
    if (c.argmax && s.sum != s.sum && found.max == found.max) {
        const F nan = std::numeric_limits<F>::quiet_NaN();
        const int first = find(z, n, nan);
        if (first < n) found.max = nan, found.argmax = at + first;  // stays, for nothing is larger than NaN
    }
    found.sum += s.sum;
    found.tilt += s.tilt;
}

template <class T, class F>
INLINE void add_piece(const Call& c, Found& found, int64_t row, int64_t y, int64_t at, int n) {
    F z_buffer[PIECE], q_buffer[PIECE];
    const T* x = c.logits.at<T>(row, at);
    const F* z = scores(c, x, n, z_buffer);
    const F* w = c.weight ? static_cast<const F*>(c.weight) + at : nullptr;
    add_exp(c, found, x, z, n, at);
    const F base = std::isfinite(found.max) ? F(found.max) : 0;
    if (c.has_wsum()) {
        const Products all = dot<F>(nullptr, w, z, n, base);
        found.weights += all.mass, found.wsum += all.total;
    }
    if (c.soft()) {
        const Products all = dot(probabilities(c, row, at, n, q_buffer), w, z, n, base);
        found.mass += all.mass, found.picked += all.total;
    } else if (at <= y && y < at + n) {
        found.picked = z[y - at];
    }
}

template <class T, class F>
INLINE void gradient_piece(const Call& c, int64_t row, int k, int64_t at, int n, const Factors<F>& of) {
    F z_buffer[PIECE], q_buffer[PIECE], d_buffer[PIECE];
    const T* x = c.logits.at<T>(row + k, at);
    const char* logits = reinterpret_cast<const char*>(x);
    const F* z = scores(c, x, n, z_buffer);
    const F* w = c.weight ? static_cast<const F*>(c.weight) + at : nullptr;
    T* out = c.out.at<T>(row + k, at);
    F* d = d_buffer;
    if constexpr (std::is_same_v<T, F>) d = out;
    c.g_entropy.data ? softmax<true>(z, n, of.top[k], of.a[k], of.h[k], d, logits, int(sizeof(T)))
                     : softmax<false>(z, n, of.top[k], of.a[k], of.h[k], d, logits, int(sizeof(T)));
    if (c.soft()) add_weighted(of.g_picked[k], probabilities(c, row + k, at, n, q_buffer), w, n, d);
    if (c.has_wsum()) add_weighted<F>(of.g_wsum[k], nullptr, w, n, d);
    if (c.softcap != 0) multiply_slope(z, n, F(c.softcap), d);
    if constexpr (!std::is_same_v<T, F>) store(d, n, out);
}

// ------------------------------------------------------------------------------------------------- rows

INLINE int piece(int64_t left) { return left < PIECE ? int(left) : PIECE; }

template <class T>
INLINE Found scan(const Call& c, int64_t row, int64_t y, int64_t at, int64_t end) {
    Found found;
    for (; at < end; at += PIECE) add_piece<T, Compute<T>>(c, found, row, y, at, piece(end - at));
    return found;
}

template <class T>
LOOP void statistics_by_row(const Call& c, int64_t task, int64_t row, int rows, int64_t at, int64_t end) {
    using F = Compute<T>;
    int64_t y[WIDTH];
    Totals<F> all;
    all.ignored = targets_of(c, row, rows, y);
    for (int k = 0; k < rows; ++k) {
        const Found found = y[k] == IGNORED ? Found() : scan<T>(c, row + k, y[k], at, end);
        if (c.parts > 1) return void(c.found[task] = found);
        put_found(found, k, all);
    }
    finish_block(c, task, row, rows, all, y);
    if (c.picks_candidates()) pick_rows<T>(c, row, row + rows);
}

template <class T>
INLINE void clear(const Call& c, int64_t row, int64_t at, int64_t end) {
    char* out = reinterpret_cast<char*>(c.out.at<T>(row, at));
    const int64_t bytes = (end - at) * int64_t(sizeof(T));
    if (c.zeros_begin <= out && out + bytes <= c.zeros_end) return;
    if (c.past_caches)
        clear_past_caches(out, bytes);
    else
        std::memset(out, 0, size_t(bytes));
}

template <class T>
LOOP void gradient_by_row(const Call& c, int64_t row, int rows, int64_t begin, int64_t end) {
    using F = Compute<T>;
    int64_t y[WIDTH];
    Factors<F> of;
    of.ignored = targets_of(c, row, rows, y);
    factors_of<T>(c, row, rows, y, begin, end, of);
    SumsOfEquals sums(c.picks_candidates() ? c.candidates.K : 0);
    if (c.picks_candidates() && !sums.entries) return void(*c.no_memory = true);
    for (int k = 0; k < rows; ++k) {
        if (y[k] == IGNORED) {
            clear<T>(c, row + k, begin, end);
            continue;
        }
        if (c.scattered) populate(reinterpret_cast<char*>(c.out.at<T>(row + k, begin)), (end - begin) * int64_t(sizeof(T)));
        if (sums.entries) pick_rows<T>(c, row + k, row + k + 1);
        for (int64_t at = begin; at < end; at += PIECE) gradient_piece<T>(c, row, k, at, piece(end - at), of);
        if (sums.entries) put_rows<T>(c, row + k, row + k + 1, sums);
        if (!c.soft() && begin <= y[k] && y[k] < end) narrow(of.of_target[k], *c.out.at<T>(row + k, y[k]));
    }
}

// ------------------------------------------------------------------------------------------------- tasks

template <class T>
LOOP void statistics(const Call& c, int64_t task) {
    const Call::Range r = c.range(task);
    for (int64_t row = r.row, rows; row < r.row_end; row += rows) {
        rows = block(c, row, r.row_end);
        c.by_class ? statistics_by_class<T>(c, task, row, int(rows), r.at, r.end)
                   : statistics_by_row<T>(c, task, row, int(rows), r.at, r.end);
    }
}

template <class T>
LOOP void gradient(const Call& c, int64_t task) {
    const Call::Range r = c.range(task);
    for (int64_t row = r.row, rows; row < r.row_end; row += rows) {
        rows = block(c, row, r.row_end);
        c.by_class ? gradient_by_class<T>(c, row, int(rows), r.at, r.end) : gradient_by_row<T>(c, row, int(rows), r.at, r.end);
    }
}

constexpr Kernels KERNELS = {
    NAME,
    {statistics<float>, statistics<BFloat16>, statistics<Float16>, statistics<double>},
    {gradient<float>, gradient<BFloat16>, gradient<Float16>, gradient<double>},
    {pick_task<float>, pick_task<BFloat16>, pick_task<Float16>, pick_task<double>},
    {put_task<float>, put_task<BFloat16>, put_task<Float16>, put_task<double>},
    finish_parts,
};
