// The two passes for a block of rows, class by class; see lanes.h. A block goes through in steps of some classes, as
// many as a tile holds.

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

template <class T>
LOOP void block_statistics(const Call& c, int64_t row, int rows, int64_t at, int64_t end, Found* found) {
    using F = Compute<T>;
    F tile[SIZE], before[WIDTH], base[WIDTH], largest[WIDTH];
    int64_t argmax[WIDTH] = {};
    Totals<F> all = {};
    for (int k = 0; k < rows; ++k) all.top[k] = largest[k] = -F(INF);
    const int step = SIZE / whole(rows);
    for (; at < end; at += step) {
        const int n = end - at < step ? int(end - at) : step;
        const Lanes<F> z = load<T>(c.logits, row, rows, at, n, F(c.scale), F(c.softcap), tile);
        const F* w = c.weight ? static_cast<const F*>(c.weight) + at : nullptr;
        std::memcpy(before, all.top, sizeof before);
        raise(z, n, rows, all.top);
        rebase(all, before, rows);
        for (int k = 0; k < rows; ++k) base[k] = std::isfinite(all.top[k]) || all.top[k] > 0 ? all.top[k] : 0;
        for (int i = 0; i < n; i += EXACT) {
            const int part = n - i < EXACT ? n - i : EXACT;
            const Lanes<F> some{z[i], z.stride};
            c.entropy ? add_exp<true>(some, part, rows, base, all.sum, all.tilt)
                      : add_exp<false>(some, part, rows, base, all.sum, all.tilt);
        }
        if (c.argmax) find_largest(z, n, rows, at, largest, argmax);
        for (int k = 0; k < rows; ++k) base[k] = std::isfinite(base[k]) ? base[k] : 0;
        for (int i = 0; i < n && c.wsum; ++i)
            add_products<F>(nullptr, w ? w + i : nullptr, z[i], rows, base, all.weights, all.wsum);
        if (c.soft()) {
            add_probabilities(c, z, row, rows, at, n, base, all);
            continue;
        }
        for (int k = 0; k < rows; ++k) {
            const int64_t y = c.y(row + k) - c.start - at;
            if (0 <= y && y < n) all.picked[k] = z[y][k];
        }
    }
    for (int k = 0; k < rows; ++k) {
        const F top = c.argmax ? largest[k] : all.top[k];
        found[k] = {top, all.sum[k], all.tilt[k], all.picked[k], all.mass[k], all.wsum[k], all.weights[k], argmax[k]};
    }
}

// p (g - e log p) = e^t (a - h t) with t = z - top, and lse in the two factors of the row, which are taken in double.
template <class F>
struct Factors {
    F top[WIDTH], a[WIDTH], h[WIDTH], g_picked[WIDTH], g_wsum[WIDTH];
    double lse[WIDTH];
};

template <class F>
LOOP void factors_of(const Call& c, int64_t row, int rows, Factors<F>& of) {
    double minus[WIDTH] = {}, factor[WIDTH];
    for (int k = 0; k < rows; ++k) minus[k] = -(of.lse[k] = c.lse_in[row + k]);
    exponentials(minus, rows, factor);
    for (int k = 0; k < rows; ++k) {
        if (!(minus[k] < 700)) factor[k] = std::exp(minus[k]);
        const double scaled = factor[k] * c.scale, g_entropy = c.g_entropy[row + k];
        of.top[k] = F(c.top_in[row + k]);
        of.a[k] = F((c.g_lse[row + k] + g_entropy * of.lse[k]) * scaled);
        of.h[k] = F(g_entropy * scaled);
        of.g_picked[k] = F(c.g_picked[row + k] * c.scale);
        of.g_wsum[k] = F(c.g_wsum[row + k] * c.scale);
    }
}

INLINE bool target_is_among(const Call& c, int64_t row, int64_t at, int n) {
    const int64_t y = c.y(row) - c.start - at;
    return 0 <= y && y < n;
}

