// linear: out = scale (a b^T + bias) + add, the matrix product behind projections, forward and backward. Shapes and
// dtypes are in linear.cpp, which checks them.
#pragma once

#include <optional>

#include "cpu/isa.h"
#include "view.h"

namespace cgpt {

// A matrix whose rows or columns are contiguous.
struct Matrix {
    const void* data;
    int64_t stride;  // elements between rows, or between columns where !row_major
    bool row_major;
};

// out = scale (a b^T + bias) + add;  a (m, k), b (n, k), bias (n,), add and out (m, n)
struct LinearArgs {
    Matrix a, b;
    const void *bias, *add;  // may be null; add may be out
    void* out;
    int64_t add_stride, out_stride;  // elements between rows
    int64_t m, n, k;
    float scale;
    DType dtype, add_dtype, out_dtype;  // of a, b and bias; the others' may be fp32 besides
};

// The operand `v` of `op`. std::invalid_argument names what it must be.
Matrix matrix(const char* op, const char* name, const View& v);

// The border of the op: what its own arguments must be.
void linear_check(const View& x, const View& weight, const std::optional<View>& bias);

void linear(const View& a, const View& b, const std::optional<View>& bias, float scale, const std::optional<View>& add,
            const View& out);

}  // namespace cgpt

CGPT_CPU_KERNEL(linear, LinearArgs)
