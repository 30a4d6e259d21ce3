// LayerNorm over the last dimension, with an optional residual add in front.
//
//   h = x + residual            rounded to the working dtype: what the next block reads
//   y = (h - mean) * rstd * weight + bias,   rstd = 1 / sqrt(var + eps)
//
//   xhat = (h - mean) * rstd,  g = dout * weight
//   dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dh
//   dweight = sum over rows of dout * xhat,  dbias = sum over rows of dout
//
// Rows are read and written one after the other, which is what the hardware prefetches; each sum is four independent
// chains of additions. Only dweight and dbias take four rows at once, when those are in the first-level cache, so that
// they pass through registers once for the four. They are summed per block of rows, then over the blocks in order: the
// blocks depend on the shape alone, so the bits do not depend on the thread count.
#include "../layer_norm.h"

#include <algorithm>
#include <vector>

#include "threads.h"
#include "vec.h"

namespace cgpt::CGPT_ISA {
namespace {

constexpr int64_t kTile = 4;  // rows whose dweight and dbias go together

template <class T>
const T* row_of(const void* base, int64_t row, int64_t D) {
    return static_cast<const T*>(base) + row * D;
}
template <class T>
T* row_of(void* base, int64_t row, int64_t D) {
    return static_cast<T*>(base) + row * D;
}

// weight and bias (D) in fp32, so that 16-bit ones are widened once for many rows.
std::vector<float> in_fp32(const void* values, DType dtype, int64_t D) {
    std::vector<float> wide(D);
    if (values)
        CGPT_WITH_FLOAT_TYPE(dtype, P, for_lanes(D, [&](int64_t i, auto n) {
                                 put(wide.data() + i, get(static_cast<const P*>(values) + i, n), n);
                             }))
    return wide;
}

template <class T>
void forward_row(const LayerNormFwdArgs& a, int64_t row, const float* weight, const float* bias) {
    const int64_t D = a.cols;
    const T* h = row_of<T>(a.residual ? a.h : a.x, row, D);
    if (a.residual) {  // what is stored is what gets normalised: the backward pass sees only that
        const T *x = row_of<T>(a.x, row, D), *residual = row_of<T>(a.residual, row, D);
        T* sum = row_of<T>(a.h, row, D);
        for_lanes(D, [&](int64_t i, auto n) { put(sum + i, get(x + i, n) + get(residual + i, n), n); });
    }
    vf sum[4] = {};
    for_lanes4(D, [&](int64_t i, auto n, auto k) { sum[k] += get(h + i, n); });
    const float first = hsum4(sum) / D;
    vf squares[4] = {}, rest[4] = {};
    for_lanes4(D, [&](int64_t i, auto n, auto k) {
        const vf centred = keep_n(get(h + i, n) - first, n);
        squares[k] = madd(centred, centred, squares[k]);
        rest[k] += centred;
    });
    // What rounding left in the mean of a large offset is the mean of the centred row.
    const float delta = hsum4(rest) / D, mean = first + delta;
    const float rstd = 1.0f / std::sqrt(std::fmax(hsum4(squares) / D - delta * delta, 0.0f) + a.eps);
    if (a.mean) {
        a.mean[row] = mean;
        a.rstd[row] = rstd;
    }
    T* y = row_of<T>(a.y, row, D);
    for_lanes(D, [&](int64_t i, auto n) {
        put(y + i, madd((get(h + i, n) - mean) * rstd, get(weight + i, n), get(bias + i, n)), n);
    });
}

template <class T, class N>
CGPT_INLINE vf xhat(const LayerNormBwdArgs& a, int64_t row, int64_t i, N n) {
    return (get(row_of<T>(a.h, row, a.cols) + i, n) - a.mean[row]) * a.rstd[row];
}

template <class T>
void backward_row(const LayerNormBwdArgs& a, int64_t row, const float* weight) {
    const int64_t D = a.cols;
    const T* dout = row_of<T>(a.dout, row, D);
    vf sum_g[4] = {}, sum_gx[4] = {};
    for_lanes4(D, [&](int64_t i, auto n, auto k) {  // beyond the row's end dout is 0, and every term with it
        const vf g = get(dout + i, n) * get(weight + i, n);
        sum_g[k] += g;
        sum_gx[k] = madd(g, xhat<T>(a, row, i, n), sum_gx[k]);
    });
    const float mean_g = hsum4(sum_g) / D, mean_gx = hsum4(sum_gx) / D;
    const T* dh = a.dh ? row_of<T>(a.dh, row, D) : nullptr;
    T* dx = row_of<T>(a.dx, row, D);
    for_lanes(D, [&](int64_t i, auto n) {
        const vf g = get(dout + i, n) * get(weight + i, n);
        vf d = (g - mean_g - xhat<T>(a, row, i, n) * mean_gx) * a.rstd[row];
        if (dh) d += get(dh + i, n);
        put(dx + i, d, n);
    });
}

// Adds R rows to dweight and dbias (D).
template <class T, int R>
void add_rows(const LayerNormBwdArgs& a, int64_t row, float* dweight, float* dbias) {
    const int64_t D = a.cols;
    for_lanes(D, [&](int64_t i, auto n) {
        vf dw = get(dweight + i, n), db = get(dbias + i, n);
        for (int r = 0; r < R; ++r) {
            const vf d = get(row_of<T>(a.dout, row + r, D) + i, n);
            dw = madd(d, xhat<T>(a, row + r, i, n), dw);
            db += d;
        }
        put(dweight + i, dw, n);
        put(dbias + i, db, n);
    });
}

// Gradients of rows [begin, end); their sums for dweight and dbias go to `partial` (2, D).
template <class T>
void backward_rows(const LayerNormBwdArgs& a, int64_t begin, int64_t end, const float* weight, float* partial) {
    float *dweight = partial, *dbias = partial + a.cols;
    std::fill(partial, partial + 2 * a.cols, 0.0f);
    for (int64_t row = begin; row < end; row += kTile) {
        const int64_t last = std::min(end, row + kTile);
        for (int64_t r = row; r < last; ++r) backward_row<T>(a, r, weight);
        if (last - row == kTile)
            add_rows<T, kTile>(a, row, dweight, dbias);
        else
            for (int64_t r = row; r < last; ++r) add_rows<T, 1>(a, r, dweight, dbias);
    }
}

}  // namespace

void layer_norm_fwd(const LayerNormFwdArgs& a) {
    const std::vector<float> weight = in_fp32(a.weight, a.weight_dtype, a.cols);
    const std::vector<float> bias = in_fp32(a.bias, a.weight_dtype, a.cols);
    const int64_t grain = std::max<int64_t>(1, 16384 / a.cols);
    CGPT_WITH_FLOAT_TYPE(a.dtype, T, {
        parallel_ranges(a.rows, grain, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) forward_row<T>(a, row, weight.data(), bias.data());
        });
    })
}

