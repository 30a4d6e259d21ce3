// Everything Python may call. Tensors arrive as Views (tensor.h), the border functions check them, kernels
// run without the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "adamw.h"
#include "attention.h"
#include "cpu/isa.h"
#include "cpu/threads.h"
#include "cross_entropy.h"
#include "embedding.h"
#include "gelu_mlp.h"
#include "grad_norm.h"
#include "host/bind.h"
#include "layer_norm.h"
#include "linear.h"
#include "rotary.h"
#include "tensor.h"

namespace py = pybind11;
using namespace cgpt;
using namespace py::literals;

// What `python -m cgpt_ext` says of this build; setup.py knows the rest (CGPT_NVCC, CGPT_CUDA_ARCHS).
#if defined(__clang__)
static const char* const kCompiler = "clang " __clang_version__;
#else
static const char* const kCompiler = "gcc " __VERSION__;
#endif

PYBIND11_MODULE(_native, m) {
    m.doc() = "Native kernels of cgpt_ext. Call them through cgpt_ext.ops.";
    py::register_exception_translator([](std::exception_ptr p) {
        try {
            if (p) std::rethrow_exception(p);
        } catch (const TypeError& e) {
            PyErr_SetString(PyExc_TypeError, e.what());
        }
    });

#if defined(CGPT_CUDA)
    m.attr("has_cuda_kernels") = true;
    m.attr("built_with") = py::dict("compiler"_a = kCompiler, "nvcc"_a = CGPT_NVCC, "archs"_a = CGPT_CUDA_ARCHS);
#else
    m.attr("has_cuda_kernels") = false;
    m.attr("built_with") = py::dict("compiler"_a = kCompiler, "nvcc"_a = "", "archs"_a = "");
#endif
    m.def("cpu_isa", &cpu_isa_name);
    m.def("cpu_isas", &cpu_isas);
    m.def("set_cpu_isa", &set_cpu_isa);
    // torch sets a thread's count the first time that it is asked there, and must not do so after these.
    const auto settle = [] {
        if (py::module_::import("sys").attr("modules").contains("torch"))
            py::module_::import("torch").attr("get_num_threads")();
    };
    m.def("num_threads", [settle] {
        settle();
        return num_threads();
    });
    m.def("set_thread_count", [settle](int64_t n) {
        settle();
        return set_thread_count(n);
    });
    m.def("use_python_attributes", &use_python_attributes);

    const auto nogil = py::call_guard<py::gil_scoped_release>();
    m.def("adamw", &adamw, nogil);
    m.def("split_master", &split_master, nogil);
    m.def("join_master", &join_master, nogil);
    m.def("grad_norm", &grad_norm, nogil);
    m.def("grad_norm_workspace", &grad_norm_workspace, nogil);
    m.def("grad_square_sums", &grad_square_sums, nogil);
    m.def("attention_check", &attention_check, nogil);
    m.def("attention_fwd", &attention_fwd, nogil);
    m.def("attention_bwd", &attention_bwd, nogil);
    m.def("embedding_fwd", &embedding_fwd, nogil);
    m.def("embedding_bwd", &embedding_bwd, nogil);
    m.def("embedding_workspace", &embedding_workspace, nogil);
    m.def("gelu_mlp_check", &gelu_mlp_check, nogil);
    m.def("gelu_mlp_fwd", &gelu_mlp_fwd, nogil);
    m.def("gelu_mlp_bwd", &gelu_mlp_bwd, nogil);
    m.def("gelu_mlp_bias_grad", &gelu_mlp_bias_grad, nogil);
    m.def("gelu_mlp_product", &gelu_mlp_product, nogil);
    m.def("gelu_mlp_linear_fwd", &gelu_mlp_linear_fwd, nogil);
    m.def("gelu_mlp_linear_bwd", &gelu_mlp_linear_bwd, nogil);
    m.def("gelu_mlp_cublaslt_fwd", &gelu_mlp_cublaslt_fwd, nogil);
    m.def("gelu_mlp_cublaslt_bwd", &gelu_mlp_cublaslt_bwd, nogil);
    m.def("cross_entropy_check", &cross_entropy_check, nogil);
    m.def("cross_entropy_rows", &cross_entropy_rows, nogil);
    m.def("cross_entropy_share", &cross_entropy_share, nogil);
    m.def("cross_entropy_total", &cross_entropy_total, nogil);
    m.def("cross_entropy_add", &cross_entropy_add, nogil);
    m.def("rotary", &rotary, nogil);
    m.def("layer_norm_fwd", &layer_norm_fwd, nogil);
    m.def("layer_norm_bwd", &layer_norm_bwd, nogil);
    m.def("layer_norm_workspace", &layer_norm_workspace, nogil);
    m.def("linear", &linear, nogil);
    m.def("linear_check", &linear_check, nogil);
    bind_host(m);
}
