// How one call is cut into tasks, and how threads take them.
#pragma once
#include <atomic>
#include <cstdint>

#include "native_call.h"

// The runtime that torch itself uses starts the threads: native.py finds its entry point. Either of the two that
// compilers call at a parallel region will do.
inline void (*gomp_parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
inline void (*kmpc_fork_call)(void* location, int32_t count, void (*body)(int32_t*, int32_t*, void*), ...);

struct Work {
    void (*kernel)(const Call&, int64_t task);
    const Call& call;
    int64_t tasks, stretches;  // one stretch of neighbouring tasks for each thread
    std::atomic<int64_t> next;
};

// Each thread takes the next task that is left, so that ignored rows and a busy core do not leave the others waiting.
// Tasks are handed out from each stretch in turn: two threads that write neighbouring rows of fresh memory meet in one
// huge page, and the system would clear it once for each of them.
inline void take_tasks(void* data) {
    Work& work = *static_cast<Work*>(data);
    const int64_t length = (work.tasks + work.stretches - 1) / work.stretches;
    for (int64_t turn; (turn = work.next.fetch_add(1)) < length * work.stretches;) {
        const int64_t task = turn % work.stretches * length + turn / work.stretches;
        if (task < work.tasks) work.kernel(work.call, task);
    }
}

inline void take_tasks_kmpc(int32_t*, int32_t*, void* data) { take_tasks(data); }

struct Location {  // of a parallel region in the source, which kmpc wants to know: "unknown"
    int32_t reserved[4];
    const char* source;
};

inline void run(void (*kernel)(const Call&, int64_t), const Call& call, unsigned threads) {
    const int64_t blocks = (call.N + call.rows_per_task - 1) / call.rows_per_task;
    Work work{kernel, call, blocks * call.parts, threads, {0}};
    if (threads > 1 && work.tasks > 1 && gomp_parallel) {
        gomp_parallel(take_tasks, &work, threads, 0);
    } else if (threads > 1 && work.tasks > 1 && kmpc_fork_call) {
        Location location = {{0, 2, 0, 0}, ";unknown;unknown;0;0;;"};
        kmpc_fork_call(&location, 1, take_tasks_kmpc, &work);
    } else {
        take_tasks(&work);
    }
}

constexpr int64_t TASK = 32768;  // logits: enough to be worth handing out, too few to leave a thread waiting long
constexpr int64_t FEW_ROWS = 16, MOST_PARTS = 16;

// The same for every number of threads, so that the results are too.
inline void cut(Call& c) {
    c.rows_per_task = c.C < TASK ? TASK / (c.C + 1) + 1 : 1;
    c.classes_per_task = c.N > FEW_ROWS ? c.C + 1 : (c.C / TASK / MOST_PARTS + 1) * TASK;
    c.parts = c.C / c.classes_per_task + 1;
    if (c.parts > 1) c.rows_per_task = 1;
}
