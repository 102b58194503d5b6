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
    for (; i + 8 <= n; i += 8) {
        const __m256 z = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i)));
        _mm256_storeu_ps(out + i, _mm256_mul_ps(z, _mm256_set1_ps(scale)));
    }
    for (; i < n; ++i) out[i] = scale * widen(x[i]);
}

LOOP void store(const float* d, int n, Float16* out) {
    int i = 0;
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(d + i), _MM_FROUND_TO_NEAREST_INT));
    for (; i < n; ++i) narrow(d[i], out[i]);
}
#endif

// The vector at i. What is left over of whole vectors is the end of one that overlaps the one before; `skip` of its
// lanes have been there. Of fewer classes than lanes it is `few`, which is filled up with -inf.
template <class F>
struct Vector {
    const F* at;
    int skip;
};

template <class F>
INLINE Vector<F> vector_at(const F* z, int i, int n, F* few) {
    if (i + LANES <= n) return {z + i, 0};
    if (n >= LANES) return {z + n - LANES, LANES - n % LANES};
    for (int k = 0; k < LANES; ++k) few[k] = k < n ? z[k] : -F(INF);
    return {few, 0};
}

// Explicit lanes, since clang takes the usual loop for a maximum as it stands, in which no order may be changed.
template <class F>
LOOP F maximum(const F* z, int n) {
    F lane[LANES], few[LANES];
    for (int k = 0; k < LANES; ++k) lane[k] = -F(INF);
    for (int i = 0; i < n; i += LANES) {
        const F* here = vector_at(z, i, n, few).at;
#pragma omp simd
        for (int k = 0; k < LANES; ++k) lane[k] = here[k] > lane[k] ? here[k] : lane[k];
    }
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int k = 0; k < width; ++k) lane[k] = lane[k] > lane[k + width] ? lane[k] : lane[k + width];
    return lane[0];
}

template <class F>
struct Sums {
    F sum, tilt;
    bool above;
};

// The sums of e^t and e^t t with t = z - base, and whether any z is above the base. On the way, what lies AHEAD of the
// logits in memory, `size` bytes each, is asked for into the second-level cache: spread over the loop like this, the
// arithmetic and the memory work at the same time. (Explicit lanes, since nothing else fits into a simd loop.)
template <bool TILT, class F>
LOOP Sums<F> sum_exp(const F* z, int n, F base, const char* logits, int size) {
    F sum[LANES] = {}, tilt[LANES] = {}, top[LANES], few[LANES];
    for (int k = 0; k < LANES; ++k) top[k] = base;
    for (int i = 0; i < n; i += LANES) {
        PREFETCH(logits + i * size + AHEAD, 2);
        const Vector<F> here = vector_at(z, i, n, few);
#pragma omp simd
        for (int k = 0; k < LANES; ++k) {
            const F z_k = here.at[k], t = k < here.skip ? -F(INF) : z_k - base, e = exponential(t);
            top[k] = z_k > top[k] ? z_k : top[k];
            sum[k] += e;
            if (TILT) tilt[k] += e * (t < -1000 ? -1000 : t);  // where e is 0, t must not be -inf
        }
    }
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int k = 0; k < width; ++k) {
            sum[k] += sum[k + width];
            tilt[k] += tilt[k + width];
            top[k] = top[k] > top[k + width] ? top[k] : top[k + width];
        }
    return {sum[0], tilt[0], top[0] > base};
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

// sum k and sum k (z - base) with the coefficients k = q w, either of which may be missing.
template <class F>
LOOP void dot(const F* q, const F* w, const F* z, int n, double base, double& mass, double& total) {
    double m = 0, s = 0;
#pragma omp simd reduction(+ : m, s)
    for (int i = 0; i < n; ++i) {
        const double k = (q ? double(q[i]) : 1) * (w ? double(w[i]) : 1);
        m += k;
        s += k == 0 ? 0 : k * (double(z[i]) - base);  // not 0 * inf
    }
    mass += m;
    total += s;
}

// d = e^t (a - h t) with t = z - top; see `write_gradient` for a and h, and `sum_exp` for the prefetch.
// By way of `p`, since d may lie over z, and a compiler that cannot rule that out leaves the loop as it is.
template <bool TILT, class F>
INLINE void softmax_of_lanes(F top, F a, F h, F* p) {
#pragma omp simd
    for (int k = 0; k < LANES; ++k) {
        const F t = p[k] - top, e = exponential(t);
        p[k] = TILT ? e * (a - h * (t < -1000 ? -1000 : t)) : e * a;
    }
}

template <bool TILT, class F>
LOOP void softmax(const F* z, int n, F top, F a, F h, F* d, const char* logits, int size) {
    int i = 0;
    for (; i + LANES <= n; i += LANES) {
        PREFETCH(logits + i * size + AHEAD, 2);
        F p[LANES];
        for (int k = 0; k < LANES; ++k) p[k] = z[i + k];
        softmax_of_lanes<TILT>(top, a, h, p);
        for (int k = 0; k < LANES; ++k) d[i + k] = p[k];
    }
    if (i < n) {
        F p[LANES] = {};
        for (int k = 0; k < n - i; ++k) p[k] = z[i + k];
        softmax_of_lanes<TILT>(top, a, h, p);
        for (int k = 0; k < n - i; ++k) d[i + k] = p[k];
    }
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

template <class F>
LOOP void exp_all(const F* t, F* out, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = exponential(t[i]);
}
