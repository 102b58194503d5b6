// What the passes do for each row besides its logits, for the rows of a block at once: targets, logarithms, the formula
// of a loss, and the factors of the gradient.

constexpr int64_t IGNORED = std::numeric_limits<int64_t>::min();

template <class F>
struct Totals {  // the sums of each row, in terms of its top so far: see `Found`
    F top[WIDTH], z_y[WIDTH];  // z_y: of index targets, 0 where it is elsewhere
    double sum[WIDTH], tilt[WIDTH], picked[WIDTH], mass[WIDTH], wsum[WIDTH], weights[WIDTH];
    int64_t argmax[WIDTH];
    bool ignored;  // any of them
};

// What the next block reads or writes for each row is asked for while this one is worked on: the processor sees too late
// how these short pieces of memory go on.
template <class T>
INLINE void prefetch_next(const T* numbers, int rows) {
    for (int k = 0; k < rows; k += int(64 / sizeof(T))) PREFETCH(numbers + rows + k, 3);
}

// The targets of a block, as y - start; IGNORED where a row does not count, and for probabilities 0. One that is no class
// is reported. It is nowhere among the classes that are read. Returns whether any row is left out.
LOOP bool targets_of(const Call& c, int64_t row, int rows, int64_t* y) {
    if (c.soft()) {
        std::memset(y, 0, size_t(rows) * sizeof *y);
        return false;
    }
    const auto read = [&](const auto* first) {
        const int64_t stride = c.target.row_stride;
        if (stride == 1) prefetch_next(first, rows);
        for (int k = 0; k < rows && stride == 1; ++k) y[k] = first[k];
        for (int k = 0; k < rows && stride != 1; ++k) y[k] = first[k * stride];
    };
    if (c.candidates.K || !in_step(c.target, row, rows)) {
        for (int k = 0; k < rows; ++k) y[k] = c.y(row + k);
    } else if (c.target_kind == INT64) {
        read(c.target.at<int64_t>(row, 0));
    } else {
        read(c.target.at<int32_t>(row, 0));
    }
    const int64_t ignore_index = c.ignore_index, start = c.start;
    const int64_t classes = c.candidates.K ? start + c.C + 2 : c.classes;  // each candidate is checked by itself
    int64_t bad = 0, ignored = 0;  // as wide as the targets, so that vectors hold both
#pragma omp simd reduction(| : bad, ignored)
    for (int k = 0; k < rows; ++k) {
        const int64_t skipped = y[k] == ignore_index ? 1 : 0, outside = y[k] < 0 || y[k] >= classes ? 1 : 0;
        bad |= outside & ~skipped;
        ignored |= skipped;
        y[k] = skipped ? IGNORED : y[k] - start;
    }
    if (bad && c.bad) c.bad->store(true);
    return ignored;
}

// The weights of the rows of a loss: 0 where a row does not count, and 1 where there are none.
LOOP void weights_of(const Call& c, int rows, const int64_t* y, bool ignored, double* w) {
    const double* row_weight = c.formula.row_weight;
    for (int k = 0; k < rows && !ignored; ++k) w[k] = 1;
    for (int k = 0; k < rows && ignored; ++k) w[k] = y[k] != IGNORED;
    for (int k = 0; k < rows && row_weight; ++k) {
        const bool here = 0 <= y[k] && y[k] < c.C;
        const double weight = row_weight[here ? y[k] : 0];  // no branch, since some may be elsewhere
        w[k] = here ? weight : w[k];
    }
}

// Rounded twice, as torch does it: no fused multiply-add, so that a graph of torch operations finds the same bits.
LOOP void add(const double* x, int n, double* out) {
#pragma omp simd
    for (int k = 0; k < n; ++k) out[k] += x[k];
}

