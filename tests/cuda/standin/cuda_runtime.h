// As much of CUDA's runtime as a kernel needs to run on a CPU, one thread after another: enough where, up to a barrier,
// only thread 0 writes shared memory. A launch runs the grid at once.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(threads)

struct dim3 {
    unsigned x, y = 1, z = 1;
    dim3(unsigned n = 1) : x(n) {}
};
inline dim3 blockIdx, threadIdx;

inline void __syncthreads() {}

struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __uint_as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof x);
    return bits;
}

enum cudaError_t { cudaSuccess = 0 };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t) { return "none"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

inline int launches = 0;

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), const Args&... args) {
    ++launches;
    for (blockIdx.x = 0; blockIdx.x < config->gridDim.x; ++blockIdx.x)
        for (threadIdx.x = 0; threadIdx.x < config->blockDim.x; ++threadIdx.x) kernel(args...);
    return cudaSuccess;
}
