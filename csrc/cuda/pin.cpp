// Page-locking host memory for the CUDA driver (HostArena). A refusal is an answer, not an error: the caller then moves
// its data through a smaller piece that is pinned.
#include "../host/arena.h"
#include "launch.cuh"

namespace cgpt {
namespace {

std::string text(cudaError_t error) {
    return "CUDA error " + std::to_string(static_cast<int>(error)) + " (" + cudaGetErrorString(error) + ")";
}

}  // namespace

std::string pin(void* data, size_t nbytes, int device_id) {
    int devices = 0;
    cudaError_t error = cudaGetDeviceCount(&devices);
    if (error == cudaSuccess && (device_id < 0 || device_id >= devices))
        return "device " + std::to_string(device_id) + " is not among the " + std::to_string(devices) + " there are";
    if (error == cudaSuccess) {
        try {
            const cuda::DeviceGuard guard("HostArena", device_id);
            error = cudaHostRegister(data, nbytes, cudaHostRegisterPortable);
        } catch (const std::runtime_error& refusal) {
            (void)cudaGetLastError();
            return refusal.what();
        }
    }
    (void)cudaGetLastError();  // the next launch must not be blamed for it
    return error == cudaSuccess ? "" : text(error);
}

void unpin(void* data, int device_id) {
    try {
        const cuda::DeviceGuard guard("HostArena", device_id);
        (void)cudaHostUnregister(data);
    } catch (const std::runtime_error&) {  // at the process's end the driver may be gone already
    }
    (void)cudaGetLastError();
}

}  // namespace cgpt