template <class F>
LOOP void losses_of(const Call& c, int64_t row, int rows, const Totals<F>& all, const int64_t* y, const double* picked,
                    const double* w, double* loss) {
    const Formula& f = c.formula;
    const double *lse = c.lse + row, kept = 1 - f.eps, share = f.eps / double(c.C);
    const bool soft = c.soft(), gone = soft && f.eps == 1;  // of a q that is gone, not even 0 * inf
    double minus[WIDTH];
    minus[0] = 0;  // the compiler does not know that there are rows, and would warn
    for (int k = 0; k < rows && !soft; ++k) loss[k] = lse[k] - picked[k];
    for (int k = 0; k < rows && soft; ++k) loss[k] = lse[k] * all.mass[k], minus[k] = -picked[k];
    if (soft) add(minus, rows, loss);
    for (int k = 0; k < rows && f.row_weight; ++k) loss[k] *= w[k];
    if (f.eps > 0) {
        double smooth[WIDTH];
        for (int k = 0; k < rows; ++k) smooth[k] = lse[k] * f.weight_sum, minus[k] = y[k] == IGNORED ? 0 : -all.wsum[k];
        add(minus, rows, smooth);
        for (int k = 0; k < rows; ++k) smooth[k] *= share, loss[k] = gone ? 0 : kept * loss[k];
        add(smooth, rows, loss);
    }
    for (int k = 0; k < rows && f.z_loss != 0; ++k) minus[k] = f.z_loss * ((all.top[k] + lse[k]) * (all.top[k] + lse[k]));
    if (f.z_loss != 0) add(minus, rows, loss);
}

template <class F>
LOOP void write(const F* x, int64_t row, int rows, Type type, void* out) {
    const auto as = [&](auto* first) {
        prefetch_next(first + row, rows);
        for (int k = 0; k < rows; ++k) narrow(decltype(widen(*first))(x[k]), first[row + k]);
    };
    if (type == FLOAT32) as(static_cast<float*>(out));
    if (type == BFLOAT16) as(static_cast<BFloat16*>(out));
    if (type == FLOAT16) as(static_cast<Float16*>(out));
    if (type == FLOAT64) as(static_cast<double*>(out));
}

template <class F>
LOOP void add_losses(const Call& c, int64_t task, int64_t row, int rows, const Totals<F>& all, const int64_t* y, const double* picked) {
    double loss[WIDTH], w[WIDTH], sum = 0, weight = 0;
    int64_t left_out = 0;
    const bool weighted = c.formula.row_weight;
    if (weighted) weights_of(c, rows, y, all.ignored, w);
    losses_of(c, row, rows, all, y, picked, w, loss);
    if (c.formula.losses) write(loss, row, rows, c.formula.losses_type, c.formula.losses);
#pragma omp simd reduction(+ : sum)
    for (int k = 0; k < rows; ++k) sum += loss[k];
#pragma omp simd reduction(+ : weight)
    for (int k = 0; k < (weighted ? rows : 0); ++k) weight += w[k];
    for (int k = 0; k < rows && all.ignored; ++k) left_out += y[k] == IGNORED;
    Formula::Sums& sums = c.formula.sums[task];
    sums.loss += sum, sums.weight += weight, sums.rows += rows - left_out;
}

template <class F>
LOOP void finish_block(const Call& c, int64_t task, int64_t row, int rows, Totals<F>& all, const int64_t* y) {
    double own[WIDTH], *lse = c.lse + row, *picked = c.picked ? c.picked + row : own;
    prefetch_next(lse, rows);
    logarithms(all.sum, rows, lse);
    const bool soft = c.soft();
    F* top = all.top;
#pragma omp simd
    for (int k = 0; k < rows; ++k) top[k] = top[k] - top[k] == 0 ? top[k] : 0;
    for (int k = 0; k < rows && all.ignored; ++k) top[k] = y[k] == IGNORED ? 0 : top[k], lse[k] = y[k] == IGNORED ? 0 : lse[k];
    for (int k = 0; k < rows && c.top; ++k) c.top[row + k] = top[k];
    if (c.saved.top) write(top, row, rows, c.saved.type, c.saved.top);
    if (c.saved.picked) write(all.z_y, row, rows, c.saved.type, c.saved.picked);
    if (soft) std::memcpy(picked, all.picked, size_t(rows) * sizeof *picked);
    for (int k = 0; k < rows && !soft; ++k) picked[k] = double(all.z_y[k]) - double(top[k]);
    const uint64_t here = uint64_t(all.ignored || c.classes > c.C ? c.C : 0);  // 0: all of them
    for (int k = 0; k < rows && here && !soft; ++k) picked[k] = uint64_t(y[k]) < here ? picked[k] : 0;
    for (int k = 0; k < rows && c.mass; ++k) c.mass[row + k] = all.mass[k];
    for (int k = 0; k < rows && c.wsum; ++k) c.wsum[row + k] = y[k] == IGNORED ? 0 : all.wsum[k];
    for (int k = 0; k < rows && c.entropy; ++k)  // -sum p (t - log sum)
        c.entropy[row + k] = y[k] == IGNORED ? 0 : lse[k] - all.tilt[k] / all.sum[k];
    for (int k = 0; k < rows && c.argmax; ++k) c.argmax[row + k] = y[k] == IGNORED ? -1 : all.argmax[k];
    if (c.formula.wanted) add_losses(c, task, row, rows, all, y, picked);
}

