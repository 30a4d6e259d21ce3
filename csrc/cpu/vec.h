// A vector of W floats, W being what the instruction set holds: 16 (AVX-512), 8 (AVX2) or the 4 that every
// 64-bit baseline has ("scalar": no extension assumed). Written with the compilers' vector extensions, so
// arithmetic is plain operators; intrinsics only where those have no word for it. Loads widen bf16 and fp16
// to fp32 and stores round to nearest even, so kernels compute in fp32 whatever they read. Each instruction
// set compiles this file in a namespace of its own (CGPT_ISA): two variants of one inline function must never
// meet in the linker.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../view.h"

namespace cgpt::CGPT_ISA {

#if defined(__AVX512F__)
inline constexpr int W = 16;
#elif defined(__AVX2__)
inline constexpr int W = 8;
#else
inline constexpr int W = 4;
#endif

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

#define CGPT_INLINE inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

CGPT_INLINE vf splat(float x) { return vf{} + x; }
CGPT_INLINE vi as_int(vf x) { return reinterpret_cast<vi>(x); }
CGPT_INLINE vf as_float(vi x) { return reinterpret_cast<vf>(x); }
CGPT_INLINE vf as_float(vu x) { return reinterpret_cast<vf>(x); }

// 16-bit lanes as the low halves of 32-bit ones, and back; gcc 12 takes the long way when it is not told.
CGPT_INLINE vu widen_bits(vh bits) {
#if defined(__AVX512F__)
    return (vu)_mm512_cvtepu16_epi32((__m256i)bits);
#elif defined(__AVX2__)
    return (vu)_mm256_cvtepu16_epi32((__m128i)bits);
#else
    return __builtin_convertvector(bits, vu);
#endif
}
CGPT_INLINE vh narrow_bits(vu bits) {
#if defined(__AVX512F__)
    return (vh)_mm512_cvtepi32_epi16((__m512i)bits);
#else
    return __builtin_convertvector(bits, vh);
#endif
}

CGPT_INLINE vf widen(vh bits, bf16) { return as_float(widen_bits(bits) << 16); }

CGPT_INLINE vh narrow(vf x, bf16) {
    vu u = reinterpret_cast<vu>(x);
    vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    vu quiet = (u >> 16) | 0x40u;  // rounding could carry a NaN's payload into infinity
    return narrow_bits(x == x ? rounded : quiet);
}

// Scalar IEEE half conversions for machines without F16C.
CGPT_INLINE float half_to_float(uint16_t h) {
    const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31u, fraction = h & 1023u;
    uint32_t bits;
    float x;
    if (exponent == 31) {
        bits = sign | 0x7f800000u | (fraction << 13);
    } else if (exponent != 0) {
        bits = sign | ((exponent + 112u) << 23) | (fraction << 13);
    } else {
        x = static_cast<float>(fraction) * 0x1p-24f;
        std::memcpy(&bits, &x, 4);
        bits |= sign;
    }
    std::memcpy(&x, &bits, 4);
    return x;
}

CGPT_INLINE uint16_t float_to_half(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint16_t sign = (bits >> 16) & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return sign | 0x7e00u;
    if (bits >= 0x477ff000u) return sign | 0x7c00u;  // rounds past 65504
    if (bits < 0x38800000u) {                        // subnormal: let the float adder round at 2^-24
        float magnitude;
        std::memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        std::memcpy(&bits, &magnitude, 4);
        return sign | static_cast<uint16_t>(bits - 0x3f000000u);
    }
    return sign | static_cast<uint16_t>((bits + 0xfffu + ((bits >> 13) & 1u) - 0x38000000u) >> 13);
}

CGPT_INLINE vf widen(vh bits, f16) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__F16C__)
    return (vf)_mm256_cvtph_ps((__m128i)bits);
#else
    vf x;
    for (int i = 0; i < W; ++i) x[i] = half_to_float(bits[i]);
    return x;
#endif
}

