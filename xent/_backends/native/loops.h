// The loops over one chunk of a row, each written so that GCC and clang turn it into SIMD; see rows.h.
//
// Each is a function of its own, never inlined: GCC vectorises it reliably only so (inlined, it once duplicated a loop
// and left one of the copies scalar, five times slower).

constexpr int LANES = 16;  // of the widest vectors

template <class T>
LOOP void gather(const T* x, int64_t stride, int n, T* out) {
    for (int i = 0; i < n; ++i) out[i] = x[i * stride];
}

template <class T, class F>
LOOP void convert(const T* x, int n, F scale, F* out) {
#pragma omp simd
    for (int i = 0; i < n; ++i) out[i] = scale * F(widen(x[i]));
}

template <class T, class F>
LOOP void convert_capped(const T* x, int n, F scale, F cap, F* out) {
    const F inverse = 1 / cap;
#pragma omp simd
    for (int i = 0; i < n; ++i) out[i] = cap * hyperbolic_tangent(scale * widen(x[i]) * inverse);
}

template <class F, class T>
LOOP void store(const F* d, int n, T* out) {
#pragma omp simd
    for (int i = 0; i < n; ++i) narrow(d[i], out[i]);
}

#ifdef F16C  // the same, with the instructions for these numbers, which no compiler finds
LOOP void convert(const Float16* x, int n, float scale, float* out) {
    int i = 0;
#if VECTOR == 64
    for (; i + 16 <= n; i += 16) {
        const __m512 z = _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i)));
        _mm512_storeu_ps(out + i, _mm512_mul_ps(z, _mm512_set1_ps(scale)));
    }
#endif
    for (; i + 8 <= n; i += 8) {
        const __m256 z = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i)));
        _mm256_storeu_ps(out + i, _mm256_mul_ps(z, _mm256_set1_ps(scale)));
    }
    for (; i < n; ++i) out[i] = scale * widen(x[i]);
}

LOOP void store(const float* d, int n, Float16* out) {
    int i = 0;
#if VECTOR == 64
    for (; i + 16 <= n; i += 16) {
        const __m256i x = _mm512_maskz_cvtps_ph(0xffff, _mm512_loadu_ps(d + i), _MM_FROUND_TO_NEAREST_INT);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), x);
    }
#endif
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(d + i), _MM_FROUND_TO_NEAREST_INT));
    for (; i < n; ++i) narrow(d[i], out[i]);
}
#endif

// What is left over of whole vectors is the end of one that overlaps the one before; `skip` of its lanes have been there.
// Of fewer classes than lanes it is `few`, which is filled up with -inf.
template <class F>
struct Vector {
    const F* at;
    int skip;
};

template <class F>
INLINE Vector<F> last_vector(const F* z, int n, F* few) {
    if (n >= LANES) return {z + n - LANES, LANES - n % LANES};
    for (int k = 0; k < LANES; ++k) few[k] = k < n ? z[k] : -F(INF);
    return {few, 0};
}

template <int HALF = LANES / 2, class F>
INLINE F sum_of_lanes(F* x) {
    for (int k = 0; k < HALF; ++k) x[k] += x[k + HALF];
    if constexpr (HALF > 1) return sum_of_lanes<HALF / 2>(x);
    return x[0];
}

template <int HALF = LANES / 2, class F>
INLINE F largest_of_lanes(F* x) {
    for (int k = 0; k < HALF; ++k) x[k] = x[k] > x[k + HALF] ? x[k] : x[k + HALF];
    if constexpr (HALF > 1) return largest_of_lanes<HALF / 2>(x);
    return x[0];
}

template <class F>
INLINE void raise_lanes(const F* z, F* top) {
#pragma omp simd
    for (int k = 0; k < LANES; ++k) top[k] = z[k] > top[k] ? z[k] : top[k];
}

