// The logits of a linear head, h W^T, for one instruction set, as rows.h is.
//
// A product of torch copies the head into an order of its own, for each block of rows anew: with few rows to a block, a
// third of the time. Here the head is read where it lies, and each of its numbers is multiplied by a vector of rows; only
// the hidden states are copied, into panels of as many rows as two vectors hold. The sums of a panel and AT_ONCE classes
// stay in registers. Their order is the same for every size of block.

#ifdef VECTOR  // bytes; without it there are no such kernels
constexpr int AT_ONCE = VECTOR == 64 ? 12 : 6;  // classes: with two vectors of rows they take 24 of 32 registers, or 12 of 16
constexpr int SUMMED = 192;  // products that are added up before their sum is added to that of others
static_assert(HEAD_CLASSES % AT_ONCE == 0, "whole blocks of classes");

template <class F>
using Register __attribute__((vector_size(VECTOR), may_alias)) = F;

template <class F>
constexpr int PANEL = 2 * VECTOR / sizeof(F);  // rows

// Panel `task`: number d of all its rows, then number d + 1; of rows that are not there 0.
template <class T>
LOOP void pack_panel(const Call& call, int64_t task) {
    using F = Compute<T>;
    const LinearCall& c = static_cast<const LinearCall&>(call);
    F* panel = static_cast<F*>(c.panels) + task * PANEL<F> * c.D;
    for (int k = 0; k < PANEL<F>; ++k) {
        const int64_t row = task * PANEL<F> + k;
        for (int64_t d = 0; d < c.D; ++d) panel[d * PANEL<F> + k] = row < c.n ? F(widen(*c.logits.at<T>(row, d))) : 0;
    }
}

// sums (class, row) += (or =, at first) the products of `count` numbers of AT_ONCE classes, `stride` apart, and of a panel.
// Meanwhile as many bytes of T are fetched from `next` on. Three classes share a pointer: for each its own there are too few
// registers, and a compiler would keep the others where they take time of the products.
template <class F, class T>
INLINE void add_products(const F* head, int64_t stride, const F* panel, int count, bool first, const T* next, F* sums) {
    using V = Register<F>;
    constexpr int LANE = PANEL<F> / 2;
    V found[AT_ONCE][2] = {};
    const F* some[AT_ONCE / 3];
    for (int i = 0; i < AT_ONCE / 3; ++i) some[i] = head + 3 * i * stride;
    for (int d = 0; d < count; ++d, panel += PANEL<F>, next += AT_ONCE) {
        const V a = *reinterpret_cast<const V*>(panel), b = *reinterpret_cast<const V*>(panel + LANE);
        PREFETCH(next, 2);
        for (int i = 0; i < AT_ONCE; ++i) {
            const F x = some[i / 3][i % 3 * stride];
            found[i][0] += x * a, found[i][1] += x * b;
        }
        for (int i = 0; i < AT_ONCE / 3; ++i) ++some[i];
    }
    for (int i = 0; i < AT_ONCE; ++i)
        for (int j = 0; j < 2; ++j) {
            V& sum = *reinterpret_cast<V*>(sums + i * PANEL<F> + j * LANE);
            sum = first ? found[i][j] : sum + found[i][j];
        }
}

template <class T>
LOOP void linear(const Call& call, int64_t task) {
    using F = Compute<T>;
    const LinearCall& c = static_cast<const LinearCall&>(call);
    const Call::Range range = c.range(task);
    const T* head = static_cast<const T*>(c.head);
    const F* panels = static_cast<const F*>(c.panels);
    alignas(64) F sums[HEAD_CLASSES * PANEL<F>], converted[AT_ONCE][SUMMED];
    for (int64_t row = 0; row < c.n; row += PANEL<F>) {
        // While this thread works at its last panel, its next classes are fetched.
        const bool fetches = row + PANEL<F> >= c.n && range.row_end + HEAD_CLASSES <= c.N;
        const int64_t ahead = fetches ? HEAD_CLASSES * c.stride : 0;
        int64_t d = 0;
        do {  // without any products the sums are 0
            const int count = c.D - d < SUMMED ? int(c.D - d) : SUMMED;
            for (int64_t at = range.row; at < range.row_end; at += AT_ONCE) {
                const T* own = head + at * c.stride + d;
                const bool copies = !std::is_same_v<T, F> || at + AT_ONCE > c.N;  // the last class more than once: not stored
                for (int i = 0; i < AT_ONCE && copies; ++i)
                    convert(at + i < c.N ? own + i * c.stride : head + (c.N - 1) * c.stride + d, count, F(1), converted[i]);
                const F* some = converted[0];
                if constexpr (std::is_same_v<T, F>) some = copies ? some : own;
                const T* next = head + at * c.stride + d * AT_ONCE + ahead;
                add_products(some, copies ? SUMMED : c.stride, panels + row * c.D + d * PANEL<F>, count, d == 0, next,
                             sums + (at - range.row) * PANEL<F>);
            }
        } while ((d += SUMMED) < c.D);
        const int rows = c.n - row < PANEL<F> ? int(c.n - row) : PANEL<F>;
        transpose_back<F, F>({sums, PANEL<F>}, row, rows, range.row, int(range.row_end - range.row), c.out);
    }
}
#endif

constexpr HeadKernels HEAD = {
    {samples<float>, samples<BFloat16>, samples<Float16>, samples<double>},
    {gather_sums<float>, gather_sums<BFloat16>, gather_sums<Float16>, gather_sums<double>},
#ifdef VECTOR
    {pack_panel<float>, pack_panel<BFloat16>, pack_panel<Float16>, pack_panel<double>},
    {linear<float>, linear<BFloat16>, linear<Float16>, linear<double>},
    2 * VECTOR,
#endif
};
