// Arithmetic on one number, without branches, tables or intrinsics, so that the compiler turns a loop over it into
// whatever SIMD the machine has: exp and tanh, and the two 16-bit formats to and from float32.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__GNUC__)                                 // GCC and every clang
#define INLINE inline __attribute__((always_inline))  // so that it takes the instruction set of its caller
#define PREFETCH(address, locality) __builtin_prefetch(address, 0, locality)
#else
#define INLINE inline
#define PREFETCH(address, locality) void(address)
#endif

template <class To, class From>
INLINE To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "another type, the same bits");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// ----------------------------------------------------------------------------------------------------- exp and tanh

// Here 2^k would be subnormal, and has the bits of 0. No constants, but in native.cpp: GCC would work out what becomes of
// them, and compare and mask each result, which takes longer than one maximum.
extern float lowest32;   // -88
extern double lowest64;  // -709

template <class F>
struct Exp {  // e^t = scale (1 + r h): scale = 2^k, k = round(t / ln 2), r = t - k ln 2, h = (e^r - 1) / r
    F scale, r, h;
};

// The magic number is 1.5 * 2^23 + 127: a number below 2^22 that is added to it ends up, rounded, in the lowest bits
// of the sum, with the exponent's bias, so that one shift makes 2^k. ln 2 is split into a short first part, whose
// product with k is exact, and the rest. -ffast-math would cancel all of this: the build must not use it.
INLINE Exp<float> exp_parts(float t) {
    t = t < lowest32 ? lowest32 : t;
    const float shifted = t * 1.44269504f + 12583039.0f;
    const float k = shifted - 12583039.0f;
    const float r = (t - k * 0.693359375f) + k * 2.12194440e-4f;
    float h = 1.3888873e-3f;  // minimax on |r| <= ln(2) / 2, relative error 1.1e-8
    h = h * r + 8.369104e-3f;
    h = h * r + 4.1667137e-2f;
    h = h * r + 1.6666506e-1f;
    h = h * r + 0.5f;
    h = h * r + 1.0f;
    return {bits<float>(bits<uint32_t>(shifted) << 23), r, h};
}

template <class DIGITS = double>  // with as many terms as the digits of this type ask for
INLINE Exp<double> exp_parts(double t) {  // the same with 1.5 * 2^52 + 1023
    t = t < lowest64 ? lowest64 : t;
    const double shifted = t * 1.4426950408889634 + 6755399441056767.0;
    const double k = shifted - 6755399441056767.0;
    const double r = (t - k * 6.93147180369123816490e-01) - k * 1.90821492927058770002e-10;
    double h;
    if constexpr (sizeof(DIGITS) == sizeof(float)) {
        h = 1.984125146263827e-04;  // relative error 2.3e-10
        h = h * r + 1.394100491597582e-03;
        h = h * r + 8.333402898177727e-03;
        h = h * r + 4.166635444984559e-02;
        h = h * r + 0.16666666249624018;
        h = h * r + 0.5000000046652098;
        h = h * r + 1.0000000000311966;
    } else {
        h = 2.5052095329310414e-08;  // 1.8e-17
        h = h * r + 2.7626331651543027e-07;
        h = h * r + 2.7557414983715266e-06;
        h = h * r + 2.480150443697496e-05;
        h = h * r + 1.9841269707063285e-04;
        h = h * r + 1.3888888932388807e-03;
        h = h * r + 8.333333333398092e-03;
        h = h * r + 4.166666666657354e-02;
        h = h * r + 0.16666666666666563;
        h = h * r + 0.5;
        h = h * r + 1.0;
    }
    return {bits<double>(bits<uint64_t>(shifted) << 52), r, h};
}

// Within 1.3 ulp of e^t for float and 1.8 for double (tests/backends/test_native.py; 1 and 1.5 where there is a fused multiply-
// add). Exactly 0 where k is that of the lowest t, below e^-87.68 or e^-708.74, and for -inf; NaN stays. A softmax needs t <= 0
// only: the bound holds up to 88 (709), but beyond, the result is meaningless. A clamp there would cost every element.
template <class F>
INLINE F exponential(const Exp<F>& e) {
    return (e.h * e.r + 1) * e.scale;
}

template <class F>
INLINE F exponential(F t) {
    return exponential(exp_parts(t));
}

