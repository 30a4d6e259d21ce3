// cross_entropy: arguments and launchers. Shapes and dtypes are in cross_entropy.cpp, which checks them. The matrix
// products around these kernels are torch's.
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

// Checks all that one call was given, every target included; returns how many targets are not ignored.
int64_t cross_entropy_check(const View& x, const View& weight, const View& target, int64_t ignore_index,
                            int64_t vocab_size);

// Returns the sum of the rows' losses, added up in order.
double cross_entropy_rows(const View& logits, const View& target, const std::optional<View>& dout, const View& loss,
                          int64_t ignore_index, double z_loss);

void cross_entropy_add(const View& a, const View& b, const View& out);

}  // namespace cgpt

CGPT_CPU_KERNEL(cross_entropy_rows, CrossEntropyArgs)
CGPT_CPU_KERNEL(cross_entropy_add, CrossEntropyAddArgs)
