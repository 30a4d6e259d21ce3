// Which instruction set the CPU kernels use. Every cpu/<op>.cpp is compiled once per set, inside a namespace
// of that name; the choice is made at run time, so one wheel runs anywhere and every path can be tested by
// name.
#pragma once

#include <string>
#include <vector>

namespace cgpt {

enum class Isa { scalar, avx2, avx512, avx512bf16, amx };

Isa cpu_isa();  // the best this machine has, or the one chosen by name
std::string cpu_isa_name();
std::vector<std::string> cpu_isas();        // those that this build has and this machine can run, best last
void set_cpu_isa(const std::string& name);  // std::invalid_argument names what there is

}  // namespace cgpt

// Declares a CPU kernel's variants and `<name>_cpu(args)`, which calls the chosen one.
#if defined(__x86_64__)
#define CGPT_CPU_KERNEL(name, Args)            \
    namespace cgpt::scalar {                   \
    void name(const Args&);                    \
    }                                          \
    namespace cgpt::avx2 {                     \
    void name(const Args&);                    \
    }                                          \
    namespace cgpt::avx512 {                   \
    void name(const Args&);                    \
    }                                          \
    namespace cgpt::avx512bf16 {               \
    void name(const Args&);                    \
    }                                          \
    namespace cgpt::amx {                      \
    void name(const Args&);                    \
    }                                          \
    namespace cgpt {                           \
    inline void name##_cpu(const Args& args) { \
        switch (cpu_isa()) {                   \
            case Isa::amx:                     \
                return amx::name(args);        \
            case Isa::avx512bf16:              \
                return avx512bf16::name(args); \
            case Isa::avx512:                  \
                return avx512::name(args);     \
            case Isa::avx2:                    \
                return avx2::name(args);       \
            case Isa::scalar:                  \
                return scalar::name(args);     \
        }                                      \
    }                                          \
    }
#else
#define CGPT_CPU_KERNEL(name, Args)                                         \
    namespace cgpt::scalar {                                                \
    void name(const Args&);                                                 \
    }                                                                       \
    namespace cgpt {                                                        \
    inline void name##_cpu(const Args& args) { return scalar::name(args); } \
    }
#endif
