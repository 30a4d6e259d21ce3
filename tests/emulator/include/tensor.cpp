// csrc/tensor.cpp where the device is emulated: a CPU tensor is a CUDA tensor, and the device learns where its memory
// is.
#include "tensor.h"

#include "cpu/isa.h"
#include "cpu/threads.h"
#include "emulator.h"

namespace py = pybind11;

namespace cgpt {
namespace {

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

}  // namespace

bool view_of_tensor(py::handle t, View& out) {
    if (!py::isinstance(t, py::module_::import("torch").attr("Tensor"))) return false;
    const std::string type = py::str(t.attr("device").attr("type"));
    out.device = type == "cpu" ? Device::cuda : Device::other;
    out.dtype = dtype_named(py::str(t.attr("dtype")));
    py::tuple shape = t.attr("shape"), stride = t.attr("stride")();
    out.ndim = static_cast<int>(shape.size());
    if (out.ndim > View::kMaxDims) throw std::invalid_argument("a tensor must have at most 8 dimensions");
    int64_t last = 0;
    for (int i = 0; i < out.ndim; ++i) {
        out.size[i] = shape[i].cast<int64_t>();
        out.stride[i] = stride[i].cast<int64_t>();
        last += (out.size[i] - 1) * out.stride[i];
    }
    if (out.device != Device::cuda) return true;
    out.data = reinterpret_cast<void*>(t.attr("data_ptr")().cast<uintptr_t>());
    if (out.numel() != 0) emulator::add_tensor(out.data, (last + 1) * t.attr("element_size")().cast<int64_t>());
    return true;
}

void use_python_attributes(bool) {}
void* current_stream(int) { return nullptr; }
std::string cpu_isa_name() { return "emulated"; }
std::vector<std::string> cpu_isas() { return {"emulated"}; }
void set_cpu_isa(const std::string&) {}
int num_threads() { return 1; }
int set_thread_count(int64_t) { return 1; }

}  // namespace cgpt
