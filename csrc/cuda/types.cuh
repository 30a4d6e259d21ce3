// The 16-bit floats as kernels hold them: their bits. vec.cuh widens and narrows them, ptx.cuh multiplies them.
#pragma once

#include <cstdint>

namespace cgpt::cuda {

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

}  // namespace cgpt::cuda
