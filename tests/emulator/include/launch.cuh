// csrc/cuda/launch.cuh on a CPU: the launch runs to its end in this call.
#pragma once

#include <tuple>

#include "cuda_runtime.h"

namespace cgpt {

void* current_stream(int device_id);

namespace cuda {

class DeviceGuard {
  public:
    DeviceGuard(const char*, int) {}
};

inline int multiprocessors(const char*, int) { return emulator::multiprocessors(); }

template <class... Params>
struct Call {
    void (*kernel)(Params...);
    std::tuple<Params...> arguments;
    static void run(const void* call) {
        const Call& c = *static_cast<const Call*>(call);
        std::apply(c.kernel, c.arguments);
    }
};

template <class... Params, class... Args>
void launch(const char* op, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, void*,
            const Args&... args) {
    const Call<Params...> call = {kernel, {args...}};
    emulator::run({op,
                   reinterpret_cast<const void*>(kernel),
                   {grid.x, grid.y, grid.z},
                   {block.x, block.y, block.z},
                   shared_bytes,
                   reinterpret_cast<const char*>(&call),
                   sizeof call},
                  &Call<Params...>::run);
}

}  // namespace cuda
}  // namespace cgpt
