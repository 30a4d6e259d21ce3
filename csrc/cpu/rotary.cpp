// Rotary position embedding (Su et al. 2021, arXiv 2104.09864) of (B, T, H, D): pairs of the first R values of a head
// turn by their position's angles, the others pass.
//
//   out_1 = x_1 cos - x_2 sin,  out_2 = x_2 cos + x_1 sin
//
// A pair is (i, i + R / 2), or (2i, 2i + 1) where interleaved. Tokens are handed to the threads.
#include "../rotary.h"

#include <algorithm>
#include <vector>

#include "threads.h"
#include "vec.h"

namespace cgpt::CGPT_ISA {
namespace {

template <class T>
void rotate_halves(const RotaryArgs& a, const T* x, const float* cos, const float* sin, float sign, T* out) {
    const int64_t half = a.rotated / 2;
    for_lanes(half, [&](int64_t i, auto n) {
        const vf first = get(x + i, n), second = get(x + half + i, n);
        const vf c = get(cos + i, n), s = get(sin + i, n) * sign;
        put(out + i, madd(first, c, -(second * s)), n);
        put(out + half + i, madd(second, c, first * s), n);
    });
}

// `wide` (R): the row in fp32, so that only whole vectors are widened and narrowed.
template <class T>
void rotate_pairs(const RotaryArgs& a, const T* x, const float* cos, const float* sin, float sign, float* wide,
                  T* out) {
    for_lanes(a.rotated, [&](int64_t i, auto n) { put(wide + i, get(x + i, n), n); });
    for (int64_t i = 0; i < a.rotated / 2; ++i) {
        const float first = wide[2 * i], second = wide[2 * i + 1], s = sin[i] * sign;
        wide[2 * i] = first * cos[i] - second * s;
        wide[2 * i + 1] = second * cos[i] + first * s;
    }
    for_lanes(a.rotated, [&](int64_t i, auto n) { put(out + i, get(wide + i, n), n); });
}

template <class T>
void rotate_tokens(const RotaryArgs& a, int64_t begin, int64_t end) {
    std::vector<float> wide(a.interleaved ? a.rotated : 0);
    const float sign = a.inverse ? -1.0f : 1.0f;
    for (int64_t token = begin; token < end; ++token) {
        const int64_t b = token / a.time, t = token % a.time;
        const float *cos = a.cos + t * (a.rotated / 2), *sin = a.sin + t * (a.rotated / 2);
        for (int64_t h = 0; h < a.heads; ++h) {
            const T* x = static_cast<const T*>(a.x) + b * a.stride[0] + t * a.stride[1] + h * a.stride[2];
            T* out = static_cast<T*>(a.out) + (token * a.heads + h) * a.dim;
            if (a.interleaved)
                rotate_pairs(a, x, cos, sin, sign, wide.data(), out);
            else
                rotate_halves(a, x, cos, sin, sign, out);
            std::copy(x + a.rotated, x + a.dim, out + a.rotated);
        }
    }
}

}  // namespace

void rotary(const RotaryArgs& a) {
    const int64_t grain = std::max<int64_t>(1, 12288 / (a.heads * a.dim));
    CGPT_WITH_FLOAT_TYPE(a.dtype, T, {
        parallel_ranges(a.batch * a.time, grain, [&](int64_t begin, int64_t end) { rotate_tokens<T>(a, begin, end); });
    })
}

}  // namespace cgpt::CGPT_ISA
