// cross_entropy: arguments and launchers. Shapes and dtypes are in cross_entropy.cpp, which checks them. The matrix
// products around these kernels are linear's, on a GPU torch's.
#pragma once

#include <optional>

#include "cpu/isa.h"
#include "view.h"

namespace cgpt {

struct CrossEntropyArgs {
    void* logits;  // rows of `cols` values, `row_stride` apart; with dout they become dlogits
    const int64_t* target;
    const float* dout;  // one factor a row, null when no gradient is asked for
    float* loss;
    int64_t rows, cols, row_stride;
    int64_t ignore_index;
    float z_loss;
    DType dtype;
};

struct CrossEntropyAddArgs {
    const void *a, *b;
    void* out;  // may be a
    int64_t n;
    DType a_dtype, out_dtype;  // each f32 or bf16; b is bf16
};

struct CrossEntropyMeanArgs {
    const float* losses;  // null: `out` is a factor for each row, else the sum or the mean of all
    const int64_t* target;
    float* out;
    int64_t rows, ignore_index;
    bool mean;
};

// Checks all that one call was given, on a CPU every target included. A GPU's targets are not read back: one out of
// range makes its row's loss and gradient NaN.
void cross_entropy_check(const View& x, const View& weight, const View& target, int64_t ignore_index,
                         int64_t vocab_size);

void cross_entropy_rows(const View& logits, const View& target, const std::optional<View>& dout, const View& loss,
                        int64_t ignore_index, double z_loss);

// dout (rows,) = 1 over the number of targets not ignored, at least 1: what the mean gives each row's gradient.
void cross_entropy_share(const View& target, int64_t ignore_index, const View& dout);

// out () = the sum of the losses (rows,), in double; with `mean` divided by the number of targets not ignored.
void cross_entropy_total(const View& losses, const View& target, int64_t ignore_index, bool mean, const View& out);

// out = a + b, rounded once. On a GPU alone: a CPU's products add by themselves.
void cross_entropy_add(const View& a, const View& b, const View& out);

#if defined(CGPT_CUDA)
void cross_entropy_rows_cuda(const CrossEntropyArgs& args, int device_id);
void cross_entropy_mean_cuda(const CrossEntropyMeanArgs& args, int device_id);
void cross_entropy_add_cuda(const CrossEntropyAddArgs& args, int device_id);
#endif

}  // namespace cgpt

CGPT_CPU_KERNEL(cross_entropy_rows, CrossEntropyArgs)
