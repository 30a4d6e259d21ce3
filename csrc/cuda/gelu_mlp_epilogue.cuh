// What gelu_mlp does with the rows of a product while they are on chip (gemm.cuh calls it), and the sum over rows that
// ends a bias gradient.
//
//   product    out = acc + bias
//   forward    pre = acc + bias, act = f(pre)                       SwiGLU: act = silu(gate) * up
//   backward   dpre = acc f'(pre), act = f(pre), partials = sums over 32 rows of dpre
//
// A lane has four neighbouring columns: a warp's loads and stores are whole lines of 64 or 128 bytes, and the sum of a
// column is a sum in registers, the same way every time. Which of the three it is, and which f, are branches that a
// whole launch takes alike: one kernel serves all, at a seventh of the kernels to compile.
#pragma once

#include "activation.cuh"
#include "gemm.cuh"

namespace cgpt::cuda {

enum class GemmWork : uint8_t { product, forward, backward };

struct Quad {
    float at[4];
};

template <class T>
__device__ __forceinline__ Quad load_quad(const T* p) {
    const uint2 bits = *reinterpret_cast<const uint2*>(p);
    return {widen(T{uint16_t(bits.x)}), widen(T{uint16_t(bits.x >> 16)}), widen(T{uint16_t(bits.y)}),
            widen(T{uint16_t(bits.y >> 16)})};
}
template <class T>
__device__ __forceinline__ void store_quad(T* p, const Quad& x) {
    *reinterpret_cast<uint2*>(p) = make_uint2(pack<T>(x.at[0], x.at[1]), pack<T>(x.at[2], x.at[3]));
}
template <>
__device__ __forceinline__ Quad load_quad(const float* p) {
    const float4 x = *reinterpret_cast<const float4*>(p);
    return {x.x, x.y, x.z, x.w};
}
__device__ __forceinline__ void store_sums(float* p, const Quad& x) {
    *reinterpret_cast<float4*>(p) = make_float4(x.at[0], x.at[1], x.at[2], x.at[3]);
}

template <class T>
struct GeluMlpEpilogue {
    GemmWork work;
    Activation activation;
    const T *bias, *pre_in;
    T *out, *act, *dpre;  // out: the product, or pre
    float* partials;
    int64_t m, n;  // n: columns of out in a product, of act otherwise

    // Of this lane: its columns begin at `col`, and the sums so far of the columns of dpre.
    int64_t col;
    int lane, staged_col;  // staged_col: where the columns are in the staging area
    bool inside;
    Quad bias0, bias1, sum0, sum1;

    __device__ __forceinline__ bool paired() const {
        return work == GemmWork::forward && activation == Activation::swiglu;
    }

    template <int kWarpN>
    __device__ __forceinline__ void begin(int64_t first_col, int lane_) {
        lane = lane_;
        staged_col = lane % (kWarpN / (paired() ? 8 : 4)) * 4;
        col = first_col + staged_col;
        inside = col < n;
        bias0 = bias1 = sum0 = sum1 = {};
        if (work == GemmWork::backward || bias == nullptr || !inside) return;
        bias0 = load_quad(bias + col);
        if (paired()) bias1 = load_quad(bias + n + col);
    }

    template <int kWarpN>
    __device__ __forceinline__ void rows16(const float* staging, int pitch, int64_t row0) {
        if (work == GemmWork::product)
            each_row<kWarpN / 4>(row0, [&](int r, int64_t row) { product(staging + r * pitch, row); });
        else if (work == GemmWork::forward)
            with_activation(activation, [&](auto f) {
                constexpr Activation kF = decltype(f)::value;
                each_row<kWarpN / (kF == Activation::swiglu ? 8 : 4)>(
                    row0, [&](int r, int64_t row) { forward<kF, kWarpN>(staging + r * pitch, row); });
            });
        else
            with_activation(activation, [&](auto f) {
                constexpr Activation kF = decltype(f)::value;
                each_row<kWarpN / 4>(row0, [&](int r, int64_t row) { backward<kF>(staging + r * pitch, row); });
                if (partials != nullptr && row0 % kPartialRows != 0) finish_sums<kF, kWarpN / 4>(row0);
            });
    }

