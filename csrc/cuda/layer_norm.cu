// LayerNorm over the last dimension on a GPU, with an optional residual add in front. rows x cols, rows contiguous.
//
//   h = x + residual            rounded to the working dtype: what the next block reads
//   y = (h - mean) * rstd * weight + bias,   rstd = 1 / sqrt(var + eps)
//
//   xhat = (h - mean) * rstd,  g = dout * weight
//   dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dh
//   dweight = sum over rows of dout * xhat,  dbias = sum over rows of dout
//
// A row belongs to a team, which holds it in registers between its passes, so memory is read once: a warp up to 1,024
// columns, a block above. The backward pass is persistent: as many blocks as run at once walk the rows, each thread
// keeps the sums of its own columns in registers, and a second kernel adds the blocks' sums up in a fixed order (two
// stages, no atomics). Past 8,192 columns those sums no longer fit the registers: dx then has a kernel of its own, and
// the sums another that reads dout and h a second time.
#include <algorithm>

#include "../layer_norm.h"
#include "launch.cuh"
#include "ptx.cuh"
#include "reduce.cuh"
#include "vec.cuh"

namespace cgpt {
namespace {

using namespace cuda;

constexpr const char* kOp = "layer_norm";
constexpr int kFwdVecs = 4;            // vectors of a row that a thread holds
constexpr int kFwdThreads = 384;       // most of a forward block: 12,288 columns are read once, the rest again from L2
constexpr int kWarpCols = 1024;        // up to here a row is a warp's
constexpr int kWarpRows = 4;           // rows, and warps, of a block then
constexpr int kBwdThreads = 256;       // most of a backward block
constexpr int kFusedCols = 8192;       // past these the sums over the rows are a kernel of their own
constexpr int kStripRows = 8;          // warps of that kernel's blocks, each of which takes a row
constexpr int kStripCols = 8 * kWarp;  // and this many of its columns
constexpr int kStripBlocks = 32;       // blocks that share a strip's rows

// Sums N numbers over a team: a warp, or where blockDim.x is more than one warp the block. Every thread gets the sums.
// scratch: N * 32 floats of shared memory, free again after the block's next barrier.
template <int N>
__device__ __forceinline__ void team_sum(float (&x)[N], float* scratch) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = warp_sum(x[i]);
    if (blockDim.x == kWarp) return;
    const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    if (lane == 0)
        for (int i = 0; i < N; ++i) scratch[i * kWarp + warp] = x[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = warp_sum(lane < warps ? scratch[i * kWarp + lane] : 0.0f);
}

__device__ __forceinline__ int left(int cols, int i) { return cols - i < kVec ? cols - i : kVec; }

template <class T, class P>
__global__ void __launch_bounds__(kFwdThreads)
    layer_norm_fwd_kernel(const __grid_constant__ LayerNormFwdArgs a, bool aligned) {
    float* scratch = shared_memory<float>();
    const int cols = int(a.cols), stride = blockDim.x * kVec, first = threadIdx.x * kVec;
    for (int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; row < a.rows;
         row += int64_t(gridDim.x) * blockDim.y) {
        const T* x = static_cast<const T*>(a.x) + row * a.cols;
        const T* residual = a.residual ? static_cast<const T*>(a.residual) + row * a.cols : nullptr;
        T* sums = residual ? static_cast<T*>(a.h) + row * a.cols : nullptr;
        const T* source = residual ? sums : x;
        auto load = [&](int i) {
            const int n = left(cols, i);
            Vec<T> v = load_vec(x + i, n, aligned);
            if (residual) {  // what is stored is what gets normalised: the backward pass sees only that
                const Vec<T> r = load_vec(residual + i, n, aligned);
                float sum[kVec];
#pragma unroll
                for (int e = 0; e < kVec; ++e) sum[e] = widen(v.at[e]) + widen(r.at[e]);
                v = narrow_vec<T>(sum);
                store_vec(sums + i, v, n, aligned);
            }
            return v;
        };
        Vec<T> kept[kFwdVecs];
        // f(vector, column) for each of the thread's vectors; those past the kept ones are read again.
        auto each = [&](auto&& f) {
#pragma unroll
            for (int k = 0; k < kFwdVecs; ++k)
                if (first + k * stride < cols) f(kept[k], first + k * stride);
            for (int i = first + kFwdVecs * stride; i < cols; i += stride) {
                Vec<T> again = load_vec(source + i, left(cols, i), aligned);
                f(again, i);
            }
        };

        float sum[1] = {0.0f}, squares[1] = {0.0f};
#pragma unroll
        for (int k = 0; k < kFwdVecs; ++k)
            if (first + k * stride < cols) kept[k] = load(first + k * stride);
#pragma unroll
        for (int k = 0; k < kFwdVecs; ++k)
            if (first + k * stride < cols)
#pragma unroll
                for (int e = 0; e < kVec; ++e) sum[0] += widen(kept[k].at[e]);
        for (int i = first + kFwdVecs * stride; i < cols; i += stride) {
            const Vec<T> v = load(i);
#pragma unroll
            for (int e = 0; e < kVec; ++e) sum[0] += widen(v.at[e]);
        }
        team_sum(sum, scratch);
        const float mean = sum[0] / float(cols);
        each([&](Vec<T>& v, int i) {
            recompute(v);
            const int n = left(cols, i);
#pragma unroll
            for (int e = 0; e < kVec; ++e) {
                const float centred = e < n ? widen(v.at[e]) - mean : 0.0f;
                squares[0] = fmaf(centred, centred, squares[0]);
            }
        });
        team_sum(squares, scratch + kWarp);
        const float rstd = 1.0f / sqrtf(squares[0] / float(cols) + a.eps);
        if (a.mean && threadIdx.x == 0) {
            a.mean[row] = mean;
            a.rstd[row] = rstd;
        }
        T* y = static_cast<T*>(a.y) + row * a.cols;
        each([&](Vec<T>& v, int i) {
            recompute(v);
            const int n = left(cols, i);
            const Vec<P> weight = load_vec(static_cast<const P*>(a.weight) + i, n, aligned);
            Vec<P> bias = {};
            if (a.bias) bias = load_vec(static_cast<const P*>(a.bias) + i, n, aligned);
            float out[kVec];
#pragma unroll
            for (int e = 0; e < kVec; ++e)
                out[e] = fmaf((widen(v.at[e]) - mean) * rstd, widen(weight.at[e]), widen(bias.at[e]));
            store_vec(y + i, narrow_vec<T>(out), n, aligned);
        });
    }
}

// dx of eight columns.
template <class T, class P>
__device__ __forceinline__ void write_dx(const LayerNormBwdArgs& a, int64_t at, int i, int n, const Vec<T>& h,
                                         const Vec<T>& dout, float mean, float rstd, float mean_g, float mean_gx,
                                         bool aligned) {
    const Vec<P> weight = load_vec(static_cast<const P*>(a.weight) + i, n, aligned);
    Vec<T> dh = {};
    if (a.dh) dh = load_vec(static_cast<const T*>(a.dh) + at, n, aligned);
    const float slope = rstd * mean_gx;
    float dx[kVec];
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
        const float g = widen(dout.at[e]) * widen(weight.at[e]);
        dx[e] = fmaf(fmaf(mean - widen(h.at[e]), slope, g - mean_g), rstd, widen(dh.at[e]));
    }
    store_vec(static_cast<T*>(a.dx) + at, narrow_vec<T>(dx), n, aligned);
}

// Adds eight columns' share to the row's sums of g and of g * xhat.
template <class T, class P>
__device__ __forceinline__ void add_row_sums(const LayerNormBwdArgs& a, int i, int n, const Vec<T>& h,
                                             const Vec<T>& dout, float mean, float rstd, float (&sums)[2],
                                             bool aligned) {
    const Vec<P> weight = load_vec(static_cast<const P*>(a.weight) + i, n, aligned);
#pragma unroll
    for (int e = 0; e < kVec; ++e) {  // beyond the row's end dout is 0, and every term with it
        const float g = widen(dout.at[e]) * widen(weight.at[e]);
        sums[0] += g;
        sums[1] = fmaf(g, (widen(h.at[e]) - mean) * rstd, sums[1]);
    }
}

// Eight columns' sums over rows.
struct ColumnSums {
    Vec<float> dweight, dbias;
    template <class T>
    __device__ __forceinline__ void add(const Vec<T>& h, const Vec<T>& dout, float mean, float rstd) {
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
            const float d = widen(dout.at[e]);
            dweight.at[e] = fmaf(d, (widen(h.at[e]) - mean) * rstd, dweight.at[e]);
            dbias.at[e] += d;
        }
    }
    __device__ __forceinline__ void store(float* dweight_row, float* dbias_row, int n, bool aligned) const {
        store_vec(dweight_row, dweight, n, aligned);
        store_vec(dbias_row, dbias, n, aligned);
    }
    __device__ __forceinline__ void store_shared(float* dweight_row, float* dbias_row, int n) const {
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
            if (e >= n) continue;
            dweight_row[e] = dweight.at[e];
            dbias_row[e] = dbias.at[e];
        }
    }
};

