// The two passes for a block of rows at once: a vector holds the same class of many rows, so nothing is added up across
// a vector, and what a row needs besides its logits is done for many rows at a time. For logits whose classes do not lie
// side by side (images), which are read where they lie, and for short rows, which are transposed on the way.
//
// Numerics are those of the other loops: exp in F, sums of at most 32 classes in F, all sums of these in double.

// ------------------------------------------------------------------------------------------------- memory

// Whether these rows are one stride apart; and whether that is 1.
inline bool in_step(const Matrix& x, int64_t row, int rows) { return row % x.B + rows <= x.B; }
inline bool together(const Matrix& x, int64_t row, int rows) { return x.row_stride == 1 && in_step(x, row, rows); }

// Of some rows whose numbers lie together: this class is asked for while the one before is worked on.
template <class T>
INLINE void prefetch_class(const Matrix& x, int64_t row, int rows, int64_t at) {
    const char* first = reinterpret_cast<const char*>(x.at<T>(row, at));
    for (int b = 0; b < rows * int(sizeof(T)); b += 64) PREFETCH(first + b, 3);
}

template <class F>
LOOP void raise(Lanes<F> z, int n, int rows, F* top) {
    for (int i = 0; i < n; ++i) {
        const F* z_i = z[i];
#pragma omp simd
        for (int k = 0; k < rows; ++k) top[k] = z_i[k] > top[k] ? z_i[k] : top[k];
    }
}

template <class T, class F>
LOOP void transpose(const Matrix& x, int64_t row, int rows, int64_t at, int n, F scale, Lanes<F> z, F* top) {
    const int64_t stride = x.row_stride, class_stride = x.class_stride;
    int k = 0;
#ifdef TURN
    if constexpr (std::is_same_v<F, float>)
        if (class_stride == 1 && in_step(x, row, rows)) k = transpose_rows(x.at<T>(row, at), stride, rows, n, scale, z, top);
#endif
    const int tiles = k;
    for (; k < rows && in_step(x, row, rows); k += LANES)
        for (int i = 0; i < n; ++i) {
            const T* x_i = x.at<T>(row + k, at + i);
            F* z_i = z[i] + k;
            const int end = rows - k < LANES ? rows - k : LANES;
#pragma omp simd
            for (int j = 0; j < end; ++j) z_i[j] = scale * F(widen(x_i[j * stride]));
        }
    for (; k < rows; ++k) {
        const T* x_k = x.at<T>(row + k, at);
        for (int i = 0; i < n; ++i) z[i][k] = scale * F(widen(x_k[i * class_stride]));
    }
    if (top && tiles < rows) raise(Lanes<F>{z.at + tiles, z.stride}, n, rows - tiles, top + tiles);
}

template <class F, class T>
LOOP void transpose_back(Lanes<F> d, int64_t row, int rows, int64_t at, int n, const Matrix& out) {
    const int64_t class_stride = out.class_stride, stride = d.stride;
    int k = 0;
#ifdef TURN
    if constexpr (std::is_same_v<F, float>)
        if (class_stride == 1 && in_step(out, row, rows)) k = transpose_rows_back(d, rows, n, out.at<T>(row, at), out.row_stride);
#endif
    for (; k < rows; ++k) {
        T* out_k = out.at<T>(row + k, at);
        const F* d_k = d.at + k;
#pragma omp simd
        for (int i = 0; i < n; ++i) narrow(d_k[i * stride], out_k[i * class_stride]);
    }
}

// The logits that count: these themselves where they are that, else `buffer`.
template <class T, class F>
INLINE const F* scores(const Call& c, const T* x, int n, F* buffer) {
    if constexpr (std::is_same_v<T, F>) {
        if (c.scale == 1 && c.softcap == 0) return x;
    }
    c.softcap == 0 ? convert(x, n, F(c.scale), buffer) : convert_capped(x, n, F(c.scale), F(c.softcap), buffer);
    return buffer;
}

// The numbers that count, scaled and capped: where they lie, or in the tile. If there is a `top`, it is raised to them.
template <class T, class F>
INLINE Lanes<F> load(const Matrix& x, int64_t row, int rows, int64_t at, int n, F scale, F cap, F* tile, F* top = nullptr) {
    const bool side_by_side = together(x, row, rows), as_it_is = std::is_same_v<T, F> && scale == 1 && cap == 0;
    Lanes<F> z{tile, tile_stride(rows)};
    if constexpr (std::is_same_v<T, F>)
        if (side_by_side && as_it_is) z = {x.at<T>(row, at), x.class_stride};
    if (!side_by_side) transpose<T>(x, row, rows, at, n, scale, z, cap == 0 ? top : nullptr);
    for (int i = 0; i < n && side_by_side && !as_it_is; ++i) convert(x.at<T>(row, at + i), rows, scale, z[i]);
    for (int i = 0; i < n && cap != 0; ++i) convert_capped(z[i], rows, F(1), cap, z[i]);
    if (top && (side_by_side || cap != 0)) raise(z, n, rows, top);
    return z;
}

template <class F>
INLINE Lanes<F> load_probabilities(const Call& c, int64_t row, int rows, int64_t at, int n, F* tile) {
    const F one = 1, none = 0;
    if (c.target_kind == FLOAT32) return load<float>(c.target, row, rows, at, n, one, none, tile);
    if (c.target_kind == BFLOAT16) return load<BFloat16>(c.target, row, rows, at, n, one, none, tile);
    if (c.target_kind == FLOAT16) return load<Float16>(c.target, row, rows, at, n, one, none, tile);
    return load<double>(c.target, row, rows, at, n, one, none, tile);
}