// e^t - 1, with all its digits where t is small.
template <class F>
INLINE F exponential_less_one(const Exp<F>& e) {
    return e.scale * (e.h * e.r) + (e.scale - 1);
}

// log x = k ln 2 + log m with x = 2^k m and m in [sqrt(1/2), sqrt(2)); log m = 2 artanh(s), s = (m - 1) / (m + 1), by a
// polynomial in s^2. Within 2 ulp of log x for 0 and normal x, and NaN for NaN: what sums of e^t with t <= 0 are.
INLINE double logarithm(double x) {
    const uint64_t shifted = bits<uint64_t>(x) - bits<uint64_t>(0.70710678118654752) + (1023ull << 52);
    // An integer below 2^52 as a double, without the conversion, which AVX2 lacks.
    const double k = bits<double>(shifted >> 52 | bits<uint64_t>(0x1p52)) - (0x1p52 + 1023);
    const double m = bits<double>((shifted & 0xfffffffffffff) + bits<uint64_t>(0.70710678118654752));
    const double s = (m - 1) / (m + 1), v = s * s;
    double h = 7.308437863705854e-02;  // minimax on |s| <= 0.1716, relative error of the logarithm 4.5e-18
    h = h * v + 7.66584200121672e-02;
    h = h * v + 9.091445184664071e-02;
    h = h * v + 0.11111105557913133;
    h = h * v + 0.14285714313053088;
    h = h * v + 0.1999999999994959;
    h = h * v + 0.3333333333333335;
    const double value = k * 6.93147180369123816490e-01 + (2 * s + (2 * s * v * h + k * 1.90821492927058770002e-10));
    return x == 0 ? -INFINITY : value + (x - x);
}

// tanh |u| = -m / (2 + m) with m = e^(-2|u|) - 1, which keeps all its digits where u is small.
template <class F>
INLINE F hyperbolic_tangent(F u) {
    const F t = u < 0 ? 2 * u : -2 * u;
    const F m = exponential_less_one(exp_parts(t));
    const F positive = -m / (2 + m);
    return u < 0 ? -positive : positive;
}

// ----------------------------------------------------------------------------------------------------- 16-bit formats

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

INLINE double widen(double x) { return x; }
INLINE float widen(float x) { return x; }
INLINE float widen(BFloat16 x) { return bits<float>(uint32_t(x.bits) << 16); }

// The exponent's bias goes from 15 to 127. A subnormal number is first given the exponent of 2^-14, which is then
// subtracted again: no float32 subnormal appears, which a processor may have been told to flush to 0.
INLINE float widen(Float16 x) {
    const uint32_t size = uint32_t(x.bits & 0x7fff) << 13;
    const float subnormal = bits<float>(size + (113u << 23)) - bits<float>(113u << 23);
    const uint32_t normal = size + (size >= 31u << 23 ? 224u << 23 : 112u << 23);  // 31, infinity and NaN, becomes 255
    const uint32_t value = size < 1u << 23 ? bits<uint32_t>(subnormal) : normal;
    return bits<float>(value | uint32_t(x.bits & 0x8000) << 16);
}

// To nearest, ties to even: add half of the last place, less one bit where that place is even, and cut off.
INLINE void narrow(double x, double& out) { out = x; }
INLINE void narrow(float x, float& out) { out = x; }
INLINE void narrow(float x, BFloat16& out) {
    const uint32_t u = bits<uint32_t>(x);
    const uint32_t rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
    out.bits = uint16_t((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);  // a NaN must not round to infinity
}

INLINE void narrow(float x, Float16& out) {
    const uint32_t u = bits<uint32_t>(x), size = u & 0x7fffffff;
    // Below 2^-14, adding 0.5 rounds at the right place, 2^-24, and leaves the digits in the lowest bits.
    const uint32_t subnormal = bits<uint32_t>(bits<float>(size) + 0.5f) - bits<uint32_t>(0.5f);
    const uint32_t normal = (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13;
    const uint32_t special = size > 0x7f800000 ? 0x7e00 : 0x7c00;  // NaN, or infinity from 2^16 on
    const uint32_t value = size < 113u << 23 ? subnormal : size < 143u << 23 ? normal : special;
    out.bits = uint16_t(value | (u >> 16 & 0x8000));
}
