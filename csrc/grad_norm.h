// grad_norm: the L2 norm of all elements of a list of tensors, as one fp32 number.
//
//   norm = sqrt(sum over tensors and elements of grad^2)
//
// Squares of fp32 are exact in double, so only the sums round: 32 running sums a chunk (element i goes to sum i % 32),
// added in a fixed tree, then the chunks in order. The bits depend on the list alone: not on the threads, not on the
// instruction set. In double nothing an fp32 can hold overflows.
#pragma once

#include <vector>

#include "cpu/isa.h"
#include "view.h"

namespace cgpt {

struct GradNormTensor {
    const void* data;
    int64_t numel;
    DType dtype;
};

struct GradNormArgs {
    const GradNormTensor* tensors;
    int64_t count;
    float* norm;
};

void grad_norm(const std::vector<View>& grads, const View& norm);

}  // namespace cgpt

CGPT_CPU_KERNEL(grad_norm, GradNormArgs)
