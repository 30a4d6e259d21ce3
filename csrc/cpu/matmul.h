// A matrix product over whole tensors, shared among the threads:
//
//   C[i][j] = sum over l of A[i][l] * B[j][l],  A (m, k), B (n, k);  each of fp32, bf16 or fp16, C in fp32
//
// A finished tile goes to the caller while it is in the first-level cache, so a bias, an activation or a rounding costs
// no pass over memory:
//
//   finish(tile, ld, row, column, rows, columns)    C[row + r][column + c] = tile[r * ld + c]
//
// Parts of the sum and its order depend on the shape alone, so the bits do not depend on the thread count. Rows come to
// `finish` in blocks of block_rows(m, k), each block's in ascending order for every column and on one thread: what the
// caller sums over rows it may keep per block.
#pragma once

#include <functional>

#include "../linear.h"
#include "vec.h"

namespace cgpt::CGPT_ISA {

// An operand's lines: `along` the sum, line i at i * stride has A[i]'s values; or across it, line l has A[.][l].
template <class T>
struct Lines {
    const T* data;
    int64_t stride;
    bool along;
};

template <class T>
Lines<T> lines_of(const Matrix& m) {
    return {static_cast<const T*>(m.data), m.stride, m.row_major};
}

using Finish =
    std::function<void(const float* tile, int64_t ld, int64_t row, int64_t column, int64_t rows, int64_t columns)>;

// Rows of a block, a function of the shape alone. T: float, bf16, f16.
template <class T>
int64_t block_rows(int64_t m, int64_t k);

// Called before a tile is computed: where `finish` will read and write, so that it need not wait for memory then.
using Foresee = std::function<void(int64_t row, int64_t column, int64_t rows, int64_t columns)>;

template <class T>
void matmul(const Lines<T>& a, const Lines<T>& b, int64_t m, int64_t n, int64_t k, const Finish& finish,
            const Foresee& foresee);

// Asks the machine for part of a row-major matrix, to be read or (kWrite) written. The empty statement: gcc takes a
// function that does nothing but prefetch for one that does nothing.
template <int kWrite, class T>
void fetch(const T* data, int64_t stride, int64_t row, int64_t column, int64_t rows, int64_t columns) {
    asm volatile("");
    for (int64_t r = row; r < row + rows; ++r)
        for (int64_t c = column; c < column + columns; c += 64 / sizeof(T))
            __builtin_prefetch(data + r * stride + c, kWrite);
}

}  // namespace cgpt::CGPT_ISA