// Backward threads that a multiprocessor is to hold at once, in blocks of a row or of four warps; what that leaves each
// of 65,536 registers, 128, 168 or 255, is what it needs.
constexpr int bwd_resident(int bytes, int vecs) { return vecs == 2 ? 512 : bytes == 2 ? 384 : 256; }

template <class T, class P, int kVecs>
__global__ void __launch_bounds__(bwd_resident(sizeof(T), kVecs))
    layer_norm_bwd_kernel(const __grid_constant__ LayerNormBwdArgs a, bool aligned) {
    float* shared = shared_memory<float>();
    const int cols = int(a.cols), stride = blockDim.x * kVec, first = threadIdx.x * kVec;
    ColumnSums columns[kVecs] = {};
    int scratch = 0;  // two places in turn: a fast warp may be a row ahead
    for (int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; row < a.rows;
         row += int64_t(gridDim.x) * blockDim.y) {
        const int64_t at = row * a.cols;
        Vec<T> h[kVecs], dout[kVecs];
#pragma unroll
        for (int k = 0; k < kVecs; ++k) {
            const int i = first + k * stride;
            if (i >= cols) continue;
            h[k] = load_vec(static_cast<const T*>(a.h) + at + i, left(cols, i), aligned);
            dout[k] = load_vec(static_cast<const T*>(a.dout) + at + i, left(cols, i), aligned);
        }
        const float mean = a.mean[row], rstd = a.rstd[row];
        float sums[2] = {};
#pragma unroll
        for (int k = 0; k < kVecs; ++k) {
            const int i = first + k * stride;
            if (i >= cols) continue;
            add_row_sums<T, P>(a, i, left(cols, i), h[k], dout[k], mean, rstd, sums, aligned);
            columns[k].add(h[k], dout[k], mean, rstd);
        }
        team_sum(sums, shared + scratch);
        scratch ^= 2 * kWarp;
        const float mean_g = sums[0] / float(cols), mean_gx = sums[1] / float(cols);
#pragma unroll
        for (int k = 0; k < kVecs; ++k) {
            const int i = first + k * stride;
            if (i >= cols) continue;
            recompute(h[k]);
            recompute(dout[k]);
            write_dx<T, P>(a, at + i, i, left(cols, i), h[k], dout[k], mean, rstd, mean_g, mean_gx, aligned);
        }
    }
    float* partials = a.partials + int64_t(blockIdx.x) * 2 * cols;
    float* mine = shared + threadIdx.y * 2 * cols;
#pragma unroll
    for (int k = 0; k < kVecs; ++k) {
        const int i = first + k * stride;
        if (i >= cols) continue;
        if (blockDim.y == 1)
            columns[k].store(partials + i, partials + cols + i, left(cols, i), aligned);
        else
            columns[k].store_shared(mine + i, mine + cols + i, left(cols, i));
    }
    if (blockDim.y == 1) return;
    __syncthreads();
    for (int c = threadIdx.y * kWarp + threadIdx.x; c < 2 * cols; c += kWarpRows * kWarp) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarpRows; ++w) sum += shared[w * 2 * cols + c];
        partials[c] = sum;
    }
}

