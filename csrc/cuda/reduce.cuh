// Sums and maxima over a warp and over a block, in a fixed order: the same bits every time.
#pragma once

#include <cuda_runtime.h>

namespace cgpt::cuda {

inline constexpr int kWarp = 32;

// Over `Lanes` neighbouring lanes (a power of two); every one of them gets the result.
template <int Lanes = kWarp>
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int lanes = Lanes / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
    return x;
}
template <int Lanes = kWarp>
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int lanes = Lanes / 2; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lanes));
    return x;
}

// Over a block of whole warps, at most 1,024 threads; every thread gets the result. `scratch`: 32 floats of shared
// memory, free again at the block's next barrier.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
    x = warp_sum(x);
    const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? scratch[lane] : 0.0f);
}
__device__ __forceinline__ float block_max(float x, float* scratch) {
    x = warp_max(x);
    const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    return warp_max(lane < warps ? scratch[lane] : scratch[0]);
}

}  // namespace cgpt::cuda