// Explicit lanes, since clang takes the usual loop for a maximum as it stands, in which no order may be changed.
template <class F>
LOOP F maximum(const F* z, int n) {
    F top[LANES], few[LANES];
    for (int k = 0; k < LANES; ++k) top[k] = -F(INF);
    int i = 0;
    for (; i + LANES <= n; i += LANES) raise_lanes(z + i, top);
    if (i < n) raise_lanes(last_vector(z, n, few).at, top);
    return largest_of_lanes(top);
}

struct Sums {
    double sum, tilt;
};
struct Products {
    double mass, total;
};

// Sums of products may be too large for F, of logits that are the lowest number there is; then they are taken in double.
INLINE bool overflows(double total) { return total - total != 0; }

constexpr int QUARTER = LANES / 4;

template <class F>
INLINE void add_lanes(const F* x, double* sum) {
    for (int k = 0; k < QUARTER; ++k)
        sum[k] += (double(x[k]) + double(x[k + QUARTER])) + (double(x[k + 2 * QUARTER]) + double(x[k + 3 * QUARTER]));
}

template <bool TILT, bool LAST, class F>
INLINE void add_exp_of_lanes(const F* z, int skip, F base, F* sum, F* tilt) {
#pragma omp simd
    for (int k = 0; k < LANES; ++k) {
        const F t = z[k] - base, e = LAST && k < skip ? 0 : exponential(t);
        sum[k] += e;
        if (TILT) tilt[k] += e * (t < -1000 ? -1000 : t);  // where e is 0, t must not be -inf
    }
}

// The sums of e^t and e^t t with t = z - base: of a chunk in F, of all in double. On the way, what lies AHEAD of the
// logits in memory, `size` bytes each, is asked for into the second-level cache: spread over the loop like this, the
// arithmetic and the memory work at the same time. (Explicit lanes, since nothing else fits into a simd loop.)
template <bool TILT, class F>
LOOP Sums sum_exp(const F* z, int n, F base, const char* logits, int size) {
    F few[LANES];
    double sum[QUARTER], tilt[QUARTER];
    for (int k = 0; k < QUARTER; ++k) sum[k] = tilt[k] = 0;
    for (int64_t i = 0; i < n;) {
        const int64_t end = i + CHUNK < n ? i + CHUNK : n;
        F s[LANES] = {}, u[LANES] = {};
        for (; i + LANES <= end; i += LANES) {
            PREFETCH(logits + i * size + AHEAD, 2);
            add_exp_of_lanes<TILT, false>(z + i, 0, base, s, u);
        }
        if (i < end) {
            const Vector<F> last = last_vector(z, n, few);
            add_exp_of_lanes<TILT, true>(last.at, last.skip, base, s, u);
            i = end;
        }
        add_lanes(s, sum);
        if (TILT) add_lanes(u, tilt);
    }
    return {sum_of_lanes<QUARTER / 2>(sum), TILT ? sum_of_lanes<QUARTER / 2>(tilt) : 0};
}

// The first class with this logit; with a NaN, the first NaN. n if there is none.
template <class F>
LOOP int find(const F* z, int n, F value) {
    int first = n;
    const bool nan = value != value;
#pragma omp simd reduction(min : first)
    for (int i = 0; i < n; ++i) {
        const int here = z[i] == value || (nan && z[i] != z[i]) ? i : n;
        first = here < first ? here : first;
    }
    return first;
}

template <bool Q, bool W, int N, class S, class F>
INLINE void add_products_of_lanes(const F* q, const F* w, const F* z, S base, S* mass, S* total) {
#pragma omp simd
    for (int j = 0; j < N; ++j) {
        const S k = (Q ? S(q[j]) : 1) * (W ? S(w[j]) : 1), t = S(z[j]) - base;
        mass[j] += k;
        total[j] += (Q || W) && k == 0 ? 0 : k * t;  // not 0 * inf
    }
}

