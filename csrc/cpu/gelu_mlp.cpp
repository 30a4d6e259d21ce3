// GELU or SwiGLU between two matrix products, forward and backward (Hendrycks & Gimpel 2016,
// arXiv 1606.08415; Shazeer 2020, arXiv 2002.05202).
//
//   act = z Phi(z)                                                  "gelu"
//   act = z s,  s = (1 + tanh(c z (1 + a z^2))) / 2                 "gelu_tanh", c = sqrt(2 / pi), a = 0.044715
//
//   dpre = dact * act'(z);  act' = Phi(z) + z phi(z)  or  s + z s (1 - s) 2 c (1 + 3 a z^2)
//   dbias = sum over rows of dpre,  each term before it is rounded
//
// "swiglu": z is a gate g and an up projection u side by side, act = silu(g) u with silu(g) = g s(g), s(g) = 1 / (1 +
// e^-g);
//   dg = dact u silu'(g),  du = dact silu(g),  silu' = s + g s (1 - s)
//
// z is pre, the product with its bias added before it is rounded: what the two cancel is not lost. Column sums are
// taken per block of rows, then over the blocks in order: the blocks depend on the shape alone, so the bits do not
// depend on the thread count.
#include "../gelu_mlp.h"

#include <algorithm>
#include <memory>

#include "math.h"
#include "matmul.h"
#include "threads.h"
#include "vec.h"

namespace cgpt::CGPT_ISA {
namespace {

struct Activated {
    vf share, slope;  // f(z) = z * share, slope = f'(z)
};

template <Activation kActivation>
CGPT_INLINE Activated activate(vf z) {
    if constexpr (kActivation == Activation::gelu_tanh) {
        // Beyond 16 the share is 0 or 1 and the slope's second term 0; clamped, z^2 cannot overflow against that 0.
        const vf near = max(min(z, splat(16.0f)), splat(-16.0f));
        const vf square = near * near;
        const Logistic s = logistic(near * madd(square, splat(0x1.2444f2p-4f), splat(0x1.988454p+0f)));
        const vf inner = madd(square, splat(0x1.b6676cp-3f), splat(0x1.988454p+0f));
        return {s.value, madd(z * s.slope, inner, s.value)};
    } else if constexpr (kActivation == Activation::swiglu) {
        const Logistic s = logistic(z);
        return {s.value, madd(z, s.slope, s.value)};
    } else {
        const Normal n = normal(z);
        return {n.cdf, madd(z, n.pdf, n.cdf)};
    }
}

template <class T, Activation kActivation>
void forward_rows(const GeluMlpFwdArgs& a, int64_t begin, int64_t end) {
    constexpr bool swiglu = kActivation == Activation::swiglu;
    const int64_t width = swiglu ? 2 * a.cols : a.cols;
    for (int64_t r = begin; r < end; ++r) {
        const T* pre = static_cast<const T*>(a.pre) + r * width;
        T* act = static_cast<T*>(a.act) + r * a.cols;
        for_lanes(a.cols, [&](int64_t i, auto n) {
            const vf z = get(pre + i, n);
            vf y = z * activate<kActivation>(z).share;
            if constexpr (swiglu) y *= get(pre + a.cols + i, n);
            put(act + i, y, n);
        });
    }
}

// Rows [begin, end); their sum of dpre goes to `partial`, as wide as dpre.
template <class T, Activation kActivation>
void backward_rows(const GeluMlpBwdArgs& a, int64_t begin, int64_t end, float* partial) {
    constexpr bool swiglu = kActivation == Activation::swiglu;
    const int64_t width = swiglu ? 2 * a.cols : a.cols;
    std::fill(partial, partial + width, 0.0f);
    for (int64_t r = begin; r < end; ++r) {
        const T* pre = static_cast<const T*>(a.pre) + r * width;
        const T* dact = static_cast<const T*>(a.dact) + r * a.cols;
        T* act = static_cast<T*>(a.act) + r * a.cols;
        T* dpre = static_cast<T*>(a.dpre) + r * width;
        for_lanes(a.cols, [&](int64_t i, auto n) {
            const vf z = get(pre + i, n), g = get(dact + i, n);
            const Activated f = activate<kActivation>(z);
            vf y = z * f.share, d = g * f.slope;
            if constexpr (swiglu) {
                const int64_t j = a.cols + i;
                const vf up = get(pre + j, n), d_up = g * y;
                y *= up;
                d *= up;
                put(dpre + j, d_up, n);
                put(partial + j, get(partial + j, n) + d_up, n);
            }
            put(act + i, y, n);
            put(dpre + i, d, n);
            put(partial + i, get(partial + i, n) + d, n);
        });
    }
}

// Calls f with the activation as a constant.
template <class F>
void with_activation(Activation activation, F&& f) {
    if (activation == Activation::gelu)
        f(std::integral_constant<Activation, Activation::gelu>{});
    else if (activation == Activation::gelu_tanh)
        f(std::integral_constant<Activation, Activation::gelu_tanh>{});
    else
        f(std::integral_constant<Activation, Activation::swiglu>{});
}

// The sum of `blocks` partial sums, in order, to `out` (cols,).
template <class T>
void add_blocks(const float* partials, int64_t blocks, int64_t cols, T* out) {
    for_lanes(cols, [&](int64_t i, auto n) {
        vf sum{};
        for (int64_t b = 0; b < blocks; ++b) sum += get(partials + b * cols + i, n);
        put(out + i, sum, n);
    });
}

// Calls sum_rows(begin, end, partial) for every block of rows and writes the sum of the partials to `out` (cols,).
template <class T, class F>
void sum_blocks(int64_t rows, int64_t cols, T* out, const F& sum_rows) {
    const int64_t grain = std::max<int64_t>(16, (rows + 63) / 64);
    const int64_t blocks = (rows + grain - 1) / grain;
    const std::unique_ptr<float[]> partials(new float[blocks * cols]);
    parallel_for(blocks,
                 [&](int64_t b) { sum_rows(b * grain, std::min(rows, (b + 1) * grain), partials.get() + b * cols); });
    if (out) add_blocks(partials.get(), blocks, cols, out);
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

// One tile of x w1^T to pre and act.
template <class T, Activation kActivation>
void forward_tile(const GeluMlpLinearFwdArgs& a, const float* tile, int64_t ld, int64_t row, int64_t column,
                  int64_t rows, int64_t columns) {
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = (row + r) * a.n + column;
        for_lanes(columns, [&](int64_t c, auto n) {
            vf z = get(tile + r * ld + c, n);
            if (a.b1) z += get(static_cast<const T*>(a.b1) + column + c, n);
            if (a.pre) put(static_cast<T*>(a.pre) + at + c, z, n);
            put(static_cast<T*>(a.act) + at + c, z * activate<kActivation>(z).share, n);
        });
    }
}

// One tile of dout w2 to dpre and act, and dpre's sum over these rows onto `partial` (n,), if there is one.
template <class T, Activation kActivation>
void backward_tile(const GeluMlpLinearBwdArgs& a, const float* tile, int64_t ld, int64_t row, int64_t column,
                   int64_t rows, int64_t columns, float* partial) {
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = (row + r) * a.n + column;
        for_lanes(columns, [&](int64_t c, auto n) {
            const vf z = get(static_cast<const T*>(a.pre) + at + c, n);
            const Activated f = activate<kActivation>(z);
            const vf d = get(tile + r * ld + c, n) * f.slope;
            if (a.act) put(static_cast<T*>(a.act) + at + c, z * f.share, n);
            put(static_cast<T*>(a.dpre) + at + c, d, n);
            if (partial) put(partial + column + c, get(partial + column + c, n) + d, n);
        });
    }
}

}  // namespace