// dx alone, a block a row, of any length.
template <class T, class P>
__global__ void __launch_bounds__(512)
    layer_norm_bwd_dx_kernel(const __grid_constant__ LayerNormBwdArgs a, bool aligned) {
    float* shared = shared_memory<float>();
    const int cols = int(a.cols), stride = blockDim.x * kVec, first = threadIdx.x * kVec;
    const int64_t row = blockIdx.x, at = row * a.cols;
    const T *h = static_cast<const T*>(a.h) + at, *dout = static_cast<const T*>(a.dout) + at;
    const float mean = a.mean[row], rstd = a.rstd[row];
    float sums[2] = {};
    for (int i = first; i < cols; i += stride) {
        const int n = left(cols, i);
        add_row_sums<T, P>(a, i, n, load_vec(h + i, n, aligned), load_vec(dout + i, n, aligned), mean, rstd, sums,
                           aligned);
    }
    team_sum(sums, shared);
    const float mean_g = sums[0] / float(cols), mean_gx = sums[1] / float(cols);
    for (int i = first; i < cols; i += stride) {
        const int n = left(cols, i);
        write_dx<T, P>(a, at + i, i, n, load_vec(h + i, n, aligned), load_vec(dout + i, n, aligned), mean, rstd, mean_g,
                       mean_gx, aligned);
    }
}

