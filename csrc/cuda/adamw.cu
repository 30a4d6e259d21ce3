// AdamW on a GPU: one launch over all tensors. The table of tensors travels as the kernel's argument (CUDA 12.1 and
// later take 32 KiB of it), so there is no buffer to fill, nothing to wait for, and a CUDA graph may hold the launch.
// A block finds its tensor by the number of chunks before it, works out the step's coefficients and updates one chunk.
// The arithmetic is adamw_update.h's, compiled with -fmad=false.
#include <vector>

#include "../adamw.h"
#include "launch.cuh"
#include "ptx.cuh"
#include "vec.cuh"

namespace cgpt {
namespace {

using namespace cuda;

constexpr int kThreads = 256;
constexpr int kSteps = 8;  // of eight elements a thread
constexpr int64_t kChunk = int64_t(kThreads) * kVec * kSteps;
constexpr int kTensors = 440;

struct Entry {
    void* param;
    const void* grad;
    float *exp_avg, *exp_avg_sq;
    void* rest;
    const void* step;
    int64_t numel;
    int64_t index;
    uint32_t first_chunk;
    bool aligned;  // all five at 16 bytes
};

struct Table {
    AdamWHyper hyper;
    int count;
    Entry entries[kTensors];
};
static_assert(sizeof(Table) <= 32764, "a kernel's arguments must fit its parameter space");

struct Math {
    static __device__ __forceinline__ float splat(float x) { return x; }
    static __device__ __forceinline__ float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
    static __device__ __forceinline__ float sqrt(float x) { return __fsqrt_rn(x); }
};

// Where the fp32 weights of eight elements are kept.
template <class T>
struct Plain {
    Vec<T> param;
    __device__ __forceinline__ Plain(const Entry& e, const AdamWCoefficients&, int64_t i, int n, bool aligned)
        : param(load_vec(static_cast<const T*>(e.param) + i, n, aligned)) {}
    __device__ __forceinline__ float get(int k) const { return widen(param.at[k]); }
    __device__ __forceinline__ void set(int k, float x) { param.at[k] = narrow<T>(x); }
    __device__ __forceinline__ void store(const Entry& e, int64_t i, int n, bool aligned) const {
        store_vec(static_cast<T*>(e.param) + i, param, n, aligned);
    }
};

template <class T>
struct Master {
    Vec<float> master;
    __device__ __forceinline__ Master(const Entry& e, const AdamWCoefficients&, int64_t i, int n, bool aligned)
        : master(load_vec(static_cast<const float*>(e.rest) + i, n, aligned)) {}
    __device__ __forceinline__ float get(int k) const { return master.at[k]; }
    __device__ __forceinline__ void set(int k, float x) { master.at[k] = x; }
    __device__ __forceinline__ void store(const Entry& e, int64_t i, int n, bool aligned) const {
        Vec<T> param;
#pragma unroll
        for (int k = 0; k < kVec; ++k) param.at[k] = narrow<T>(master.at[k]);
        store_vec(static_cast<float*>(e.rest) + i, master, n, aligned);
        store_vec(static_cast<T*>(e.param) + i, param, n, aligned);
    }
};

struct Split {
    Vec<uint16_t> high, low;
    __device__ __forceinline__ Split(const Entry& e, const AdamWCoefficients&, int64_t i, int n, bool aligned)
        : high(load_vec(static_cast<const uint16_t*>(e.param) + i, n, aligned)),
          low(load_vec(static_cast<const uint16_t*>(e.rest) + i, n, aligned)) {}
    __device__ __forceinline__ float get(int k) const {
        return __uint_as_float(split_join(uint32_t(high.at[k]), uint32_t(low.at[k])));
    }
    __device__ __forceinline__ void set(int k, float x) {
        const uint32_t bits = __float_as_uint(x), nan = x == x ? 0u : ~0u;
        high.at[k] = uint16_t(split_high(bits, nan));
        low.at[k] = uint16_t(split_low(bits, nan));
    }
    __device__ __forceinline__ void store(const Entry& e, int64_t i, int n, bool aligned) const {
        store_vec(static_cast<uint16_t*>(e.param) + i, high, n, aligned);
        store_vec(static_cast<uint16_t*>(e.rest) + i, low, n, aligned);
    }
};

struct Stochastic {
    Vec<uint16_t> param;
    StochasticKeys keys;
    uint32_t index;
    __device__ __forceinline__ Stochastic(const Entry& e, const AdamWCoefficients& c, int64_t i, int n, bool aligned)
        : param(load_vec(static_cast<const uint16_t*>(e.param) + i, n, aligned)),
          keys(stochastic_keys(c, i)),
          index(uint32_t(i)) {}
    __device__ __forceinline__ float get(int k) const { return __uint_as_float(uint32_t(param.at[k]) << 16); }
    __device__ __forceinline__ void set(int k, float x) {
        param.at[k] = uint16_t(stochastic_round(__float_as_uint(x), x == x ? 0u : ~0u, index + k, keys));
    }
    __device__ __forceinline__ void store(const Entry& e, int64_t i, int n, bool aligned) const {
        store_vec(static_cast<uint16_t*>(e.param) + i, param, n, aligned);
    }
};

template <class Kept, class G>
__global__ void __launch_bounds__(kThreads) adamw_kernel(const __grid_constant__ Table table) {
    AdamWCoefficients& shared = *shared_memory<AdamWCoefficients>();
    int low = 0, high = table.count;  // the last tensor that starts at this chunk or before it
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (table.entries[middle].first_chunk <= blockIdx.x)
            low = middle;
        else
            high = middle;
    }
    const Entry& e = table.entries[low];
    if (threadIdx.x == 0) shared = adamw_coefficients(table.hyper, e.step, e.index);
    __syncthreads();
    const AdamWCoefficients c = shared;
    if (c.skip) return;
    const int64_t begin = int64_t(blockIdx.x - e.first_chunk) * kChunk;
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step) {
        const int64_t i = begin + (int64_t(step) * kThreads + threadIdx.x) * kVec;
        if (i >= e.numel) return;
        const int n = e.numel - i < kVec ? int(e.numel - i) : kVec;
        Kept kept(e, c, i, n, e.aligned);
        const Vec<G> grad = load_vec(static_cast<const G*>(e.grad) + i, n, e.aligned);
        Vec<float> m = load_vec(e.exp_avg + i, n, e.aligned), v = load_vec(e.exp_avg_sq + i, n, e.aligned);
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
            float p = kept.get(k);
            adamw_update<Math>(c, widen(grad.at[k]), p, m.at[k], v.at[k]);
            kept.set(k, p);
        }
        kept.store(e, i, n, e.aligned);
        store_vec(e.exp_avg + i, m, n, e.aligned);
        store_vec(e.exp_avg_sq + i, v, n, e.aligned);
    }
}

