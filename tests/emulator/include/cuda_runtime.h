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
CGPT_VECTOR(double, double, 8)
CGPT_VECTOR(int, int, 4)
CGPT_VECTOR(unsigned, uint, 4)
CGPT_VECTOR(unsigned short, ushort, 2)
CGPT_VECTOR(long long, longlong, 8)

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
inline constexpr int warpSize = 32;

// Barriers and warps.
#define CGPT_PC emulator::offset(emulator::here())  // inlined: a place in the kernel
namespace emulator {
const void* here();  // the return address: where the stand-in was inlined
}
CGPT_EMULATED void __syncthreads() { emulator::wait_at_barrier(0, 0, CGPT_PC); }
CGPT_EMULATED void __syncwarp(unsigned mask = ~0u) { emulator::sync_warp(mask, CGPT_PC); }
CGPT_EMULATED unsigned __ballot_sync(unsigned mask, int x) { return emulator::vote(mask, x != 0, CGPT_PC); }
CGPT_EMULATED int __any_sync(unsigned mask, int x) { return emulator::vote(mask, x != 0, CGPT_PC) != 0; }
CGPT_EMULATED int __all_sync(unsigned mask, int x) { return emulator::vote(mask, x == 0, CGPT_PC) == 0; }
CGPT_EMULATED void __threadfence() {}
CGPT_EMULATED void __threadfence_block() {}
CGPT_EMULATED void __nanosleep(unsigned) {}
[[noreturn]] CGPT_EMULATED void __trap() { emulator::fault("__trap", CGPT_PC); }

namespace emulator {
template <class T>
CGPT_EMULATED T shuffled(unsigned mask, T x, int operand, int width, int mode, uint32_t pc) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
    std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t> bits;
    __builtin_memcpy(&bits, &x, sizeof x);
    bits = static_cast<decltype(bits)>(shuffle(mask, bits, operand, width, mode, pc));
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}
}  // namespace emulator
template <class T>
CGPT_EMULATED T __shfl_sync(unsigned mask, T x, int lane, int width = 32) {
    return emulator::shuffled(mask, x, lane, width, 0, CGPT_PC);
}
template <class T>
CGPT_EMULATED T __shfl_up_sync(unsigned mask, T x, unsigned by, int width = 32) {
    return emulator::shuffled(mask, x, int(by), width, 1, CGPT_PC);
}
template <class T>
CGPT_EMULATED T __shfl_down_sync(unsigned mask, T x, unsigned by, int width = 32) {
    return emulator::shuffled(mask, x, int(by), width, 2, CGPT_PC);
}
template <class T>
CGPT_EMULATED T __shfl_xor_sync(unsigned mask, T x, int lanes, int width = 32) {
    return emulator::shuffled(mask, x, lanes, width, 3, CGPT_PC);
}

// Atomics on integers; floating-point ones would make results depend on the order of threads, so there are none.
template <class T>
CGPT_EMULATED T atomicAdd(T* p, std::common_type_t<T> x) {
    static_assert(std::is_integral_v<T>, "no float atomics: two runs give the same bits");
    emulator::atomic(p, sizeof(T), CGPT_PC);
    return __atomic_fetch_add(p, x, __ATOMIC_SEQ_CST);
}
template <class T>
CGPT_EMULATED T atomicExch(T* p, std::common_type_t<T> x) {
    emulator::atomic(p, sizeof(T), CGPT_PC);
    return __atomic_exchange_n(p, x, __ATOMIC_SEQ_CST);
}

// Loads and stores with hints to the caches.
template <class T>
CGPT_EMULATED T __ldg(const T* p) {
    return *p;
}
template <class T>
CGPT_EMULATED T __ldcs(const T* p) {
    return *p;
}
template <class T>
CGPT_EMULATED T __ldcg(const T* p) {
    return *p;
}
template <class T>
CGPT_EMULATED T __ldca(const T* p) {
    return *p;
}
template <class T>
CGPT_EMULATED void __stcs(T* p, const std::common_type_t<T>& x) {
    *p = x;
}
template <class T>
CGPT_EMULATED void __stcg(T* p, const std::common_type_t<T>& x) {
    *p = x;
}

// Arithmetic. The fast forms are the accurate ones here: kernels may not lean on their errors.
CGPT_EMULATED unsigned __float_as_uint(float x) { return emulator::float_to_bits(x); }
CGPT_EMULATED float __uint_as_float(unsigned x) { return emulator::bits_to_float(x); }
CGPT_EMULATED int __float_as_int(float x) { return int(emulator::float_to_bits(x)); }
CGPT_EMULATED float __int_as_float(int x) { return emulator::bits_to_float(unsigned(x)); }
CGPT_EMULATED float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
CGPT_EMULATED float __fadd_rn(float a, float b) { return a + b; }
CGPT_EMULATED float __fsub_rn(float a, float b) { return a - b; }
CGPT_EMULATED float __fmul_rn(float a, float b) { return a * b; }
CGPT_EMULATED float __fdiv_rn(float a, float b) { return a / b; }
CGPT_EMULATED float __fsqrt_rn(float x) { return std::sqrt(x); }
CGPT_EMULATED float __frcp_rn(float x) { return 1.0f / x; }
CGPT_EMULATED double __dadd_rn(double a, double b) { return a + b; }
CGPT_EMULATED double __dmul_rn(double a, double b) { return a * b; }
CGPT_EMULATED double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
CGPT_EMULATED float __fdividef(float a, float b) { return a / b; }
CGPT_EMULATED float __expf(float x) { return std::exp(x); }
CGPT_EMULATED float __logf(float x) { return std::log(x); }
CGPT_EMULATED float __log2f(float x) { return std::log2(x); }
CGPT_EMULATED float __sinf(float x) { return std::sin(x); }
CGPT_EMULATED float __cosf(float x) { return std::cos(x); }
CGPT_EMULATED float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
CGPT_EMULATED double rsqrt(double x) { return 1.0 / std::sqrt(x); }
CGPT_EMULATED float __saturatef(float x) { return std::fmin(std::fmax(x, 0.0f), 1.0f); }
CGPT_EMULATED float __int2float_rn(int x) { return float(x); }
CGPT_EMULATED float __uint2float_rn(unsigned x) { return float(x); }
CGPT_EMULATED int __float2int_rn(float x) { return int(std::nearbyint(x)); }
CGPT_EMULATED int __popc(unsigned x) { return __builtin_popcount(x); }
CGPT_EMULATED int __ffs(int x) { return __builtin_ffs(x); }
CGPT_EMULATED int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
CGPT_EMULATED unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
CGPT_EMULATED unsigned __funnelshift_l(unsigned low, unsigned high, unsigned n) {
    return unsigned((uint64_t(high) << 32 | low) << (n & 31) >> 32);
}
CGPT_EMULATED unsigned __funnelshift_r(unsigned low, unsigned high, unsigned n) {
    return unsigned((uint64_t(high) << 32 | low) >> (n & 31));
}
using std::isfinite;
using std::isinf;
using std::isnan;
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
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrMaxSharedMemoryPerBlockOptin,
    cudaDevAttrComputeCapabilityMajor,
    cudaDevAttrComputeCapabilityMinor
};
namespace emulator {
int device_attribute(cudaDeviceAttr attribute);
}
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = emulator::device_attribute(attribute);
    return cudaSuccess;
}
