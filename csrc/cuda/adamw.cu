// AdamW on a GPU: one launch over all tensors. The table of tensors travels as the kernel's argument (CUDA 12.1 and
// later take 32 KiB of it), so there is no buffer to fill, nothing to wait for, and a CUDA graph may hold the launch.
// A block finds its tensor by the number of chunks before it, works out the step's coefficients and updates one chunk.
// Arithmetic and random bits are adamw_update.h's, compiled with -fmad=false.
#include <type_traits>
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
constexpr int kTensors = 400;

struct Entry {
    void* param;
    const void* grad;
    void *exp_avg, *exp_avg_sq;
    void* rest;
    const void* step;
    int64_t numel, first;
    uint32_t number;
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

__device__ __forceinline__ uint32_t nan_bits(float x) { return x == x ? 0u : ~0u; }

// Where the fp32 weights of eight elements are kept.
template <class T>
struct Plain {
    Vec<T> param;
    __device__ __forceinline__ Plain(const Entry& e, StochasticKeys, int64_t i, int n, bool aligned)
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
    __device__ __forceinline__ Master(const Entry& e, StochasticKeys, int64_t i, int n, bool aligned)
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
    __device__ __forceinline__ Split(const Entry& e, StochasticKeys, int64_t i, int n, bool aligned)
        : high(load_vec(static_cast<const uint16_t*>(e.param) + i, n, aligned)),
          low(load_vec(static_cast<const uint16_t*>(e.rest) + i, n, aligned)) {}
    __device__ __forceinline__ float get(int k) const {
        return __uint_as_float(split_join(uint32_t(high.at[k]), uint32_t(low.at[k])));
    }
    __device__ __forceinline__ void set(int k, float x) {
        const uint32_t bits = __float_as_uint(x), nan = nan_bits(x);
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
    __device__ __forceinline__ Stochastic(const Entry& e, StochasticKeys keys, int64_t i, int n, bool aligned)
        : param(load_vec(static_cast<const uint16_t*>(e.param) + i, n, aligned)),
          keys(keys),
          index(uint32_t(e.first + i)) {}
    __device__ __forceinline__ float get(int k) const { return __uint_as_float(uint32_t(param.at[k]) << 16); }
    __device__ __forceinline__ void set(int k, float x) {
        param.at[k] = uint16_t(stochastic_round(__float_as_uint(x), nan_bits(x), index + k, keys));
    }
    __device__ __forceinline__ void store(const Entry& e, int64_t i, int n, bool aligned) const {
        store_vec(static_cast<uint16_t*>(e.param) + i, param, n, aligned);
    }
};

// Where their exp_avg and exp_avg_sq are kept.
struct Moments {
    Vec<float> m, v;
    __device__ __forceinline__ Moments(const Entry& e, StochasticKeys, int64_t i, int n, bool aligned)
        : m(load_vec(static_cast<const float*>(e.exp_avg) + i, n, aligned)),
          v(load_vec(static_cast<const float*>(e.exp_avg_sq) + i, n, aligned)) {}
    __device__ __forceinline__ float first(int k) const { return m.at[k]; }
    __device__ __forceinline__ float second(int k) const { return v.at[k]; }
    __device__ __forceinline__ void set(int k, float first, float second) {
        m.at[k] = first;
        v.at[k] = second;
    }
    __device__ __forceinline__ void store(const Entry& e, int64_t i, int n, bool aligned) const {
        store_vec(static_cast<float*>(e.exp_avg) + i, m, n, aligned);
        store_vec(static_cast<float*>(e.exp_avg_sq) + i, v, n, aligned);
    }
};

struct HalfMoments {
    Vec<uint16_t> m, v;
    StochasticKeys keys;
    uint32_t index;
    __device__ __forceinline__ HalfMoments(const Entry& e, StochasticKeys weights, int64_t i, int n, bool aligned)
        : m(load_vec(static_cast<const uint16_t*>(e.exp_avg) + i, n, aligned)),
          v(load_vec(static_cast<const uint16_t*>(e.exp_avg_sq) + i, n, aligned)),
          keys(stochastic_state_keys(weights)),
          index(uint32_t(e.first + i)) {}
    __device__ __forceinline__ float first(int k) const { return __uint_as_float(uint32_t(m.at[k]) << 16); }
    __device__ __forceinline__ float second(int k) const { return __uint_as_float(uint32_t(v.at[k]) << 16); }
    __device__ __forceinline__ void set(int k, float first, float second) {
        const uint32_t random = stochastic_bits(index + k, keys);
        m.at[k] = uint16_t(stochastic_round_by(__float_as_uint(first), nan_bits(first), random >> 16));
        v.at[k] = uint16_t(stochastic_round_by(__float_as_uint(second), nan_bits(second), random & 0xffffu));
    }
    __device__ __forceinline__ void store(const Entry& e, int64_t i, int n, bool aligned) const {
        store_vec(static_cast<uint16_t*>(e.exp_avg) + i, m, n, aligned);
        store_vec(static_cast<uint16_t*>(e.exp_avg_sq) + i, v, n, aligned);
    }
};

template <class Kept, class States, class G>
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
    if (threadIdx.x == 0) shared = adamw_coefficients(table.hyper, e.step, e.number, e.first);
    __syncthreads();
    const AdamWCoefficients c = shared;
    if (c.skip) return;
    const int64_t begin = int64_t(blockIdx.x - e.first_chunk) * kChunk;
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step) {
        const int64_t i = begin + (int64_t(step) * kThreads + threadIdx.x) * kVec;
        if (i >= e.numel) return;
        const int n = e.numel - i < kVec ? int(e.numel - i) : kVec;
        Kept kept(e, c.keys, i, n, e.aligned);
        States states(e, c.keys, i, n, e.aligned);
        const Vec<G> grad = load_vec(static_cast<const G*>(e.grad) + i, n, e.aligned);
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
            float p = kept.get(k), m = states.first(k), v = states.second(k);
            adamw_update<Math>(c, widen(grad.at[k]), p, m, v);
            kept.set(k, p);
            states.set(k, m, v);
        }
        kept.store(e, i, n, e.aligned);
        states.store(e, i, n, e.aligned);
    }
}

