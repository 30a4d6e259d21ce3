// csrc/cpu/isa.h where the device is emulated: there are no CPU kernels, and a border that asks for one says so.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

namespace cgpt {

std::string cpu_isa_name();
std::vector<std::string> cpu_isas();
void set_cpu_isa(const std::string& name);

}  // namespace cgpt

#define CGPT_CPU_KERNEL(name, Args)                                                                \
    namespace cgpt {                                                                               \
    inline void name##_cpu(const Args&) { throw std::runtime_error(#name " has no CUDA kernel"); } \
    }
