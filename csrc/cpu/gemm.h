// A small fp32 matrix product for operands that already sit in cache, in row-major scratch:
//
//   C[m][n] = init(m, n) + sum over k in [k0, k1) of A(m, k) * B[k][n]
//
// n runs along vector lanes and A is broadcast, so A may be read transposed at no cost and B's rows must be whole
// vectors. A tile of C stays in registers over all of k (the register-tiled inner kernel of Goto and van de Geijn
// 2008, doi 10.1145/1356052.1356053); what happens to it first and last is the caller's: init(row, column) gives
// the starting vector, done(row, column, value) takes the result.
//
// k counts elements of A and B: floats, or pairs of bf16 where the instruction set multiplies those and sums in fp32.
//
// Where pairs go through AMX's tiles, A is read as rows only, and both in whole tiles: A's rows up to a multiple of
// kTileSide, whatever stands in the last of them, and k up to a multiple of kTileDepth (gemm(): down to one as well),
// where every product must be 0. Such a thread holds a Tiles meanwhile.
#pragma once

#include <algorithm>

#include "amx.h"
#include "vec.h"

namespace cgpt::CGPT_ISA {

enum class A { rows, columns };  // A(m, k) is a[m * lda + k] or a[k * lda + m]

CGPT_INLINE vf broadcast(const float* p) { return *p - vf{}; }  // x - 0 is x for every x; x + 0 is not for -0

// Two neighbours along k, the first in the lower half.
struct bf16x2 {
    uint32_t bits;
};

// What products of T's values go through, and how many of those values it holds.
#if defined(__AVX512BF16__)
template <class T>
using Element = std::conditional_t<std::is_same_v<T, bf16>, bf16x2, float>;
#else
template <class T>
using Element = float;
#endif
template <class E>
inline constexpr int64_t kHeld = std::is_same_v<E, bf16x2> ? 2 : 1;

// Whether products of E go through AMX's tiles.
#if defined(__AMX_BF16__)
template <class E>
inline constexpr bool kOnTiles = std::is_same_v<E, bf16x2>;
#else
template <class E>
inline constexpr bool kOnTiles = false;
#endif

// Rows and vectors of one tile of C: as many accumulators as leave registers for B's row and A's element. AMX: two by
// two of its tiles. And how much of k a tile takes at a time.
template <class E>
inline constexpr int kTileRows = kOnTiles<E> ? 32 : (W > 4 ? 6 : 4);
template <class E>
inline constexpr int kTileVecs = kOnTiles<E> ? 2 : (W > 8 ? 4 : 2);
template <class E>
inline constexpr int64_t kTileDepth = kOnTiles<E> ? 16 : 1;

// Held by a thread while it multiplies elements E, one at a time.
template <class E>
struct Tiles {
    Tiles() {
        if constexpr (kOnTiles<E>) hold_tiles();
    }
    ~Tiles() {
        if constexpr (kOnTiles<E>) release_tiles();
    }
    Tiles(const Tiles&) = delete;
};

#if defined(__AVX512BF16__)
CGPT_INLINE vu load(const bf16x2* p) {
    vu x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
CGPT_INLINE void store(bf16x2* p, vu x) { std::memcpy(p, &x, sizeof x); }
CGPT_INLINE vu broadcast(const bf16x2* p) { return vu{} + p->bits; }

// c plus both products of a pair, to nearest even whatever the rounding mode; denormals count as 0, in and out.
CGPT_INLINE vf madd(vu a, vu b, vf c) { return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b); }

#endif

// W elements of 2 W neighbours, and of two vectors' equal lanes (floats: of one vector). bf16 is rounded to nearest
// even, denormals to 0.
CGPT_INLINE void store_along(float* p, const vf (&x)[1]) { store(p, x[0]); }
CGPT_INLINE void store_across(float* p, const vf (&x)[1]) { store(p, x[0]); }
#if defined(__AVX512BF16__)
CGPT_INLINE void store_along(bf16x2* p, const vf (&x)[2]) {
    store(p, (vu)_mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]));
}
CGPT_INLINE vu across(const vf (&x)[2]) {
    const vu low = widen_bits((vh)_mm512_cvtneps_pbh((__m512)x[0]));
    return low | widen_bits((vh)_mm512_cvtneps_pbh((__m512)x[1])) << 16;
}
CGPT_INLINE void store_across(bf16x2* p, const vf (&x)[2]) { store(p, across(x)); }
#endif