// sum k and sum k (z - base) with the coefficients k = q w, either of which may be missing: of a chunk in S, of all in double.
template <bool Q, bool W, class S, class F>
LOOP Products dot_of(const F* q, const F* w, const F* z, int n, S base) {
    double m[QUARTER] = {}, s[QUARTER] = {};
    for (int i = 0; i < n;) {
        const int end = i + CHUNK < n ? i + CHUNK : n;
        S mass[LANES] = {}, total[LANES] = {};
        const auto add = [&](auto count) {
            add_products_of_lanes<Q, W, count>(Q ? q + i : q, W ? w + i : w, z + i, base, mass, total);
            i += count;
        };
        while (i + LANES <= end) add(std::integral_constant<int, LANES>());
        while (i < end) add(std::integral_constant<int, 1>());
        add_lanes(mass, m);
        add_lanes(total, s);
    }
    return {sum_of_lanes<QUARTER / 2>(m), sum_of_lanes<QUARTER / 2>(s)};
}

template <class S, class F>
INLINE Products dot_in(const F* q, const F* w, const F* z, int n, F base) {
    if (q) return w ? dot_of<true, true>(q, w, z, n, S(base)) : dot_of<true, false>(q, w, z, n, S(base));
    return w ? dot_of<false, true>(q, w, z, n, S(base)) : dot_of<false, false>(q, w, z, n, S(base));
}

template <class F>
INLINE Products dot(const F* q, const F* w, const F* z, int n, F base) {
    const Products found = dot_in<F>(q, w, z, n, base);
    return overflows(found.mass + found.total) ? dot_in<double>(q, w, z, n, base) : found;
}

// d = e^t (a - h t) with t = z - top; see `write_gradient` for a and h, and `sum_exp` for the prefetch.
// By way of `p`, since d may lie over z, and a compiler that cannot rule that out leaves the loop as it is.
template <bool TILT, int N, class F>
INLINE void softmax_of_lanes(F top, F a, F h, F* p) {
#pragma omp simd
    for (int k = 0; k < N; ++k) {
        const F t = p[k] - top, e = exponential(t);
        p[k] = TILT ? e * (a - h * (t < -1000 ? -1000 : t)) : e * a;
    }
}

template <bool TILT, int N, class F>
INLINE void softmax_of_vector(const F* z, F top, F a, F h, F* d) {
    F p[N];
    for (int k = 0; k < N; ++k) p[k] = z[k];
    softmax_of_lanes<TILT, N>(top, a, h, p);
    for (int k = 0; k < N; ++k) d[k] = p[k];
}

template <bool TILT, class F>
LOOP void softmax(const F* z, int n, F top, F a, F h, F* d, const char* logits, int size) {
    // What is left over is the end of one more vector that overlaps the last one: read before d is written over it.
    constexpr int HALF = LANES / 2;
    const bool few = n < HALF;
    const int64_t first = few ? 0 : n - HALF;
    F last[HALF] = {};
    for (int k = 0; few && k < n; ++k) last[k] = z[k];
    for (int k = 0; !few && k < HALF; ++k) last[k] = (z + first)[k];
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        PREFETCH(logits + i * size + AHEAD, 2);
        softmax_of_vector<TILT, LANES>(z + i, top, a, h, d + i);
    }
    for (; i + HALF <= n; i += HALF) softmax_of_vector<TILT, HALF>(z + i, top, a, h, d + i);
    if (i < n) softmax_of_lanes<TILT, HALF>(top, a, h, last);
    for (int k = 0; few && k < n; ++k) d[k] = last[k];
    for (int k = 0; i < n && !few && k < HALF; ++k) (d + first)[k] = last[k];
}

template <class F>
LOOP void add_weighted(F g, const F* q, const F* w, int n, F* d) {
#pragma omp simd
    for (int i = 0; i < n; ++i) d[i] += g * (q ? q[i] : 1) * (w ? w[i] : 1);
}

template <class F>
LOOP void multiply_slope(const F* z, int n, F cap, F* d) {  // d tanh u = 1 - tanh^2 u
    const F inverse = 1 / cap;
#pragma omp simd
    for (int i = 0; i < n; ++i) d[i] *= (1 - z[i] * inverse) * (1 + z[i] * inverse);
}
