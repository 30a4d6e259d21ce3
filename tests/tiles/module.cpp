// What of cgpt_ext._native goes through tiles, with the instruction set amx alone and its tiles in software.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>

#include "attention.h"
#include "cpu/matmul.h"
#include "cpu/scratch.h"
#include "cpu/threads.h"
#include "tensor.cpp"  // in one with this file: pybind11's headers take longer than all else here

#define ON_TILES_ALONE(name, Args)                                                     \
    namespace cgpt::scalar {                                                           \
    void name(const Args&) { throw std::logic_error(#name " is here for amx alone"); } \
    }                                                                                  \
    namespace cgpt::avx2 {                                                             \
    void name(const Args& args) { scalar::name(args); }                                \
    }                                                                                  \
    namespace cgpt::avx512 {                                                           \
    void name(const Args& args) { scalar::name(args); }                                \
    }                                                                                  \
    namespace cgpt::avx512bf16 {                                                       \
    void name(const Args& args) { scalar::name(args); }                                \
    }

ON_TILES_ALONE(attention_fwd, AttentionFwdArgs)
ON_TILES_ALONE(attention_bwd, AttentionBwdArgs)

namespace cgpt {
Isa cpu_isa() { return Isa::amx; }
}  // namespace cgpt

using namespace cgpt;

// out = a b^T in fp32; a (m, k), b (n, k) bf16, contiguous in rows or in columns.
void product(const View& a, const View& b, const View& out) {
    const auto lines = [](const View& v) {
        const bool along = v.stride[1] == 1;
        return amx::Lines<amx::bf16>{static_cast<const amx::bf16*>(v.data), v.stride[along ? 0 : 1], along};
    };
    amx::matmul(
        lines(a), lines(b), a.size[0], b.size[0], a.size[1],
        [&](const float* tile, int64_t ld, int64_t row, int64_t column, int64_t rows, int64_t columns) {
            for (int64_t r = 0; r < rows; ++r)
                std::copy_n(tile + r * ld, columns, static_cast<float*>(out.data) + (row + r) * out.stride[0] + column);
        },
        [](auto...) {});
}

PYBIND11_MODULE(_tiles, m) {
    const auto nogil = pybind11::call_guard<pybind11::gil_scoped_release>();
    m.def("attention_fwd", &attention_fwd, nogil);
    m.def("attention_bwd", &attention_bwd, nogil);
    m.def("matmul", &product, nogil);
    m.def("num_threads", &num_threads);
    // This thread's, of the software's tiles.
    m.def("configured", [] { return standin::state.configured; });
    m.def("configurations", [] { return standin::state.configurations; });
    m.def("products", [] { return standin::state.products; });
    m.def("poison_scratch", [](int64_t floats) {
        float* memory = amx::Scratch(floats).take(floats);
        std::fill(memory, memory + floats, std::nanf(""));
    });
}
