// The sparse gradient of a linear head, for one instruction set, as rows.h is: which probabilities of a row are kept,
// and the products of what is kept with a dense matrix.
//
//     samples      reads each logit once; writes the classes and probabilities that are kept to the row's slots
//     gather_sums  sums of rows of a matrix, with coefficients; each is summed by one thread, in order

constexpr int GROUP = 64;  // classes: what is looked at one by one where one of them is kept
constexpr int COLUMNS = 1024;  // columns that are summed at a time: they stay in the first-level cache

INLINE int whole(int n) { return (n + LANES - 1) / LANES * LANES; }

// Whole vectors of scores, the last filled up with -inf, whose probability is 0.
template <class T, class F>
INLINE const F* padded_scores(const Call& c, const T* x, int n, F* buffer) {
    const F* z = scores(c, x, n, buffer);
    if (n == whole(n)) return z;
    if (z != buffer) std::memcpy(buffer, z, size_t(n) * sizeof(F));
    for (int i = n; i < whole(n); ++i) buffer[i] = -F(INF);
    return buffer;
}

template <class F>
struct Parts {  // of some p: their sum and the largest, in lanes
    F sum[LANES], peak[LANES];
};

template <class F>
INLINE F sum_of(const Parts<F>& some) {
    F sum[LANES / 2];
    for (int k = 0; k < LANES / 2; ++k) sum[k] = some.sum[k] + some.sum[k + LANES / 2];
    return (sum[0] + sum[4]) + (sum[1] + sum[5]) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}

template <class F>
INLINE F peak_of(const Parts<F>& some) {
    F peak[LANES];
    for (int k = 0; k < LANES; ++k) peak[k] = some.peak[k];
    return largest_of_lanes(peak);
}

template <class F>
INLINE Parts<F> lanes_of(const F* p) {
    Parts<F> some;
#pragma omp simd
    for (int k = 0; k < LANES; ++k) some.sum[k] = some.peak[k] = p[k];
    return some;
}

// p = e^(z - top) factor of a chunk, and what each GROUP of them and all together come to.
template <class F>
LOOP void probabilities_in_groups(const F* z, int n, F top, F factor, F* p, Parts<F>* groups, Parts<F>& all, const char* logits, int size) {
    all = {};
    for (int at = 0; at < whole(n); at += GROUP) {
        F sum[LANES] = {}, peak[LANES] = {};
        const int end = at + GROUP < whole(n) ? at + GROUP : whole(n);
        for (int i = at; i < end; i += LANES) {
            PREFETCH(logits + i * size + AHEAD, 2);
#pragma omp simd
            for (int k = 0; k < LANES; ++k) {
                const F e = exponential(z[i + k] - top) * factor;
                p[i + k] = e;
                sum[k] += e;
                peak[k] = e > peak[k] ? e : peak[k];
            }
        }
        Parts<F>& group = groups[at / GROUP];
#pragma omp simd
        for (int k = 0; k < LANES; ++k) {
            group.sum[k] = sum[k], group.peak[k] = peak[k];
            all.sum[k] += sum[k];
            all.peak[k] = peak[k] > all.peak[k] ? peak[k] : all.peak[k];
        }
    }
}

