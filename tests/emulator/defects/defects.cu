// One kernel for each mistake that the emulator must see. With `planted` the mistake is made, without it the kernel is
// right; the line that the report must name ends in "caught: <kernel>".
#include <stdexcept>
#include <string>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"

namespace cgpt {
namespace {

using namespace cuda;

constexpr int kThreads = 64;

// out = in, each block's 64 elements turned round through shared memory.
__global__ void missing_barrier(const float* in, float* out, int, bool planted) {
    float* turned = shared_memory<float>();
    const int i = blockIdx.x * kThreads + threadIdx.x;
    turned[threadIdx.x] = 0.0f;  // so that reading too early is a race, not an uninitialised read
    __syncthreads();
    turned[kThreads - 1 - threadIdx.x] = in[i];
    if (!planted) __syncthreads();
    out[i] = turned[threadIdx.x];  // caught: missing_barrier
}

__global__ void missing_syncwarp(const float* in, float* out, int, bool planted) {
    float* swapped = shared_memory<float>();
    const int i = blockIdx.x * kThreads + threadIdx.x;
    swapped[threadIdx.x] = 0.0f;
    __syncwarp();
    swapped[threadIdx.x] = in[i];
    if (!planted) __syncwarp();
    out[i] = swapped[threadIdx.x ^ 1];  // caught: missing_syncwarp
}

// Two tiles through one buffer: without the second barrier a fast warp overwrites what a slow one still reads.
__global__ void overwritten_tile(const float* in, float* out, int, bool planted) {
    float* tile = shared_memory<float>();
    float sum = 0.0f;
    for (int step = 0; step < 2; ++step) {
        tile[threadIdx.x] = in[step * kThreads + threadIdx.x];  // caught: overwritten_tile
        __syncthreads();
        sum += tile[(threadIdx.x + 32) % kThreads];
        if (!planted) __syncthreads();
    }
    out[blockIdx.x * kThreads + threadIdx.x] = sum;
}

__global__ void missing_async_wait(const float* in, float* out, int, bool planted) {
    float* tile = shared_memory<float>();
    const int first = blockIdx.x * kThreads;
    if (threadIdx.x < kThreads / 4) cp_async16(shared_at(tile + 4 * threadIdx.x), in + first + 4 * threadIdx.x);
    cp_async_commit();
    if (!planted) cp_async_wait<0>();
    __syncthreads();
    out[first + threadIdx.x] = tile[threadIdx.x];  // caught: missing_async_wait
}

// out[i] = sum of in[0..i].
__global__ void off_by_one_mask(const float* in, float* out, int, bool planted) {
    const int i = blockIdx.x * kThreads + threadIdx.x;
    float sum = 0.0f;
    for (int j = 0; j <= i - int(planted); ++j) sum += in[j];
    out[i] = sum;  // caught: off_by_one_mask
}

// A 64 x 64 tile of bf16 stored with its 16-byte chunks permuted in each row, and read by ldmatrix.
__device__ void through_tile(const float* in, float* out, bool swizzle_store, bool swizzle_load) {
    char* tile = shared_memory<char>();
    for (int c = 0; c < 8; ++c) {
        const int row = threadIdx.x, chunk = swizzle_store ? c ^ (row % 8) : c;
        uint4 x;
        x.x = pack<bf16>(in[row * 64 + 8 * c], in[row * 64 + 8 * c + 1]);
        x.y = pack<bf16>(in[row * 64 + 8 * c + 2], in[row * 64 + 8 * c + 3]);
        x.z = pack<bf16>(in[row * 64 + 8 * c + 4], in[row * 64 + 8 * c + 5]);
        x.w = pack<bf16>(in[row * 64 + 8 * c + 6], in[row * 64 + 8 * c + 7]);
        *reinterpret_cast<uint4*>(tile + row * 128 + chunk * 16) = x;
    }
    __syncthreads();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    for (int block = 0; block < 4; ++block) {   // of 8 rows of this warp
        for (int half = 0; half < 2; ++half) {  // four matrices side by side
            const int row = warp * 32 + block * 8 + lane % 8, c = half * 4 + lane / 8;
            uint32_t r[4];
            const int chunk = swizzle_load ? c ^ (row % 8) : c;
            ldmatrix_x4(r, shared_at(tile) + row * 128 + chunk * 16);  // caught: bank_conflict
            for (int m = 0; m < 4; ++m) {
                float* to = out + (warp * 32 + block * 8 + g) * 64 + (half * 4 + m) * 8 + 2 * t;
                to[0] = widen(bf16{uint16_t(r[m])});  // caught: wrong_swizzle
                to[1] = widen(bf16{uint16_t(r[m] >> 16)});
            }
        }
    }
}

__global__ void wrong_swizzle(const float* in, float* out, int, bool planted) { through_tile(in, out, true, !planted); }

__global__ void bank_conflict(const float* in, float* out, int, bool planted) {
    through_tile(in, out, !planted, !planted);
}

__global__ void read_past_the_end(const float* in, float* out, int n, bool planted) {
    const int i = blockIdx.x * kThreads + threadIdx.x;
    if (i < n) out[i] = in[i + int(planted)];  // caught: read_past_the_end
}

__global__ void write_past_shared_memory(const float* in, float* out, int, bool planted) {
    float* tile = shared_memory<float>();
    tile[threadIdx.x + int(planted)] = in[threadIdx.x];  // caught: write_past_shared_memory
    __syncthreads();
    out[blockIdx.x * kThreads + threadIdx.x] = tile[threadIdx.x];
}

__global__ void uninitialised_shared_memory(const float* in, float* out, int, bool planted) {
    float* tile = shared_memory<float>();
    if (!planted || threadIdx.x != 17) tile[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    out[blockIdx.x * kThreads + threadIdx.x] = tile[threadIdx.x];  // caught: uninitialised_shared_memory
}

__global__ void divergent_shuffle(const float* in, float* out, int, bool planted) {
    float x = in[threadIdx.x];
    if (!planted || threadIdx.x % 32 < 16) x += __shfl_xor_sync(~0u, x, 1);  // caught: divergent_shuffle
    __syncthreads();
    out[blockIdx.x * kThreads + threadIdx.x] = x;
}

__global__ void divergent_barrier(const float* in, float* out, int, bool planted) {
    if (planted && threadIdx.x >= 32) {
        __syncthreads();
        out[0] = in[0];
    } else {
        __syncthreads();  // caught: divergent_barrier
    }
}

__global__ void misaligned_vector_load(const float* in, float* out, int n, bool planted) {
    const int i = 4 * (blockIdx.x * kThreads + threadIdx.x);
    if (i + 4 >= n) return;
    const float4 x = *reinterpret_cast<const float4*>(in + i + int(planted));  // caught: misaligned_vector_load
    out[i] = x.x + x.y + x.z + x.w;
}

__global__ void deadlock(const float* in, float* out, int, bool planted) {
    if (!planted || threadIdx.x < 32) named_barrier(1, kThreads);  // caught: deadlock
    out[blockIdx.x * kThreads + threadIdx.x] = in[threadIdx.x];
}

__global__ void race_between_blocks(const float* in, float* out, int, bool planted) {
    if (threadIdx.x == 0) out[planted ? 0 : blockIdx.x] = in[blockIdx.x];  // caught: race_between_blocks
}

__global__ void overflowing_index(const float* in, float* out, int n, bool planted) {
    const int rows = planted ? 1 << 26 : 1;
    const int at = rows * n;  // caught: overflowing_index
    if (at > 0 && threadIdx.x == 0 && blockIdx.x == 0) out[0] = in[0];
}

__global__ void spinning(const float* in, float* out, int, bool planted) {
    volatile float* flag = out;
    if (threadIdx.x == 0 && blockIdx.x == 0) {
        *flag = 0.0f;
        while (planted && *flag == 0.0f) {  // caught: spinning
        }
        out[1] = in[1];
    }
}

struct Defect {
    const char* name;
    void (*kernel)(const float*, float*, int, bool);
};
#define DEFECT(name) {#name, name}
constexpr Defect kDefects[] = {DEFECT(missing_barrier),
                               DEFECT(missing_syncwarp),
                               DEFECT(overwritten_tile),
                               DEFECT(missing_async_wait),
                               DEFECT(off_by_one_mask),
                               DEFECT(wrong_swizzle),
                               DEFECT(bank_conflict),
                               DEFECT(read_past_the_end),
                               DEFECT(write_past_shared_memory),
                               DEFECT(uninitialised_shared_memory),
                               DEFECT(divergent_shuffle),
                               DEFECT(divergent_barrier),
                               DEFECT(misaligned_vector_load),
                               DEFECT(deadlock),
                               DEFECT(race_between_blocks),
                               DEFECT(overflowing_index),
                               DEFECT(spinning)};

}  // namespace
}  // namespace cgpt

// Runs it over n elements in blocks of 64; returns what the device said, or "".
extern "C" __attribute__((visibility("default"))) const char* run_defect(const char* name, const float* in, float* out,
                                                                         int n, int blocks, bool planted) {
    static std::string said;
    said = "no such kernel";
    for (const cgpt::Defect& d : cgpt::kDefects) {
        if (std::string(name) != d.name) continue;
        const size_t shared_bytes = std::string(name) == "wrong_swizzle" || std::string(name) == "bank_conflict"
                                        ? 64 * 128
                                        : cgpt::kThreads * sizeof(float);
        try {
            cgpt::cuda::launch(name, d.kernel, dim3(blocks), dim3(cgpt::kThreads), shared_bytes, nullptr, in, out, n,
                               planted);
            said = "";
        } catch (const std::runtime_error& e) {
            said = e.what();
        }
    }
    return said.c_str();
}
