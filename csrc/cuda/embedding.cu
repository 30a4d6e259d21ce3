// Token embedding with learned positions on a GPU, and its gradient. (tokens, cols), token i at position i % time.
//
//   out[i] = wte[ids[i]] + wpe[i % time]              added in fp32, rounded once
//   dwte[v] = sum over tokens i with ids[i] = v of dout[i],  dwpe[t] = sum over b of dout[b, t]
//
// Ids are not read back to the host: one out of range looks up a row of NaN and has no gradient.
//
// The gradient of wte takes the tokens sorted by id, equal ids in token order (torch's stable sort on the same device),
// and cuts them into segments of 32, a block each, so that an id of a thousand tokens is many blocks' work. A run of
// one id that lies inside a segment is summed and written at once; the parts of a run that crosses from segment to
// segment go to a workspace, and a second kernel adds them in order. Every row is written once and nothing is atomic,
// so the bits depend on the input alone. Sums are fp32.
#include <algorithm>

#include "../embedding.h"
#include "launch.cuh"
#include "ptx.cuh"
#include "reduce.cuh"
#include "vec.cuh"

namespace cgpt {
namespace {

using namespace cuda;

constexpr const char* kOp = "embedding";
constexpr int kRows = 8;  // rows, and warps, of a forward block
constexpr int kMostThreads = 256;

__device__ __forceinline__ int left(int64_t cols, int64_t i) { return cols - i < kVec ? int(cols - i) : kVec; }

template <class T>
__global__ void __launch_bounds__(kRows* kWarp)
    embedding_fwd_kernel(const __grid_constant__ EmbeddingFwdArgs a, bool aligned) {
    const int64_t row = int64_t(blockIdx.x) * kRows + threadIdx.y;
    if (row >= a.tokens) return;
    const int64_t id = a.ids[row];
    const bool inside = id >= 0 && id < a.vocabulary;
    const T* token = static_cast<const T*>(a.wte) + (inside ? id : 0) * a.wte_stride;
    const T* position = a.wpe ? static_cast<const T*>(a.wpe) + row % a.time * a.wpe_stride : nullptr;
    T* out = static_cast<T*>(a.out) + row * a.cols;
    for (int64_t i = threadIdx.x * kVec; i < a.cols; i += kWarp * kVec) {
        const int n = left(a.cols, i);
        Vec<T> v;
        if (inside) {
            v = load_vec(token + i, n, aligned);
        } else {
#pragma unroll
            for (int e = 0; e < kVec; ++e) v.at[e] = narrow<T>(NAN);
        }
        if (position) {
            const Vec<T> p = load_vec(position + i, n, aligned);
            float sum[kVec];
#pragma unroll
            for (int e = 0; e < kVec; ++e) sum[e] = widen(v.at[e]) + widen(p.at[e]);
            v = narrow_vec<T>(sum);
        }
        store_vec(out + i, v, n, aligned);
    }
}

struct Sum {
    Vec<float> value;
    template <class T>
    __device__ __forceinline__ void add(const Vec<T>& x) {
#pragma unroll
        for (int e = 0; e < kVec; ++e) value.at[e] += widen(x.at[e]);
    }
    template <class T>
    __device__ __forceinline__ void store(T* to, int n, bool aligned) const {
        store_vec(to, narrow_vec<T>(value.at), n, aligned);
    }
};

__device__ __forceinline__ bool has_row(const EmbeddingBwdArgs& a, int64_t id) {
    return id >= 0 && id < a.vocabulary && id != a.padding_idx;
}

// Segment blockIdx.x of the sorted tokens. parts[segment][0]: of the run that came in from the left; [1]: of the run
// that begins here and goes on to the right.
template <class T>
__global__ void __launch_bounds__(kMostThreads)
    embedding_bwd_kernel(const __grid_constant__ EmbeddingBwdArgs a, bool aligned) {
    const int64_t begin = int64_t(blockIdx.x) * kEmbeddingSegment, next = begin + kEmbeddingSegment;
    const int64_t end = next < a.tokens ? next : a.tokens;
    const int64_t column = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * kVec;
    if (column >= a.cols) return;
    const int n = left(a.cols, column);
    auto load = [&](int64_t i) {
        const int64_t row = a.order[i];
        if (row < 0 || row >= a.tokens) return Vec<T>{};  // no order that a stable sort gives
        return load_vec(static_cast<const T*>(a.dout) + row * a.cols + column, n, aligned);
    };
    float* parts = a.parts + int64_t(blockIdx.x) * 2 * a.cols + column;
    bool from_left = begin > 0 && a.sorted[begin - 1] == a.sorted[begin];
    Sum sum = {};
    Vec<T> row = load(begin);  // one ahead of the sum
    for (int64_t i = begin; i < end; ++i) {
        const int64_t id = a.sorted[i];
        const bool more = i + 1 < a.tokens && a.sorted[i + 1] == id;
        sum.add(row);
        if (i + 1 < end) row = load(i + 1);
        if (more && i + 1 < end) continue;
        if (from_left)
            sum.store(parts, n, aligned);
        else if (more)
            sum.store(parts + a.cols, n, aligned);
        else if (has_row(a, id))
            sum.store(static_cast<T*>(a.dwte) + id * a.cols + column, n, aligned);
        sum = {};
        from_left = false;
    }
}

// The run that begins in segment blockIdx.x and crosses its end, if there is one: its parts in order.
template <class T>
__global__ void __launch_bounds__(kMostThreads)
    embedding_bwd_join_kernel(const __grid_constant__ EmbeddingBwdArgs a, bool aligned) {
    int64_t segment = blockIdx.x, end = (segment + 1) * kEmbeddingSegment;
    const int64_t begin = segment * kEmbeddingSegment, id = a.sorted[end - 1];  // the last segment has no block
    if (a.sorted[end] != id || !has_row(a, id)) return;
    if (a.sorted[begin] == id && begin > 0 && a.sorted[begin - 1] == id) return;
    const int64_t column = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * kVec;
    if (column >= a.cols) return;
    const int n = left(a.cols, column);
    Sum sum = {};
    sum.add(load_vec(a.parts + (2 * segment + 1) * a.cols + column, n, aligned));
    do {
        ++segment;
        end += kEmbeddingSegment;
        sum.add(load_vec(a.parts + 2 * segment * a.cols + column, n, aligned));
    } while (end < a.tokens && a.sorted[end - 1] == id && a.sorted[end] == id);
    sum.store(static_cast<T*>(a.dwte) + id * a.cols + column, n, aligned);
}

template <class T>
__global__ void __launch_bounds__(kMostThreads)
    embedding_bwd_positions_kernel(const __grid_constant__ EmbeddingBwdArgs a, bool aligned) {
    const int64_t column = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * kVec, t = blockIdx.x;
    if (column >= a.cols) return;
    const int n = left(a.cols, column);
    Sum sum = {};
#pragma unroll 4
    for (int64_t row = t; row < a.tokens; row += a.time)
        sum.add(load_vec(static_cast<const T*>(a.dout) + row * a.cols + column, n, aligned));
    sum.store(static_cast<T*>(a.dwpe) + t * a.cols + column, n, aligned);
}

int64_t bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

}  // namespace

void embedding_fwd_cuda(const EmbeddingFwdArgs& a, int device_id) {
    if (a.tokens == 0) return;
    const DeviceGuard guard(kOp, device_id);
    bool aligned = aligned16(a.wte) && aligned16(a.wpe) && aligned16(a.out);
    for (int64_t stride : {a.cols, a.wte_stride, a.wpe_stride})
        aligned = aligned && stride * bytes_of(a.dtype) % 16 == 0;
    with_type(a.dtype, [&](auto t) {
        launch(kOp, embedding_fwd_kernel<decltype(t)>, dim3(static_cast<unsigned>((a.tokens + kRows - 1) / kRows)),
               dim3(kWarp, kRows), 0, current_stream(device_id), a, aligned);
    });
}

void embedding_bwd_cuda(const EmbeddingBwdArgs& a, int device_id) {
    if (a.tokens == 0) return;
    const DeviceGuard guard(kOp, device_id);
    void* stream = current_stream(device_id);
    const bool aligned = aligned16(a.dout) && aligned16(a.dwte) && aligned16(a.dwpe) && aligned16(a.parts) &&
                         a.cols * bytes_of(a.dtype) % 16 == 0;
    const int64_t vectors = (a.cols + kVec - 1) / kVec;
    const int64_t threads = std::min<int64_t>((vectors + kWarp - 1) / kWarp * kWarp, kMostThreads);
    const dim3 block(static_cast<unsigned>(threads));
    auto grid = [&](int64_t blocks) {
        return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>((vectors + threads - 1) / threads));
    };
    with_type(a.dtype, [&](auto t) {
        using T = decltype(t);
        if (a.dwte) {
            const int64_t segments = embedding_segments(a.tokens);
            launch(kOp, embedding_bwd_kernel<T>, grid(segments), block, 0, stream, a, aligned);
            if (segments > 1)
                launch(kOp, embedding_bwd_join_kernel<T>, grid(segments - 1), block, 0, stream, a, aligned);
        }
        if (a.dwpe) launch(kOp, embedding_bwd_positions_kernel<T>, grid(a.time), block, 0, stream, a, aligned);
    });
}

}  // namespace cgpt
