// The global gradient norm, or its chunks' sums, on a GPU, to the bit what the CPU gives: grad_norm.h states the order.
//
// A warp a chunk: lane i adds the squares of elements i, i + 32, ... in double, which is the chunk's 32 running sums.
// The table of tensors travels as the kernel's argument, as adamw.cu's does. A last block adds the chunks up, for a
// norm.
#include <algorithm>

#include "../grad_norm.h"
#include "launch.cuh"
#include "ptx.cuh"
#include "reduce.cuh"
#include "vec.cuh"

namespace cgpt {
namespace {

using namespace cuda;

constexpr int kWarps = 4;  // chunks of a block
constexpr int kTensors = 1000;
static_assert(kGradNormSums == kWarp, "a lane is a running sum");

struct Entry {
    const void* data;
    int64_t numel;
    int64_t first_chunk;
    DType dtype;
};

struct Table {
    double* sums;  // one a chunk
    int64_t chunks;
    int chunk;  // elements of one
    int count;
    Entry entries[kTensors];
};
static_assert(sizeof(Table) <= 32764, "a kernel's arguments must fit its parameter space");

// Squares of fp32 are exact in double, so that fused and separate addition agree.
template <class T>
__device__ __forceinline__ double sum_of_squares(const T* x, int n) {
    double sum = 0.0;
#pragma unroll 8
    for (int i = threadIdx.x; i < n; i += kWarp) {
        const double v = widen(x[i]);
        sum = fma(v, v, sum);
    }
    return sum;
}

__global__ void __launch_bounds__(kWarps* kWarp) grad_norm_chunks_kernel(const __grid_constant__ Table table) {
    const int64_t chunk = int64_t(blockIdx.x) * kWarps + threadIdx.y;
    if (chunk >= table.chunks) return;
    int low = 0, high = table.count;  // the last tensor that starts at this chunk or before it
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (table.entries[middle].first_chunk <= chunk)
            low = middle;
        else
            high = middle;
    }
    const Entry& e = table.entries[low];
    const int64_t begin = (chunk - e.first_chunk) * table.chunk;
    const int n = e.numel - begin < table.chunk ? int(e.numel - begin) : table.chunk;
    double sum;
    if (e.dtype == DType::bf16)
        sum = sum_of_squares(static_cast<const bf16*>(e.data) + begin, n);
    else if (e.dtype == DType::f16)
        sum = sum_of_squares(static_cast<const f16*>(e.data) + begin, n);
    else
        sum = sum_of_squares(static_cast<const float*>(e.data) + begin, n);
#pragma unroll
    for (int half = kWarp / 2; half > 0; half /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, half);
    if (threadIdx.x == 0) table.sums[chunk] = sum;
}

__global__ void __launch_bounds__(kGradNormTotals)
    grad_norm_total_kernel(const double* sums, int64_t chunks, float* norm) {
    double* totals = shared_memory<double>();
    double total = 0.0;
#pragma unroll 8
    for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += kGradNormTotals) total += sums[chunk];
    totals[threadIdx.x] = total;
    for (int half = kGradNormTotals / 2; half > 0; half /= 2) {
        __syncthreads();
        if (int(threadIdx.x) < half) totals[threadIdx.x] += totals[threadIdx.x + half];
    }
    if (threadIdx.x == 0) *norm = float(sqrt(totals[0]));
}

}  // namespace

void grad_norm_cuda(const GradNormArgs& a, int device_id) {
    const char* op = a.norm ? "grad_norm" : "grad_square_sums";
    const DeviceGuard guard(op, device_id);
    void* stream = current_stream(device_id);
    double* sums = a.sums;
    Table table;
    table.chunk = static_cast<int>(a.chunk);
    for (int64_t first = 0; first < a.count; first += kTensors) {
        table.sums = sums;
        table.chunks = 0;
        table.count = 0;
        for (int64_t i = first; i < std::min(a.count, first + kTensors); ++i) {
            const GradNormTensor& t = a.tensors[i];
            if (t.numel == 0) continue;
            table.entries[table.count++] = {t.data, t.numel, table.chunks, t.dtype};
            table.chunks += grad_norm_chunks(t.numel, a.chunk);
        }
        if (table.count == 0) continue;
        launch(op, grad_norm_chunks_kernel, dim3(static_cast<unsigned>((table.chunks + kWarps - 1) / kWarps)),
               dim3(kWarp, kWarps), 0, stream, table);
        sums += table.chunks;
    }
    if (!a.norm) return;
    const double* all = a.sums;
    launch(op, grad_norm_total_kernel, dim3(1), dim3(kGradNormTotals), kGradNormTotals * sizeof(double), stream, all,
           static_cast<int64_t>(sums - all), a.norm);
}

}  // namespace cgpt