CGPT_INLINE vh narrow(vf x, f16) {
#if defined(__AVX512F__)
    return (vh)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
    return (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
    vh bits;
    for (int i = 0; i < W; ++i) bits[i] = float_to_half(x[i]);
    return bits;
#endif
}

CGPT_INLINE vf load(const float* p) {
    vf x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
CGPT_INLINE void store(float* p, vf x) { std::memcpy(p, &x, sizeof x); }

template <class T>
CGPT_INLINE vf load(const T* p) {
    vh bits;
    std::memcpy(&bits, p, sizeof bits);
    return widen(bits, T{});
}
template <class T>
CGPT_INLINE void store(T* p, vf x) {
    vh bits = narrow(x, T{});
    std::memcpy(p, &bits, sizeof bits);
}

// Tails: the first n < W lanes; the others read as zero and are not written.
template <class T>
CGPT_INLINE vf load_n(const T* p, int64_t n) {
    T lanes[W] = {};
    std::memcpy(lanes, p, n * sizeof(T));
    return load(lanes);
}
template <class T>
CGPT_INLINE void store_n(T* p, vf x, int64_t n) {
    T lanes[W];
    store(lanes, x);
    std::memcpy(p, lanes, n * sizeof(T));
}

template <class T>
CGPT_INLINE float load_one(const T* p) {
    return load_n(p, 1)[0];
}
template <>
CGPT_INLINE float load_one(const float* p) {
    return *p;
}
template <class T>
CGPT_INLINE void store_one(T* p, float x) {
    store_n(p, splat(x), 1);
}

// Calls body(i, n) along [0, size): n == W but for the last, shorter step. `get` and `put` pick load or
// load_n by n.
template <class F>
CGPT_INLINE void for_lanes(int64_t size, F&& body) {
    int64_t i = 0;
    for (; i + W <= size; i += W) body(i, std::integral_constant<int64_t, W>{});
    if (i < size) body(i, size - i);
}
template <class T>
CGPT_INLINE vf get(const T* p, std::integral_constant<int64_t, W>) {
    return load(p);
}
template <class T>
CGPT_INLINE vf get(const T* p, int64_t n) {
    return load_n(p, n);
}
template <class T>
CGPT_INLINE void put(T* p, vf x, std::integral_constant<int64_t, W>) {
    store(p, x);
}
template <class T>
CGPT_INLINE void put(T* p, vf x, int64_t n) {
    store_n(p, x, n);
}

// The same four steps at a time: body(i, n, k) gets k = 0..3 as a constant, to index four accumulators whose additions
// do not wait for each other.
template <class F>
CGPT_INLINE void for_lanes4(int64_t size, F&& body) {
    const std::integral_constant<int64_t, W> full;
    int64_t i = 0;
    for (; i + 4 * W <= size; i += 4 * W) {
        body(i, full, std::integral_constant<int, 0>{});
        body(i + W, full, std::integral_constant<int, 1>{});
        body(i + 2 * W, full, std::integral_constant<int, 2>{});
        body(i + 3 * W, full, std::integral_constant<int, 3>{});
    }
    for (; i + W <= size; i += W) body(i, full, std::integral_constant<int, 0>{});
    if (i < size) body(i, size - i, std::integral_constant<int, 0>{});
}

// x with the lanes from n on set to zero.
CGPT_INLINE vf keep_n(vf x, std::integral_constant<int64_t, W>) { return x; }
CGPT_INLINE vf keep_n(vf x, int64_t n) {
    for (int64_t i = n; i < W; ++i) x[i] = 0;
    return x;
}

// a * b + c rounded once, everywhere: what bit-for-bit contracts are written with (slow on "scalar").
CGPT_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    vf r;
    for (int i = 0; i < W; ++i) r[i] = std::fma(a[i], b[i], c[i]);
    return r;
#endif
}

// a * b + c, fused where that is fast.
CGPT_INLINE vf madd(vf a, vf b, vf c) {
#if defined(__FMA__)
    return fma(a, b, c);
#else
    return a * b + c;
#endif
}

CGPT_INLINE vf sqrt(vf x) {
#if defined(__AVX512F__)
    return (vf)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
    return (vf)_mm256_sqrt_ps((__m256)x);
#else
    for (int i = 0; i < W; ++i) x[i] = std::sqrt(x[i]);
    return x;
#endif
}

CGPT_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
CGPT_INLINE vf min(vf a, vf b) { return a < b ? a : b; }

// W rows of W 32-bit lanes, transposed in log2(W) rounds: round d exchanges the blocks of d rows by d lanes that lie
// across each other.
template <int d>
CGPT_INLINE void transpose_round(vu (&x)[W]) {
    vi low, high;
    for (int i = 0; i < W; ++i) {
        low[i] = i & d ? W + i - d : i;
        high[i] = i & d ? W + i : i + d;
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
        if (i & d) continue;
        const vu a = x[i], b = x[i + d];
        x[i] = __builtin_shuffle(a, b, low);
        x[i + d] = __builtin_shuffle(a, b, high);
    }
    if constexpr (d > 1) transpose_round<d / 2>(x);
}
CGPT_INLINE void transpose(vu (&x)[W]) { transpose_round<W / 2>(x); }

// Horizontal sums and maxima in a fixed tree: upper half onto lower half until one lane is left.
typedef float vf4 __attribute__((vector_size(16)));
typedef float vf8 __attribute__((vector_size(32)));

template <class Combine>
CGPT_INLINE float fold(vf x, Combine combine) {
#if defined(__AVX512F__)
    __m256 y = (__m256)combine((vf8)_mm512_castps512_ps256((__m512)x), (vf8)_mm512_extractf32x8_ps((__m512)x, 1));
    vf4 z = combine((vf4)_mm256_castps256_ps128(y), (vf4)_mm256_extractf128_ps(y, 1));
#elif defined(__AVX2__)
    vf4 z = combine((vf4)_mm256_castps256_ps128((__m256)x), (vf4)_mm256_extractf128_ps((__m256)x, 1));
#else
    vf4 z = x;
#endif
    vf4 pair = combine(z, (vf4){z[2], z[3], z[2], z[3]});
    return combine(pair, (vf4){pair[1], pair[1], pair[1], pair[1]})[0];
}
CGPT_INLINE float hsum(vf x) {
    return fold(x, [](auto a, auto b) { return a + b; });
}
CGPT_INLINE float hsum4(const vf* x) { return hsum((x[0] + x[1]) + (x[2] + x[3])); }
CGPT_INLINE float hmax(vf x) {
    return fold(x, [](auto a, auto b) { return a > b ? a : b; });
}

// e^x to about 1 ulp: x = n ln2 + r, |r| <= ln2/2, a degree-6 minimax polynomial in r, and 2^n by the
// exponent field. exp(-inf) = 0, exp(inf) = inf, NaN stays NaN; results below the smallest normal float are
// 0.
CGPT_INLINE vf exp(vf x) {
    const vf shift = splat(0x1.8p23f);  // adding it rounds to an integer in the low mantissa bits
    vf clamped = x > 88.72284f ? splat(88.72284f) : x;
    clamped = clamped < -87.33654f ? splat(-87.33654f) : clamped;
    vf n = madd(clamped, splat(0x1.715476p+0f), shift) - shift;
    vf r = madd(n, splat(-0x1.62e400p-1f), clamped);  // ln2 in two parts; n * the first is exact
    r = madd(n, splat(-0x1.7f7d1cp-20f), r);
    vf p = splat(0x1.6c16c2p-10f);  // 1/720
    p = madd(p, r, splat(0x1.111112p-7f));
    p = madd(p, r, splat(0x1.555556p-5f));
    p = madd(p, r, splat(0x1.555556p-3f));
    p = madd(p, r, splat(0.5f));
    p = madd(p, r, splat(1.0f));
    p = madd(p, r, splat(1.0f));
    // 2^n in two factors: n reaches 128 where one factor would overflow to infinity too early.
    vi whole = __builtin_convertvector(n, vi), half = whole >> 1;
    vf scale1 = as_float((half + 127) << 23), scale2 = as_float((whole - half + 127) << 23);
    vf y = p * scale1 * scale2;
    y = x < -87.33654f ? vf{} : y;
    y = x > 88.72284f ? splat(INFINITY) : y;
    return x == x ? y : x;
}

}  // namespace cgpt::CGPT_ISA

// Runs `...` with T bound to the C++ type of `dtype`; the border has refused every other dtype.
#define CGPT_WITH_FLOAT_TYPE(dtype, T, ...) \
    switch (dtype) {                        \
        case DType::f32: {                  \
            using T = float;                \
            __VA_ARGS__;                    \
            break;                          \
        }                                   \
        case DType::bf16: {                 \
            using T = bf16;                 \
            __VA_ARGS__;                    \
            break;                          \
        }                                   \
        case DType::f16: {                  \
            using T = f16;                  \
            __VA_ARGS__;                    \
            break;                          \
        }                                   \
        default:                            \
            break;                          \
    }
