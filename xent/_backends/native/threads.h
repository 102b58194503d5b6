// How one call is cut into tasks, and how threads take them.
#pragma once
#include <atomic>
#include <cstdint>

#include "call.h"

// The runtime that torch itself uses starts the threads: native.py finds its entry point. Either of the two that
// compilers call at a parallel region will do.
inline void (*gomp_parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
inline void (*kmpc_fork_call)(void* location, int32_t count, void (*body)(int32_t*, int32_t*, void*), ...);
inline int (*thread_number)();  // of a thread in its region

constexpr int64_t RANGES = 64;  // at most; more threads share them

struct Work {
    void (*kernel)(const Call&, int64_t task);
    const Call& call;
    int64_t tasks, ranges;
    bool last_first;  // for whom reads again what was read: the end of it is still in the caches
    std::atomic<int64_t> taken[RANGES];
};

// Each thread has a range of tasks, the same in every pass, and as torch's own loops cut theirs: so it finds in its caches
// what it read or wrote before, and no two write into one huge page of fresh memory. Then it takes what others have left,
// so that ignored rows and a busy core do not leave it waiting.
inline void take_tasks(void* data) {
    Work& work = *static_cast<Work*>(data);
    const int64_t own = thread_number ? thread_number() : 0;
    for (int64_t i = 0; i < work.ranges; ++i) {
        const int64_t range = (own + i) % work.ranges;
        const int64_t begin = work.tasks * range / work.ranges, end = work.tasks * (range + 1) / work.ranges;
        for (int64_t k; (k = work.taken[range].fetch_add(1)) < end - begin;)
            work.kernel(work.call, work.last_first ? end - 1 - k : begin + k);
    }
}

inline void take_tasks_kmpc(int32_t*, int32_t*, void* data) { take_tasks(data); }

struct Location {  // of a parallel region in the source, which kmpc wants to know: "unknown"
    int32_t reserved[4];
    const char* source;
};

inline void run(void (*kernel)(const Call&, int64_t), const Call& call, unsigned threads, bool last_first = false) {
    const int64_t blocks = (call.N + call.rows_per_task - 1) / call.rows_per_task;
    Work work{kernel, call, blocks * call.parts, threads > RANGES ? RANGES : threads > 1 ? threads : 1, last_first, {}};
    if (threads > 1 && work.tasks > 1 && gomp_parallel) {
        gomp_parallel(take_tasks, &work, threads, 0);
    } else if (threads > 1 && work.tasks > 1 && kmpc_fork_call) {
        Location location = {{0, 2, 0, 0}, ";unknown;unknown;0;0;;"};
        kmpc_fork_call(&location, 1, take_tasks_kmpc, &work);
    } else {
        take_tasks(&work);
    }
}

constexpr int64_t THREADED = 1 << 16;  // logits: fewer are done before other threads have woken up
constexpr int64_t TASK = 32768;  // logits: enough to be worth handing out, too few to leave a thread waiting long
constexpr int64_t FEW_ROWS = 16, MOST_PARTS = 16;
constexpr int64_t SHORT = 192, SHORT_GRADIENT = 48;  // classes: of fewer, many rows at a time take less time

// The same for every number of threads, so that the statistics are too.
inline void cut(Call& c) {
    const bool side_by_side = c.logits.class_stride == 1 && (!c.out.data || c.out.class_stride == 1);
    c.by_class = !side_by_side || (c.N >= FEW_ROWS && c.C <= (c.out.data ? SHORT_GRADIENT : SHORT));
    c.rows_per_task = TASK / (c.C + 1) + 1;
    const int64_t tasks = c.N / c.rows_per_task + 1, whole = c.out.data && c.logits.class_stride != 1 && c.N >= 8 * RUN ? RUN : WIDTH;
    if (c.by_class)
        c.rows_per_task = (c.rows_per_task + whole - 1) / whole * whole;
    else if (tasks > 1)
        c.rows_per_task = c.N / ((tasks + 3) / 4 * 4) + 1;  // an equal number of equal tasks for each thread
    c.classes_per_task = c.N > FEW_ROWS ? c.C + 1 : (c.C / TASK / MOST_PARTS + 1) * TASK;
    c.parts = c.C / c.classes_per_task + 1;
    if (c.parts > 1) c.rows_per_task = 1;
}
