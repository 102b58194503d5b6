// The two passes for a block of rows, class by class; see lanes.h. A block goes through in steps of some classes, as
// many as a tile holds.

// No sums yet, of those that are wanted; of a part of a row, of all, since parts are merged.
template <class F>
LOOP void clear(const Call& c, int rows, Totals<F>& all) {
    const size_t bytes = size_t(rows) * sizeof(double);
    const bool part = c.parts > 1;
    std::memset(all.sum, 0, bytes);
    if (part || c.entropy) std::memset(all.tilt, 0, bytes);
    if (part || c.argmax) std::memset(all.argmax, 0, bytes);
    if (part || c.soft()) std::memset(all.picked, 0, bytes), std::memset(all.mass, 0, bytes);
    if (part || c.has_wsum()) std::memset(all.wsum, 0, bytes), std::memset(all.weights, 0, bytes);
}

// Express the sums in terms of larger tops. Of a row that was -inf so far they are 0.
template <class F>
LOOP void rebase(const Call& c, Totals<F>& all, const F* before, int rows) {
    const bool entropy = c.entropy, soft = c.soft(), has_wsum = c.has_wsum();
#pragma omp simd
    for (int k = 0; k < rows; ++k) {
        const double d = before[k] == all.top[k] || before[k] == -F(INF) ? 0 : double(before[k]) - double(all.top[k]);
        const double factor = exponential(d);
        if (entropy) all.tilt[k] = factor * (all.tilt[k] + d * all.sum[k]);
        all.sum[k] *= factor;
        if (soft) all.picked[k] += all.mass[k] * d;
        if (has_wsum) all.wsum[k] += all.weights[k] * d;
    }
}

template <class F>
LOOP void add_probabilities(const Call& c, Lanes<F> z, int64_t row, int rows, int64_t at, int n, const F* base, Totals<F>& all) {
    F tile[SIZE];
    const Lanes<F> q = load_probabilities(c, row, rows, at, n, tile);
    const F* w = c.weight ? static_cast<const F*>(c.weight) + at : nullptr;
    add_products(q, w, z, n, rows, base, all.mass, all.picked);
}

constexpr int FEW = 8;  // classes that are compared with the targets in less time than numbers are looked up

// y - at, exact where it is small; elsewhere nothing small, perhaps NaN. (The digits of 2^52 + i are those of i.)
template <class F>
LOOP void differences(const int64_t* y, int64_t at, int rows, F* out) {
#pragma omp simd
    for (int k = 0; k < rows; ++k) out[k] = F(bits<double>(uint64_t(y[k] - at) | bits<uint64_t>(0x1p52)) - 0x1p52);
}

// The numbers of the targets among n classes from `at` on. Without a branch, since some targets may be elsewhere.
template <class F>
LOOP void pick(Lanes<F> z, int n, int rows, const int64_t* y, int64_t at, F* picked) {
    F own[WIDTH];
    if (n <= FEW) differences(y, at, rows, own);
    for (int i = 0; i < n && n <= FEW; ++i) {
        const F* z_i = z[i];
        const F c = F(i);
#pragma omp simd
        for (int k = 0; k < rows; ++k) picked[k] = own[k] == c ? z_i[k] : picked[k];
    }
    for (int k = 0; k < rows && n > FEW; ++k) {
        const uint64_t i = uint64_t(y[k] - at), end = uint64_t(n);
        const F value = z[int64_t(i < end ? i : 0)][k];
        picked[k] = i < end ? value : picked[k];
    }
}

template <class T>
LOOP void statistics_by_class(const Call& c, int64_t task, int64_t row, int rows, int64_t begin, int64_t end) {
    using F = Compute<T>;
    F tile[SIZE], before[WIDTH], base[WIDTH], largest[WIDTH];
    int64_t y[WIDTH];
    Totals<F> all;
    clear(c, rows, all);
    all.ignored = targets_of(c, row, rows, y);
    for (int k = 0; k < rows; ++k) all.top[k] = largest[k] = -F(INF), all.z_y[k] = 0;
    const int step = classes_of_step(rows, end - begin);
    for (int64_t at = begin; at < end; at += step) {
        const int n = end - at < step ? int(end - at) : step;
        std::memcpy(before, all.top, sizeof before);
        const Lanes<F> z = load<T>(c.logits, row, rows, at, n, F(c.scale), F(c.softcap), tile, all.top);
        const F* w = c.weight ? static_cast<const F*>(c.weight) + at : nullptr;
        if (at > begin) rebase(c, all, before, rows);
        for (int k = 0; k < rows; ++k) base[k] = all.top[k] == -F(INF) ? 0 : all.top[k];
        const Ahead next = next_step<T>(c.logits, row, rows, at + n, begin, end);
        c.entropy ? add_exp<true>(z, n, rows, base, all.sum, all.tilt, next)
                  : add_exp<false>(z, n, rows, base, all.sum, all.tilt, next);
        if (c.argmax) find_largest(z, n, rows, at, largest, all.argmax);
        for (int k = 0; k < rows && (c.has_wsum() || c.soft()); ++k) base[k] = std::isfinite(base[k]) ? base[k] : 0;
        if (c.has_wsum()) add_products<F>({}, w, z, n, rows, base, all.weights, all.wsum);
        if (c.soft()) add_probabilities(c, z, row, rows, at, n, base, all);
        if (!c.soft()) pick(z, n, rows, y, at, all.z_y);
    }
    if (c.parts == 1) return finish_block(c, task, row, rows, all, y);
    const F top = c.argmax ? largest[0] : all.top[0];  // a part of one row
    const double picked = c.soft() ? all.picked[0] : all.z_y[0];
    c.found[task] = {top, all.sum[0], all.tilt[0], picked, all.mass[0], all.wsum[0], all.weights[0], all.argmax[0]};
}