// A strip of columns' sums over one share of the rows, for each of gridDim.y shares.
template <class T>
__global__ void __launch_bounds__(kStripRows* kWarp)
    layer_norm_bwd_columns_kernel(const __grid_constant__ LayerNormBwdArgs a, bool aligned) {
    float* shared = shared_memory<float>();  // (kStripRows, 2, kStripCols)
    const int cols = int(a.cols), strip = blockIdx.x * kStripCols, i = strip + threadIdx.x * kVec;
    ColumnSums sums = {};
    if (i < cols)
        for (int64_t row = int64_t(blockIdx.y) * kStripRows + threadIdx.y; row < a.rows;
             row += int64_t(gridDim.y) * kStripRows) {
            const int64_t at = row * a.cols + i;
            sums.add(load_vec(static_cast<const T*>(a.h) + at, left(cols, i), aligned),
                     load_vec(static_cast<const T*>(a.dout) + at, left(cols, i), aligned), a.mean[row], a.rstd[row]);
        }
    float* mine = shared + threadIdx.y * 2 * kStripCols + threadIdx.x * kVec;
    sums.store_shared(mine, mine + kStripCols, kVec);
    __syncthreads();
    float* partials = a.partials + int64_t(blockIdx.y) * 2 * cols;
    for (int c = threadIdx.y * kWarp + threadIdx.x; c < 2 * kStripCols; c += kStripRows * kWarp) {
        const int column = strip + c % kStripCols;
        if (column >= cols) continue;
        float sum = 0.0f;
        for (int w = 0; w < kStripRows; ++w) sum += shared[w * 2 * kStripCols + c];
        partials[c / kStripCols * cols + column] = sum;
    }
}

// dweight and dbias from the partial sums (count, 2, cols): 32 columns a block, 32 rows of threads.
template <class P>
__global__ void __launch_bounds__(1024) layer_norm_bwd_sum_kernel(const __grid_constant__ LayerNormBwdArgs a) {
    float* tile = shared_memory<float>();  // (32, 33)
    const int64_t width = 2 * a.cols, column = int64_t(blockIdx.x) * kWarp + threadIdx.x;
    float sum = 0.0f;
    if (column < width)
#pragma unroll 8
        for (int64_t row = threadIdx.y; row < a.partials_count; row += kWarp) sum += a.partials[row * width + column];
    tile[threadIdx.y * (kWarp + 1) + threadIdx.x] = sum;
    __syncthreads();
    sum = warp_sum(tile[threadIdx.x * (kWarp + 1) + threadIdx.y]);
    const int64_t mine = int64_t(blockIdx.x) * kWarp + threadIdx.y;
    if (threadIdx.x != 0 || mine >= width) return;
    if (mine < a.cols)
        static_cast<P*>(a.dweight)[mine] = narrow<P>(sum);
    else if (a.dbias)
        static_cast<P*>(a.dbias)[mine - a.cols] = narrow<P>(sum);
}

// f(T{}, P{}) for the dtypes of the rows and of the weights.
template <class F>
void with_types(DType dtype, DType weight_dtype, F&& f) {
    with_type(dtype, [&](auto t) {
        if (weight_dtype == DType::f32) return f(t, float{});
        f(t, t);
    });
}

bool all_aligned(std::initializer_list<const void*> pointers, int64_t cols, DType dtype) {
    bool aligned = cols * (dtype == DType::f32 ? 4 : 2) % 16 == 0;
    for (const void* p : pointers) aligned = aligned && aligned16(p);  // null is
    return aligned;
}

