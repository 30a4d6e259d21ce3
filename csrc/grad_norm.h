// grad_norm: the L2 norm of all elements of a list of tensors, as one fp32 number.
//
//   norm = sqrt(sum over tensors and elements of grad^2)
//
// Squares of fp32 are exact in double, so only the sums round: 32 running sums a chunk (element i goes to sum i % 32),
// added in a fixed tree; then 256 running sums of the chunks (chunk i goes to sum i % 256), added in such a tree. A
// tree adds the upper half onto the lower until one is left. The bits depend on the list alone: not on the threads, not
// on the instruction set, not on the device. In double nothing an fp32 can hold overflows.
#pragma once

#include <optional>
#include <vector>

#include "cpu/isa.h"
#include "view.h"

namespace cgpt {

inline constexpr int64_t kGradNormChunk = 1 << 15;
inline constexpr int kGradNormSums = 32, kGradNormTotals = 256;

inline constexpr int64_t grad_norm_chunks(int64_t numel) { return (numel + kGradNormChunk - 1) / kGradNormChunk; }

struct GradNormTensor {
    const void* data;
    int64_t numel;
    DType dtype;
};

struct GradNormArgs {
    const GradNormTensor* tensors;
    int64_t count;
    float* norm;
    double* workspace;  // one a chunk; CUDA only
};

void grad_norm(const std::vector<View>& grads, const View& norm, const std::optional<View>& workspace);

// How many doubles grad_norm's workspace must hold: 0 on a CPU, which needs none.
int64_t grad_norm_workspace(const std::vector<View>& grads);

#if defined(CGPT_CUDA)
void grad_norm_cuda(const GradNormArgs& args, int device_id);
#endif

}  // namespace cgpt

CGPT_CPU_KERNEL(grad_norm, GradNormArgs)
