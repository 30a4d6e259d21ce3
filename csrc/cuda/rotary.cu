// Rotary position embedding (Su et al. 2021, arXiv 2104.09864) of (B, T, H, D) on a GPU: pairs of the first R values of
// a head turn by their position's angles, the others pass.
//
//   out_1 = x_1 cos - x_2 sin,  out_2 = x_2 cos + x_1 sin
//
// A pair is (i, i + R / 2), or (2i, 2i + 1) where interleaved. A block a token: its threads take eight pairs each, or
// eight of the values that pass, over all heads, so a position's angles come from memory once.
#include <algorithm>

#include "../rotary.h"
#include "launch.cuh"
#include "ptx.cuh"
#include "reduce.cuh"
#include "vec.cuh"

namespace cgpt {
namespace {

using namespace cuda;

constexpr int kMostThreads = 256;

__host__ __device__ inline int vectors(int64_t n) { return int((n + kVec - 1) / kVec); }

template <class T>
__device__ __forceinline__ void turn(T first, T second, float cos, float sin, float& out_first, float& out_second) {
    const float p = widen(first), q = widen(second);
    out_first = fmaf(p, cos, -(q * sin));
    out_second = fmaf(q, cos, p * sin);
}

template <class T>
__global__ void __launch_bounds__(kMostThreads)
    rotary_kernel(const __grid_constant__ RotaryArgs a, bool aligned, bool angles_aligned) {
    const int64_t token = blockIdx.x, b = token / a.time, t = token % a.time;
    const int half = int(a.rotated / 2), dim = int(a.dim), turning = vectors(half);
    const int items = turning + vectors(dim - a.rotated);
    const float sign = a.inverse ? -1.0f : 1.0f;
    for (int item = threadIdx.x; item < items * int(a.heads); item += blockDim.x) {
        const int h = item / items, k = item % items;
        const T* x = static_cast<const T*>(a.x) + b * a.stride[0] + t * a.stride[1] + h * a.stride[2];
        T* out = static_cast<T*>(a.out) + (token * a.heads + h) * a.dim;
        if (k >= turning) {
            const int i = int(a.rotated) + (k - turning) * kVec, n = dim - i < kVec ? dim - i : kVec;
            store_vec(out + i, load_vec(x + i, n, aligned), n, aligned);
            continue;
        }
        const int i = k * kVec, n = half - i < kVec ? half - i : kVec;
        const Vec<float> cos = load_vec(a.cos + t * half + i, n, angles_aligned);
        const Vec<float> sin = load_vec(a.sin + t * half + i, n, angles_aligned);
        // The two vectors that hold the pairs: eight firsts and eight seconds, or eight pairs in a row.
        const int low = a.interleaved ? 2 * i : i, high = a.interleaved ? 2 * i + kVec : half + i;
        const int low_n = a.interleaved && 2 * n < kVec ? 2 * n : a.interleaved ? kVec : n;
        const int high_n = a.interleaved ? 2 * n - low_n : n;
        const Vec<T> u = load_vec(x + low, low_n, aligned), v = load_vec(x + high, high_n, aligned);
        float p[kVec], q[kVec];
        if (a.interleaved) {
#pragma unroll
            for (int e = 0; e < kVec; e += 2) {
                turn(u.at[e], u.at[e + 1], cos.at[e / 2], sin.at[e / 2] * sign, p[e], p[e + 1]);
                turn(v.at[e], v.at[e + 1], cos.at[(e + kVec) / 2], sin.at[(e + kVec) / 2] * sign, q[e], q[e + 1]);
            }
        } else {
#pragma unroll
            for (int e = 0; e < kVec; ++e) turn(u.at[e], v.at[e], cos.at[e], sin.at[e] * sign, p[e], q[e]);
        }
        store_vec(out + low, narrow_vec<T>(p), low_n, aligned);
        store_vec(out + high, narrow_vec<T>(q), high_n, aligned);
    }
}

}  // namespace

void rotary_cuda(const RotaryArgs& a, int device_id) {
    constexpr const char* kOp = "rotary";
    const DeviceGuard guard(kOp, device_id);
    const int64_t bytes = a.dtype == DType::f32 ? 4 : 2, half = a.rotated / 2;
    bool aligned = aligned16(a.x) && aligned16(a.out);
    for (int64_t step : {a.stride[0], a.stride[1], a.stride[2], a.dim, half})
        aligned = aligned && step * bytes % 16 == 0;
    const bool angles_aligned = aligned16(a.cos) && aligned16(a.sin) && half % 4 == 0;
    const int64_t items = a.heads * (vectors(half) + vectors(a.dim - a.rotated));
    const dim3 block(static_cast<unsigned>(std::min<int64_t>((items + kWarp - 1) / kWarp * kWarp, kMostThreads)));
    with_type(a.dtype, [&](auto t) {
        launch(kOp, rotary_kernel<decltype(t)>, dim3(static_cast<unsigned>(a.batch * a.time)), block, 0,
               current_stream(device_id), a, aligned, angles_aligned);
    });
}

}  // namespace cgpt
