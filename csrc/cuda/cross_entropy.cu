// Softmax cross-entropy of rows of logits on a GPU, and its gradient in their place. rows x cols, rows row_stride
// apart.
//
//   lse  = max + log(sum_j exp(l_j - max)),   p_j = exp(l_j - lse)
//   loss = lse - l_target + z_loss * lse^2
//   dl_j = dout * (p_j * (1 + 2 z_loss lse) - [j = target])
//
// A block a row. The first pass keeps a running maximum and a sum of exponentials that is rescaled when the maximum
// grows (online softmax, Milakov & Gimelshein 2018, arXiv 1805.02867); the second reads the row again, from the L2
// cache where the rows in flight fit into it, and writes dlogits. Nothing is read back to the host: a target out of
// range makes its row's loss and gradient NaN.
//
// The sums over all tokens, their count and their losses, are one block's work, since they are far below the matrix
// products around them: each thread adds every 1,024th in order, then a fixed tree, losses in double.
#include <algorithm>

#include "../cross_entropy.h"
#include "launch.cuh"
#include "ptx.cuh"
#include "reduce.cuh"
#include "vec.cuh"

namespace cgpt {
namespace {

using namespace cuda;

constexpr const char* kOp = "cross_entropy";
constexpr int kThreads = 512;  // most of a row's block
constexpr int kSumThreads = 1024;
constexpr float kLog2e = 1.4426950408889634f;

// The maximum to subtract: where it is -inf so is every value yet, whose exponentials are then 0 and not NaN.
__device__ __forceinline__ float base_of(float top) { return top == -INFINITY ? 0.0f : top; }
__device__ __forceinline__ float exp_above(float base, float x) { return exp2_approx((x - base) * kLog2e); }

template <class T>
__global__ void __launch_bounds__(kThreads, 3)
    cross_entropy_rows_kernel(const __grid_constant__ CrossEntropyArgs a, bool aligned) {
    float* scratch = shared_memory<float>();
    const int64_t row = blockIdx.x;
    T* logits = static_cast<T*>(a.logits) + row * a.row_stride;
    const int64_t target = a.target[row], stride = int64_t(blockDim.x) * kVec, first = threadIdx.x * kVec;
    auto left = [&](int64_t i) { return a.cols - i < kVec ? int(a.cols - i) : kVec; };
    if (target == a.ignore_index) {
        if (threadIdx.x == 0) a.loss[row] = 0.0f;
        if (a.dout)
            for (int64_t i = first; i < a.cols; i += stride) store_vec(logits + i, Vec<T>{}, left(i), aligned);
        return;
    }
    const bool inside = target >= 0 && target < a.cols;
    const float picked = inside ? widen(logits[target]) : NAN;

    float top = -INFINITY, base = 0.0f, sum = 0.0f;
    for (int64_t i = first; i < a.cols; i += stride) {
        const int n = left(i);
        const Vec<T> v = load_vec(logits + i, n, aligned);
        float x[kVec], largest = -INFINITY;
#pragma unroll
        for (int e = 0; e < kVec; ++e) x[e] = widen(v.at[e]);
        if (n < kVec)
#pragma unroll
            for (int e = 0; e < kVec; ++e)
                if (e >= n) x[e] = -INFINITY;
#pragma unroll
        for (int e = 0; e < kVec; ++e) largest = fmaxf(largest, x[e]);
        if (largest > top) {
            base = base_of(largest);
            sum *= exp_above(base, top);
            top = largest;
        }
#pragma unroll
        for (int e = 0; e < kVec; ++e) sum += exp_above(base, x[e]);
    }
    const float row_top = block_max(top, scratch);
    const float row_base = base_of(row_top);
    sum = block_sum(top == row_top ? sum : sum * exp_above(row_base, top), scratch + kWarp);
    const float log_sum = logf(sum), lse = row_top + log_sum;
    // row_top - l_target first: exact where the logits are large and close
    if (threadIdx.x == 0) a.loss[row] = (row_top - picked) + log_sum + a.z_loss * lse * lse;
    if (!a.dout) return;
    const float dout = inside ? a.dout[row] : NAN, z = 2.0f * a.z_loss * lse;
    const float factor = dout * (1.0f + z) / sum, p = exp_above(row_base, picked) / sum;
    const float at_target = dout * ((p - 1.0f) + z * p);
    for (int64_t i = first; i < a.cols; i += stride) {
        const int n = left(i);
        const Vec<T> v = load_vec(logits + i, n, aligned);
        float x[kVec];
#pragma unroll
        for (int e = 0; e < kVec; ++e) x[e] = exp_above(row_base, widen(v.at[e])) * factor;
        if (target >= i && target < i + kVec)
#pragma unroll
            for (int e = 0; e < kVec; ++e)
                if (target == i + e) x[e] = at_target;
        store_vec(logits + i, narrow_vec<T>(x), n, aligned);
    }
}

// Each thread's share of n items in a fixed order, then the threads' in a fixed tree; thread 0 has the whole.
template <class F>
__device__ __forceinline__ double sum_of(int64_t n, double* scratch, F&& item) {
    double sum = 0.0;
    for (int64_t i = threadIdx.x; i < n; i += kSumThreads) sum += item(i);
    scratch[threadIdx.x] = sum;
    __syncthreads();
    for (int half = kSumThreads / 2; half > 0; half /= 2) {
        if (int(threadIdx.x) < half) scratch[threadIdx.x] += scratch[threadIdx.x + half];
        __syncthreads();
    }
    return scratch[0];
}

// How many targets are not ignored; exact below 2^53.
__device__ __forceinline__ double count_of(const CrossEntropyMeanArgs& a, double* scratch) {
    return sum_of(a.rows, scratch, [&](int64_t i) { return a.target[i] == a.ignore_index ? 0.0 : 1.0; });
}

__global__ void __launch_bounds__(kSumThreads)
    cross_entropy_share_kernel(const __grid_constant__ CrossEntropyMeanArgs a) {
    const double count = count_of(a, shared_memory<double>());
    const float share = float(1.0 / (count > 1.0 ? count : 1.0));
    for (int64_t i = threadIdx.x; i < a.rows; i += kSumThreads) a.out[i] = share;
}

__global__ void __launch_bounds__(kSumThreads)
    cross_entropy_total_kernel(const __grid_constant__ CrossEntropyMeanArgs a) {
    double* scratch = shared_memory<double>();
    const double total = sum_of(a.rows, scratch, [&](int64_t i) { return double(a.losses[i]); });
    double count = 1.0;
    if (a.mean) {
        __syncthreads();
        count = count_of(a, scratch);
    }
    if (threadIdx.x == 0) *a.out = float(total / count);
}

template <class A, class O>
__global__ void __launch_bounds__(256)
    cross_entropy_add_kernel(const __grid_constant__ CrossEntropyAddArgs args, bool aligned) {
    const int64_t stride = int64_t(gridDim.x) * blockDim.x * kVec;
    for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * kVec; i < args.n; i += stride) {
        const int n = args.n - i < kVec ? int(args.n - i) : kVec;
        const Vec<A> a = load_vec(static_cast<const A*>(args.a) + i, n, aligned);
        const Vec<bf16> b = load_vec(static_cast<const bf16*>(args.b) + i, n, aligned);
        float out[kVec];
#pragma unroll
        for (int e = 0; e < kVec; ++e) out[e] = widen(a.at[e]) + widen(b.at[e]);
        store_vec(static_cast<O*>(args.out) + i, narrow_vec<O>(out), n, aligned);
    }
}

}  // namespace

