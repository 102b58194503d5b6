// What the gradient asks of memory beyond loads and stores. Each is a hint, or has a plain equivalent.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <emmintrin.h>
#endif

constexpr int64_t HUGE_PAGE = 2 << 20;
constexpr int64_t HUGE_PAGES = 4 << 20;  // bytes that are worth some
constexpr int64_t LARGE = 32 << 20;      // bytes: more than caches hold, and than malloc takes from memory used before

struct Pages {  // the whole ones in a piece of memory
    char *begin, *end;
    Pages(void* data, int64_t bytes) {
        const uintptr_t page = 4096, first = reinterpret_cast<uintptr_t>(data);
        begin = reinterpret_cast<char*>((first + page - 1) / page * page);
        end = reinterpret_cast<char*>((first + uintptr_t(bytes)) / page * page);
    }
};

// Whether memory that was just allocated has been used before, and so has pages already: a few of them, far apart, tell.
inline bool resident(Pages pages) {
#if defined(__linux__)
    const int64_t last = (pages.end - pages.begin) / 4096 - 1, probes = 16;
    unsigned char here = 1;
    for (int64_t i = 0; i < probes && here & 1; ++i)
        if (mincore(pages.begin + last * i / (probes - 1) * 4096, 1, &here) != 0) return false;
    return last >= 0 && here & 1;
#else
    (void)pages;
    return false;
#endif
}

// Most of what fresh memory costs are its page faults, one for each 4 KiB; with huge pages, one for each 2 MiB.
inline void advise_huge_pages(Pages pages) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    madvise(pages.begin, size_t(pages.end - pages.begin), MADV_HUGEPAGE);  // may fail: it is a hint
#else
    (void)pages;
#endif
}

// Give the pages back, so that they are zeros which take neither memory nor time until something is written. Not so
// if they have a file behind them, or other processes share them: therefore it is tried on one byte.
inline bool become_zeros(Pages pages) {
#if defined(__linux__)
    volatile char* probe = pages.begin;
    *probe = 1;
    return madvise(pages.begin, size_t(pages.end - pages.begin), MADV_DONTNEED) == 0 && *probe == 0;
#else
    (void)pages;
    return false;
#endif
}

// All small pages of a piece of memory in one call of the system, for less than half of what their faults would cost.
inline void populate(char* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_POPULATE_WRITE)
    const uintptr_t first = reinterpret_cast<uintptr_t>(data) & ~uintptr_t(4095);
    madvise(reinterpret_cast<void*>(first), reinterpret_cast<uintptr_t>(data) + size_t(bytes) - first, MADV_POPULATE_WRITE);
#else
    (void)data, (void)bytes;
#endif
}

// Zeros, by stores that do not first read what they overwrite: for memory that no cache holds, half of the time.
inline void clear_past_caches(char* out, int64_t bytes) {
#if defined(__x86_64__) || defined(_M_X64)
    const int64_t before = -reinterpret_cast<intptr_t>(out) & 15, head = before < bytes ? before : bytes;
    std::memset(out, 0, size_t(head));
    out += head, bytes -= head;
    for (; bytes >= 16; out += 16, bytes -= 16) _mm_stream_si128(reinterpret_cast<__m128i*>(out), _mm_setzero_si128());
    _mm_sfence();  // these stores are not ordered with others, and must be done when the call returns
#endif
    std::memset(out, 0, size_t(bytes));
}
