// adamw: one AdamW step over lists of tensors (Loshchilov & Hutter 2019, arXiv 1711.05101), in place.
//
// Every operation below is IEEE 754 fp32 and rounds once; the coefficients are computed in double and rounded once.
// t is the step, counted from 1; beta^t is by repeated squaring, so that no library's pow() has a say.
//
//   g = grad * grad_scale                                  grad_scale is 1 where none is given, negated to maximize
//   m = fma(1 - beta1, g - m, m)
//   v = fma(beta2, v, ((1 - beta2) * g) * g)
//   d = m / (sqrt(v) + eps * c2)                           c2 = sqrt(1 - beta2^t): the bias correction of v, moved out
//   p = fma(-(lr * c2 / (1 - beta1^t)), d, p * (1 - lr * weight_decay))
//
// This is torch's update with the division by c2 taken out of the loop: fewer roundings, one division an element.
// ((1 - beta2) * g) * g reaches further than (1 - beta2) * g^2 before it overflows or underflows.
//
// The fp32 value p of a parameter is kept in one of three ways:
//   plain    in the parameter: exact for fp32; bf16 and fp16 lose to rounding what a step adds below their last bit
//   master   in an fp32 tensor beside it; the parameter is the master rounded to nearest even
//   split    in the bf16 parameter and an int16 beside it: hi = (bits + 0x8000) >> 16, lo = bits - (hi << 16).
//            This rounds ties away from zero, so the parameter differs from master.to(bfloat16) on exact ties.
#pragma once

#include <optional>
#include <vector>

#include "adamw_update.h"
#include "cpu/isa.h"
#include "view.h"

namespace cgpt {

enum class Weights : uint8_t { plain, master, split };

struct AdamWTensor {
    void* param;
    const void* grad;
    float *exp_avg, *exp_avg_sq;
    void* rest;        // fp32 master or int16 low half, null for plain
    const void* step;  // 0-d on the device, or null: AdamWHyper::step
    int64_t numel;
    DType dtype, grad_dtype;
};

struct AdamWArgs {
    AdamWHyper hyper;
    Weights weights;
    const AdamWTensor* tensors;  // none is empty
    int64_t count;
    const AdamWCoefficients* coefficients;  // one a tensor, on the CPU; a CUDA kernel computes its own
};

// `steps` holds no tensor (then `step` counts), one for all parameters, or one each.
void adamw(const std::vector<View>& params, const std::vector<View>& grads, const std::vector<View>& exp_avgs,
           const std::vector<View>& exp_avg_sqs, const std::vector<View>& steps, int64_t step, double lr,
           const std::optional<View>& lr_tensor, double beta1, double beta2, double eps, double weight_decay,
           const std::vector<View>& masters, const std::vector<View>& lows, const std::optional<View>& grad_scale,
           bool maximize);

// master (fp32) <-> high (bf16) and low (int16), contiguous, on the CPU.
void split_master(const View& master, const View& high, const View& low);
void join_master(const View& high, const View& low, const View& master);

struct SplitArgs {
    float* master;
    uint16_t *high, *low;
    int64_t numel;
    bool join;
};

#if defined(CGPT_CUDA)
void adamw_cuda(const AdamWArgs& args, int device_id);
#endif

}  // namespace cgpt

CGPT_CPU_KERNEL(adamw, AdamWArgs)
CGPT_CPU_KERNEL(adamw_split, SplitArgs)
