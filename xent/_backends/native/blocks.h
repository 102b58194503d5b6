// The two passes for a block of rows, class by class; see lanes.h. A block goes through in steps of some classes, as
// many as a tile holds.

constexpr int64_t IGNORED = std::numeric_limits<int64_t>::min();

template <class F>
struct Totals {  // the sums of each row, in terms of its top so far: see `Found`
    F top[WIDTH];
    double sum[WIDTH], tilt[WIDTH], picked[WIDTH], mass[WIDTH], wsum[WIDTH], weights[WIDTH];
};

// Express the sums in terms of larger tops. Of a row that was -inf so far they are 0.
template <class F>
LOOP void rebase(Totals<F>& all, const F* before, int rows) {
#pragma omp simd
    for (int k = 0; k < rows; ++k) {
        const double d = before[k] == all.top[k] || before[k] == -F(INF) ? 0 : double(before[k]) - double(all.top[k]);
        const double factor = exponential(d);
        all.tilt[k] = factor * (all.tilt[k] + d * all.sum[k]);
        all.sum[k] *= factor;
        all.picked[k] += all.mass[k] * d;
        all.wsum[k] += all.weights[k] * d;
    }
}

template <class F>
LOOP void add_probabilities(const Call& c, Lanes<F> z, int64_t row, int rows, int64_t at, int n, const F* base, Totals<F>& all) {
    F tile[SIZE];
    const Lanes<F> q = load_probabilities(c, row, rows, at, n, tile);
    const F* w = c.weight ? static_cast<const F*>(c.weight) + at : nullptr;
    for (int i = 0; i < n; ++i) add_products(q[i], w ? w + i : nullptr, z[i], rows, base, all.mass, all.picked);
}

// The targets of a block, as y - start; IGNORED where a row does not count, and for probabilities 0. One that is no class
// is reported. It is nowhere among the classes that are read.
LOOP void targets_of(const Call& c, int64_t row, int rows, int64_t* y) {
    if (c.soft()) return void(std::memset(y, 0, size_t(rows) * sizeof *y));
    for (int k = 0; k < rows; ++k) y[k] = c.y(row + k);
    const int64_t ignore_index = c.ignore_index, start = c.start, classes = c.classes;
    bool bad = false;
#pragma omp simd reduction(| : bad)
    for (int k = 0; k < rows; ++k) {
        bad |= (y[k] < 0 || y[k] >= classes) && y[k] != ignore_index;
        y[k] = y[k] == ignore_index ? IGNORED : y[k] - start;
    }
    if (bad && c.bad) c.bad->store(true);
}

// The same as `finish`, of the rows of a block.
template <class F>
LOOP void finish_block(const Call& c, int64_t row, int rows, const Totals<F>& all, const int64_t* y, const int64_t* argmax) {
    double log_sum[WIDTH];
    logarithms(all.sum, rows, log_sum);
    double *top = c.top + row, *lse = c.lse + row, *picked = c.picked + row;
    const int64_t C = c.C;
    const bool soft = c.soft();
#pragma omp simd
    for (int k = 0; k < rows; ++k) {
        const bool counts = y[k] != IGNORED, here = counts && y[k] >= 0 && y[k] < C;
        const double found = all.top[k], finite = found - found == 0 && counts ? found : 0;
        top[k] = finite;
        lse[k] = counts ? log_sum[k] : 0;
        picked[k] = soft ? all.picked[k] : here ? all.picked[k] - finite : 0;
    }
    for (int k = 0; k < rows && c.mass; ++k) c.mass[row + k] = all.mass[k];
    for (int k = 0; k < rows && c.wsum; ++k) c.wsum[row + k] = y[k] == IGNORED ? 0 : all.wsum[k];
    for (int k = 0; k < rows && c.entropy; ++k)
        c.entropy[row + k] = y[k] == IGNORED ? 0 : log_sum[k] - all.tilt[k] / all.sum[k];
    for (int k = 0; k < rows && c.argmax; ++k) c.argmax[row + k] = y[k] == IGNORED ? -1 : argmax[k];
}