unsigned team_threads(int64_t cols, int vecs, int most) {
    const int64_t threads = (cols + kVec * vecs - 1) / (kVec * vecs);
    return static_cast<unsigned>(std::min<int64_t>((threads + kWarp - 1) / kWarp * kWarp, most));
}

// The backward kernel's vectors a thread and its block. More than 512 columns of a warp, or 4,096 of a block, take four
// vectors; fewer registers otherwise let more warps run.
struct BwdShape {
    int vecs;
    dim3 block;
};
BwdShape bwd_shape(int64_t cols) {
    if (cols <= kWarpCols) return {cols <= kWarpCols / 2 ? 2 : 4, dim3(kWarp, kWarpRows)};
    const int vecs = cols <= kBwdThreads * kVec * 2 ? 2 : 4;
    return {vecs, dim3(team_threads(cols, vecs, kBwdThreads))};
}

}  // namespace

int64_t layer_norm_workspace_cuda(int64_t rows, int64_t cols, DType dtype, int device_id) {
    if (cols > kFusedCols) return std::min<int64_t>((rows + kStripRows - 1) / kStripRows, kStripBlocks);
    const BwdShape shape = bwd_shape(cols);
    const int resident = bwd_resident(dtype == DType::f32 ? 4 : 2, shape.vecs) / int(shape.block.x * shape.block.y);
    const int64_t most = int64_t(multiprocessors(kOp, device_id)) * resident;
    return std::min<int64_t>((rows + shape.block.y - 1) / shape.block.y, most);
}

void layer_norm_fwd_cuda(const LayerNormFwdArgs& a, int device_id) {
    if (a.rows == 0) return;
    const DeviceGuard guard(kOp, device_id);
    const bool aligned = all_aligned({a.x, a.residual, a.weight, a.bias, a.y, a.h}, a.cols, a.dtype);
    const dim3 block = a.cols <= kWarpCols ? dim3(kWarp, kWarpRows) : dim3(team_threads(a.cols, kFwdVecs, kFwdThreads));
    const dim3 grid(static_cast<unsigned>(std::min<int64_t>((a.rows + block.y - 1) / block.y, INT32_MAX)));
    with_types(a.dtype, a.weight_dtype, [&](auto t, auto p) {
        launch(kOp, layer_norm_fwd_kernel<decltype(t), decltype(p)>, grid, block, 2 * kWarp * sizeof(float),
               current_stream(device_id), a, aligned);
    });
}

void layer_norm_bwd_cuda(const LayerNormBwdArgs& a, int device_id) {
    const DeviceGuard guard(kOp, device_id);
    void* stream = current_stream(device_id);
    const bool aligned = all_aligned({a.dout, a.dh, a.h, a.weight, a.dx, a.partials}, a.cols, a.dtype);
    const dim3 blocks(static_cast<unsigned>(a.partials_count));
    with_types(a.dtype, a.weight_dtype, [&](auto t, auto p) {
        using T = decltype(t);
        using P = decltype(p);
        if (a.rows != 0 && a.cols > kFusedCols) {
            const dim3 strips(static_cast<unsigned>((a.cols + kStripCols - 1) / kStripCols), blocks.x);
            launch(kOp, layer_norm_bwd_dx_kernel<T, P>, dim3(static_cast<unsigned>(a.rows)), dim3(512),
                   2 * kWarp * sizeof(float), stream, a, aligned);
            launch(kOp, layer_norm_bwd_columns_kernel<T>, strips, dim3(kWarp, kStripRows),
                   kStripRows * 2 * kStripCols * sizeof(float), stream, a, aligned);
        } else if (a.rows != 0) {
            const BwdShape shape = bwd_shape(a.cols);
            const size_t shared = shape.block.y == 1 ? 4 * kWarp : kWarpRows * 2 * a.cols;
            launch(kOp, shape.vecs == 2 ? layer_norm_bwd_kernel<T, P, 2> : layer_norm_bwd_kernel<T, P, 4>, blocks,
                   shape.block, shared * sizeof(float), stream, a, aligned);
        }
        launch(kOp, layer_norm_bwd_sum_kernel<P>, dim3(static_cast<unsigned>((2 * a.cols + kWarp - 1) / kWarp)),
               dim3(kWarp, kWarp), kWarp * (kWarp + 1) * sizeof(float), stream, a);
    });
}

}  // namespace cgpt
