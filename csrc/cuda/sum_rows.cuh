// Column sums of a matrix of fp32, the last step of sums over rows that several blocks have begun: a fixed order, so
// the same bits every time.
#pragma once

#include "launch.cuh"
#include "ptx.cuh"
#include "vec.cuh"

namespace cgpt::cuda {

inline constexpr int kSumColumns = 32, kSumGroups = 8;  // a block

// out[c] = sum over rows of x (rows, cols): row r in group r % 8, a group's rows in order, then the groups in order.
template <class T>
__global__ void __launch_bounds__(kSumColumns* kSumGroups)
    sum_rows_kernel(const float* x, int64_t rows, int64_t cols, T* out) {
    const int lane = threadIdx.x % kSumColumns, group = threadIdx.x / kSumColumns;
    const int64_t col = int64_t(blockIdx.x) * kSumColumns + lane;
    float* sums = shared_memory<float>();
    float sum = 0.0f;
    if (col < cols) {
#pragma unroll 4
        for (int64_t r = group; r < rows; r += kSumGroups) sum += x[r * cols + col];
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (group != 0 || col >= cols) return;
#pragma unroll
    for (int g = 1; g < kSumGroups; ++g) sum += sums[g * kSumColumns + lane];
    out[col] = narrow<T>(sum);
}

inline void sum_rows(const char* op, const float* x, int64_t rows, int64_t cols, void* out, DType dtype,
                     int device_id) {
    if (cols == 0) return;
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        launch(op, sum_rows_kernel<T>, dim3(static_cast<unsigned>((cols + kSumColumns - 1) / kSumColumns)),
               dim3(kSumColumns * kSumGroups), kSumColumns * kSumGroups * sizeof(float), current_stream(device_id), x,
               rows, cols, static_cast<T*>(out));
    });
}

}  // namespace cgpt::cuda
