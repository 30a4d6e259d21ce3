// GELU with its bias between two matrix products, forward and backward (Hendrycks & Gimpel 2016, arXiv 1606.08415).
//
//   z = pre + bias
//   act = z Phi(z)                                                  "gelu"
//   act = z s,  s = (1 + tanh(c z (1 + a z^2))) / 2                 "gelu_tanh", c = sqrt(2 / pi), a = 0.044715
//
//   dpre = dact * act'(z);  act' = Phi(z) + z phi(z)  or  s + z s (1 - s) 2 c (1 + 3 a z^2)
//   dbias = sum over rows of dpre,  each term before it is rounded
//
// pre is the product as the matrix engine rounded it; adding the bias here in fp32 rounds once less and saves the
// engine a pass. Column sums are taken per block of rows, then over the blocks in order: the blocks depend on the
// shape alone, so the bits do not depend on the thread count.
#include "../gelu_mlp.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "math.h"
#include "threads.h"
#include "vec.h"

namespace cgpt::CGPT_ISA {
namespace {

struct Activation {
    vf share, slope;  // act = z * share, slope = act'(z)
};

template <bool kTanh>
CGPT_INLINE Activation activate(vf z) {
    if constexpr (kTanh) {
        // Beyond 16 the share is 0 or 1 and the slope's second term 0; clamped, z^2 cannot overflow against that 0.
        const vf near = max(min(z, splat(16.0f)), splat(-16.0f));
        const vf square = near * near;
        const Logistic s = logistic(near * madd(square, splat(0x1.2444f2p-4f), splat(0x1.988454p+0f)));
        const vf inner = madd(square, splat(0x1.b6676cp-3f), splat(0x1.988454p+0f));
        return {s.value, madd(z * s.slope, inner, s.value)};
    } else {
        const Normal n = normal(z);
        return {n.cdf, madd(z, n.pdf, n.cdf)};
    }
}

// The bias in fp32, zeros where there is none: a block of rows pays for it once.
template <class T>
std::vector<float> wide_bias(const void* bias, int64_t cols) {
    std::vector<float> wide(cols);
    if (bias)
        for_lanes(cols, [&](int64_t i, auto n) { put(wide.data() + i, get(static_cast<const T*>(bias) + i, n), n); });
    return wide;
}

template <class T, bool kTanh>
void forward_rows(const GeluMlpFwdArgs& a, int64_t begin, int64_t end) {
    const std::vector<float> bias = wide_bias<T>(a.bias, a.cols);
    for (int64_t r = begin; r < end; ++r) {
        const T* pre = static_cast<const T*>(a.pre) + r * a.cols;
        T* act = static_cast<T*>(a.act) + r * a.cols;
        for_lanes(a.cols, [&](int64_t i, auto n) {
            const vf z = get(pre + i, n) + get(bias.data() + i, n);
            put(act + i, z * activate<kTanh>(z).share, n);
        });
    }
}

// Rows [begin, end); their sum of dpre goes to `partial` (cols,).
template <class T, bool kTanh>
void backward_rows(const GeluMlpBwdArgs& a, int64_t begin, int64_t end, float* partial) {
    const std::vector<float> bias = wide_bias<T>(a.bias, a.cols);
    std::fill(partial, partial + a.cols, 0.0f);
    for (int64_t r = begin; r < end; ++r) {
        const T* pre = static_cast<const T*>(a.pre) + r * a.cols;
        const T* dact = static_cast<const T*>(a.dact) + r * a.cols;
        T* act = static_cast<T*>(a.act) + r * a.cols;
        T* dpre = static_cast<T*>(a.dpre) + r * a.cols;
        for_lanes(a.cols, [&](int64_t i, auto n) {
            const vf z = get(pre + i, n) + get(bias.data() + i, n);
            const Activation f = activate<kTanh>(z);
            const vf d = get(dact + i, n) * f.slope;
            put(act + i, z * f.share, n);
            put(dpre + i, d, n);
            put(partial + i, get(partial + i, n) + d, n);
        });
    }
}

// Calls sum_rows(begin, end, partial) for every block of rows and writes the sum of the partials to `out` (cols,).
template <class T, class F>
void sum_blocks(int64_t rows, int64_t cols, T* out, const F& sum_rows) {
    const int64_t grain = std::max<int64_t>(16, (rows + 63) / 64);
    const int64_t blocks = (rows + grain - 1) / grain;
    const std::unique_ptr<float[]> partials(new float[blocks * cols]);
    parallel_for(blocks,
                 [&](int64_t b) { sum_rows(b * grain, std::min(rows, (b + 1) * grain), partials.get() + b * cols); });
    if (!out) return;
    for_lanes(cols, [&](int64_t i, auto n) {
        vf sum{};
        for (int64_t b = 0; b < blocks; ++b) sum += get(partials.get() + b * cols + i, n);
        put(out + i, sum, n);
    });
}

// One row a pass: four at once cost 2.3 times as much on rows that are not in cache yet (2048 x 768 bf16, Zen 4).
template <class T>
void bias_grad(const GeluMlpBiasGradArgs& a) {
    sum_blocks(a.rows, a.cols, static_cast<T*>(a.dbias), [&](int64_t begin, int64_t end, float* partial) {
        std::fill(partial, partial + a.cols, 0.0f);
        for (int64_t r = begin; r < end; ++r) {
            const T* dout = static_cast<const T*>(a.dout) + r * a.cols;
            for_lanes(a.cols, [&](int64_t i, auto n) { put(partial + i, get(partial + i, n) + get(dout + i, n), n); });
        }
    });
}

}  // namespace

void gelu_mlp_fwd(const GeluMlpFwdArgs& a) {
    const int64_t grain = std::max<int64_t>(1, 65536 / a.cols);
    CGPT_WITH_FLOAT_TYPE(a.dtype, T, {
        parallel_ranges(a.rows, grain, [&](int64_t begin, int64_t end) {
            if (a.tanh)
                forward_rows<T, true>(a, begin, end);
            else
                forward_rows<T, false>(a, begin, end);
        });
    })
}

void gelu_mlp_bwd(const GeluMlpBwdArgs& a) {
    CGPT_WITH_FLOAT_TYPE(a.dtype, T, {
        sum_blocks(a.rows, a.cols, static_cast<T*>(a.dbias), [&](int64_t begin, int64_t end, float* partial) {
            if (a.tanh)
                backward_rows<T, true>(a, begin, end, partial);
            else
                backward_rows<T, false>(a, begin, end, partial);
        });
    })
}

void gelu_mlp_bias_grad(const GeluMlpBiasGradArgs& a) {
    CGPT_WITH_FLOAT_TYPE(a.dtype, T, { bias_grad<T>(a); })
}

}  // namespace cgpt::CGPT_ISA
