// GELU, its tanh approximation and SwiGLU's SiLU with their slopes, in fp32: csrc/cpu/math.h's formulas with the
// hardware's exponential and reciprocal (about 2 units in the last place each), and one exponential for value and
// slope.
#pragma once

#include "../gelu_mlp.h"
#include "ptx.cuh"

namespace cgpt::cuda {

struct Activated {
    float share, slope;  // f(z) = z * share, slope = f'(z)
};

// Phi(z) and Phi(z) + z phi(z). With t = |z|: Phi(-t) = exp(-t^2 / 2) R(t), R a polynomial in (t - 3) / (t + 3); its
// coefficients and their fit are described in csrc/cpu/math.h.
__device__ __forceinline__ Activated gelu(float z) {
    const float t = fabsf(z);
    const float u = fmaf(__fdividef(1.0f, t + 3.0f), -6.0f, 1.0f);
    float r = 0x1.c6512ap-15f;
    r = fmaf(r, u, 0x1.e6c0d6p-14f);
    r = fmaf(r, u, -0x1.646c7ep-12f);
    r = fmaf(r, u, -0x1.020012p-10f);
    r = fmaf(r, u, 0x1.7cb998p-9f);
    r = fmaf(r, u, 0x1.91e100p-8f);
    r = fmaf(r, u, -0x1.7a9458p-5f);
    r = fmaf(r, u, 0x1.f8baccp-4f);
    r = fmaf(r, u, -0x1.a6b66ap-3f);
    r = fmaf(r, u, 0x1.f1b89cp-4f);
    const float e = exp2_approx(t * t * -0x1.715476p-1f);  // log2(e) / 2
    const float tail = r * e, cdf = z < 0.0f ? tail : 1.0f - tail;
    return {cdf, fmaf(z, e * 0x1.988454p-2f, cdf)};
}

struct Logistic {
    float value, slope;
};

// s = 1 / (1 + e^-x) and s (1 - s), both from the smaller of s and 1 - s, so that neither tail cancels.
__device__ __forceinline__ Logistic logistic(float x) {
    const float e = exp2_approx(fabsf(x) * -0x1.715476p+0f);
    const float large = __fdividef(1.0f, 1.0f + e), small = e * large;
    return {x < 0.0f ? small : 1.0f - small, small * large};
}

// z s and its slope, s = logistic(2 c z (1 + a z^2)), c = sqrt(2 / pi), a = 0.044715. Beyond 16 the slope's second term
// is 0; clamped, z^2 cannot overflow against that 0.
__device__ __forceinline__ Activated gelu_tanh(float z) {
    const float near = z != z ? z : fmaxf(fminf(z, 16.0f), -16.0f);
    const float square = near * near;
    const Logistic s = logistic(near * fmaf(square, 0x1.2444f2p-4f, 0x1.988454p+0f));
    const float inner = fmaf(square, 0x1.b6676cp-3f, 0x1.988454p+0f);
    return {s.value, fmaf(z * s.slope, inner, s.value)};
}

__device__ __forceinline__ Activated silu(float z) {
    const Logistic s = logistic(z);
    return {s.value, fmaf(z, s.slope, s.value)};
}

template <Activation kActivation>
__device__ __forceinline__ Activated activate(float z) {
    if constexpr (kActivation == Activation::gelu) return gelu(z);
    if constexpr (kActivation == Activation::gelu_tanh) return gelu_tanh(z);
    return silu(z);
}

// Calls f with the activation as a constant.
template <class F>
__device__ __forceinline__ void with_activation(Activation activation, F&& f) {
    if (activation == Activation::gelu)
        f(std::integral_constant<Activation, Activation::gelu>{});
    else if (activation == Activation::gelu_tanh)
        f(std::integral_constant<Activation, Activation::gelu_tanh>{});
    else
        f(std::integral_constant<Activation, Activation::swiglu>{});
}

}  // namespace cgpt::cuda