void layer_norm_bwd(const LayerNormBwdArgs& a) {
    const int64_t D = a.cols;
    const std::vector<float> weight = in_fp32(a.weight, a.weight_dtype, D);
    const int64_t grain = std::max<int64_t>(16, (a.rows + 63) / 64);
    const int64_t blocks = (a.rows + grain - 1) / grain;
    std::vector<float> partials(blocks * 2 * D);
    CGPT_WITH_FLOAT_TYPE(a.dtype, T, {
        parallel_for(blocks, [&](int64_t b) {
            backward_rows<T>(a, b * grain, std::min(a.rows, (b + 1) * grain), weight.data(),
                             partials.data() + b * 2 * D);
        });
    })
    CGPT_WITH_FLOAT_TYPE(a.weight_dtype, P, for_lanes(D, [&](int64_t i, auto n) {
                             vf dweight{}, dbias{};
                             for (int64_t block = 0; block < blocks; ++block) {
                                 dweight += get(partials.data() + block * 2 * D + i, n);
                                 dbias += get(partials.data() + block * 2 * D + D + i, n);
                             }
                             put(static_cast<P*>(a.dweight) + i, dweight, n);
                             if (a.dbias) put(static_cast<P*>(a.dbias) + i, dbias, n);
                         }))
}

}  // namespace cgpt::CGPT_ISA
