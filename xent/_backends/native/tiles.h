// Blocks of rows as lanes.h takes them: the numbers of one class of many rows side by side, in a tile that stays in the
// cache. Where the classes of a row lie side by side in memory, they are transposed in registers, SIDE by SIDE numbers.

constexpr int SIZE = 1 << 14;   // numbers of a tile, which stays in the cache; at least 64 classes of a whole block
constexpr int EXACT = 32;       // classes that are added up in F

template <class F>
struct Lanes {  // class i of all rows: at + i * stride
    F* at;
    int64_t stride;
    F* operator[](int64_t i) const { return at + i * stride; }
};

// An odd number of cache lines, so that the classes of a row do not all fall into the same few sets of the cache.
inline int tile_stride(int rows) { return (rows + 2 * LANES - 1) / (2 * LANES) * (2 * LANES) + LANES; }

// How many classes are a step: as many as a tile holds, or somewhat fewer, so that all steps have about the same number.
inline int classes_of_step(int rows, int64_t classes) {
    const int64_t fitting = SIZE / tile_stride(rows), steps = (classes - 1) / fitting + 1;
    return int((classes - 1) / steps + 1);
}

// Other compilers, and double, take number by number: see lanes.h.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define TURN
#endif
#endif

#ifdef TURN
#ifdef F16C  // and so AVX
constexpr int SIDE = 8;
#else
constexpr int SIDE = 4;
#endif
typedef float Side __attribute__((vector_size(4 * SIDE)));
typedef float Loose __attribute__((vector_size(4 * SIDE), aligned(4), may_alias));  // anywhere in memory

INLINE const Loose& side(const float* x) { return *reinterpret_cast<const Loose*>(x); }
INLINE Loose& side(float* x) { return *reinterpret_cast<Loose*>(x); }

// Rows become columns.
#ifdef F16C
INLINE void turn(Side* v) {
    Side t[SIDE];
    for (int j = 0; j < SIDE; j += 2) {
        t[j] = __builtin_shufflevector(v[j], v[j + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        t[j + 1] = __builtin_shufflevector(v[j], v[j + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int j = 0; j < SIDE; j += 4)
        for (int i = 0; i < 2; ++i) {
            v[j + 2 * i] = __builtin_shufflevector(t[j + i], t[j + i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            v[j + 2 * i + 1] = __builtin_shufflevector(t[j + i], t[j + i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int j = 0; j < 4; ++j) {
        t[j] = __builtin_shufflevector(v[j], v[j + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        t[j + 4] = __builtin_shufflevector(v[j], v[j + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
    for (int j = 0; j < SIDE; ++j) v[j] = t[j];
}
#else
INLINE void turn(Side* v) {
    Side t[SIDE];
    for (int j = 0; j < SIDE; j += 2) {
        t[j] = __builtin_shufflevector(v[j], v[j + 1], 0, 4, 1, 5);
        t[j + 1] = __builtin_shufflevector(v[j], v[j + 1], 2, 6, 3, 7);
    }
    for (int i = 0; i < 2; ++i) {
        v[2 * i] = __builtin_shufflevector(t[i], t[i + 2], 0, 1, 4, 5);
        v[2 * i + 1] = __builtin_shufflevector(t[i], t[i + 2], 2, 3, 6, 7);
    }
}
#endif

// Both take whole tiles of n classes of these rows, the last of which overlaps the one before, and return how many rows
// that were. A row of fewer classes than a tile has is read on into the next ones; and written so, if those follow at
// once and are written later. If there is a `top`, it is raised to the numbers that are read.
LOOP int transpose_tiles(const float* x, int64_t stride, int rows, int n, float scale, Lanes<float> z, float* top) {
    const int64_t end = (rows - 1) * stride + n;
    for (int k = 0; k < rows; k += SIDE) {
        const int row = k + SIDE <= rows ? k : rows - SIDE;
        if (row < 0 || (row + SIDE - 1) * stride + SIDE > end) return k;
        Side largest[4];  // so that one comparison need not wait for the one before; none becomes NaN
        for (int j = 0; j < 4; ++j) largest[j] = top ? Side(side(top + row)) : Side{};
        for (int i = 0; i < n; i += SIDE) {
            const int at = i + SIDE <= n || n < SIDE ? i : n - SIDE;
            const float* from = x + row * stride + at;
            float* to = z[at] + row;
            Side v[SIDE];
            for (int j = 0; j < SIDE; ++j, from += stride) {
                PREFETCH(reinterpret_cast<const char*>(from) + AHEAD, 2);
                v[j] = scale * side(from);
            }
            turn(v);
            for (int j = 0; j < SIDE; ++j, to += z.stride) {
                if (j >= n) continue;
                side(to) = v[j];
                if (top) largest[j % 4] = v[j] > largest[j % 4] ? v[j] : largest[j % 4];
            }
        }
        for (int j = 0; j < 4 && top; ++j) side(top + row) = largest[j] > side(top + row) ? largest[j] : Side(side(top + row));
    }
    return rows;
}

LOOP int transpose_tiles_back(Lanes<float> d, int rows, int n, float* out, int64_t stride) {
    const int64_t end = (rows - 1) * stride + n;
    if (n < SIDE && n != stride) return 0;
    for (int k = 0; k < rows; k += SIDE) {
        const int row = k + SIDE <= rows ? k : rows - SIDE;
        if (row < 0 || (row + SIDE - 1) * stride + SIDE > end) return k;
        for (int i = 0; i < n; i += SIDE) {
            const int at = i + SIDE <= n || n < SIDE ? i : n - SIDE;
            const float* from = d[at] + row;
            float* to = out + row * stride + at;
            Side v[SIDE];
            for (int j = 0; j < SIDE; ++j, from += d.stride) v[j] = j < n ? Side(side(from)) : Side{};
            turn(v);
            for (int j = 0; j < SIDE; ++j, to += stride) side(to) = v[j];
        }
    }
    return rows;
}

// Of numbers of another type, all rows are converted first, or at the end.
template <class T>
INLINE int transpose_rows(const T* x, int64_t stride, int rows, int n, float scale, Lanes<float> z, float* top) {
    if constexpr (std::is_same_v<T, float>) return transpose_tiles(x, stride, rows, n, scale, z, top);
    float flat[SIZE];
    const bool whole = stride == n;
    for (int k = 0; k < (whole ? 1 : rows); ++k) convert(x + k * stride, whole ? rows * n : n, scale, flat + k * n);
    return transpose_tiles(flat, n, rows, n, 1, z, top);
}

template <class T>
INLINE int transpose_rows_back(Lanes<float> d, int rows, int n, T* out, int64_t stride) {
    if constexpr (std::is_same_v<T, float>) return transpose_tiles_back(d, rows, n, out, stride);
    float flat[SIZE];
    const int done = transpose_tiles_back(d, rows, n, flat, n);
    const bool whole = stride == n;
    for (int k = 0; k < (whole ? 1 : done); ++k) store(flat + k * n, whole ? done * n : n, out + k * stride);
    return done;
}
#endif