// Systematic sampling: `sum` runs over the small probabilities, and the class at which it passes `next` is kept. A chunk
// or a group without a large one, and whose sum stays below, is skipped whole.
template <class T>
INLINE int64_t sample_row(const SampleCall& c, int64_t row) {
    using F = Compute<T>;
    F z_buffer[CHUNK], p[CHUNK];
    Parts<F> groups[CHUNK / GROUP], all;
    const F top = F(c.top_in[row]), factor = F(std::exp(-c.lse_in[row])), r = F(c.resolution);
    const int64_t y = c.soft() ? -1 : c.y(row) - c.start;
    int32_t* classes = c.classes + row * c.slots;
    F* kept = static_cast<F*>(c.kept) + row * c.slots;
    int64_t count = 0, steps = 0;
    double sum = 0, next = (1 - c.uniform[row]) * c.resolution;
    const auto large = [&](const Parts<F>& some) { return !(peak_of(some) < r); };
    const auto skips = [&](const Parts<F>& some, int64_t first, int count, bool any_large) {
        if ((first <= y && y < first + count) || any_large) return false;
        const double later = sum + sum_of(some);
        if (later < next) sum = later;
        return later < next;
    };
    for (int64_t at = 0; at < c.C; at += CHUNK) {
        const int n = c.C - at < CHUNK ? int(c.C - at) : CHUNK;
        const T* x = c.logits.at<T>(row, at);
        const F* z = padded_scores(c, x, n, z_buffer);
        probabilities_in_groups(z, n, top, factor, p, groups, all, reinterpret_cast<const char*>(x), int(sizeof(T)));
        if (skips(all, at, n, large(all))) continue;
        for (int g = 0; g < n; g += GROUP) {
            const int end = g + GROUP < n ? g + GROUP : n;
            const bool any_large = large(groups[g / GROUP]);
            if (skips(groups[g / GROUP], at + g, end - g, any_large)) continue;
            for (int i = g; i < end; ++i) {
                if (i % LANES == 0) {
                    const Parts<F> lanes = lanes_of(p + i);
                    if (skips(lanes, at + i, LANES, any_large && large(lanes))) {
                        i += LANES - 1;
                        continue;
                    }
                }
                bool keep = at + i == y || p[i] >= r;
                if (!keep && p[i] < r) {  // not so a NaN
                    sum += p[i];
                    keep = sum >= next;
                    if (keep) next = (double(++steps) + 1 - c.uniform[row]) * c.resolution;
                }
                if (keep && count < c.slots) {
                    classes[count] = int32_t(at + i);
                    kept[count++] = p[i];
                }
            }
        }
    }
    return count;
}

template <class T>
LOOP void samples(const Call& call, int64_t task) {
    const SampleCall& c = static_cast<const SampleCall&>(call);
    const Call::Range range = c.range(task);
    for (int64_t row = range.row; row < range.row_end; ++row) c.counts[row] = c.ignored(row) ? 0 : sample_row<T>(c, row);
}

// Four rows at a time: so the sums are read and written a quarter as often. What comes next is asked for on the way.
template <class T, class F>
LOOP void add_rows(const T* const* rows, const T* const* next, const F* k, int n, F* sums) {
    const T *a = rows[0], *b = rows[1], *c = rows[2], *d = rows[3];
    constexpr int LINE = 64 / sizeof(T);
    int i = 0;
    for (; i + LINE <= n; i += LINE) {
        for (int j = 0; j < 4; ++j) PREFETCH(next[j] + i, 3);
#pragma omp simd
        for (int m = i; m < i + LINE; ++m)
            sums[m] += k[0] * widen(a[m]) + k[1] * widen(b[m]) + (k[2] * widen(c[m]) + k[3] * widen(d[m]));
    }
    for (; i < n; ++i) sums[i] += k[0] * widen(a[i]) + k[1] * widen(b[i]) + (k[2] * widen(c[i]) + k[3] * widen(d[i]));
}

template <class F>
INLINE void store_as(const F* sums, int n, int64_t kind, void* out, int64_t at) {
    if (kind == 0) store(sums, n, static_cast<float*>(out) + at);
    if constexpr (sizeof(F) == 4) {
        if (kind == 1) store(sums, n, static_cast<BFloat16*>(out) + at);
        if (kind == 2) store(sums, n, static_cast<Float16*>(out) + at);
    } else {
        if (kind == 3) store(sums, n, static_cast<double*>(out) + at);
    }
}

template <class T>
LOOP void gather_sums(const Call& call, int64_t task) {
    using F = Compute<T>;
    const SumsCall& c = static_cast<const SumsCall&>(call);
    const F* coefficient = static_cast<const F*>(c.coefficient);
    const T* matrix = static_cast<const T*>(c.rows);
    const Call::Range range = c.range(task);
    for (int64_t s = range.row; s < range.row_end; ++s) {
        const int64_t begin = s ? c.ends[s - 1] : 0, end = c.ends[s];
        for (int64_t at = 0; at < c.D; at += COLUMNS) {
            const int n = c.D - at < COLUMNS ? int(c.D - at) : COLUMNS;
            F sums[COLUMNS] = {};
            for (int64_t e = begin; e < end; e += 4) {
                const T *rows[4], *next[4];
                F k[4];
                for (int j = 0; j < 4; ++j) {
                    const int64_t entry = e + j < end ? e + j : e, later = e + 4 + j < c.E ? e + 4 + j : e;
                    rows[j] = matrix + c.index[entry] * c.stride + at;
                    next[j] = matrix + c.index[later] * c.stride + at;
                    k[j] = e + j < end ? coefficient[entry] : 0;
                }
                add_rows(rows, next, k, n, sums);
            }
            store_as(sums, n, c.out_kind, c.sums, s * c.D + at);
        }
    }
}
