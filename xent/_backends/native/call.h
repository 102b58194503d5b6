// What one call of a primitive is about, and the few numbers per row that the passes over the logits find.
//
// Letters as in dispatch.py: N = A B rows, C classes, x a raw logit, z the logit that counts, y the target, q a target
// probability, w a class weight, p a probability. Strides are in elements.
#pragma once
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>

#include "math.h"

constexpr double INF = std::numeric_limits<double>::infinity();

enum Type { NO_TYPE, INT64, INT32, FLOAT32, BFLOAT16, FLOAT16, FLOAT64 };  // class indices, and floating numbers

inline double number(const void* data, Type type, int64_t at) {
    if (type == FLOAT32) return static_cast<const float*>(data)[at];
    if (type == BFLOAT16) return widen(static_cast<const BFloat16*>(data)[at]);
    if (type == FLOAT16) return widen(static_cast<const Float16*>(data)[at]);
    return static_cast<const double*>(data)[at];
}

constexpr int WIDTH = 256;      // rows of a block, at most
constexpr int RUN = 4 * WIDTH;  // the same of a gradient whose classes are far apart: of each class a page of memory

struct Matrix {  // (A, B, C) with any strides, of a type that the code knows; a row is one of A B, B after B
    void* data;
    int64_t B, outer_stride, row_stride, class_stride;
    int64_t offset(int64_t row) const {
        return row < B ? row * row_stride : row / B * outer_stride + row % B * row_stride;
    }
    template <class T>
    T* at(int64_t row, int64_t c) const {
        return static_cast<T*>(data) + offset(row) + c * class_stride;
    }
};

struct PerRow {  // one floating number per row; without data 0
    const void* data;
    Type type;
    Matrix at;  // its data is not used
    double operator[](int64_t row) const { return data ? number(data, type, at.offset(row)) : 0; }
};

inline PerRow side_by_side(const void* data, Type type, int64_t N) { return {data, type, {nullptr, N, 0, 1, 0}}; }
inline PerRow the_same(const double* x, int64_t N) { return {x, FLOAT64, {nullptr, N, 0, 0, 0}}; }

// The sums over the classes seen so far of one row, in terms of t = z - max.
struct Found {
    double max = -INF;
    double sum = 0, tilt = 0;  //       sum e^t, sum e^t t
    double picked = 0, mass = 0;  //    sum k t and sum k, with k = q w; of an index target z_y and 0
    double wsum = 0, weights = 0;  //   sum w t, sum w
    int64_t argmax = 0;
};

// A loss, from the statistics of its rows: the formula of `_rows/objective.py`, of all options. eps: label smoothing.
struct Formula {
    bool wanted;
    double eps, z_loss, weight_sum;
    const double* row_weight;  // (C,): of the row's target, or null

    bool empty;                // a mean of no rows is 0
    char* losses;              // of each row, or null
    Type losses_type;
    struct Sums {
        double loss, weight;
        int64_t rows;
    }* sums;  // of each task, in its own order, so that the number of threads changes nothing

    PerRow g, mass;  // of the gradient: what flows back, and what it is divided by
    double divisor;
};

struct Candidates {
    int64_t K;  //        0: each row has one class, and not several
    double* scores;  //   (N, K): z - top; 0 of one that is ignored, or held elsewhere
    const double* g;  //  (N, K), of the gradient
};

struct Call {
    int64_t N, C;
    Matrix logits, target;  // the class stride of an index target leads from one candidate to the next
    Type type, target_kind;  // of the logits, and of the target
    int64_t start, ignore_index, classes;  // classes: of all shards
    double scale, softcap;  // softcap 0: none
    const void* weight;     // (C,) in the type of the arithmetic, or null

    // Statistics: null where they are not wanted.
    std::atomic<bool>* bad;  // whether any target is neither a class nor ignored
    double *top, *lse, *picked, *mass, *wsum, *entropy;
    int64_t* argmax;
    struct {
        void *top, *picked;  // z_y itself, in the digits of the arithmetic; null for probabilities
        Type type;
    } saved;  // what a loss keeps for its gradient, besides lse

    // Gradient.
    PerRow top_in, lse_in, picked_in, g_lse, g_picked, g_wsum, g_entropy;
    Matrix out;
    bool past_caches;                      // `out` is in no cache
    const char *zeros_begin, *zeros_end;  // the part of `out` that holds zeros as it is
    bool scattered;                       // so few rows of it count that small pages take less time than huge ones

    bool by_class;  // blocks of rows class by class, and not row by row

    // A task is a block of rows, or where there are few rows, one of the `parts` of a row.
    int64_t rows_per_task, parts, classes_per_task;
    Found* found;  // (N, parts), where parts > 1

    Formula formula;
    Candidates candidates;
    std::atomic<bool>* no_memory;  // for what a gradient of candidates needs

    struct Range {
        int64_t row, row_end, at, end;
    };
    Range range(int64_t task) const {
        const int64_t first = task / parts * rows_per_task, last = first + rows_per_task;
        const int64_t at = task % parts * classes_per_task, end = at + classes_per_task;
        return {first, last < N ? last : N, at, end < C ? end : C};
    }
    bool soft() const { return target_kind >= FLOAT32; }
    bool has_wsum() const { return wsum || g_wsum.data || formula.eps > 0; }
    int64_t y_at(int64_t offset) const {
        return target_kind == INT64 ? static_cast<int64_t*>(target.data)[offset] : static_cast<int32_t*>(target.data)[offset];
    }
    int64_t y(int64_t row, int64_t k) const { return y_at(target.offset(row) + k * target.class_stride); }
    // Of a row with candidates, one that is held nowhere.
    int64_t y(int64_t row) const {
        if (!candidates.K) return y(row, 0);
        for (int64_t k = 0; k < candidates.K; ++k)
            if (y(row, k) != ignore_index) return start + C + (ignore_index == start + C);
        return ignore_index;
    }
    bool picks_candidates() const { return candidates.K && !by_class && parts == 1; }  // row by row, in the caches
    int64_t local(int64_t y) const { return y == ignore_index || y < start || y >= start + C ? -1 : y - start; }
    bool ignored(int64_t row) const { return !soft() && y(row) == ignore_index; }
};

// Express the sums in terms of a larger maximum. With -inf so far they are 0, or NaN, and stay so: -inf - -inf would
// make NaN of 0.
inline void rebase(Found& f, double max) {
    if (f.max > -INF) {
        const double d = f.max - max, factor = std::exp(d);
        f.tilt = factor * (f.tilt + d * f.sum);
        f.sum *= factor;
        f.picked += f.mass * d;
        f.wsum += f.weights * d;
    }
    f.max = max;
}

// Add what later classes of the same row gave. A maximum of NaN stands for a NaN logit and wins, the first one first.
inline void merge(Found& f, Found later) {
    if (f.max == f.max && !(later.max <= f.max)) {
        rebase(f, later.max);
        f.argmax = later.argmax;
    } else {
        rebase(later, f.max);
    }
    f.sum += later.sum;
    f.tilt += later.tilt;
    f.picked += later.picked;
    f.mass += later.mass;
    f.wsum += later.wsum;
    f.weights += later.weights;
}

// The entry points of one instruction set; the types of logits are float32, bfloat16, float16, float64.
struct Kernels {
    const char* name;
    void (*statistics[4])(const Call&, int64_t task);
    void (*gradient[4])(const Call&, int64_t task);
    void (*pick[4])(const Call&, int64_t task);  // of candidates
    void (*put[4])(const Call&, int64_t task);
    void (*finish_parts)(const Call&);
};
