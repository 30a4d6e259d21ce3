// csrc/cpu/gemm.h by itself, for ctypes.
#include "gemm.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace cgpt::amx;

namespace {

thread_local std::string error;

template <class F>
const char* caught(F&& body) {
    try {
        body();
        return nullptr;
    } catch (const std::exception& e) {
        error = e.what();
        return error.c_str();
    }
}

}  // namespace

// c (rows, ldc) = add * c + a (rows, lda) b (k, ldb) over columns [0, n) and k in [k0, k1).
EXPORT const char* product(int64_t rows, int64_t n, int64_t k0, int64_t k1, const bf16x2* a, int64_t lda,
                           const bf16x2* b, int64_t ldb, float add, float* c, int64_t ldc) {
    return caught([&] {
        const Tiles<bf16x2> tiles;
        gemm<A::rows>(
            rows, n, a, lda, b, ldb, [&](int64_t, int64_t) { return Extent{n, k0, k1}; },
            [&](int64_t r, int64_t i) { return load(c + r * ldc + i) * add; },
            [&](int64_t r, int64_t i, vf x) { store(c + r * ldc + i, x); });
    });
}

// One whole tile of C, as a packed product takes it: a (kTileRows, lda), b (k, C vectors).
EXPORT const char* whole_tile(int64_t k, const bf16x2* a, int64_t lda, const bf16x2* b, int held, float* c) {
    constexpr int rows = kTileRows<bf16x2>, vecs = kTileVecs<bf16x2>;
    const auto multiply = [&] {
        gemm_tile<rows, vecs, A::rows>(
            0, 0, 0, k, a, lda, b, vecs * W, [](int64_t, int64_t) { return vf{}; },
            [&](int64_t r, int64_t i, vf x) { store(c + r * vecs * W + i, x); });
    };
    return caught([&] {
        if (!held) return multiply();
        const Tiles<bf16x2> tiles;
        multiply();
    });
}

EXPORT int configured() { return standin::state.configured; }
EXPORT int64_t constant(int which) {
    constexpr int64_t values[] = {kTileRows<bf16x2>, kTileVecs<bf16x2>, kTileDepth<bf16x2>, kTileSide};
    return values[which];
}