void cross_entropy_rows_cuda(const CrossEntropyArgs& a, int device_id) {
    if (a.rows == 0) return;
    const DeviceGuard guard(kOp, device_id);
    const int64_t vectors = (a.cols + kVec - 1) / kVec, bytes = a.dtype == DType::f32 ? 4 : 2;
    const unsigned threads = static_cast<unsigned>(std::min<int64_t>((vectors + kWarp - 1) / kWarp * kWarp, kThreads));
    const bool aligned = aligned16(a.logits) && (a.rows == 1 || a.row_stride * bytes % 16 == 0);
    launch(kOp, a.dtype == DType::bf16 ? cross_entropy_rows_kernel<bf16> : cross_entropy_rows_kernel<float>,
           dim3(static_cast<unsigned>(a.rows)), dim3(threads), 2 * kWarp * sizeof(float), current_stream(device_id), a,
           aligned);
}

void cross_entropy_mean_cuda(const CrossEntropyMeanArgs& a, int device_id) {
    const DeviceGuard guard(kOp, device_id);
    launch(kOp, a.losses ? cross_entropy_total_kernel : cross_entropy_share_kernel, dim3(1), dim3(kSumThreads),
           kSumThreads * sizeof(double), current_stream(device_id), a);
}

void cross_entropy_add_cuda(const CrossEntropyAddArgs& a, int device_id) {
    if (a.n == 0) return;
    const DeviceGuard guard(kOp, device_id);
    const bool aligned = aligned16(a.a) && aligned16(a.b) && aligned16(a.out);
    const int64_t blocks = (a.n + 256 * kVec - 1) / (256 * kVec);
    const dim3 grid(static_cast<unsigned>(std::min<int64_t>(blocks, INT32_MAX)));
    auto run = [&](auto kernel) { launch(kOp, kernel, grid, dim3(256), 0, current_stream(device_id), a, aligned); };
    if (a.a_dtype == DType::bf16)
        run(a.out_dtype == DType::bf16 ? cross_entropy_add_kernel<bf16, bf16> : cross_entropy_add_kernel<bf16, float>);
    else
        run(a.out_dtype == DType::bf16 ? cross_entropy_add_kernel<float, bf16>
                                       : cross_entropy_add_kernel<float, float>);
}

}  // namespace cgpt
