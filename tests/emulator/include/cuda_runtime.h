// A stand-in for CUDA's own header of this name: what kernels and launchers here use of it, and no more. A kernel that
// needs another built-in adds it here, with the CUDA C++ Programming Guide's meaning.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator.h"
#include "halves.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define CGPT_EMULATED inline __attribute__((always_inline))

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define CGPT_VECTOR(T, name, size)                                                     \
    struct alignas(sizeof(T) * 2) name##2 { T x, y; };                                 \
    struct name##3 { T x, y, z; };                                                     \
    struct alignas(sizeof(T) * 4 > 16 ? 16 : sizeof(T) * 4) name##4 { T x, y, z, w; }; \
    CGPT_EMULATED name##2 make_##name##2(T x, T y) { return {x, y}; }                  \
    CGPT_EMULATED name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }          \
    CGPT_EMULATED name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
CGPT_VECTOR(float, float, 4)
CGPT_VECTOR(int, int, 4)
CGPT_VECTOR(unsigned, uint, 4)

namespace emulator {
// Calls, not variables: the runtime's own memory is none of a kernel's business.
uint3 thread_index() __attribute__((const));
uint3 block_index_now() __attribute__((const));
dim3 block_size();
dim3 grid_size();
}  // namespace emulator
#define threadIdx (::emulator::thread_index())
#define blockIdx (::emulator::block_index_now())
#define blockDim (::emulator::block_size())
#define gridDim (::emulator::grid_size())

// Barriers and warps.
#define CGPT_PC emulator::offset(emulator::here())  // inlined: a place in the kernel
namespace emulator {
const void* here();  // the return address: where the stand-in was inlined
}
CGPT_EMULATED void __syncthreads() { emulator::wait_at_barrier(0, 0, CGPT_PC); }
CGPT_EMULATED void __syncwarp(unsigned mask = ~0u) { emulator::sync_warp(mask, CGPT_PC); }
CGPT_EMULATED int __any_sync(unsigned mask, int x) { return emulator::vote(mask, x != 0, CGPT_PC) != 0; }

template <class T>
CGPT_EMULATED T __shfl_xor_sync(unsigned mask, T x, int lanes, int width = 32) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
    std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t> bits;
    __builtin_memcpy(&bits, &x, sizeof x);
    bits = static_cast<decltype(bits)>(emulator::shuffle_xor(mask, bits, lanes, width, CGPT_PC));
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}

// Arithmetic. The fast forms are the accurate ones here: kernels may not lean on their errors.
CGPT_EMULATED unsigned __float_as_uint(float x) { return emulator::float_to_bits(x); }
CGPT_EMULATED float __uint_as_float(unsigned x) { return emulator::bits_to_float(x); }
CGPT_EMULATED float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
CGPT_EMULATED float __fsqrt_rn(float x) { return std::sqrt(x); }
CGPT_EMULATED float __fdividef(float a, float b) { return a / b; }
template <class A, class B>
CGPT_EMULATED constexpr std::common_type_t<A, B> min(A a, B b) {
    using T = std::common_type_t<A, B>;
    return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B>
CGPT_EMULATED constexpr std::common_type_t<A, B> max(A a, B b) {
    using T = std::common_type_t<A, B>;
    return T(a) < T(b) ? T(b) : T(a);
}

// The host's side.
namespace emulator {
int multiprocessors();
}

enum cudaError_t { cudaSuccess = 0, cudaErrorMemoryAllocation = 2, cudaErrorHostMemoryNotRegistered = 713 };
constexpr unsigned cudaHostRegisterPortable = 1;
namespace emulator {
bool pin(const void* data, size_t bytes);
bool unpin(const void* data);
}  // namespace emulator
inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess ? "no error" : error == cudaErrorMemoryAllocation ? "out of memory" : "not registered";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaHostRegister(void* data, size_t bytes, unsigned) {
    return emulator::pin(data, bytes) ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline cudaError_t cudaHostUnregister(void* data) {
    return emulator::unpin(data) ? cudaSuccess : cudaErrorHostMemoryNotRegistered;
}
