// AdamW's arithmetic, written once: the CPU kernels instantiate it on vectors of floats, the CUDA kernel on one float,
// so every owner of a parameter gives the same bits. Files that include this are compiled without contraction
// (setup.py), and +, -, *, /, fma and sqrt are IEEE 754: each rounds once, to nearest even. The sequence is in adamw.h.
#pragma once

#include <cmath>
#include <cstdint>

#include "view.h"

#if defined(__CUDACC__)
#define CGPT_SHARED __host__ __device__ __forceinline__
#else
#define CGPT_SHARED inline __attribute__((always_inline))
#endif

namespace cgpt {

// What a step is made of. The pointers are 0-d tensors on the parameters' device, read when the kernel runs.
struct AdamWHyper {
    double lr, beta1, beta2, eps, weight_decay;
    int64_t step;                // used where a tensor has no step of its own
    const void* lr_tensor;       // fp32 or fp64, or null: lr
    const float* grad_scale;     // or null: 1
    DType lr_dtype, step_dtype;  // of lr_tensor; of every AdamWTensor::step
    bool maximize;
    int64_t seed;                // of stochastic rounding
    const int64_t* seed_tensor;  // or null: seed
};

// What the random bits of a tensor's elements are counted with.
struct StochasticKeys {
    uint32_t first, second;
};

// The hyperparameters at one step, computed in double and rounded once.
struct AdamWCoefficients {
    float grad_scale;  // its sign turned to maximize
    float one_minus_beta1;
    float beta2, one_minus_beta2;
    float decay;            // 1 - lr * weight_decay
    float minus_step_size;  // -(lr * sqrt(1 - beta2^t) / (1 - beta1^t))
    float eps;              // eps * sqrt(1 - beta2^t)
    bool skip;              // a step below 1 changes nothing
    StochasticKeys keys;    // of the weights' stochastic rounding
};

CGPT_SHARED double adamw_scalar(const void* p, DType dtype) {
    switch (dtype) {
        case DType::f32:
            return static_cast<double>(*static_cast<const float*>(p));
        case DType::i64:
            return static_cast<double>(*static_cast<const int64_t*>(p));
        default:
            return *static_cast<const double*>(p);
    }
}

// x^n by repeated squaring: libraries' pow() differ in the last bit from each other.
CGPT_SHARED double adamw_power(double x, int64_t n) {
    double y = 1.0;
    for (; n > 0; n >>= 1) {
        if (n & 1) y = y * x;
        x = x * x;
    }
    return y;
}

// U: uint32_t or a vector of them.
template <class U>
CGPT_SHARED U stochastic_mix(U x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ (x >> 16);
}
CGPT_SHARED uint32_t stochastic_absorb(uint32_t key, uint64_t word) {
    return stochastic_mix(key + static_cast<uint32_t>(word) + 0x9e3779b9u);
}

// The keys of the moments' bits, which must not be the weights'.
CGPT_SHARED StochasticKeys stochastic_state_keys(StochasticKeys keys) {
    return {stochastic_absorb(keys.first, 1), stochastic_absorb(keys.second, 1)};
}

// i: the element's index modulo 2^32.
template <class U>
CGPT_SHARED U stochastic_bits(U i, StochasticKeys keys) {
    return stochastic_mix(stochastic_mix(i ^ keys.first) ^ keys.second);
}

// The bf16 that fp32 `bits` are rounded to by 16 random bits, in the low halves; nan: all ones where the value is a
// NaN, which stays one.
template <class U>
CGPT_SHARED U stochastic_round_by(U bits, U nan, U random) {
    return ((bits | (nan & 0x400000u)) + (random & ~nan)) >> 16;
}
template <class U>
CGPT_SHARED U stochastic_round(U bits, U nan, U i, StochasticKeys keys) {
    return stochastic_round_by(bits, nan, stochastic_bits(i, keys) >> 16);
}

// `step`: the tensor's own, or null; `number`, `first`: AdamWTensor's.
CGPT_SHARED AdamWCoefficients adamw_coefficients(const AdamWHyper& h, const void* step, uint32_t number,
                                                 int64_t first) {
    const double given = step ? adamw_scalar(step, h.step_dtype) : static_cast<double>(h.step);
    const bool skip = !(given >= 1.0);
    const int64_t t = skip ? 1 : given < 0x1p62 ? static_cast<int64_t>(given) : int64_t(1) << 62;
    const double lr = h.lr_tensor ? adamw_scalar(h.lr_tensor, h.lr_dtype) : h.lr;
    const double correction1 = 1.0 - adamw_power(h.beta1, t);
    const double root2 = std::sqrt(1.0 - adamw_power(h.beta2, t));
    const float scale = h.grad_scale ? *h.grad_scale : 1.0f;
    AdamWCoefficients c;
    c.grad_scale = h.maximize ? -scale : scale;
    c.one_minus_beta1 = static_cast<float>(1.0 - h.beta1);
    c.beta2 = static_cast<float>(h.beta2);
    c.one_minus_beta2 = static_cast<float>(1.0 - h.beta2);
    c.decay = static_cast<float>(1.0 - lr * h.weight_decay);
    c.minus_step_size = static_cast<float>(-(lr * root2 / correction1));
    c.eps = static_cast<float>(h.eps * root2);
    c.skip = skip;
    const auto seed = static_cast<uint64_t>(h.seed_tensor ? *h.seed_tensor : h.seed), when = static_cast<uint64_t>(t);
    const uint64_t high = static_cast<uint64_t>(first) >> 32;
    c.keys = {0, 1};
    for (uint64_t word : {seed, seed >> 32, when, when >> 32, static_cast<uint64_t>(number), high})
        c.keys = {stochastic_absorb(c.keys.first, word), stochastic_absorb(c.keys.second, word)};
    return c;
}

// One step of a float, or of each float in a vector. Math brings splat, fma and sqrt for the type Float.
template <class Math, class Float>
CGPT_SHARED void adamw_update(const AdamWCoefficients& c, Float grad, Float& p, Float& m, Float& v) {
    const Float g = grad * Math::splat(c.grad_scale);
    m = Math::fma(Math::splat(c.one_minus_beta1), g - m, m);
    v = Math::fma(Math::splat(c.beta2), v, Math::splat(c.one_minus_beta2) * g * g);
    const Float direction = m / (Math::sqrt(v) + Math::splat(c.eps));
    p = Math::fma(Math::splat(c.minus_step_size), direction, p * Math::splat(c.decay));
}

// The split master: an fp32 weight as a bf16 `high`, the bits next to it in value with ties away from zero, and the
// int16 `low` that is left. A NaN keeps its top bits, made quiet, so that `high` alone is a NaN too.
// U: uint32_t or a vector of them; nan: all ones in the lanes that hold a NaN.
template <class U>
CGPT_SHARED U split_high(U bits, U nan) {
    return ((bits | (nan & 0x400000u)) + (~nan & 0x8000u)) >> 16;
}
template <class U>
CGPT_SHARED U split_low(U bits, U nan) {  // as the low half of 32 bits; bits - (high << 16) is these 16 bits, signed
    return bits & 0xffffu & ~nan;
}
template <class U>
CGPT_SHARED U split_join(U high, U low) {
    return (high << 16) + (((low & 0xffffu) ^ 0x8000u) - 0x8000u);
}

}  // namespace cgpt
