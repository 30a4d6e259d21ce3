// How a torch.Tensor becomes a View without any torch header.
//
// torch publishes a table of C functions in a capsule, torch.Tensor.__dlpack_c_exchange_api__ (DLPack 1.3,
// https://dmlc.github.io/dlpack/latest/c_api.html); one of them describes a tensor in about 20 ns without
// taking ownership. A torch without that table is asked for data_ptr(), shape, stride() and dtype as Python
// would.
#pragma once

#include <pybind11/pybind11.h>

#include "view.h"

namespace cgpt {

// Fills `out` from `source`; false if `source` is not a torch.Tensor. Throws on what a View cannot hold.
bool view_of_tensor(pybind11::handle source, View& out);

// For tests: describe tensors through Python attributes although torch has the table.
void use_python_attributes(bool on);

// The stream work on `device_id` is queued on: torch's current one (a cudaStream_t), or null for the default
// stream.
void* current_stream(int device_id);

}  // namespace cgpt

namespace pybind11::detail {

template <>
struct type_caster<cgpt::View> {
    PYBIND11_TYPE_CASTER(cgpt::View, const_name("torch.Tensor"));
    bool load(handle source, bool) { return cgpt::view_of_tensor(source, value); }
};

}  // namespace pybind11::detail
