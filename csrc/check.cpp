#include "check.h"

namespace cgpt {

const char* name_of(DType dtype) {
    switch (dtype) {
        case DType::f32:
            return "float32";
        case DType::bf16:
            return "bfloat16";
        case DType::f16:
            return "float16";
        case DType::f64:
            return "float64";
        case DType::i16:
            return "int16";
        case DType::i32:
            return "int32";
        case DType::i64:
            return "int64";
        case DType::other:
            break;
    }
    return "another dtype";
}

std::string name_of_device(const View& v) {
    if (v.device == Device::cpu) return "cpu";
    if (v.device == Device::cuda) return "cuda:" + std::to_string(v.device_id);
    return "another device";
}

static std::string join(const int64_t* values, int n) {
    std::string s = "(";
    for (int i = 0; i < n; ++i) s += (i ? ", " : "") + (values[i] < 0 ? std::string("*") : std::to_string(values[i]));
    return s + (n == 1 ? ",)" : ")");
}

std::string shape_of(const View& v) { return join(v.size, v.ndim); }

void fail(const char* op, const std::string& arg, const std::string& wanted, const std::string& got) {
    throw std::invalid_argument(std::string(op) + ": " + arg + " must be " + wanted + ", got " + got);
}

void fail_device(const char* op, const View& v) {
    throw std::invalid_argument(std::string(op) + ": no kernel in this build for device " + name_of_device(v));
}

Arg::Arg(const char* op, std::string name, const View& v) : op_(op), name_(std::move(name)), v_(v) {
    if (v.device == Device::other) fail(op, name_, "on a cpu or cuda device", "another device");
    if (v.data == nullptr && v.numel() != 0) fail(op, name_, "a tensor with memory", "one without (meta or fake)");
}

Arg& Arg::dtype(std::initializer_list<DType> wanted) {
    std::string names;
    const DType* previous = nullptr;
    for (const DType& d : wanted) {
        if (d == v_.dtype) return *this;
        if (!previous || *previous != d) names += (previous ? " or " : "") + std::string(name_of(d));
        previous = &d;
    }
    throw TypeError(std::string(op_) + ": " + name_ + " must be " + names + ", got " + name_of(v_.dtype));
}

Arg& Arg::ndim(int wanted) {
    if (v_.ndim != wanted) fail(op_, name_, std::to_string(wanted) + "-dimensional", "shape " + shape_of(v_));
    return *this;
}

Arg& Arg::shape(std::initializer_list<int64_t> wanted) {
    const int n = static_cast<int>(wanted.size());
    bool same = n == v_.ndim;
    for (int i = 0; same && i < n; ++i) {
        const int64_t extent = wanted.begin()[i];
        same = extent < 0 || extent == v_.size[i];
    }
    if (!same) fail(op_, name_, join(wanted.begin(), n), shape_of(v_));
    return *this;
}

Arg& Arg::contiguous() {
    if (!v_.contiguous())
        fail(op_, name_, "contiguous", "shape " + shape_of(v_) + " with strides " + join(v_.stride, v_.ndim));
    return *this;
}

Arg& Arg::last_dim_contiguous() {
    const int i = v_.ndim - 1;
    if (i >= 0 && v_.size[i] > 1 && v_.stride[i] != 1)
        fail(op_, name_, "contiguous in its last dimension", "strides " + join(v_.stride, v_.ndim));
    return *this;
}

Arg& Arg::on(const View& other) {
    if (v_.device != other.device || v_.device_id != other.device_id)
        fail(op_, name_, "on " + name_of_device(other), name_of_device(v_));
    return *this;
}

}  // namespace cgpt
