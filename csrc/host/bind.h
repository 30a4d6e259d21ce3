#pragma once

#include <pybind11/pybind11.h>

namespace cgpt {

void bind_host(pybind11::module_& m);  // HostArena and DiskFile

}  // namespace cgpt
