// LayerNorm over the last dimension, with an optional residual add in front.
//
//   h = x + residual            rounded to the working dtype: what the next block reads
//   y = (h - mean) * rstd * weight + bias,   rstd = 1 / sqrt(var + eps)
//
//   xhat = (h - mean) * rstd,  g = dout * weight
//   dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dh
//   dweight = sum over rows of dout * xhat,  dbias = sum over rows of dout
//
// Rows are read one after the other, which is what the hardware prefetches; each sum is four independent chains of
// additions. The second pass of the backward, over rows that the caches now hold, takes a column of several rows at
// once, so that dweight and dbias pass through registers once for all of them. They are summed per block of rows, then
// over the blocks in order: the blocks depend on the shape alone, so the bits do not depend on the thread count.
//
// weight, bias and the sums for dweight and dbias are fp32 in the order that load2 gives the working dtype in
// (pairs.h), filled up to whole pairs of vectors.
#include "../layer_norm.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "pairs.h"
#include "threads.h"

namespace cgpt::CGPT_ISA {
namespace {

constexpr int64_t kTile = 8;  // rows whose dweight and dbias go together

template <class T>
const T* row_of(const void* base, int64_t row, int64_t D) {
    return static_cast<const T*>(base) + row * D;
}
template <class T>
T* row_of(void* base, int64_t row, int64_t D) {
    return static_cast<T*>(base) + row * D;
}

// D, rounded up to the two vectors that are taken at a time.
int64_t padded(int64_t D) { return (D + 2 * W - 1) / (2 * W) * (2 * W); }

// Calls body with a value of the weights' type, which is T or float.
template <class T, class F>
void with_weight_type(DType dtype, F&& body) {
    if (dtype == DType::f32)
        body(float{});
    else
        body(T{});
}

// weight or bias (D), null for zeros, in fp32 and T's order: widened once for many rows.
template <class T>
std::vector<float> in_fp32(const void* values, DType dtype, int64_t D) {
    std::vector<float> wide(padded(D));
    if (!values) return wide;
    with_weight_type<T>(dtype, [&](auto type) {
        const auto* from = static_cast<const decltype(type)*>(values);
        for_pairs(D, [&](int64_t i, auto n, auto) { store2(wide.data() + i, get2_as<T>(from + i, n)); });
    });
    return wide;
}

struct Moments {
    float mean, variance;
};

// One pass over the row, centred on the mean of its first values. Where that turns out further from the mean than the
// standard deviation, so that the variance would lose digits to it, a second pass is centred on the mean itself.
template <class T>
CGPT_INLINE Moments moments(const T* h, int64_t D) {
    const int64_t few = std::min<int64_t>(D, 2 * W);
    const vf2 sample = few == 2 * W ? load2(h) : get2(h, few);
    float centre = hsum(sample.half[0] + sample.half[1]) / few;
    for (bool again = false;; again = true) {
        vf squares[4] = {}, rest[4] = {};
        for_pairs(D, [&](int64_t i, auto n, auto k) {
            const vf2 x = get2(h + i, n);
            const vf2 centred = keep2<T>({x.half[0] - centre, x.half[1] - centre}, n);
            for (int s = 0; s < 2; ++s) {
                squares[2 * k + s] = madd(centred.half[s], centred.half[s], squares[2 * k + s]);
                rest[2 * k + s] += centred.half[s];
            }
        });
        const float delta = hsum4(rest) / D, variance = hsum4(squares) / D - delta * delta;
        if (again || delta * delta <= variance) return {centre + delta, std::fmax(variance, 0.0f)};
        centre += delta;
    }
}

template <class T>
void forward_row(const LayerNormFwdArgs& a, int64_t row, const float* weight, const float* bias) {
    const int64_t D = a.cols;
    const T* h = row_of<T>(a.residual ? a.h : a.x, row, D);
    if (a.residual) {  // what is stored is what gets normalised: the backward pass sees only that
        const T *x = row_of<T>(a.x, row, D), *residual = row_of<T>(a.residual, row, D);
        T* sum = row_of<T>(a.h, row, D);
        for_pairs(D, [&](int64_t i, auto n, auto) {
            const vf2 u = get2(x + i, n), v = get2(residual + i, n);
            put2(sum + i, {u.half[0] + v.half[0], u.half[1] + v.half[1]}, n);
        });
    }
    const Moments m = moments(h, D);
    const float mean = m.mean, rstd = 1.0f / std::sqrt(m.variance + a.eps);
    if (a.mean) {
        a.mean[row] = mean;
        a.rstd[row] = rstd;
    }
    T* y = row_of<T>(a.y, row, D);
    for_pairs(D, [&](int64_t i, auto n, auto) {
        vf2 x = get2(h + i, n);
        const vf2 w = load2(weight + i), b = load2(bias + i);
        for (int s = 0; s < 2; ++s) x.half[s] = madd((x.half[s] - mean) * rstd, w.half[s], b.half[s]);
        put2(y + i, x, n);
    });
}

// What dx is made of, besides dout and h.
struct RowGradient {
    float mean, rstd, mean_g, mean_gx;
};

template <class T>
CGPT_INLINE RowGradient row_gradient(const LayerNormBwdArgs& a, int64_t row, const float* weight) {
    const int64_t D = a.cols;
    const T *dout = row_of<T>(a.dout, row, D), *h = row_of<T>(a.h, row, D);
    const float mean = a.mean[row], rstd = a.rstd[row];
    vf sum_g[4] = {}, sum_gx[4] = {};
    for_pairs(D, [&](int64_t i, auto n, auto k) {  // beyond the row's end dout is 0, and every term with it
        const vf2 d = get2(dout + i, n), x = get2(h + i, n), w = load2(weight + i);
        for (int s = 0; s < 2; ++s) {
            const vf g = d.half[s] * w.half[s];
            sum_g[2 * k + s] += g;
            sum_gx[2 * k + s] = madd(g, x.half[s] - mean, sum_gx[2 * k + s]);
        }
    });
    return {mean, rstd, hsum4(sum_g) / D, hsum4(sum_gx) * rstd / D};
}

// dx of up to kTile rows, [begin, end), and what they add to dweight and dbias (padded(D)).
template <class T>
void backward_tile(const LayerNormBwdArgs& a, int64_t begin, int64_t end, const float* weight, float* dweight,
                   float* dbias) {
    const int64_t D = a.cols;
    RowGradient gradients[kTile];
    for (int64_t row = begin; row < end; ++row) gradients[row - begin] = row_gradient<T>(a, row, weight);
    for_pairs(D, [&](int64_t i, auto n, auto) {
        const vf2 w = load2(weight + i);
        vf2 dw = load2(dweight + i), db = load2(dbias + i);
        for (int64_t row = begin; row < end; ++row) {
            const RowGradient& c = gradients[row - begin];
            const vf2 d = get2(row_of<T>(a.dout, row, D) + i, n), x = get2(row_of<T>(a.h, row, D) + i, n);
            vf2 dx;
            for (int s = 0; s < 2; ++s) {
                const vf xhat = (x.half[s] - c.mean) * c.rstd;
                dw.half[s] = madd(d.half[s], xhat, dw.half[s]);
                db.half[s] += d.half[s];
                dx.half[s] = madd(xhat, splat(-c.mean_gx), d.half[s] * w.half[s] - c.mean_g) * c.rstd;
            }
            if (a.dh) {
                const vf2 dh = get2(row_of<T>(a.dh, row, D) + i, n);
                for (int s = 0; s < 2; ++s) dx.half[s] += dh.half[s];
            }
            put2(row_of<T>(a.dx, row, D) + i, dx, n);
        }
        store2(dweight + i, dw);
        store2(dbias + i, db);
    });
}

// Gradients of rows [begin, end); their sums for dweight and dbias go to `partial` (2, padded(D)).
template <class T>
void backward_rows(const LayerNormBwdArgs& a, int64_t begin, int64_t end, const float* weight, float* partial) {
    std::fill(partial, partial + 2 * padded(a.cols), 0.0f);
    for (int64_t row = begin; row < end; row += kTile)
        backward_tile<T>(a, row, std::min(end, row + kTile), weight, partial, partial + padded(a.cols));
}

// to (size) = the sum of the blocks' floats, `stride` apart and in T's order, from the first to the last.
template <class T, class P>
void sum_blocks(const float* first, int64_t blocks, int64_t stride, P* to, int64_t size) {
    for_pairs(size, [&](int64_t i, auto n, auto) {
        vf2 sum{};
        for (int64_t b = 0; b < blocks; ++b) {
            const vf2 x = load2(first + b * stride + i);
            for (int s = 0; s < 2; ++s) sum.half[s] += x.half[s];
        }
        put2_as<T>(to + i, sum, n);
    });
}

}  // namespace

void layer_norm_fwd(const LayerNormFwdArgs& a) {
    const int64_t grain = std::max<int64_t>(1, 12288 / a.cols);
    CGPT_WITH_FLOAT_TYPE(a.dtype, T, {
        const std::vector<float> weight = in_fp32<T>(a.weight, a.weight_dtype, a.cols);
        const std::vector<float> bias = in_fp32<T>(a.bias, a.weight_dtype, a.cols);
        parallel_ranges(a.rows, grain, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) forward_row<T>(a, row, weight.data(), bias.data());
        });
    })
}

void layer_norm_bwd(const LayerNormBwdArgs& a) {
    const int64_t D = a.cols, stride = 2 * padded(D);
    const int64_t grain = std::max<int64_t>(16, (a.rows + 63) / 64);
    const int64_t blocks = (a.rows + grain - 1) / grain;
    const std::unique_ptr<float[]> partials(new float[blocks * stride]);
    CGPT_WITH_FLOAT_TYPE(a.dtype, T, {
        const std::vector<float> weight = in_fp32<T>(a.weight, a.weight_dtype, D);
        parallel_for(blocks, [&](int64_t b) {
            backward_rows<T>(a, b * grain, std::min(a.rows, (b + 1) * grain), weight.data(),
                             partials.get() + b * stride);
        });
        with_weight_type<T>(a.weight_dtype, [&](auto type) {
            using P = decltype(type);
            sum_blocks<T>(partials.get(), blocks, stride, static_cast<P*>(a.dweight), D);
            if (a.dbias) sum_blocks<T>(partials.get() + stride / 2, blocks, stride, static_cast<P*>(a.dbias), D);
        });
    })
}

}  // namespace cgpt::CGPT_ISA