// The entries of the targets: where they are among n classes, -1 elsewhere, and in double, since p - 1 may be tiny.
template <class F>
LOOP void entries_of_targets(const Call& c, Lanes<const F> z, int64_t row, int rows, int64_t at, int n, const Factors<F>& of, int64_t* where, double* value) {
    const F* w = c.weight ? static_cast<const F*>(c.weight) + at : nullptr;
    double z_y[WIDTH], t[WIDTH] = {}, p[WIDTH];
    for (int k = 0; k < rows; ++k) {
        const int64_t y = c.y(row + k) - c.start - at;
        where[k] = 0 <= y && y < n ? y : -1;
        z_y[k] = where[k] < 0 ? 0 : double(z[y][k]);
        t[k] = z_y[k] - c.top_in[row + k] - of.lse[k];
    }
    exponentials(t, rows, p);
    for (int k = 0; k < rows; ++k) {
        const double u = c.softcap == 0 ? 0 : z_y[k] / c.softcap;
        const double p_term = t[k] < -1000 ? 0 : p[k] * (c.g_lse[row + k] - c.g_entropy[row + k] * t[k]);
        const double w_term = c.g_wsum[row + k] * (w && where[k] >= 0 ? double(w[where[k]]) : 1);
        value[k] = (p_term + c.g_picked[row + k] + w_term) * c.scale * (1 - u * u);
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
LOOP void block_gradient(const Call& c, int64_t row, int rows, int64_t at, int64_t end) {
    using F = Compute<T>;
    F tile[SIZE], d_tile[SIZE];
    int64_t where[WIDTH];
    double value[WIDTH];
    Factors<F> of;
    factors_of(c, row, rows, of);
    const bool direct = std::is_same_v<T, F> && together(c.out, row, rows);
    const int step = SIZE / whole(rows);
    for (; at < end; at += step) {
        const int n = end - at < step ? int(end - at) : step;
        const Lanes<F> z = load<T>(c.logits, row, rows, at, n, F(c.scale), F(c.softcap), tile);
        const F* w = c.weight ? static_cast<const F*>(c.weight) + at : nullptr;
        Lanes<F> d{d_tile, whole(rows)};
        if constexpr (std::is_same_v<T, F>)
            if (direct) d = {c.out.at<T>(row, at), c.out.class_stride};
        if (!c.soft()) entries_of_targets(c, Lanes<const F>{z.at, z.stride}, row, rows, at, n, of, where, value);  // before d, which may lie over z
        c.g_entropy.data ? softmax<true>(z, n, rows, of.top, of.a, of.h, d) : softmax<false>(z, n, rows, of.top, of.a, of.h, d);
        if (c.soft()) add_probabilities(c, row, rows, at, n, of.g_picked, d);
        for (int i = 0; i < n && c.g_wsum.data; ++i) add_weighted<F>(of.g_wsum, nullptr, w ? w + i : nullptr, rows, d[i]);
        for (int i = 0; i < n && c.softcap != 0; ++i) multiply_slope(z[i], rows, F(c.softcap), d[i]);
        for (int k = 0; k < rows && !c.soft(); ++k) {
            if (where[k] >= 0) d[where[k]][k] = F(value[k]);
            for (int i = 0; i < n && c.ignored(row + k); ++i) d[i][k] = 0;
        }
        if (direct) continue;
        if (together(c.out, row, rows))
            for (int i = 0; i < n; ++i) store(d[i], rows, c.out.at<T>(row, at + i));
        else
            transpose_back<F, T>(d, row, rows, at, n, c.out);
    }
}

// How many rows are a block: whole tiles, and no block that lies in two places.
inline int block(const Call& c, int64_t row, int64_t row_end) {
    const int64_t fitting = SIZE / c.C / LANES * LANES, left = row_end - row, here = c.logits.B - row % c.logits.B;
    int64_t rows = fitting < 64 ? 64 : fitting > WIDTH ? WIDTH : fitting;
    if (rows > left) rows = left;
    return int(rows > here && here >= LANES ? here : rows);
}
