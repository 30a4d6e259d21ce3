// Launching a kernel: on the tensors' device, on torch's current stream, with every return code read. An error becomes
// "op: CUDA error 35 (CUDA driver version is insufficient for CUDA runtime version)", Python's RuntimeError.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace cgpt {

void* current_stream(int device_id);  // tensor.h, which nvcc would have to read pybind11 for

namespace cuda {

inline void check(const char* op, cudaError_t error) {
    if (error == cudaSuccess) return;
    throw std::runtime_error(std::string(op) + ": CUDA error " + std::to_string(static_cast<int>(error)) + " (" +
                             cudaGetErrorString(error) + ")");
}

// Makes a device current for as long as it lives.
class DeviceGuard {
  public:
    DeviceGuard(const char* op, int device_id) {
        check(op, cudaGetDevice(&before_));
        if (device_id != before_) check(op, cudaSetDevice(device_id));
        changed_ = device_id != before_;
    }
    ~DeviceGuard() {
        if (changed_) (void)cudaSetDevice(before_);  // a failure here is the next call's to report
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int before_ = 0;
    bool changed_ = false;
};

inline int multiprocessors(const char* op, int device_id) {
    int count = 0;
    check(op, cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_id));
    return count;
}

// shared_bytes: what ptx.cuh's shared_memory() then has.
template <class... Params, class... Args>
void launch(const char* op, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            const Args&... args) {
    if (shared_bytes > 48 * 1024)  // more than that is a kernel's own wish
        check(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       static_cast<int>(shared_bytes)));
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    check(op, cudaLaunchKernelEx(&config, kernel, args...));
}

}  // namespace cuda
}  // namespace cgpt