template <int R, int C, A order, class E, class Init, class Done>
CGPT_INLINE void gemm_tile(int64_t row, int64_t column, int64_t k0, int64_t k1, const E* a, int64_t lda, const E* b,
                           int64_t ldb, Init&& init, Done&& done) {
    vf c[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < C; ++i) c[r][i] = init(row + r, column + i * W);
    a += order == A::rows ? row * lda : row;
    b += column;
#pragma GCC unroll 2
    for (int64_t k = k0; k < k1; ++k) {
        decltype(load(b)) line[C];
#pragma GCC unroll 4
        for (int i = 0; i < C; ++i) line[i] = load(b + k * ldb + i * W);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const auto x = broadcast(order == A::rows ? a + r * lda + k : a + k * lda + r);
#pragma GCC unroll 4
            for (int i = 0; i < C; ++i) c[r][i] = madd(x, line[i], c[r][i]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < C; ++i) done(row + r, column + i * W, c[r][i]);
}

// One group of `rows` <= kTileRows rows by `vecs` <= kTileVecs vectors: picks the compiled tile of that size.
template <A order, class E, int R = kTileRows<E>, int C = kTileVecs<E>, class Init, class Done>
inline void gemm_group(int64_t rows, int64_t vecs, int64_t row, int64_t column, int64_t k0, int64_t k1, const E* a,
                       int64_t lda, const E* b, int64_t ldb, Init& init, Done& done) {
    if constexpr (R > 1)
        if (rows < R)
            return gemm_group<order, E, R - 1, C>(rows, vecs, row, column, k0, k1, a, lda, b, ldb, init, done);
    if constexpr (C > 1)
        if (vecs < C)
            return gemm_group<order, E, R, C - 1>(rows, vecs, row, column, k0, k1, a, lda, b, ldb, init, done);
    gemm_tile<R, C, order>(row, column, k0, k1, a, lda, b, ldb, init, done);
}

#if defined(__AMX_BF16__)
// The first `rows` of R rows by C vectors. The sums come first and init is added to them.
template <int R, int C, class Init, class Done>
CGPT_INLINE void gemm_tiles(int64_t rows, int64_t row, int64_t column, int64_t k0, int64_t k1, const bf16x2* a,
                            int64_t lda, const bf16x2* b, int64_t ldb, Init&& init, Done&& done) {
    alignas(64) float sums[R * C * W];
    sum_tiles<R / kTileSide, C>(k1 - k0, a + row * lda + k0, lda, kTileSide, b + k0 * ldb + column, ldb, sums, C * W);
    for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 2
        for (int64_t i = 0; i < C; ++i)
            done(row + r, column + i * W, init(row + r, column + i * W) + load(sums + (r * C + i) * W));
}

template <int R, int C, A order, class Init, class Done>
CGPT_INLINE void gemm_tile(int64_t row, int64_t column, int64_t k0, int64_t k1, const bf16x2* a, int64_t lda,
                           const bf16x2* b, int64_t ldb, Init&& init, Done&& done) {
    static_assert(order == A::rows);
    gemm_tiles<R, C>(R, row, column, k0, k1, a, lda, b, ldb, init, done);
}

template <A order, class Init, class Done>
inline void gemm_group(int64_t rows, int64_t vecs, int64_t row, int64_t column, int64_t k0, int64_t k1, const bf16x2* a,
                       int64_t lda, const bf16x2* b, int64_t ldb, Init& init, Done& done) {
    static_assert(order == A::rows);
    if (vecs == 2 && rows > kTileSide) return gemm_tiles<32, 2>(rows, row, column, k0, k1, a, lda, b, ldb, init, done);
    if (vecs == 2) return gemm_tiles<16, 2>(rows, row, column, k0, k1, a, lda, b, ldb, init, done);
    if (rows > kTileSide) return gemm_tiles<32, 1>(rows, row, column, k0, k1, a, lda, b, ldb, init, done);
    gemm_tiles<16, 1>(rows, row, column, k0, k1, a, lda, b, ldb, init, done);
}
#endif

// What one group of rows needs of the product: columns [0, n) rounded up to vectors, and k in [k0, k1).
struct Extent {
    int64_t n, k0, k1;
};

// All of C, `rows` rows. extent(first, last) says what rows [first, last) need, so a triangle costs half a square.
// Columns go outermost: the panel of B that a column of tiles reads stays in the first-level cache.
template <A order, class E, class ExtentOf, class Init, class Done>
inline void gemm(int64_t rows, int64_t n, const E* a, int64_t lda, const E* b, int64_t ldb, ExtentOf&& extent,
                 Init&& init, Done&& done) {
    constexpr int64_t height = kTileRows<E>, width = kTileVecs<E>, depth = kTileDepth<E>;
    const int64_t vecs = (n + W - 1) / W, panels = (vecs + width - 1) / width;
    for (int64_t p = 0; p < panels; ++p) {
        const int64_t v0 = vecs * p / panels, v1 = vecs * (p + 1) / panels;  // 5 vectors are 2 + 3, not 4 + 1
        for (int64_t row = 0; row < rows; row += height) {
            const int64_t group = std::min(height, rows - row);
            const Extent e = extent(row, row + group);
            const int64_t seen = std::min(v1, (e.n + W - 1) / W) - v0;
            const int64_t k0 = e.k0 / depth * depth, k1 = (e.k1 + depth - 1) / depth * depth;
            if (seen > 0) gemm_group<order>(group, seen, row, v0 * W, k0, k1, a, lda, b, ldb, init, done);
        }
    }
}

}  // namespace cgpt::CGPT_ISA
