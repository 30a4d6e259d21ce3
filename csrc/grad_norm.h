// grad_norm: the L2 norm of all elements of a list of tensors, as one fp32 number.
// grad_square_sums: the sums of squares of their chunks, for a norm whose tensors lie on several ranks, in pieces.
//
//   norm = sqrt(sum over tensors and elements of grad^2)
//
// Squares of fp32 are exact in double, so only the sums round: 32 running sums a chunk (element i goes to sum i % 32),
// added in a fixed tree; then 256 running sums of the chunks (chunk i goes to sum i % 256), added in such a tree. A
// tree adds the upper half onto the lower until one is left. A chunk is so many consecutive elements of one tensor, the
// last one what is left: a tensor cut at multiples of the chunk has the whole one's sums. The bits depend on the list
// and the chunk alone: not on the threads, not on the instruction set, not on the device. In double nothing an fp32 can
// hold overflows.
#pragma once

#include <vector>

#include "cpu/isa.h"
#include "view.h"

namespace cgpt {

inline constexpr int64_t kGradNormChunk = 1 << 15;         // of grad_norm
inline constexpr int64_t kGradNormLongestChunk = 1 << 30;  // an index within one is an int
inline constexpr int kGradNormSums = 32, kGradNormTotals = 256;

inline constexpr int64_t grad_norm_chunks(int64_t numel, int64_t chunk) { return (numel + chunk - 1) / chunk; }

struct GradNormTensor {
    const void* data;
    int64_t numel;
    DType dtype;
};

struct GradNormArgs {
    const GradNormTensor* tensors;
    int64_t count;
    int64_t chunk;  // elements
    double* sums;   // one a chunk
    float* norm;    // or null: the sums are all that is wanted
};

// workspace: what grad_square_sums would give for kGradNormChunk.
void grad_norm(const std::vector<View>& grads, const View& norm, const View& workspace);
void grad_square_sums(const std::vector<View>& grads, const View& sums, int64_t chunk);

// How many doubles grad_norm's workspace must hold.
int64_t grad_norm_workspace(const std::vector<View>& grads);

#if defined(CGPT_CUDA)
void grad_norm_cuda(const GradNormArgs& args, int device_id);
#endif

}  // namespace cgpt

CGPT_CPU_KERNEL(grad_norm, GradNormArgs)
