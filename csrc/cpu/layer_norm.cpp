// LayerNorm over the last dimension, with an optional residual add in front.
//
//   h = x + residual            rounded to the working dtype: what the next block reads
//   y = (h - mean) * rstd * weight + bias,   rstd = 1 / sqrt(var + eps)
//
//   xhat = (h - mean) * rstd,  g = dout * weight
//   dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dh
//   dweight = sum over rows of dout * xhat,  dbias = sum over rows of dout
//
// Four rows go together: their sums are independent chains of additions, and weight, dweight and dbias pass through
// registers once for the four. The rows stay in the first-level cache from pass to pass. dweight and dbias are summed
// per block of rows, then over the blocks in order: the blocks depend on the shape alone, so the bits do not depend on
// the thread count, nor, as each row's own arithmetic is the same in a tile of four or of one, on the tiling.
#include "../layer_norm.h"

#include <algorithm>
#include <vector>

#include "threads.h"
#include "vec.h"

namespace cgpt::CGPT_ISA {
namespace {

constexpr int kTile = 4;

template <class T>
const T* row_of(const void* base, int64_t row, int64_t D) {
    return static_cast<const T*>(base) + row * D;
}
template <class T>
T* row_of(void* base, int64_t row, int64_t D) {
    return static_cast<T*>(base) + row * D;
}

template <class T, class P, int R>
void forward_tile(const LayerNormFwdArgs& a, int64_t row) {
    const int64_t D = a.cols;
    const T* h[R];
    float mean[R], rstd[R];
    vf sum[R] = {};
    for (int r = 0; r < R; ++r) h[r] = row_of<T>(a.residual ? a.h : a.x, row + r, D);
    for_lanes(D, [&](int64_t i, auto n) {
        for (int r = 0; r < R; ++r) {
            if (a.residual) {  // what is stored is what gets normalised: the backward pass sees only that
                vf v = get(row_of<T>(a.x, row + r, D) + i, n) + get(row_of<T>(a.residual, row + r, D) + i, n);
                put(row_of<T>(a.h, row + r, D) + i, v, n);
            }
            sum[r] += get(h[r] + i, n);
        }
    });
    for (int r = 0; r < R; ++r) mean[r] = hsum(sum[r]) / D;
    vf squares[R] = {}, rest[R] = {};
    for_lanes(D, [&](int64_t i, auto n) {
        for (int r = 0; r < R; ++r) {
            vf centred = keep_n(get(h[r] + i, n) - mean[r], n);
            squares[r] = madd(centred, centred, squares[r]);
            rest[r] += centred;
        }
    });
    for (int r = 0; r < R; ++r) {
        // What rounding left in the mean of a large offset is the mean of the centred row.
        const float delta = hsum(rest[r]) / D;
        mean[r] += delta;
        rstd[r] = 1.0f / std::sqrt(std::fmax(hsum(squares[r]) / D - delta * delta, 0.0f) + a.eps);
        if (a.mean) {
            a.mean[row + r] = mean[r];
            a.rstd[row + r] = rstd[r];
        }
    }
    const P* weight = static_cast<const P*>(a.weight);
    const P* bias = static_cast<const P*>(a.bias);
    for_lanes(D, [&](int64_t i, auto n) {
        const vf w = get(weight + i, n), b = bias ? get(bias + i, n) : vf{};
        for (int r = 0; r < R; ++r)
            put(row_of<T>(a.y, row + r, D) + i, madd((get(h[r] + i, n) - mean[r]) * rstd[r], w, b), n);
    });
}

template <class T, class P>
void forward_rows(const LayerNormFwdArgs& a, int64_t begin, int64_t end) {
    for (; begin + kTile <= end; begin += kTile) forward_tile<T, P, kTile>(a, begin);
    for (; begin < end; ++begin) forward_tile<T, P, 1>(a, begin);
}

template <class T, class P, int R>
void backward_tile(const LayerNormBwdArgs& a, int64_t row, float* dweight, float* dbias) {
    const int64_t D = a.cols;
    const P* weight = static_cast<const P*>(a.weight);
    const T *dout[R], *h[R];
    float mean_g[R], mean_gx[R];
    vf sum_g[R] = {}, sum_gx[R] = {};
    for (int r = 0; r < R; ++r) {
        dout[r] = row_of<T>(a.dout, row + r, D);
        h[r] = row_of<T>(a.h, row + r, D);
    }
    const auto xhat = [&](int r, int64_t i, auto n) { return (get(h[r] + i, n) - a.mean[row + r]) * a.rstd[row + r]; };
    for_lanes(D, [&](int64_t i, auto n) {
        const vf w = get(weight + i, n);
        vf dw = get(dweight + i, n), db = get(dbias + i, n);
        for (int r = 0; r < R; ++r) {  // beyond the row's end d is 0, and every term with it
            const vf d = get(dout[r] + i, n), normal = xhat(r, i, n), g = d * w;
            dw = madd(d, normal, dw);
            db += d;
            sum_g[r] += g;
            sum_gx[r] = madd(g, normal, sum_gx[r]);
        }
        put(dweight + i, dw, n);
        put(dbias + i, db, n);
    });
    for (int r = 0; r < R; ++r) {
        mean_g[r] = hsum(sum_g[r]) / D;
        mean_gx[r] = hsum(sum_gx[r]) / D;
    }
    for_lanes(D, [&](int64_t i, auto n) {
        const vf w = get(weight + i, n);
        for (int r = 0; r < R; ++r) {
            vf dx = (get(dout[r] + i, n) * w - mean_g[r] - xhat(r, i, n) * mean_gx[r]) * a.rstd[row + r];
            if (a.dh) dx += get(row_of<T>(a.dh, row + r, D) + i, n);
            put(row_of<T>(a.dx, row + r, D) + i, dx, n);
        }
    });
}

// Gradients of rows [begin, end); their sums for dweight and dbias go to `partial` (2, D).
template <class T, class P>
void backward_rows(const LayerNormBwdArgs& a, int64_t begin, int64_t end, float* partial) {
    std::fill(partial, partial + 2 * a.cols, 0.0f);
    for (; begin + kTile <= end; begin += kTile) backward_tile<T, P, kTile>(a, begin, partial, partial + a.cols);
    for (; begin < end; ++begin) backward_tile<T, P, 1>(a, begin, partial, partial + a.cols);
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
