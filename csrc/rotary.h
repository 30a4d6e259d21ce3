// rotary: arguments and launchers. Shapes and dtypes are in rotary.cpp, which checks them.
#pragma once

#include "cpu/isa.h"
#include "view.h"

namespace cgpt {

struct RotaryArgs {
    const void* x;  // (batch, time, heads, dim), element (b, t, h, 0) at b * stride[0] + t * stride[1] + h * stride[2]
    const float *cos, *sin;  // (at least time, rotated / 2)
    void* out;               // (batch, time, heads, dim) contiguous
    int64_t batch, time, heads, dim, rotated;
    int64_t stride[3];
    bool interleaved, inverse;  // inverse: by the negative angle, which is the gradient
    DType dtype;
};

void rotary(const View& x, const View& cos, const View& sin, const View& out, bool interleaved, bool inverse);

#if defined(CGPT_CUDA)
void rotary_cuda(const RotaryArgs& args, int device_id);
#endif

}  // namespace cgpt

CGPT_CPU_KERNEL(rotary, RotaryArgs)