template <class T>
LOOP void statistics_by_class(const Call& c, int64_t task, int64_t row, int rows, int64_t at, int64_t end) {
    using F = Compute<T>;
    F tile[SIZE], before[WIDTH], base[WIDTH], largest[WIDTH];
    int64_t y[WIDTH], argmax[WIDTH] = {};
    Totals<F> all = {};
    targets_of(c, row, rows, y);
    for (int k = 0; k < rows; ++k) all.top[k] = largest[k] = -F(INF);
    for (int step = classes_of_tile(rows); at < end; at += step) {
        const int n = end - at < step ? int(end - at) : step;
        const Lanes<F> z = load<T>(c.logits, row, rows, at, n, F(c.scale), F(c.softcap), tile);
        const F* w = c.weight ? static_cast<const F*>(c.weight) + at : nullptr;
        std::memcpy(before, all.top, sizeof before);
        raise(z, n, rows, all.top);
        rebase(all, before, rows);
        for (int k = 0; k < rows; ++k) base[k] = all.top[k] == -F(INF) ? 0 : all.top[k];
        for (int i = 0; i < n; i += EXACT) {
            const int part = n - i < EXACT ? n - i : EXACT;
            const Lanes<F> some{z[i], z.stride};
            c.entropy ? add_exp<true>(some, part, rows, base, all.sum, all.tilt)
                      : add_exp<false>(some, part, rows, base, all.sum, all.tilt);
        }
        if (c.argmax) find_largest(z, n, rows, at, largest, argmax);
        for (int k = 0; k < rows && (c.wsum || c.soft()); ++k) base[k] = std::isfinite(base[k]) ? base[k] : 0;
        for (int i = 0; i < n && c.wsum; ++i)
            add_products<F>(nullptr, w ? w + i : nullptr, z[i], rows, base, all.weights, all.wsum);
        if (c.soft()) add_probabilities(c, z, row, rows, at, n, base, all);
        for (int k = 0; k < rows && !c.soft(); ++k)
            if (at <= y[k] && y[k] < at + n) all.picked[k] = z[y[k] - at][k];
    }
    if (c.parts == 1) return finish_block(c, row, rows, all, y, argmax);
    const F top = c.argmax ? largest[0] : all.top[0];  // a part of one row
    c.found[task] = {top, all.sum[0], all.tilt[0], all.picked[0], all.mass[0], all.wsum[0], all.weights[0], argmax[0]};
}

// p (g - e log p) = e^t (a - h t) with t = z - top, and lse in the two factors of the row, which are taken in double.
template <class F>
struct Factors {
    F top[WIDTH], a[WIDTH], h[WIDTH], g_picked[WIDTH], g_wsum[WIDTH];
    double lse[WIDTH], g_lse[WIDTH], g_target[WIDTH];
};

template <class F>
LOOP void factors_of(const Call& c, int64_t row, int rows, Factors<F>& of) {
    double minus[WIDTH] = {}, factor[WIDTH], g_entropy[WIDTH] = {};
    bool large = false;
#pragma omp simd reduction(| : large)
    for (int k = 0; k < rows; ++k) {
        of.lse[k] = c.lse_in[row + k];
        minus[k] = -of.lse[k];
        large |= !(minus[k] < 700);
    }
    exponentials(minus, rows, factor);
    for (int k = 0; k < rows && large; ++k) factor[k] = std::exp(minus[k]);
    for (int k = 0; k < rows && c.g_entropy.data; ++k) g_entropy[k] = c.g_entropy[row + k];
    const double scale = c.scale;
#pragma omp simd
    for (int k = 0; k < rows; ++k) {
        of.g_lse[k] = c.g_lse.data[(row + k) * c.g_lse.stride];
        of.g_target[k] = c.g_picked.data[(row + k) * c.g_picked.stride];
        of.top[k] = F(c.top_in.data[(row + k) * c.top_in.stride]);
        of.a[k] = F((of.g_lse[k] + g_entropy[k] * of.lse[k]) * (factor[k] * scale));
        of.h[k] = F(g_entropy[k] * (factor[k] * scale));
        of.g_picked[k] = F(of.g_target[k] * scale);
    }
    for (int k = 0; k < rows && c.g_wsum.data; ++k) of.g_wsum[k] = F(c.g_wsum[row + k] * scale);
}