using Kernel = void (*)(Table);

template <class Kept>
Kernel kernel_for(DType grad) {
    if (grad == DType::bf16) return adamw_kernel<Kept, bf16>;
    if (grad == DType::f16) return adamw_kernel<Kept, f16>;
    return adamw_kernel<Kept, float>;
}

Kernel kernel_for(Weights weights, DType param, DType grad) {
    if (weights == Weights::split) return kernel_for<Split>(grad);
    if (weights == Weights::stochastic) return kernel_for<Stochastic>(grad);
    if (weights == Weights::master) {
        if (param == DType::bf16) return kernel_for<Master<bf16>>(grad);
        return kernel_for<Master<f16>>(grad);
    }
    if (param == DType::bf16) return kernel_for<Plain<bf16>>(grad);
    if (param == DType::f16) return kernel_for<Plain<f16>>(grad);
    return kernel_for<Plain<float>>(grad);
}

}  // namespace

// One launch for each pair of dtypes among the tensors, which is one in practice; more past 448 tensors.
void adamw_cuda(const AdamWArgs& a, int device_id) {
    const DeviceGuard guard("adamw", device_id);
    void* stream = current_stream(device_id);
    std::vector<bool> done(a.count);
    for (int64_t first = 0; first < a.count; ++first) {
        if (done[first]) continue;
        const AdamWTensor& kind = a.tensors[first];
        Table table;
        table.hyper = a.hyper;
        table.count = 0;
        uint32_t chunks = 0;
        for (int64_t i = first; i < a.count && table.count < kTensors; ++i) {
            const AdamWTensor& t = a.tensors[i];
            if (done[i] || t.dtype != kind.dtype || t.grad_dtype != kind.grad_dtype) continue;
            done[i] = true;
            bool aligned = true;
            for (const void* p : {static_cast<const void*>(t.param), t.grad, static_cast<const void*>(t.exp_avg),
                                  static_cast<const void*>(t.exp_avg_sq), static_cast<const void*>(t.rest)})
                aligned = aligned && aligned16(p);
            float *const exp_avg = static_cast<float*>(t.exp_avg), *const exp_avg_sq =
                                                                       static_cast<float*>(t.exp_avg_sq);
            table.entries[table.count++] = {t.param, t.grad,  exp_avg, exp_avg_sq, t.rest,
                                            t.step,  t.numel, t.index, chunks,     aligned};
            chunks += static_cast<uint32_t>((t.numel + kChunk - 1) / kChunk);
        }
        launch("adamw", kernel_for(a.weights, kind.dtype, kind.grad_dtype), dim3(chunks), dim3(kThreads),
               sizeof(AdamWCoefficients), stream, table);
    }
}

}  // namespace cgpt
