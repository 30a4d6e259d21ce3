// LayerNorm over the last dimension, with an optional residual add in front.
//
//   h = x + residual            rounded to the working dtype: what the next block reads
//   y = (h - mean) * rstd * weight + bias,   rstd = 1 / sqrt(var + eps)
//
//   xhat = (h - mean) * rstd,  g = dout * weight
//   dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dh
//   dweight = sum over rows of dout * xhat,  dbias = sum over rows of dout
//
// One row stays in the first-level cache between its passes. dweight and dbias are summed per block of rows,
// then over the blocks in order: the blocks depend on the shape alone, so the bits do not depend on the
// thread count.
#include "../layer_norm.h"

#include <algorithm>
#include <vector>

#include "threads.h"
#include "vec.h"

namespace cgpt::CGPT_ISA {
namespace {

template <class T, class P>
void forward_rows(const LayerNormFwdArgs& a, int64_t begin, int64_t end) {
    const int64_t D = a.cols;
    std::vector<float> row(D);
    for (int64_t r = begin; r < end; ++r) {
        const T* x = static_cast<const T*>(a.x) + r * D;
        const T* residual = a.residual ? static_cast<const T*>(a.residual) + r * D : nullptr;
        T* h = a.h ? static_cast<T*>(a.h) + r * D : nullptr;
        vf sum{};
        for_lanes(D, [&](int64_t i, auto n) {
            vf v = get(x + i, n);
            if (residual) {
                v += get(residual + i, n);
                put(h + i, v, n);
                v = get(h + i, n);  // normalise what was stored: the backward pass sees only that
            }
            put(row.data() + i, v, n);
            sum += v;
        });
        const float first = hsum(sum) / D;
        vf squares{}, rest{};
        for_lanes(D, [&](int64_t i, auto n) {
            vf centred = keep_n(get(row.data() + i, n) - first, n);
            squares = madd(centred, centred, squares);
            rest += centred;
        });
        // What rounding left in the mean of a large offset is the mean of the centred row.
        const float delta = hsum(rest) / D, mean = first + delta;
        const float rstd = 1.0f / std::sqrt(std::fmax(hsum(squares) / D - delta * delta, 0.0f) + a.eps);
        const P* weight = static_cast<const P*>(a.weight);
        const P* bias = static_cast<const P*>(a.bias);
        T* y = static_cast<T*>(a.y) + r * D;
        for_lanes(D, [&](int64_t i, auto n) {
            vf out = (get(row.data() + i, n) - mean) * rstd * get(weight + i, n);
            if (bias) out += get(bias + i, n);
            put(y + i, out, n);
        });
        if (a.mean) {
            a.mean[r] = mean;
            a.rstd[r] = rstd;
        }
    }
}

// Gradients of rows [begin, end); their sums for dweight and dbias go to `partial` (2, D).
template <class T, class P>
void backward_rows(const LayerNormBwdArgs& a, int64_t begin, int64_t end, float* partial) {
    const int64_t D = a.cols;
    const P* weight = static_cast<const P*>(a.weight);
    float *dweight = partial, *dbias = partial + D;
    std::fill(partial, partial + 2 * D, 0.0f);
    std::vector<float> rows(2 * D);
    float *xhat = rows.data(), *g = xhat + D;
    for (int64_t r = begin; r < end; ++r) {
        const T* dout = static_cast<const T*>(a.dout) + r * D;
        const T* h = static_cast<const T*>(a.h) + r * D;
        const float mean = a.mean[r], rstd = a.rstd[r];
        vf sum_g{}, sum_gx{};
        for_lanes(D, [&](int64_t i, auto n) {
            vf d = get(dout + i, n);
            vf normal = (get(h + i, n) - mean) * rstd;
            put(dweight + i, madd(d, normal, get(dweight + i, n)), n);
            put(dbias + i, get(dbias + i, n) + d, n);
            vf scaled = d * get(weight + i, n);
            put(xhat + i, normal, n);
            put(g + i, scaled, n);
            sum_g += scaled;  // beyond the row's end d is 0, so are both terms
            sum_gx = madd(scaled, normal, sum_gx);
        });
        const float mean_g = hsum(sum_g) / D, mean_gx = hsum(sum_gx) / D;
        const T* dh = a.dh ? static_cast<const T*>(a.dh) + r * D : nullptr;
        T* dx = static_cast<T*>(a.dx) + r * D;
        for_lanes(D, [&](int64_t i, auto n) {
            vf d = (get(g + i, n) - mean_g - get(xhat + i, n) * mean_gx) * rstd;
            if (dh) d += get(dh + i, n);
            put(dx + i, d, n);
        });
    }
}

template <class T, class P>
void backward(const LayerNormBwdArgs& a) {
    const int64_t D = a.cols;
    const int64_t grain = std::max<int64_t>(16, (a.rows + 63) / 64);
    const int64_t blocks = (a.rows + grain - 1) / grain;
    std::vector<float> partials(blocks * 2 * D);
    parallel_for(blocks, [&](int64_t b) {
        backward_rows<T, P>(a, b * grain, std::min(a.rows, (b + 1) * grain), partials.data() + b * 2 * D);
    });
    P* dweight = static_cast<P*>(a.dweight);
    P* dbias = static_cast<P*>(a.dbias);
    for_lanes(D, [&](int64_t i, auto n) {
        vf w{}, b{};
        for (int64_t block = 0; block < blocks; ++block) {
            w += get(partials.data() + block * 2 * D + i, n);
            b += get(partials.data() + block * 2 * D + D + i, n);
        }
        put(dweight + i, w, n);
        if (dbias) put(dbias + i, b, n);
    });
}

}  // namespace

void layer_norm_fwd(const LayerNormFwdArgs& a) {
    const int64_t grain = std::max<int64_t>(1, 16384 / a.cols);
    CGPT_WITH_FLOAT_TYPE(a.dtype, T, {
        parallel_ranges(a.rows, grain, [&](int64_t begin, int64_t end) {
            if (a.weight_dtype == a.dtype)
                forward_rows<T, T>(a, begin, end);
            else
                forward_rows<T, float>(a, begin, end);
        });
    })
}

void layer_norm_bwd(const LayerNormBwdArgs& a) {
    CGPT_WITH_FLOAT_TYPE(a.dtype, T, {
        if (a.weight_dtype == a.dtype)
            backward<T, T>(a);
        else
            backward<T, float>(a);
    })
}

}  // namespace cgpt::CGPT_ISA