using Kernel = void (*)(Table);

template <class Kept, class States>
Kernel kernel_for(DType grad) {
    if (grad == DType::bf16) return adamw_kernel<Kept, States, bf16>;
    if (grad == DType::f16) return adamw_kernel<Kept, States, f16>;
    return adamw_kernel<Kept, States, float>;
}

template <class States>
Kernel kernel_for(Weights weights, DType param, DType grad) {
    if (weights == Weights::split) return kernel_for<Split, States>(grad);
    if (weights == Weights::stochastic) return kernel_for<Stochastic, States>(grad);
    if (weights == Weights::master) {
        if (param == DType::bf16) return kernel_for<Master<bf16>, States>(grad);
        return kernel_for<Master<f16>, States>(grad);
    }
    if constexpr (std::is_same_v<States, Moments>) {  // bf16 moments need a seed, which rounds bf16 weights too
        if (param == DType::bf16) return kernel_for<Plain<bf16>, States>(grad);
        if (param == DType::f16) return kernel_for<Plain<f16>, States>(grad);
    }
    return kernel_for<Plain<float>, States>(grad);
}

Kernel kernel_for(Weights weights, const AdamWTensor& t) {
    if (t.state_dtype == DType::bf16) return kernel_for<HalfMoments>(weights, t.dtype, t.grad_dtype);
    return kernel_for<Moments>(weights, t.dtype, t.grad_dtype);
}

}  // namespace

// One launch for each pair of dtypes among the parameters and gradients, one in practice; more past kTensors tensors.
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
            table.entries[table.count++] = {t.param, t.grad,  t.exp_avg, t.exp_avg_sq, t.rest, t.step,
                                            t.numel, t.first, t.number,  chunks,       aligned};
            chunks += static_cast<uint32_t>((t.numel + kChunk - 1) / kChunk);
        }
        launch("adamw", kernel_for(a.weights, kind), dim3(chunks), dim3(kThreads), sizeof(AdamWCoefficients), stream,
               table);
    }
}

}  // namespace cgpt
