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
// The fp32 value p of a parameter is kept in one of four ways:
//   plain    in the parameter: exact for fp32; bf16 and fp16 lose to rounding what a step adds below their last bit
//   stochastic  in the bf16 parameter, rounded up or down at random so that the mean is p: steps add up on average
//   master   in an fp32 tensor beside it; the parameter is the master rounded to nearest even
//   split    in the bf16 parameter and an int16 beside it: hi = (bits + 0x8000) >> 16, lo = bits - (hi << 16).
//            This rounds ties away from zero, so the parameter differs from master.to(bfloat16) on exact ties.
//
// Stochastic rounding of element i of tensor number n at step t: bf16 = (bits + (r >> 16)) >> 16, where r is counted,
// not drawn, so that every owner has the same:
//
//   mix(x): x ^= x >> 16, x *= 0x7feb352d, x ^= x >> 15, x *= 0x846ca68b, x ^= x >> 16      modulo 2^32
//   key_j = k after: k = j; for w in (seed, seed >> 32, t, t >> 32, n, i >> 32): k = mix(k + w + 0x9e3779b9)
//   r = mix(mix(i ^ key_0) ^ key_1)
//
// exp_avg and exp_avg_sq are fp32, or both bf16, rounded at random by r's two halves: exp_avg by the upper 16 bits,
// exp_avg_sq by the lower, r being counted with mix(key_j + 1 + 0x9e3779b9) for key_j. To nearest, exp_avg_sq would
// stand still: at beta2 = 0.999 it moves by less than half of bf16's last bit. With a split master and a bf16 gradient
// a step then moves 18 bytes a parameter instead of 26. The Triton kernel takes fp32 moments alone.
//
// i counts the elements as they lie in memory. n is the tensor's place in the call and i begins at 0, or a call says
// otherwise (rounding_places): a piece of a parameter, cut where a rank's share begins, has the parameter's number and
// begins with the element that it does, so that it is rounded as it is in the whole.
//
// mix is lowbias32, the hash of 32 bits by two multiplications with the least bias that C. Wellons' search found
// (Prospecting for Hash Functions, 2018). A vector of a CPU does it lane by lane, which Philox's products of 64 bits
// (Salmon et al. 2011) would not let it.
#pragma once

#include <optional>
#include <vector>

#include "adamw_update.h"
#include "cpu/isa.h"
#include "view.h"

namespace cgpt {

inline constexpr int64_t kPlaceStep = 1024;              // what follows a multiple of 2^32 stays aligned
inline constexpr int64_t kLastPlace = int64_t(1) << 62;  // no sum of indices overflows

enum class Weights : uint8_t { plain, master, split, stochastic };

// A tensor of the call, or what of it lies between two multiples of 2^32 as its elements are counted: they all share
// the upper half of their index, and so the keys of their bits.
struct AdamWTensor {
    void* param;
    const void* grad;
    void *exp_avg, *exp_avg_sq;  // both of state_dtype: fp32 or bf16
    void* rest;                  // fp32 master or int16 low half, else null
    const void* step;            // 0-d on the device, or null: AdamWHyper::step
    int64_t numel;
    DType dtype, grad_dtype, state_dtype;
    uint32_t number;  // among the parameters
    int64_t first;    // the first element's index
};

struct AdamWArgs {
    AdamWHyper hyper;
    Weights weights;
    const AdamWTensor* tensors;  // none is empty
    int64_t count;
    const AdamWCoefficients* coefficients;  // one a tensor, on the CPU; a CUDA kernel computes its own
};

// `steps` holds no tensor (then `step` counts), one for all parameters, or one each. With a seed, or a tensor that
// holds it (int64, 0-d), bf16 parameters with nothing beside them and bf16 moments are rounded stochastically.
// `rounding_places`: where given, n and the first i of each parameter, n below 2^32, i a multiple of kPlaceStep.
void adamw(const std::vector<View>& params, const std::vector<View>& grads, const std::vector<View>& exp_avgs,
           const std::vector<View>& exp_avg_sqs, const std::vector<View>& steps, int64_t step, double lr,
           const std::optional<View>& lr_tensor, double beta1, double beta2, double eps, double weight_decay,
           const std::vector<View>& masters, const std::vector<View>& lows, const std::optional<View>& grad_scale,
           bool maximize, const std::optional<int64_t>& seed, const std::optional<View>& seed_tensor,
           const std::optional<std::vector<int64_t>>& rounding_places);

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