// The gradient at the targets, whose scores are z_y: in double, since p - 1 may be tiny, and rounded once.
template <class F>
LOOP void entries_of_targets(const Call& c, int64_t row, int rows, const int64_t* y, const F* z_y, const Factors<F>& of, F* value) {
    const F* w = static_cast<const F*>(c.weight);
    double t[WIDTH] = {}, p[WIDTH], more[WIDTH] = {};
#pragma omp simd
    for (int k = 0; k < rows; ++k) t[k] = double(z_y[k]) - double(of.top[k]) - of.lse[k];
    exponentials(t, rows, p);
    for (int k = 0; k < rows && c.g_wsum.data; ++k)
        if (0 <= y[k] && y[k] < c.C) more[k] = c.g_wsum[row + k] * (w ? double(w[y[k]]) : 1);
    for (int k = 0; k < rows && c.g_entropy.data; ++k)
        more[k] -= t[k] < -1000 ? 0 : p[k] * c.g_entropy[row + k] * t[k];
    const double scale = c.scale, softcap = c.softcap;
#pragma omp simd
    for (int k = 0; k < rows; ++k) {
        const double u = softcap == 0 ? 0 : double(z_y[k]) / softcap;
        value[k] = F((p[k] * of.g_lse[k] + of.g_target[k] + more[k]) * scale * (1 - u * u));
    }
}

template <class F>
LOOP void add_probabilities(const Call& c, int64_t row, int rows, int64_t at, int n, const F* g, Lanes<F> d) {
    F tile[SIZE];
    const Lanes<F> q = load_probabilities(c, row, rows, at, n, tile);
    const F* w = c.weight ? static_cast<const F*>(c.weight) + at : nullptr;
    for (int i = 0; i < n; ++i) add_weighted(g, q[i], w ? w + i : nullptr, rows, d[i]);
}

template <class T>
LOOP void gradient_by_class(const Call& c, int64_t row, int rows, int64_t at, int64_t end) {
    using F = Compute<T>;
    F tile[SIZE], d_tile[SIZE];
    int64_t y[WIDTH];
    F z_y[WIDTH], value[WIDTH];
    Factors<F> of;
    targets_of(c, row, rows, y);
    factors_of(c, row, rows, of);
    const bool side_by_side = together(c.out, row, rows);
    for (int step = classes_of_tile(rows); at < end; at += step) {
        const int n = end - at < step ? int(end - at) : step;
        const Lanes<F> z = load<T>(c.logits, row, rows, at, n, F(c.scale), F(c.softcap), tile);
        const F* w = c.weight ? static_cast<const F*>(c.weight) + at : nullptr;
        Lanes<F> d{d_tile, tile_stride(rows)};
        if constexpr (std::is_same_v<T, F>)
            if (side_by_side) d = {c.out.at<T>(row, at), c.out.class_stride};
        for (int k = 0; k < rows; ++k) z_y[k] = at <= y[k] && y[k] < at + n ? z[y[k] - at][k] : 0;
        if (!c.soft()) entries_of_targets(c, row, rows, y, z_y, of, value);  // before d, which may lie over z
        c.g_entropy.data ? softmax<true>(z, n, rows, of.top, of.a, of.h, d) : softmax<false>(z, n, rows, of.top, of.a, of.h, d);
        if (c.soft()) add_probabilities(c, row, rows, at, n, of.g_picked, d);
        for (int i = 0; i < n && c.g_wsum.data; ++i) add_weighted<F>(of.g_wsum, nullptr, w ? w + i : nullptr, rows, d[i]);
        for (int i = 0; i < n && c.softcap != 0; ++i) multiply_slope(z[i], rows, F(c.softcap), d[i]);
        for (int k = 0; k < rows && !c.soft(); ++k) {
            if (at <= y[k] && y[k] < at + n) d[y[k] - at][k] = value[k];
            if (y[k] == IGNORED)
                for (int i = 0; i < n; ++i) d[i][k] = 0;
        }
        if (!side_by_side) {
            transpose_back<F, T>(d, row, rows, at, n, c.out);
        } else if constexpr (!std::is_same_v<T, F>) {
            for (int i = 0; i < n; ++i) store(d[i], rows, c.out.at<T>(row, at + i));
        }
    }
}

// How many rows are a block. By class: whole tiles, and no block that lies in two places.
inline int block(const Call& c, int64_t row, int64_t row_end) {
    const int64_t fitting = SIZE / (c.C + 1) / LANES * LANES, left = row_end - row, here = c.logits.B - row % c.logits.B;
    int64_t rows = fitting > WIDTH || !c.by_class ? WIDTH : fitting < 64 ? 64 : fitting;
    if (rows > left) rows = left;
    return int(c.by_class && rows > here && here >= LANES ? here : rows);
}
