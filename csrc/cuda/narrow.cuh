// Eight fp32 as memory holds them.
#pragma once

#include "ptx.cuh"
#include "vec.cuh"

namespace cgpt::cuda {

// Each rounded to nearest even, 16-bit ones two an instruction; a NaN stays one.
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

}  // namespace cgpt::cuda
