// The module xent._backends.native._native: the two primitives for CPU tensors.
//
// It knows of torch nothing but DLPack, so that one binary serves every release of it and of Python. Files: tensors.h what
// Python hands over, primitives.h, losses.h and entries.h the Python functions, settings.h those that are no call; math.h
// one number, call.h one call, rows.h the passes over rows, loops.h their inner loops, tiles.h, lanes.h and blocks.h the same
// for many rows at once, numbers.h what a row takes besides its logits, threads.h who does what, memory.h how memory is asked
// for, candidates.h several classes per row, head.h, linear.h and samples.h a linear head; and here the instruction sets.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdlib>
#include <type_traits>
#include <utility>

#include "call.h"
#include "math.h"
#include "memory.h"
#include "head.h"
#include "tensors.h"
#include "threads.h"

#if defined(__GNUC__) && defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

float lowest32 = -88;
double lowest64 = -709;

namespace {

// ------------------------------------------------------------------------------------------------- instruction sets

#if defined(__GNUC__) && defined(__x86_64__)
#define F16C
namespace avx512 {
#define NAME "avx512"
#define VECTOR 64
#define LOOP __attribute__((noinline, target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#include "rows.h"
#include "samples.h"
#include "linear.h"
#undef LOOP
#undef NAME
#undef VECTOR
}  // namespace avx512

namespace avx2 {
#define NAME "avx2"
#define VECTOR 32
#define LOOP __attribute__((noinline, target("avx2,fma,f16c")))
#include "rows.h"
#include "samples.h"
#include "linear.h"
#undef LOOP
#undef NAME
#undef VECTOR
}  // namespace avx2
#undef F16C
#endif

namespace baseline {  // what the compiler may assume anyway: SSE2 on x86-64, NEON on arm64
#define NAME "baseline"
#if defined(__GNUC__)
#define LOOP __attribute__((noinline))
#else
#define LOOP
#endif
#include "rows.h"
#include "samples.h"
#include "linear.h"
}  // namespace baseline

// The usable sets, best first.
int available(const Kernels** sets) {
    int n = 0;
#if defined(__GNUC__) && defined(__x86_64__)
    __builtin_cpu_init();
    unsigned a, b, c = 0, d;
    const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;  // of which not every compiler knows the name
    const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
    if (fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        sets[n++] = &avx512::KERNELS;
    if (fma) sets[n++] = &avx2::KERNELS;
#endif
    sets[n++] = &baseline::KERNELS;
    return n;
}

const Kernels* kernels;  // in use

// ------------------------------------------------------------------------------------------------- the primitives

// What a pass over the logits that does not take row by row leaves to do.
void pass_of_candidates(void (*kernel)(const Call&, int64_t), const Call& call, unsigned threads) {
    if (!call.candidates.K || call.picks_candidates()) return;
    Call c = call;
    c.rows_per_task = c.N / 64 + 1, c.parts = 1;
    run(kernel, c, threads);
}

void statistics(Call& c, int64_t dtype, unsigned threads) {
    Found found[FEW_ROWS * MOST_PARTS];
    c.found = found;
    run(kernels->statistics[dtype], c, threads);
    if (c.parts > 1) kernels->finish_parts(c);
    pass_of_candidates(kernels->pick[dtype], c, threads);
}

void write_number(double x, Type type, char* out) {
    if (type == FLOAT32) narrow(float(x), *reinterpret_cast<float*>(out));
    if (type == BFLOAT16) narrow(float(x), *reinterpret_cast<BFloat16*>(out));
    if (type == FLOAT16) narrow(float(x), *reinterpret_cast<Float16*>(out));
    if (type == FLOAT64) narrow(x, *reinterpret_cast<double*>(out));
}

// A new result need not be fresh memory, for some allocators keep pages and hand them out again.
void prepare_out(Call& c, int64_t bytes, bool fresh) {
    const Pages pages(c.out.data, bytes);
    if (fresh && bytes >= LARGE && resident(pages)) fresh = false;
    c.past_caches = !fresh && bytes >= LARGE;  // fresh pages are in the cache, where the system has just cleared them
    if (!fresh || bytes < HUGE_PAGES) return;
    // What the rows that count take, and what they take in huge pages, which are cleared whole.
    const int64_t row_bytes = bytes / c.N;
    int64_t counted = c.by_class || bytes < LARGE ? bytes : 0, touched = 0, end = 0;  // by class all is written
    for (int64_t row = 0; row < c.N && counted < bytes; ++row) {
        if (c.ignored(row)) continue;
        const int64_t first = row * row_bytes / HUGE_PAGE, last = ((row + 1) * row_bytes - 1) / HUGE_PAGE + 1;
        counted += row_bytes;
        touched += (last - (first > end ? first : end)) * HUGE_PAGE;
        end = last;
    }
    if (counted < bytes && become_zeros(pages)) {
        c.zeros_begin = pages.begin, c.zeros_end = pages.end;
        c.scattered = 2 * counted < touched;
    }
    if (!c.scattered) advise_huge_pages(pages);
}

// ------------------------------------------------------------------------------------------------- Python

constexpr int64_t TINY = 4096;  // logits: below, another thread does not wait long enough to be worth a handover

#include "primitives.h"
#include "losses.h"
#include "entries.h"
#include "settings.h"

using FastCall = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

PyCFunction fast(FastCall function) { return bits<PyCFunction>(function); }

}  // namespace

PyMODINIT_FUNC PyInit__native() {
    static PyMethodDef methods[] = {
        {"statistics", fast(py_statistics), METH_FASTCALL, nullptr},
        {"gradient", fast(py_gradient), METH_FASTCALL, nullptr},
        {"losses", fast(py_losses), METH_FASTCALL, nullptr},
        {"losses_gradient", fast(py_losses_gradient), METH_FASTCALL, nullptr},
        {"linear", fast(py_linear), METH_FASTCALL, nullptr},
        {"samples", fast(py_samples), METH_FASTCALL, nullptr},
        {"transpose", fast(py_transpose), METH_FASTCALL, nullptr},
        {"gather_sums", fast(py_gather_sums), METH_FASTCALL, nullptr},
        {"use_tensors", py_use_tensors, METH_O, nullptr},
        {"use_openmp", fast(py_use_openmp), METH_FASTCALL, nullptr},
        {"instruction_sets", py_instruction_sets, METH_NOARGS, nullptr},
        {"use", py_use, METH_O, nullptr},
        {"resident", fast(py_resident), METH_FASTCALL, nullptr},
        {nullptr, nullptr, 0, nullptr},
    };
    static PyModuleDef module = {
        PyModuleDef_HEAD_INIT, "xent._backends.native._native", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr,
    };
    const Kernels* sets[3];
    available(sets);
    kernels = sets[0];
    return PyModule_Create(&module);
}
