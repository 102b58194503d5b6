// Several classes per row: their scores, and their entries of the gradient, in double. A pass that takes row by row does
// this while some rows are in the caches; for the others it is a pass of its own.
template <class T>
INLINE double score(const Call& c, T x) {
    using F = decltype(widen(T{}));
    const F z = widen(x) * F(c.scale);
    return c.softcap == 0 ? z : F(c.softcap) * std::tanh(z / F(c.softcap));
}

struct Choices {  // the candidates of a row
    const Call& c;
    int64_t first;
    Choices(const Call& call, int64_t row) : c(call), first(call.target.offset(row)) {}
    int64_t y(int64_t k) const { return c.y_at(first + k * c.target.class_stride); }
    int64_t local(int64_t k) const { return c.local(y(k)); }
};

template <class T>
LOOP void pick_rows(const Call& c, int64_t row, int64_t row_end) {
    const Candidates& of = c.candidates;
    const int64_t stride = c.logits.class_stride;
    for (; row < row_end; ++row) {
        const Choices choices(c, row);
        const T* x = c.logits.at<T>(row, 0);
        const double top = c.top_in[row];
        for (int64_t k = 0; k < of.K; ++k) {  // all of them on their way before the first is waited for
            const int64_t y = choices.y(k), at = c.local(y);
            if (c.bad && y != c.ignore_index && (y < 0 || y >= c.classes)) *c.bad = true;
            if (at >= 0) PREFETCH(x + at * stride, 3);
        }
        for (int64_t k = 0; k < of.K; ++k) {
            const int64_t at = choices.local(k);
            of.scores[row * of.K + k] = at < 0 ? 0 : score(c, x[at * stride]) - top;
        }
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

// The entries of the candidates of rows, rounded once; `pick_rows` comes before these rows are written.
template <class T>
LOOP void put_rows(const Call& c, int64_t row, int64_t row_end, SumsOfEquals& sums) {
    using F = decltype(widen(T{}));
    const Candidates& of = c.candidates;
    const F* weight = static_cast<const F*>(c.weight);
    double t[WIDTH], p[WIDTH];
    for (int64_t first = row * of.K, end = row_end * of.K, n; first < end; first += n) {
        n = end - first < WIDTH ? end - first : WIDTH;
        const auto each = [&](auto row_begins, auto entry) {
            int64_t row = first / of.K, k = first % of.K;
            for (int i = 0; i < n; ++i) {
                if (i == 0 || k == 0) row_begins(row, k == 0);
                entry(i, k);
                if (++k == of.K) k = 0, ++row;
            }
        };
        double lse = 0, top = 0, g_lse = 0, g_entropy = 0, g_wsum = 0;
        each([&](int64_t row, bool) { lse = c.lse_in[row]; }, [&](int i, int64_t) { t[i] = of.scores[first + i] - lse; });
        exponentials(t, int(n), p);
        Choices choices(c, row);
        T* out = nullptr;
        each(
            [&](int64_t row, bool all) {
                choices.first = c.target.offset(row), out = c.out.at<T>(row, 0), top = c.top_in[row];
                g_lse = c.g_lse[row], g_entropy = c.g_entropy[row], g_wsum = c.g_wsum[row];
                if (!all) return;
                sums.clear();
                for (int64_t k = 0; k < of.K; ++k)
                    if (const int64_t at = choices.local(k); at >= 0) sums.of(at) += of.g[row * of.K + k];
            },
            [&](int i, int64_t k) {
                const int64_t at = choices.local(k);
                if (at < 0) return;
                double d = p[i] * g_lse + sums.of(at);
                if (c.g_entropy.data && p[i] > 0) d -= p[i] * t[i] * g_entropy;
                if (c.g_wsum.data) d += g_wsum * (weight ? double(weight[at]) : 1);
                const double u = c.softcap == 0 ? 0 : (of.scores[first + i] + top) / c.softcap;
                narrow(F(d * c.scale * (1 - u * u)), out[at * c.out.class_stride]);
            });
    }
}

template <class T>
LOOP void pick_task(const Call& c, int64_t task) {
    const Call::Range r = c.range(task);
    pick_rows<T>(c, r.row, r.row_end);
}

template <class T>
LOOP void put_task(const Call& c, int64_t task) {
    const Call::Range r = c.range(task);
    SumsOfEquals sums(c.candidates.K);
    if (!sums.entries) return void(*c.no_memory = true);
    put_rows<T>(c, r.row, r.row_end, sums);
}
