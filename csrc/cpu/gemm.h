// A small fp32 matrix product for operands that already sit in cache, in row-major scratch:
//
//   C[m][n] = init(m, n) + sum over k in [k0, k1) of A(m, k) * B[k][n]
//
// n runs along vector lanes and A is broadcast, so A may be read transposed at no cost and B's rows must be whole
// vectors. A tile of C stays in registers over all of k (the register-tiled inner kernel of Goto and van de Geijn
// 2008, doi 10.1145/1356052.1356053); what happens to it first and last is the caller's: init(row, column) gives
// the starting vector, done(row, column, value) takes the result.
#pragma once

#include <algorithm>

#include "vec.h"

namespace cgpt::CGPT_ISA {

// Rows and vectors of one tile: as many accumulators as leave registers for B's row and A's element.
#if defined(__AVX512F__)
inline constexpr int kTileRows = 6, kTileVecs = 4;
#elif defined(__AVX2__)
inline constexpr int kTileRows = 6, kTileVecs = 2;
#else
inline constexpr int kTileRows = 4, kTileVecs = 2;
#endif

enum class A { rows, columns };  // A(m, k) is a[m * lda + k] or a[k * lda + m]

CGPT_INLINE vf broadcast(const float* p) { return *p - vf{}; }  // x - 0 is x for every x; x + 0 is not for -0

template <int R, int C, A order, class Init, class Done>
CGPT_INLINE void gemm_tile(int64_t row, int64_t column, int64_t k0, int64_t k1, const float* a, int64_t lda,
                           const float* b, int64_t ldb, Init&& init, Done&& done) {
    vf c[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < C; ++i) c[r][i] = init(row + r, column + i * W);
    a += order == A::rows ? row * lda : row;
    b += column;
#pragma GCC unroll 2
    for (int64_t k = k0; k < k1; ++k) {
        vf line[C];
#pragma GCC unroll 4
        for (int i = 0; i < C; ++i) line[i] = load(b + k * ldb + i * W);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const vf x = broadcast(order == A::rows ? a + r * lda + k : a + k * lda + r);
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
template <A order, int R = kTileRows, int C = kTileVecs, class Init, class Done>
inline void gemm_group(int64_t rows, int64_t vecs, int64_t row, int64_t column, int64_t k0, int64_t k1, const float* a,
                       int64_t lda, const float* b, int64_t ldb, Init& init, Done& done) {
    if constexpr (R > 1)
        if (rows < R) return gemm_group<order, R - 1, C>(rows, vecs, row, column, k0, k1, a, lda, b, ldb, init, done);
    if constexpr (C > 1)
        if (vecs < C) return gemm_group<order, R, C - 1>(rows, vecs, row, column, k0, k1, a, lda, b, ldb, init, done);
    gemm_tile<R, C, order>(row, column, k0, k1, a, lda, b, ldb, init, done);
}

// What one group of rows needs of the product: columns [0, n) rounded up to vectors, and k in [k0, k1).
struct Extent {
    int64_t n, k0, k1;
};

// All of C, `rows` rows. extent(first, last) says what rows [first, last) need, so a triangle costs half a square.
// Columns go outermost: the panel of B that a column of tiles reads stays in the first-level cache.
template <A order, class ExtentOf, class Init, class Done>
inline void gemm(int64_t rows, int64_t n, const float* a, int64_t lda, const float* b, int64_t ldb, ExtentOf&& extent,
                 Init&& init, Done&& done) {
    const int64_t vecs = (n + W - 1) / W, panels = (vecs + kTileVecs - 1) / kTileVecs;
    for (int64_t p = 0; p < panels; ++p) {
        const int64_t v0 = vecs * p / panels, v1 = vecs * (p + 1) / panels;  // 5 vectors are 2 + 3, not 4 + 1
        for (int64_t row = 0; row < rows; row += kTileRows) {
            const int64_t group = std::min<int64_t>(kTileRows, rows - row);
            const Extent e = extent(row, row + group);
            const int64_t width = std::min(v1, (e.n + W - 1) / W) - v0;
            if (width > 0) gemm_group<order>(group, width, row, v0 * W, e.k0, e.k1, a, lda, b, ldb, init, done);
        }
    }
}

}  // namespace cgpt::CGPT_ISA
