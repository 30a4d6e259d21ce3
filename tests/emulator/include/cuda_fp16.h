// A stand-in for CUDA's own header of this name.
#pragma once

#include "cuda_runtime.h"

struct __half {
    uint16_t bits;
};
CGPT_EMULATED float __half2float(__half x) { return emulator::half_to_float(x.bits); }
CGPT_EMULATED __half __float2half_rn(float x) { return {emulator::float_to_half(x)}; }
CGPT_EMULATED __half __ushort_as_half(unsigned short x) { return {x}; }
CGPT_EMULATED unsigned short __half_as_ushort(__half x) { return x.bits; }