template <class F>
INLINE void put_found(const Found& found, int k, Totals<F>& all) {
    all.top[k] = F(found.max), all.sum[k] = found.sum, all.tilt[k] = found.tilt;
    all.picked[k] = found.picked, all.z_y[k] = F(found.picked);  // whichever it is
    all.mass[k] = found.mass, all.wsum[k] = found.wsum, all.argmax[k] = found.argmax;
}

LOOP void finish_parts(const Call& c) {  // of all rows, which are few
    int64_t y[WIDTH];
    Totals<double> all;
    all.ignored = targets_of(c, 0, int(c.N), y);
    for (int row = 0; row < c.N; ++row) {
        Found found = c.found[row * c.parts];
        for (int64_t part = 1; part < c.parts; ++part) merge(found, c.found[row * c.parts + part]);
        put_found(found, row, all);
    }
    finish_block(c, 0, 0, int(c.N), all, y);
}

// p (g - e log p) = e^t (a - h t) with t = z - top, and lse in the two factors of the row, which are taken in double.
template <class F>
struct Factors {
    F top[RUN], a[RUN], h[RUN], g_picked[RUN], g_wsum[RUN];
    F of_target[RUN];  // the gradient at the target
    bool ignored;      // any row
};

struct Upstream {  // what flows back to some of these rows
    double lse[WIDTH], g_lse[WIDTH], g_target[WIDTH], g_sum[WIDTH];
};

template <class T, class F>
LOOP void read(const T* first, int64_t step, int rows, F* out) {
    if (step == 1) prefetch_next(first, rows);
    for (int k = 0; k < rows && step == 0; ++k) out[k] = F(*first);
    for (int k = 0; k < rows && step == 1; ++k) out[k] = F(first[k]);
    for (int k = 0; k < rows && step > 1; ++k) out[k] = F(first[k * step]);
}

template <class F>
LOOP void read(const PerRow& x, int64_t row, int rows, F* out) {
    const int64_t first = x.at.offset(row), step = x.at.row_stride;
    if (x.type == FLOAT64 && in_step(x.at, row, rows)) return read(static_cast<const double*>(x.data) + first, step, rows, out);
    if (x.type == FLOAT32 && in_step(x.at, row, rows)) return read(static_cast<const float*>(x.data) + first, step, rows, out);
    for (int k = 0; k < rows; ++k) out[k] = F(x[row + k]);
}

// The derivatives of the sum of g loss / divisor, as `row_upstream` of `_rows/objective.py` has them.
template <class F>
LOOP void upstream_of_losses(const Call& c, int64_t row, int rows, const int64_t* y, bool ignored, const F* top, Upstream& of) {
    const Formula& f = c.formula;
    const double eps = f.eps / double(c.C), divisor = f.divisor;
    const bool soft = c.soft();
    double share[WIDTH], w[WIDTH], more[WIDTH];
    more[0] = 0;  // as above
    weights_of(c, rows, y, ignored, w);
    read(f.g, row, rows, share);
    if (soft) read(f.mass, row, rows, w);
    for (int k = 0; k < rows && divisor != 1; ++k) share[k] /= divisor;
    for (int k = 0; k < rows; ++k) {
        const double kept = share[k] * (1 - f.eps);
        of.g_lse[k] = kept * w[k];
        of.g_target[k] = soft ? -kept : -of.g_lse[k];
    }
    for (int k = 0; k < rows && eps > 0; ++k) of.g_sum[k] = -(share[k] * eps), more[k] = share[k] * eps * f.weight_sum;
    if (eps > 0) add(more, rows, of.g_lse);
    for (int k = 0; k < rows && f.z_loss != 0; ++k) more[k] = share[k] * (2 * f.z_loss) * (double(top[k]) + of.lse[k]);
    if (f.z_loss != 0) add(more, rows, of.g_lse);
}

