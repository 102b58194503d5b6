// What the calls about a linear head are, those of linear.h and samples.h; and the counting sort of its entries.
#pragma once
#include <cstdint>
#include <cstring>

#include "call.h"

struct SampleCall : Call {  // classes of one row lie side by side
    const double* uniform;
    double resolution;
    int64_t slots;  // of a row
    int32_t* classes;
    void* kept;  // probabilities, in the type of the arithmetic
    int64_t* counts;
};

struct SumsCall : Call {  // N sums
    const int64_t* ends;
    const int32_t* index;
    int64_t E, D, stride;
    const void *coefficient, *rows;  // coefficients in the type of the arithmetic
    void* sums;
    int64_t out_kind;  // its type, as that of logits
};

constexpr int HEAD_CLASSES = 48;  // of a task of linear.h

struct LinearCall : Call {  // N classes, whose logits of n rows are computed
    int64_t n, D, stride;  // the row stride of the head
    const void* head;
    void* panels;  // the hidden states, see linear.h
};

struct HeadKernels {
    void (*samples[4])(const Call&, int64_t task);
    void (*gather_sums[4])(const Call&, int64_t task);
    void (*pack_panel[4])(const Call&, int64_t task);  // by the type of the hidden states and the head
    void (*linear[4])(const Call&, int64_t task);
    int64_t panel_bytes;  // of a panel's rows; 0: there are no such kernels
};

// Close the gaps between the rows' entries.
inline void pack(const SampleCall& c, int64_t itemsize) {
    int64_t end = 0;
    for (int64_t row = 0; row < c.N; ++row) {
        const int64_t count = c.counts[row], from = row * c.slots;
        char* kept = static_cast<char*>(c.kept);
        std::memmove(c.classes + end, c.classes + from, size_t(count) * sizeof(int32_t));
        std::memmove(kept + end * itemsize, kept + from * itemsize, size_t(count * itemsize));
        end += count;
    }
}

// The entries of N rows as those of C classes, whose rows stay in order.
template <class F>
void transpose(int64_t N, int64_t C, const int64_t* ends, const int32_t* classes, const F* coefficient, int64_t* class_ends,
               int32_t* rows, F* moved) {
    const int64_t E = N ? ends[N - 1] : 0;
    std::memset(class_ends, 0, size_t(C) * sizeof(int64_t));
    for (int64_t e = 0; e < E; ++e)
        if (classes[e] + 1 < C) ++class_ends[classes[e] + 1];  // counts, one place further on
    for (int64_t c = 1; c < C; ++c) class_ends[c] += class_ends[c - 1];  // where each begins
    for (int64_t row = 0, e = 0; row < N; ++row)
        for (; e < ends[row]; ++e) {
            const int64_t to = class_ends[classes[e]]++;
            rows[to] = int32_t(row);
            moved[to] = coefficient[e];
        }
}
