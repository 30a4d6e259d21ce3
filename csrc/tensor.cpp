#include "tensor.h"

#include <atomic>
#include <cstddef>

namespace py = pybind11;

namespace cgpt {
namespace {

// The part of DLPack's C ABI that is used here; field order and types are the specification's.
struct DLDevice {
    int32_t type, id;
};
struct DLDataType {
    uint8_t code, bits;
    uint16_t lanes;
};
struct DLTensor {
    void* data;
    DLDevice device;
    int32_t ndim;
    DLDataType dtype;
    int64_t* shape;
    int64_t* strides;
    uint64_t byte_offset;
};
struct DLPackExchangeAPI {
    uint32_t major, minor;
    void* prev_api;
    void* managed_tensor_allocator;
    void* managed_tensor_from_py_object_no_sync;
    void* managed_tensor_to_py_object_no_sync;
    int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);
    int (*current_work_stream)(int32_t device_type, int32_t device_id, void** out);
};

enum { kDLInt = 0, kDLFloat = 2, kDLBfloat = 4 };
enum { kDLCPU = 1, kDLCUDA = 2, kDLCUDAHost = 3 };

struct Torch {
    PyTypeObject* tensor_type;
    const DLPackExchangeAPI* api;  // null: fall back to Python attributes
};

// Looked up at the first call, under the GIL; torch outlives every caller.
const Torch& torch() {
    static const Torch found = [] {
        py::object type = py::module_::import("torch").attr("Tensor");
        const DLPackExchangeAPI* api = nullptr;
        if (py::hasattr(type, "__dlpack_c_exchange_api__")) {
            py::object capsule = type.attr("__dlpack_c_exchange_api__");
            api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
            PyErr_Clear();
            if (api && (api->major != 1 || !api->dltensor_from_py_object_no_sync)) api = nullptr;
        }
        return Torch{reinterpret_cast<PyTypeObject*>(type.release().ptr()), api};
    }();
    return found;
}

std::atomic<bool> attributes_only{false};

DType dtype_of(DLDataType t) {
    if (t.lanes != 1) return DType::other;
    if (t.code == kDLFloat) {
        if (t.bits == 32) return DType::f32;
        if (t.bits == 16) return DType::f16;
        if (t.bits == 64) return DType::f64;
    }
    if (t.code == kDLBfloat && t.bits == 16) return DType::bf16;
    if (t.code == kDLInt) {
        if (t.bits == 64) return DType::i64;
        if (t.bits == 32) return DType::i32;
        if (t.bits == 16) return DType::i16;
    }
    return DType::other;
}

DType dtype_named(const std::string& name) {
    static constexpr std::pair<const char*, DType> names[] = {
        {"torch.float32", DType::f32}, {"torch.bfloat16", DType::bf16}, {"torch.float16", DType::f16},
        {"torch.float64", DType::f64}, {"torch.int64", DType::i64},     {"torch.int32", DType::i32},
        {"torch.int16", DType::i16},
    };
    for (auto& [text, dtype] : names)
        if (name == text) return dtype;
    return DType::other;
}

void set_ndim(View& out, int64_t ndim) {
    if (ndim > View::kMaxDims)
        throw std::invalid_argument("a tensor must have at most 8 dimensions, got " + std::to_string(ndim));
    out.ndim = static_cast<int>(ndim);
}

void from_attributes(py::handle t, View& out) {
    const std::string layout = py::str(t.attr("layout"));
    if (layout != "torch.strided") throw TypeError("a tensor must be dense, got layout " + layout);
    py::object device = t.attr("device");
    const std::string type = py::str(device.attr("type"));
    out.device = type == "cpu" ? Device::cpu : type == "cuda" ? Device::cuda : Device::other;
    out.device_id = out.device == Device::cuda ? device.attr("index").cast<int>() : 0;
    out.dtype = dtype_named(py::str(t.attr("dtype")));
    py::tuple shape = t.attr("shape"), stride = t.attr("stride")();
    set_ndim(out, static_cast<int64_t>(shape.size()));
    for (int i = 0; i < out.ndim; ++i) {
        out.size[i] = shape[i].cast<int64_t>();
        out.stride[i] = stride[i].cast<int64_t>();
    }
    out.data = out.device == Device::other ? nullptr : reinterpret_cast<void*>(t.attr("data_ptr")().cast<uintptr_t>());
}

}  // namespace

bool view_of_tensor(py::handle source, View& out) {
    const Torch& t = torch();
    if (!PyObject_TypeCheck(source.ptr(), t.tensor_type)) return false;
    if (!t.api || attributes_only.load(std::memory_order_relaxed)) {
        from_attributes(source, out);
        return true;
    }
    DLTensor d{};
    if (t.api->dltensor_from_py_object_no_sync(source.ptr(), &d) != 0) {
        // A device or dtype that DLPack cannot express (meta, float8): the attributes name it for the border
        // check.
        PyErr_Clear();
        from_attributes(source, out);
        return true;
    }
    out.device = d.device.type == kDLCPU || d.device.type == kDLCUDAHost ? Device::cpu
                 : d.device.type == kDLCUDA                              ? Device::cuda
                                                                         : Device::other;
    out.device_id = out.device == Device::cuda ? d.device.id : 0;
    out.dtype = dtype_of(d.dtype);
    set_ndim(out, d.ndim);
    for (int i = 0; i < out.ndim; ++i) {
        out.size[i] = d.shape[i];
        out.stride[i] = d.strides[i];
    }
    out.data = d.data ? static_cast<char*>(d.data) + d.byte_offset : nullptr;
    return true;
}

void use_python_attributes(bool on) { attributes_only = on; }

void* current_stream(int device_id) {
    void* stream = nullptr;
    if (const DLPackExchangeAPI* api = torch().api) {
        if (api->current_work_stream(kDLCUDA, device_id, &stream) != 0) throw py::error_already_set();
        return stream;
    }
    py::object current = py::module_::import("torch.cuda").attr("current_stream")(device_id);
    return reinterpret_cast<void*>(current.attr("cuda_stream").cast<uintptr_t>());
}

}  // namespace cgpt