// ------------------------------------------------------------------------------------------------- loops

// The first class with the largest score; a NaN counts as larger than all, the first one of them.
template <class F>
LOOP void find_largest(Lanes<F> z, int n, int rows, int64_t at, F* largest, int64_t* argmax) {
    for (int i = 0; i < n; ++i) {
        const F* z_i = z[i];
#pragma omp simd
        for (int k = 0; k < rows; ++k) {
            const bool larger = z_i[k] > largest[k] || (z_i[k] != z_i[k] && largest[k] == largest[k]);
            largest[k] = larger ? z_i[k] : largest[k];
            argmax[k] = larger ? at + i : argmax[k];
        }
    }
}

// What a loop over classes asks for on the way into the second-level cache, some bytes for each class: the arithmetic and
// the memory work at the same time.
struct Ahead {
    const char* at;
    int64_t step;
    int bytes;
    INLINE void prefetch(int i) const {
        for (int b = 0; b < bytes; b += 64) PREFETCH(at + i * step + b, 2);
    }
};

// The step that comes next: it begins at class `next`, or is the first one of the next rows.
template <class T>
INLINE Ahead next_step(const Matrix& x, int64_t row, int rows, int64_t next, int64_t begin, int64_t end) {
    const int64_t size = sizeof(T);
    if (next == end) row += rows, next = begin;
    return {reinterpret_cast<const char*>(x.at<T>(row, next)), x.class_stride * size, together(x, row, rows) ? int(rows * size) : 0};
}

// What was added up in F so far.
template <class F>
LOOP void move_sums(F* some, int rows, double* all) {
#pragma omp simd
    for (int k = 0; k < rows; ++k) all[k] += some[k], some[k] = 0;
}

template <bool TILT, class F>
LOOP void add_exp(Lanes<F> z, int n, int rows, const F* top, double* sum, double* tilt, Ahead next) {
    F s[WIDTH] = {}, u[WIDTH] = {};
    for (int i = 0; i < n; ++i) {
        next.prefetch(i);
        const F* z_i = z[i];
#pragma omp simd
        for (int k = 0; k < rows; ++k) {
            const F t = z_i[k] - top[k], e = exponential(t);
            s[k] += e;
            if (TILT) u[k] += e * (t < -1000 ? -1000 : t);  // where e is 0, t must not be -inf
        }
        if (i + 1 < n && i % EXACT != EXACT - 1) continue;
        move_sums(s, rows, sum);
        if (TILT) move_sums(u, rows, tilt);
    }
}

template <class S, class F>
LOOP void products_of_rows(Lanes<F> q, const F* w, Lanes<F> z, int n, int rows, const F* top, double* mass, double* total) {
    S m[WIDTH] = {}, s[WIDTH] = {};
    for (int k = 0; k < rows; ++k) mass[k] = total[k] = 0;
    for (int i = 0; i < n; ++i) {
        const F *q_i = q.at ? q[i] : nullptr, *z_i = z[i];
        const S w_i = w ? w[i] : 1;
#pragma omp simd
        for (int k = 0; k < rows; ++k) {
            const S coefficient = (q_i ? S(q_i[k]) : 1) * w_i;
            m[k] += coefficient;
            s[k] += coefficient == 0 ? 0 : coefficient * (S(z_i[k]) - S(top[k]));  // not 0 * inf
        }
        if (i + 1 < n && i % EXACT != EXACT - 1) continue;
        move_sums(m, rows, mass), move_sums(s, rows, total);
    }
}

// sum k and sum k (z - top) with the coefficients k = q w, either of which may be missing.
template <class F>
LOOP void add_products(Lanes<F> q, const F* w, Lanes<F> z, int n, int rows, const F* top, double* mass, double* total) {
    double m[WIDTH], s[WIDTH];
    int out_of_range = 0;
    products_of_rows<F>(q, w, z, n, rows, top, m, s);
    for (int k = 0; k < rows; ++k) out_of_range |= overflows(m[k] + s[k]);
    if (out_of_range) products_of_rows<double>(q, w, z, n, rows, top, m, s);
    move_sums(m, rows, mass), move_sums(s, rows, total);
}

template <bool TILT, class F>
LOOP void softmax(const F* z, int rows, const F* top, const F* a, const F* h, F* d) {
#pragma omp simd
    for (int k = 0; k < rows; ++k) {
        const F t = z[k] - top[k], e = exponential(t);
        d[k] = TILT ? e * (a[k] - h[k] * (t < -1000 ? -1000 : t)) : e * a[k];
    }
}

template <class F>
LOOP void add_weighted(const F* g, const F* q, const F* w, int rows, F* d) {
#pragma omp simd
    for (int k = 0; k < rows; ++k) d[k] += g[k] * (q ? q[k] : 1) * (w ? *w : 1);
}

// 0 where a row does not count, whatever is there.
template <class F>
LOOP void keep(const F* counts, int rows, F* d) {
#pragma omp simd
    for (int k = 0; k < rows; ++k) d[k] = counts[k] != 0 ? d[k] : 0;
}

LOOP void logarithms(const double* x, int n, double* out) {
#pragma omp simd
    for (int k = 0; k < n; ++k) out[k] = logarithm(x[k]);
}

LOOP void exponentials(const double* t, int n, double* out) {
#pragma omp simd
    for (int k = 0; k < n; ++k) out[k] = exponential(t[k]);
}
