// The border: what a tensor must be before a kernel may see it. Every message is one line,
// "op: argument must be WANTED, got GIVEN", and every pointer a kernel follows has passed through here.
#pragma once

#include <initializer_list>
#include <optional>
#include <string>

#include "view.h"

namespace cgpt {

const char* name_of(DType dtype);
std::string name_of_device(const View& v);
std::string shape_of(const View& v);

[[noreturn]] void fail(const char* op, const std::string& arg, const std::string& wanted, const std::string& got);

// The checks an argument needs, as a chain: Arg("layer_norm", "weight",
// w).dtype({f32}).shape({768}).contiguous(). In shape(), -1 accepts any extent. on(v) demands v's device.
class Arg {
  public:
    Arg(const char* op, std::string name, const View& v);
    Arg& dtype(std::initializer_list<DType> wanted);
    Arg& ndim(int wanted);
    Arg& shape(std::initializer_list<int64_t> wanted);
    Arg& contiguous();
    Arg& last_dim_contiguous();
    Arg& on(const View& other);

  private:
    const char* op_;
    std::string name_;
    const View& v_;
};

inline constexpr std::initializer_list<DType> kFloats = {DType::f32, DType::bf16, DType::f16};

// No kernel serves this op on this device: says so by name instead of falling back.
[[noreturn]] void fail_device(const char* op, const View& v);

template <class T>
T* data_or_null(const std::optional<View>& v) {
    return v ? v->as<T>() : nullptr;
}

}  // namespace cgpt
