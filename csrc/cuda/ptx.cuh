// Every PTX instruction the kernels use, one function each: the only file with inline assembly (PTX ISA 8 and 9,
// sections cited by instruction name). tests/emulator/ptx.cuh implements the same list on a CPU, so a kernel that is
// written against it runs there, as it stands.
//
// Fragments of a 16 x 8 x 16 product, lane = 4 * g + t (g in 0..7, t in 0..3), two 16-bit values a register, low first:
//   a (16 x 16)  a[0] = A[g][2t..], a[1] = A[g + 8][2t..], a[2] = A[g][2t + 8..], a[3] = A[g + 8][2t + 8..]
//   b (16 x 8)   b[0] = B[2t..][g], b[1] = B[2t + 8..][g]
//   d (16 x 8)   d[0], d[1] = D[g][2t, 2t + 1], d[2], d[3] = D[g + 8][2t, 2t + 1], fp32
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "types.cuh"

namespace cgpt::cuda {

// The block's dynamic shared memory, all it has (kernels declare no static one), aligned to 1,024 bytes.
template <class T>
__device__ __forceinline__ T* shared_memory() {
    extern __shared__ __align__(1024) unsigned char memory[];
    return reinterpret_cast<T*>(memory);
}

// A place in shared memory as the instructions below want it. Offsets are in bytes.
struct Shared {
    uint32_t address;
    __device__ __forceinline__ Shared operator+(int bytes) const { return {address + uint32_t(bytes)}; }
    __device__ __forceinline__ Shared operator^(int bytes) const { return {address ^ uint32_t(bytes)}; }
};

__device__ __forceinline__ Shared shared_at(const void* p) {
    return {static_cast<uint32_t>(__cvta_generic_to_shared(p))};
}

// st.global.v4: 16 bytes at once, both aligned to that.
__device__ __forceinline__ void store16(uint4* to, uint4 x) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                 : "memory");
}

// cp.async: 16 bytes from global to shared memory, or 16 zero bytes where !valid (then `from` is not read). Both ends
// are aligned to 16 bytes. Nothing of it may be touched before cp_async_wait and a barrier.
__device__ __forceinline__ void cp_async16(Shared to, const void* from, bool valid = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to.address), "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's latest groups are under way.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ldmatrix: N 8 x 8 matrices of 16-bit values; lane 8 i + r gives the address of row r (16 bytes) of matrix i, and gets
// in r[i] elements 2t, 2t + 1 of row g; with _trans of column g.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], Shared row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row.address)
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], Shared row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row.address)
                 : "memory");
}
// The addresses of lanes 0 to 15 count.
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], Shared row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(row.address)
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], Shared row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(row.address)
                 : "memory");
}

// mma.sync m16n8k16: d += a b, of bf16 or fp16 with fp32 sums; fragments as above.
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    static_assert(sizeof(T) == 2, "bf16 or f16");
    if constexpr (std::is_same_v<T, bf16>)
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    else
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Two fp32 as two T in one register, `low` in the low half, each rounded to nearest even.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t r;
    if constexpr (std::is_same_v<T, bf16>)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

// 2^x to about 2 units in the last place; 0 for -inf; subnormal results become 0.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// No instruction: from here on the compiler takes x for a new value. What it has worked out from the old one, such as
// eight fp32 of eight bf16, is then worked out again rather than kept in registers.
template <class V>
__device__ __forceinline__ void recompute(V& x) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(x) / 4); ++i)
        asm volatile("" : "+r"(reinterpret_cast<uint32_t*>(&x)[i]));
}

// bar.sync: waits until `threads` threads (whole warps) have come to barrier `id` (1 to 15; 0 is __syncthreads').
__device__ __forceinline__ void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace cgpt::cuda
