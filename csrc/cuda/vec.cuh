// Eight elements at a time in fp32, whatever memory holds: 16-byte accesses of fp32, bf16, fp16 and 16-bit integers.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../view.h"
#include "ptx.cuh"
#include "types.cuh"

namespace cgpt::cuda {

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ __forceinline__ float widen(f16 x) { return __half2float(__ushort_as_half(x.bits)); }

// To nearest even; a NaN stays one.
template <class T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float x) {
    const uint32_t u = __float_as_uint(x);
    return {uint16_t(x == x ? (u + 0x7fffu + ((u >> 16) & 1u)) >> 16 : (u >> 16) | 0x40u)};
}
template <>
__device__ __forceinline__ f16 narrow<f16>(float x) {
    return {__half_as_ushort(__float2half_rn(x))};
}

// Calls f with a value of the element type: f(float{}), f(bf16{}) or f(f16{}).
template <class F>
void with_type(DType dtype, F&& f) {
    if (dtype == DType::bf16) return f(bf16{});
    if (dtype == DType::f16) return f(f16{});
    f(float{});
}

inline constexpr int kVec = 8;

template <class T>
struct alignas(16) Vec {
    T at[kVec];
};

// n of the eight, n == 8 by 16-byte accesses where `aligned`; the others read as zero and are not written.
template <class T>
__device__ __forceinline__ Vec<T> load_vec(const T* p, int n, bool aligned) {
    Vec<T> x = {};
    if (aligned && n == kVec) {
        constexpr int words = sizeof(Vec<T>) / 16;
#pragma unroll
        for (int i = 0; i < words; ++i) reinterpret_cast<uint4*>(&x)[i] = reinterpret_cast<const uint4*>(p)[i];
    } else {
#pragma unroll
        for (int i = 0; i < kVec; ++i)
            if (i < n) x.at[i] = p[i];
    }
    return x;
}

template <class T>
__device__ __forceinline__ void store_vec(T* p, const Vec<T>& x, int n, bool aligned) {
    if (aligned && n == kVec) {
        constexpr int words = sizeof(Vec<T>) / 16;
#pragma unroll  // by name: nvcc 13.0 merges a plain store with those of the other branch, element by element
        for (int i = 0; i < words; ++i) store16(reinterpret_cast<uint4*>(p) + i, reinterpret_cast<const uint4*>(&x)[i]);
    } else {
#pragma unroll
        for (int i = 0; i < kVec; ++i)
            if (i < n) p[i] = x.at[i];
    }
}

// Eight fp32 as memory holds them: each rounded to nearest even, 16-bit ones two an instruction; a NaN stays one.
template <class T>
__device__ __forceinline__ Vec<T> narrow_vec(const float (&x)[kVec]) {
    Vec<T> v;
    if constexpr (sizeof(T) == 2) {
        uint32_t words[kVec / 2];
#pragma unroll
        for (int i = 0; i < kVec / 2; ++i) words[i] = pack<T>(x[2 * i], x[2 * i + 1]);
        *reinterpret_cast<uint4*>(&v) = make_uint4(words[0], words[1], words[2], words[3]);
    } else {
#pragma unroll
        for (int i = 0; i < kVec; ++i) v.at[i] = x[i];
    }
    return v;
}

__host__ __device__ inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace cgpt::cuda