// The scores of the targets among the classes from `begin` to `end`, 0 of one that is elsewhere: as they were saved, or
// looked up in memory that no cache holds yet.
template <class T, class F>
LOOP void scores_of_targets(const Call& c, int64_t row, int rows, const int64_t* y, int64_t begin, int64_t end, F* z_y) {
    if (c.picked_in.data) return read(c.picked_in, row, rows, z_y);
    for (int k = 0; k < rows; ++k) z_y[k] = begin <= y[k] && y[k] < end ? F(widen(*c.logits.at<T>(row + k, y[k]))) : 0;
    c.softcap == 0 ? convert(z_y, rows, F(c.scale), z_y) : convert_capped(z_y, rows, F(c.scale), F(c.softcap), z_y);
}

// In double, since p - 1 may be tiny, and rounded once.
template <class F>
LOOP void entries_of_targets(const Call& c, int64_t row, int rows, const int64_t* y, const F* z_y, const F* top, const Upstream& up, F* entry) {
    const F* w = static_cast<const F*>(c.weight);
    double t[WIDTH], less_one[WIDTH], more[WIDTH];
#pragma omp simd
    for (int k = 0; k < rows; ++k) {
        t[k] = double(z_y[k]) - double(top[k]) - up.lse[k];
        less_one[k] = exponential_less_one(exp_parts<F>(t[k]));
        more[k] = up.g_lse[k] + up.g_target[k];
    }
    for (int k = 0; k < rows && c.has_wsum(); ++k)
        if (0 <= y[k] && y[k] < c.C) more[k] += up.g_sum[k] * (w ? double(w[y[k]]) : 1);
    for (int k = 0; k < rows && c.g_entropy.data; ++k)
        more[k] -= t[k] < -1000 ? 0 : (1 + less_one[k]) * c.g_entropy[row + k] * t[k];
    const double scale = c.scale, softcap = c.softcap;
#pragma omp simd
    for (int k = 0; k < rows; ++k) {
        const double u = softcap == 0 ? 0 : double(z_y[k]) / softcap;
        entry[k] = F((up.g_lse[k] * less_one[k] + more[k]) * scale * (1 - u * u));
    }
}

// Of at most WIDTH rows, the `first` and later ones of a block.
template <class T, class F>
LOOP void factors_of_some(const Call& c, int64_t row, int rows, const int64_t* y, int64_t begin, int64_t end, int first, Factors<F>& of) {
    double factor[WIDTH], g_entropy[WIDTH];
    F z_y[WIDTH], *top = of.top + first, *a = of.a + first;
    Upstream up;
    read(c.lse_in, row, rows, up.lse);
    read(c.top_in, row, rows, top);
    if (c.formula.wanted) upstream_of_losses(c, row, rows, y, of.ignored, top, up);
    if (c.g_lse.data) read(c.g_lse, row, rows, up.g_lse);
    if (c.g_picked.data) read(c.g_picked, row, rows, up.g_target);
    if (c.g_entropy.data) read(c.g_entropy, row, rows, g_entropy);
    if (c.g_wsum.data) read(c.g_wsum, row, rows, up.g_sum);
    const double scale = c.scale;
#pragma omp simd
    for (int k = 0; k < rows; ++k) {
        const double minus = -up.lse[k];  // at most 0, for the largest of all terms is 1; inf gives NaN
        factor[k] = exponential(exp_parts<F>(minus)) * scale;
        a[k] = F(up.g_lse[k] * factor[k]);
    }
    for (int k = 0; k < rows && c.soft(); ++k) of.g_picked[first + k] = F(up.g_target[k] * scale);
    for (int k = 0; k < rows && c.g_entropy.data; ++k) {
        a[k] = F((up.g_lse[k] + g_entropy[k] * up.lse[k]) * factor[k]);
        of.h[first + k] = F(g_entropy[k] * factor[k]);
    }
    for (int k = 0; k < rows && c.has_wsum(); ++k) of.g_wsum[first + k] = F(up.g_sum[k] * scale);
    if (c.soft()) return;
    scores_of_targets<T>(c, row, rows, y, begin, end, z_y);
    entries_of_targets(c, row, rows, y, z_y, top, up, of.of_target + first);
}

template <class T, class F>
INLINE void factors_of(const Call& c, int64_t row, int rows, const int64_t* y, int64_t begin, int64_t end, Factors<F>& of) {
    for (int k = 0; k < rows; k += WIDTH)
        factors_of_some<T>(c, row + k, rows - k < WIDTH ? rows - k : WIDTH, y + k, begin, end, k, of);
}
