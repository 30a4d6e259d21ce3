// csrc/cuda/ptx.cuh on a CPU: the same functions, with the meaning stated there.
#pragma once

#include "cuda_runtime.h"
#include "types.cuh"

namespace cgpt::cuda {

template <class T>
CGPT_EMULATED T* shared_memory() {
    return reinterpret_cast<T*>(emulator::shared_base());
}

struct Shared {
    char* address;
    CGPT_EMULATED Shared operator+(int bytes) const { return {address + bytes}; }
    CGPT_EMULATED Shared operator^(int bytes) const {
        return {reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(address) ^ uintptr_t(bytes))};
    }
};

CGPT_EMULATED Shared shared_at(const void* p) { return {static_cast<char*>(const_cast<void*>(p))}; }

CGPT_EMULATED void store16(uint4* to, uint4 x) { *to = x; }

CGPT_EMULATED void cp_async16(Shared to, const void* from, bool valid = true) {
    emulator::cp_async(to.address, valid ? from : nullptr, CGPT_PC);
}
CGPT_EMULATED void cp_async_commit() { emulator::cp_async_commit(); }
template <int N>
CGPT_EMULATED void cp_async_wait() {
    emulator::cp_async_wait(N);
}

CGPT_EMULATED void ldmatrix_x4(uint32_t (&r)[4], Shared row) { emulator::ldmatrix(r, row.address, 4, false, CGPT_PC); }
CGPT_EMULATED void ldmatrix_x4_trans(uint32_t (&r)[4], Shared row) {
    emulator::ldmatrix(r, row.address, 4, true, CGPT_PC);
}
CGPT_EMULATED void ldmatrix_x2(uint32_t (&r)[2], Shared row) { emulator::ldmatrix(r, row.address, 2, false, CGPT_PC); }
CGPT_EMULATED void ldmatrix_x2_trans(uint32_t (&r)[2], Shared row) {
    emulator::ldmatrix(r, row.address, 2, true, CGPT_PC);
}

template <class T>
CGPT_EMULATED void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    static_assert(sizeof(T) == 2, "bf16 or f16");
    emulator::mma(d, a, b, std::is_same_v<T, bf16>, CGPT_PC);
}

template <class T>
CGPT_EMULATED uint32_t pack(float low, float high) {
    const auto narrow = std::is_same_v<T, bf16> ? emulator::float_to_bf16 : emulator::float_to_half;
    return narrow(low) | uint32_t(narrow(high)) << 16;
}

CGPT_EMULATED float exp2_approx(float x) {
    const float y = std::exp2(x);
    return y < 0x1p-126f ? 0.0f : y;  // a NaN stays one
}

template <class V>
CGPT_EMULATED void recompute(V&) {}

CGPT_EMULATED void named_barrier(int id, int threads) { emulator::wait_at_barrier(id, threads, CGPT_PC); }

}  // namespace cgpt::cuda
