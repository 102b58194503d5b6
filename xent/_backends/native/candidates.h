// Several classes per row: their scores, and their entries of the gradient, in double. A pass that takes row by row does
// this while a row is in the caches; for the others it is a pass of its own.
template <class T>
INLINE double score(const Call& c, T x) {
    using F = decltype(widen(T{}));
    const F z = widen(x) * F(c.scale);
    return c.softcap == 0 ? z : F(c.softcap) * std::tanh(z / F(c.softcap));
}

// The scores of a row. Of a call of the statistics, which have no top yet, they are absolute.
template <class T>
LOOP void pick_row(const Call& c, int64_t row) {
    const Candidates& of = c.candidates;
    for (int64_t k = 0; k < of.K; ++k) {  // all of them on their way before the first is waited for
        const int64_t y = c.y(row, k), at = c.local(y);
        if (c.bad && y != c.ignore_index && (y < 0 || y >= c.classes)) *c.bad = true;
        if (at >= 0) PREFETCH(c.logits.at<T>(row, at), 3);
    }
    for (int64_t k = 0; k < of.K; ++k) {
        const int64_t at = c.local(c.y(row, k));
        of.scores[row * of.K + k] = at < 0 ? 0 : score(c, *c.logits.at<T>(row, at)) - c.top_in[row];
    }
}

// What flows back to each candidate of a row, added up where a class is there more than once.
struct SumsOfEquals {
    struct Entry {
        int64_t at;
        double sum;
    };
    Entry* entries;
    int64_t size = 2;

    explicit SumsOfEquals(int64_t K) {
        while (size < 2 * K) size *= 2;
        entries = K ? static_cast<Entry*>(std::malloc(size_t(size) * sizeof(Entry))) : nullptr;
    }
    SumsOfEquals(const SumsOfEquals&) = delete;
    ~SumsOfEquals() { std::free(entries); }

    void clear() {
        for (int64_t i = 0; i < size; ++i) entries[i] = {-1, 0};
    }
    double& of(int64_t at) {
        for (uint64_t i = uint64_t(at) * 0x9E3779B97F4A7C15u >> 32;; ++i) {
            Entry& entry = entries[i & uint64_t(size - 1)];
            if (entry.at < 0) entry.at = at;
            if (entry.at == at) return entry.sum;
        }
    }
};

// The entries of a row's candidates, rounded once; `pick_row` comes before the row is written.
template <class T>
LOOP void put_row(const Call& c, int64_t row, SumsOfEquals& sums) {
    using F = decltype(widen(T{}));
    const Candidates& of = c.candidates;
    const F* weight = static_cast<const F*>(c.weight);
    sums.clear();
    for (int64_t k = 0; k < of.K; ++k) {
        const int64_t at = c.local(c.y(row, k));
        if (at >= 0) sums.of(at) += of.g[row * of.K + k];
    }
    double t[WIDTH], p[WIDTH];
    for (int64_t first = 0; first < of.K; first += WIDTH) {
        const int n = of.K - first < WIDTH ? int(of.K - first) : WIDTH;
        const double *scores = of.scores + row * of.K + first, lse = c.lse_in[row], top = c.top_in[row];
        for (int k = 0; k < n; ++k) t[k] = scores[k] - lse;
        exponentials(t, n, p);
        for (int k = 0; k < n; ++k) {
            const int64_t at = c.local(c.y(row, first + k));
            if (at < 0) continue;
            double d = p[k] * c.g_lse[row] + sums.of(at);
            if (c.g_entropy.data && p[k] > 0) d -= p[k] * t[k] * c.g_entropy[row];
            if (c.g_wsum.data) d += c.g_wsum[row] * (weight ? double(weight[at]) : 1);
            const double u = c.softcap == 0 ? 0 : (scores[k] + top) / c.softcap;
            narrow(F(d * c.scale * (1 - u * u)), *c.out.at<T>(row, at));
        }
    }
}

template <class T>
LOOP void pick_rows(const Call& c, int64_t task) {
    const Call::Range r = c.range(task);
    for (int64_t row = r.row; row < r.row_end; ++row) pick_row<T>(c, row);
}

template <class T>
LOOP void put_rows(const Call& c, int64_t task) {
    const Call::Range r = c.range(task);
    SumsOfEquals sums(c.candidates.K);
    if (!sums.entries) return void(*c.no_memory = true);
    for (int64_t row = r.row; row < r.row_end; ++row) put_row<T>(c, row, sums);
}