  private:
    // kQuads lanes a row. Four lanes a row: neighbouring groups take rows two apart, so that the eight lanes that read
    // staging at once are in different banks.
    template <int kQuads, class F>
    __device__ __forceinline__ void each_row(int64_t row0, F&& f) {
        const int group = lane / kQuads;
        const int first = kQuads == 4 ? group % 2 * 2 + group / 2 % 2 + group / 4 * 4 : group;
#pragma unroll 2
        for (int r = first; r < 16; r += kWarp / kQuads)
            if (inside && row0 + r < m) f(r, row0 + r);
    }

    __device__ __forceinline__ void product(const float* staged, int64_t row) {
        Quad x = load_quad(staged + staged_col);
#pragma unroll
        for (int k = 0; k < 4; ++k) x.at[k] += bias0.at[k];
        store_quad(out + row * n + col, x);
    }

    template <Activation kActivation, int kWarpN>
    __device__ __forceinline__ void forward(const float* staged, int64_t row) {
        Quad x = load_quad(staged + staged_col), y;
#pragma unroll
        for (int k = 0; k < 4; ++k) x.at[k] += bias0.at[k];
        if constexpr (kActivation == Activation::swiglu) {
            Quad up = load_quad(staged + staged_col + kWarpN / 2);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                up.at[k] += bias1.at[k];
                y.at[k] = x.at[k] * silu(x.at[k]).share * up.at[k];
            }
            if (out != nullptr) {
                store_quad(out + row * 2 * n + col, x);
                store_quad(out + row * 2 * n + n + col, up);
            }
        } else {
#pragma unroll
            for (int k = 0; k < 4; ++k) y.at[k] = x.at[k] * activate<kActivation>(x.at[k]).share;
            if (out != nullptr) store_quad(out + row * n + col, x);
        }
        store_quad(act + row * n + col, y);
    }

    template <Activation kActivation>
    __device__ __forceinline__ void backward(const float* staged, int64_t row) {
        const Quad dact = load_quad(staged + staged_col);
        Quad y, d;
        if constexpr (kActivation == Activation::swiglu) {
            const Quad gate = load_quad(pre_in + row * 2 * n + col), up = load_quad(pre_in + row * 2 * n + n + col);
            Quad dup;
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const Activated f = silu(gate.at[k]);
                const float s = gate.at[k] * f.share;
                y.at[k] = s * up.at[k];
                d.at[k] = dact.at[k] * up.at[k] * f.slope;
                dup.at[k] = dact.at[k] * s;
                sum1.at[k] += dup.at[k];
            }
            store_quad(dpre + row * 2 * n + col, d);
            store_quad(dpre + row * 2 * n + n + col, dup);
        } else {
            const Quad z = load_quad(pre_in + row * n + col);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const Activated f = activate<kActivation>(z.at[k]);
                y.at[k] = z.at[k] * f.share;
                d.at[k] = dact.at[k] * f.slope;
            }
            store_quad(dpre + row * n + col, d);
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) sum0.at[k] += d.at[k];
        if (act != nullptr) store_quad(act + row * n + col, y);
    }

    // Adds up the lanes that share columns and stores the sums of the 32 rows that end here.
    template <Activation kActivation, int kQuads>
    __device__ __forceinline__ void finish_sums(int64_t row0) {
        constexpr bool swiglu = kActivation == Activation::swiglu;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
#pragma unroll
            for (int lanes = kQuads; lanes < kWarp; lanes *= 2) {
                sum0.at[k] += __shfl_xor_sync(0xffffffffu, sum0.at[k], lanes);
                if constexpr (swiglu) sum1.at[k] += __shfl_xor_sync(0xffffffffu, sum1.at[k], lanes);
            }
        }
        const int64_t first = row0 / kPartialRows * kPartialRows;
        if (inside && first < m && lane < kQuads) {
            float* to = partials + first / kPartialRows * n * (swiglu ? 2 : 1) + col;
            store_sums(to, sum0);
            if constexpr (swiglu) store_sums(to + n, sum1);
        }
        sum0 = sum1 = {};
    }
};

}  // namespace cgpt::cuda