template <class F>
LOOP void put(const F* entry, const F* own, F c, int rows, F* d) {
#pragma omp simd
    for (int k = 0; k < rows; ++k) d[k] = own[k] == c ? entry[k] : d[k];
}

// Where there are too many classes to compare each of them with the targets.
template <class T, class F>
LOOP void put(const F* entry, int64_t row, int rows, const int64_t* y, int64_t begin, int64_t end, const Matrix& out) {
    T nowhere, *first = out.at<T>(row, begin);
    const bool step = in_step(out, row, rows);
    const int64_t row_stride = out.row_stride, class_stride = out.class_stride;
    for (int k = 0; k < rows; ++k) {
        const uint64_t i = uint64_t(y[k] - begin), count = uint64_t(end - begin);
        T* at = (step ? first + k * row_stride : out.at<T>(row + k, begin)) + int64_t(i) * class_stride;
        narrow(entry[k], *(i < count ? at : &nowhere));
    }
}

// Class by class, so that all that is done for one of them finds it in the first-level cache.
template <class T>
LOOP void gradient_by_class(const Call& c, int64_t row, int rows, int64_t begin, int64_t end) {
    using F = Compute<T>;
    F tile[SIZE], q_tile[SIZE], z_buffer[RUN], d_buffer[RUN], own[RUN], counts[RUN];
    int64_t y[RUN];
    Factors<F> of;
    of.ignored = targets_of(c, row, rows, y);
    for (int k = 0; k < rows && of.ignored; ++k) counts[k] = y[k] == IGNORED ? 0 : 1;
    factors_of<T>(c, row, rows, y, begin, end, of);
    const bool read_here = together(c.logits, row, rows), written_here = together(c.out, row, rows), few = !c.soft() && end - begin <= FEW;
    if (few) differences(y, begin, rows, own);
    const int step = classes_of_step(rows, end - begin);
    for (int64_t at = begin; at < end; at += step) {
        const int n = end - at < step ? int(end - at) : step;
        const F* w = c.weight ? static_cast<const F*>(c.weight) + at : nullptr;
        // What is written at once takes the place of one class; else the tile is turned back into rows.
        const Lanes<F> z{tile, tile_stride(rows)}, d{written_here ? d_buffer : tile, written_here ? 0 : z.stride};
        if (!read_here) load<T>(c.logits, row, rows, at, n, F(c.scale), F(c.softcap), tile);
        const Lanes<F> q = c.soft() ? load_probabilities(c, row, rows, at, n, q_tile) : Lanes<F>{};
        for (int i = 0; i < n; ++i) {
            if (read_here) prefetch_class<T>(c.logits, row, rows, at + i + 1);
            const F* z_i = read_here ? scores(c, c.logits.at<T>(row, at + i), rows, z_buffer) : z[i];
            F* d_i = d[i];
            if constexpr (std::is_same_v<T, F>)
                if (written_here) d_i = c.out.at<T>(row, at + i);
            // The slope needs the scores when the gradient is there already.
            if (c.softcap != 0 && d_i == z_i) std::memcpy(z_buffer, z_i, size_t(rows) * sizeof(F)), z_i = z_buffer;
            c.g_entropy.data ? softmax<true>(z_i, rows, of.top, of.a, of.h, d_i) : softmax<false>(z_i, rows, of.top, of.a, of.h, d_i);
            if (c.soft()) add_weighted(of.g_picked, q[i], w ? w + i : nullptr, rows, d_i);
            if (c.has_wsum()) add_weighted<F>(of.g_wsum, nullptr, w ? w + i : nullptr, rows, d_i);
            if (c.softcap != 0) multiply_slope(z_i, rows, F(c.softcap), d_i);
            if (few) put(of.of_target, own, F(at - begin + i), rows, d_i);
            if (of.ignored) keep(counts, rows, d_i);
            if constexpr (!std::is_same_v<T, F>)
                if (written_here) store(d_i, rows, c.out.at<T>(row, at + i));
        }
        if (!written_here) transpose_back<F, T>(d, row, rows, at, n, c.out);
    }
    if (!c.soft() && !few) put<T>(of.of_target, row, rows, y, begin, end, c.out);
}

// How many rows are a block. By class: where the classes are far apart in memory, as many as there may be, so that some
// cache lines of each follow each other; else what stays in the first-level cache. No block lies in two places.
inline int block(const Call& c, int64_t row, int64_t row_end) {
    const int64_t fitting = SIZE / 2 / (c.C + 1) / LANES * LANES, left = row_end - row, here = c.logits.B - row % c.logits.B;
    int64_t rows = !c.by_class || c.logits.class_stride != 1 || fitting > WIDTH ? WIDTH : fitting < 64 ? 64 : fitting;
    if (c.by_class && c.out.data && c.C > FEW && together(c.logits, row, RUN) && together(c.out, row, RUN)) rows = RUN;
    if (rows > left) rows = left;
    return int(c.by_class && rows > here && here >= LANES ? here : rows);
}
