// A tensor as the kernels see it: pointer, dtype, device, sizes and strides (in elements).
// A View borrows: it is valid while the Python tensor behind it is alive, which the call's arguments ensure.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace cgpt {

enum class DType : uint8_t { f32, bf16, f16, f64, i16, i32, i64, other };
enum class Device : uint8_t { cpu, cuda, other };

struct View {
    static constexpr int kMaxDims = 8;

    void* data = nullptr;
    DType dtype = DType::other;
    Device device = Device::other;
    int device_id = 0;
    int ndim = 0;
    int64_t size[kMaxDims] = {};
    int64_t stride[kMaxDims] = {};

    int64_t numel() const {
        int64_t n = 1;
        for (int i = 0; i < ndim; ++i) n *= size[i];
        return n;
    }
    bool contiguous() const {
        int64_t expected = 1;
        for (int i = ndim - 1; i >= 0; --i) {
            if (size[i] != 1 && stride[i] != expected) return numel() == 0;
            expected *= size[i];
        }
        return true;
    }
    template <class T>
    T* as() const {
        return static_cast<T*>(data);
    }
};

// Becomes Python's TypeError; std::invalid_argument becomes ValueError.
struct TypeError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

}  // namespace cgpt