void gelu_mlp_fwd(const GeluMlpFwdArgs& a) {
    const int64_t grain = std::max<int64_t>(1, 65536 / a.cols);
    CGPT_WITH_FLOAT_TYPE(a.dtype, T, {
        with_activation(a.activation, [&](auto f) {
            parallel_ranges(a.rows, grain,
                            [&](int64_t begin, int64_t end) { forward_rows<T, decltype(f)::value>(a, begin, end); });
        });
    })
}

void gelu_mlp_bwd(const GeluMlpBwdArgs& a) {
    const int64_t width = a.activation == Activation::swiglu ? 2 * a.cols : a.cols;
    CGPT_WITH_FLOAT_TYPE(a.dtype, T, {
        with_activation(a.activation, [&](auto f) {
            sum_blocks(a.rows, width, static_cast<T*>(a.dbias), [&](int64_t begin, int64_t end, float* partial) {
                backward_rows<T, decltype(f)::value>(a, begin, end, partial);
            });
        });
    })
}

void gelu_mlp_bias_grad(const GeluMlpBiasGradArgs& a) {
    CGPT_WITH_FLOAT_TYPE(a.dtype, T, { bias_grad<T>(a); })
}

void gelu_mlp_linear_fwd(const GeluMlpLinearFwdArgs& a) {
    CGPT_WITH_FLOAT_TYPE(a.dtype, T, {
        const auto tile = a.activation == Activation::gelu ? forward_tile<T, Activation::gelu>
                                                           : forward_tile<T, Activation::gelu_tanh>;
        matmul(
            lines_of<T>(a.x), lines_of<T>(a.w1), a.m, a.n, a.k, [&](auto... at) { tile(a, at...); },
            [&](auto... at) {
                if (a.pre) fetch<1>(static_cast<T*>(a.pre), a.n, at...);
                fetch<1>(static_cast<T*>(a.act), a.n, at...);
            });
    })
}

void gelu_mlp_linear_bwd(const GeluMlpLinearBwdArgs& a) {
    CGPT_WITH_FLOAT_TYPE(a.dtype, T, {
        const auto tile = a.activation == Activation::gelu ? backward_tile<T, Activation::gelu>
                                                           : backward_tile<T, Activation::gelu_tanh>;
        const int64_t height = block_rows<T>(a.m, a.k), blocks = (a.m + height - 1) / height;
        const std::unique_ptr<float[]> partials(a.db1 ? new float[blocks * a.n]() : nullptr);
        const Lines<T> w2 = lines_of<T>(a.w2);  // (k, n), where the product wants (n, k)
        matmul(
            lines_of<T>(a.dout), Lines<T>{w2.data, w2.stride, !w2.along}, a.m, a.n, a.k,
            [&](const float* x, int64_t ld, int64_t row, int64_t column, int64_t rows, int64_t columns) {
                float* partial = a.db1 ? partials.get() + row / height * a.n : nullptr;
                tile(a, x, ld, row, column, rows, columns, partial);
            },
            [&](auto... at) {
                fetch<0>(static_cast<const T*>(a.pre), a.n, at...);
                fetch<1>(static_cast<T*>(a.dpre), a.n, at...);
                if (a.act) fetch<1>(static_cast<T*>(a.act), a.n, at...);
            });
        if (a.db1) add_blocks(partials.get(), blocks, a.n, static_cast<T*>(a.db1));
    })
}

}  // namespace cgpt::CGPT_ISA
