// What stands between torch's matrix products on a GPU: the activation, its backward pass with the bias gradient,
// and a bias gradient alone, in bf16, fp16 and fp32. csrc/cpu/gelu_mlp.cpp states the formulas.
//
//   pre (rows, F), or (rows, 2 F) for SwiGLU; act, dact (rows, F); dpre like pre
//
// A thread has eight neighbouring columns: of one row after another in steps of the grid (forward), or of the 32 rows
// whose sum it keeps in registers (backward), with the next row loaded before the present one is written.
#include <algorithm>

#include "activation.cuh"
#include "launch.cuh"
#include "reduce.cuh"
#include "sum_rows.cuh"
#include "vec.cuh"

namespace cgpt {
namespace {

using namespace cuda;

constexpr const char* kOp = "gelu_mlp";
constexpr int kThreads = 128;

template <class T, Activation kActivation>
__global__ void __launch_bounds__(kThreads) gelu_mlp_fwd_kernel(GeluMlpFwdArgs a, bool aligned) {
    constexpr bool swiglu = kActivation == Activation::swiglu;
    const int64_t col = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kVec;
    if (col >= a.cols) return;
    const int n = int(min(int64_t(kVec), a.cols - col));
    const int64_t width = swiglu ? 2 * a.cols : a.cols;
    for (int64_t row = blockIdx.y; row < a.rows; row += gridDim.y) {
        const T* pre = static_cast<const T*>(a.pre) + row * width + col;
        const Vec<T> x = load_vec(pre, n, aligned);
        Vec<T> up = {}, act;
        if constexpr (swiglu) up = load_vec(pre + a.cols, n, aligned);
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
            const float z = widen(x.at[k]);
            float y = z * activate<kActivation>(z).share;
            if constexpr (swiglu) y *= widen(up.at[k]);
            act.at[k] = narrow<T>(y);
        }
        store_vec(static_cast<T*>(a.act) + row * a.cols + col, act, n, aligned);
    }
}

template <class T>
struct BackwardRow {
    Vec<T> pre, up, dact;
};

template <class T, Activation kActivation>
__global__ void __launch_bounds__(kThreads) gelu_mlp_bwd_kernel(GeluMlpBwdArgs a, bool aligned) {
    constexpr bool swiglu = kActivation == Activation::swiglu;
    const int64_t col = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kVec;
    if (col >= a.cols) return;
    const int n = int(min(int64_t(kVec), a.cols - col));
    const int64_t width = swiglu ? 2 * a.cols : a.cols;
    Vec<float> sum = {}, sum_up = {};

    auto load_row = [&](int64_t row) {
        const T* pre = static_cast<const T*>(a.pre) + row * width + col;
        BackwardRow<T> x = {
            load_vec(pre, n, aligned), {}, load_vec(static_cast<const T*>(a.dact) + row * a.cols + col, n, aligned)};
        if constexpr (swiglu) x.up = load_vec(pre + a.cols, n, aligned);
        return x;
    };
    for (int64_t part = blockIdx.y; part * kPartialRows < a.rows; part += gridDim.y) {
        const int64_t begin = part * kPartialRows, end = min(a.rows, begin + kPartialRows);
        BackwardRow<T> next = load_row(begin);
        for (int64_t row = begin; row < end; ++row) {
            const BackwardRow<T> x = next;
            if (row + 1 < end) next = load_row(row + 1);  // dpre may be dact, but of another row
            Vec<T> act, dpre, dup = {};
#pragma unroll
            for (int k = 0; k < kVec; ++k) {
                const float z = widen(x.pre.at[k]);
                const Activated f = activate<kActivation>(z);
                float y = z * f.share, d = widen(x.dact.at[k]) * f.slope;
                if constexpr (swiglu) {
                    const float up = widen(x.up.at[k]), d_up = widen(x.dact.at[k]) * y;
                    y *= up;
                    d *= up;
                    sum_up.at[k] += d_up;
                    dup.at[k] = narrow<T>(d_up);
                }
                sum.at[k] += d;
                act.at[k] = narrow<T>(y);
                dpre.at[k] = narrow<T>(d);
            }
            store_vec(static_cast<T*>(a.act) + row * a.cols + col, act, n, aligned);
            T* to = static_cast<T*>(a.dpre) + row * width + col;
            store_vec(to, dpre, n, aligned);
            if constexpr (swiglu) store_vec(to + a.cols, dup, n, aligned);
        }
        if (a.dbias != nullptr) {
            float* to = a.partials + part * width + col;
            store_vec(to, sum, n, aligned);
            if constexpr (swiglu) store_vec(to + a.cols, sum_up, n, aligned);
        }
        sum = sum_up = {};
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads) gelu_mlp_bias_grad_kernel(GeluMlpBiasGradArgs a, bool aligned) {
    const int64_t col = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kVec;
    if (col >= a.cols) return;
    const int n = int(min(int64_t(kVec), a.cols - col));
    for (int64_t part = blockIdx.y; part * kPartialRows < a.rows; part += gridDim.y) {
        const int64_t end = min(a.rows, (part + 1) * kPartialRows);
        Vec<float> sum = {};
#pragma unroll 4
        for (int64_t row = part * kPartialRows; row < end; ++row) {
            const Vec<T> x = load_vec(static_cast<const T*>(a.dout) + row * a.cols + col, n, aligned);
#pragma unroll
            for (int k = 0; k < kVec; ++k) sum.at[k] += widen(x.at[k]);
        }
        store_vec(a.partials + part * a.cols + col, sum, n, aligned);
    }
}

// Columns of eight by blocks of rows; more rows than a grid is high are walked over.
dim3 grid_of(int64_t rows, int64_t cols) {
    const int64_t across = (cols + int64_t(kThreads) * kVec - 1) / (int64_t(kThreads) * kVec);
    return dim3(static_cast<unsigned>(across), static_cast<unsigned>(std::min<int64_t>(rows, 65535)));
}

int64_t parts(int64_t rows) { return (rows + kPartialRows - 1) / kPartialRows; }

// Whether rows of `cols` values, and the parts of such rows, begin at 16-byte boundaries.
bool all_aligned(int64_t cols, std::initializer_list<const void*> pointers) {
    return cols % kVec == 0 &&
           std::all_of(pointers.begin(), pointers.end(), [](const void* p) { return aligned16(p); });
}

template <class F>
void with_kinds(DType dtype, Activation activation, F&& f) {
    with_type(dtype, [&](auto type) {
        if (activation == Activation::gelu)
            f(type, std::integral_constant<Activation, Activation::gelu>{});
        else if (activation == Activation::gelu_tanh)
            f(type, std::integral_constant<Activation, Activation::gelu_tanh>{});
        else
            f(type, std::integral_constant<Activation, Activation::swiglu>{});
    });
}

}  // namespace

void gelu_mlp_fwd_cuda(const GeluMlpFwdArgs& a, int device_id) {
    if (a.rows == 0) return;
    const DeviceGuard guard(kOp, device_id);
    const bool aligned = all_aligned(a.cols, {a.pre, a.act});
    with_kinds(a.dtype, a.activation, [&](auto type, auto activation) {
        launch(kOp, gelu_mlp_fwd_kernel<decltype(type), decltype(activation)::value>, grid_of(a.rows, a.cols),
               dim3(kThreads), 0, current_stream(device_id), a, aligned);
    });
}

void gelu_mlp_bwd_cuda(const GeluMlpBwdArgs& a, int device_id) {
    const DeviceGuard guard(kOp, device_id);
    const bool aligned = all_aligned(a.cols, {a.pre, a.dact, a.act, a.dpre, a.partials});
    if (a.rows != 0)
        with_kinds(a.dtype, a.activation, [&](auto type, auto activation) {
            launch(kOp, gelu_mlp_bwd_kernel<decltype(type), decltype(activation)::value>,
                   grid_of(parts(a.rows), a.cols), dim3(kThreads), 0, current_stream(device_id), a, aligned);
        });
    if (a.dbias == nullptr) return;
    const int64_t cols = a.activation == Activation::swiglu ? 2 * a.cols : a.cols;
    sum_rows(kOp, a.partials, parts(a.rows), cols, a.dbias, a.dtype, device_id);
}

void gelu_mlp_bias_grad_cuda(const GeluMlpBiasGradArgs& a, int device_id) {
    const DeviceGuard guard(kOp, device_id);
    const bool aligned = all_aligned(a.cols, {a.dout, a.partials});
    if (a.rows != 0)
        with_type(a.dtype, [&](auto type) {
            launch(kOp, gelu_mlp_bias_grad_kernel<decltype(type)>, grid_of(parts(a.rows), a.cols), dim3(kThreads), 0,
                   current_stream(device_id), a, aligned);
        });
    sum_rows(kOp, a.partials, parts(a.rows), a.cols, a.dbias, a.dtype, device_id);
}

}  // namespace cgpt
