#pragma once

#include <cstdint>
#include <cstring>

struct __half {
    uint16_t bits;
};

inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half x) { return x.bits; }
inline float __half2float(__half x) {
    _Float16 value;
    std::memcpy(&value, &x.bits, sizeof value);
    return static_cast<float>(value);
}
inline __half __float2half_rn(float x) {
    const _Float16 value = static_cast<_Float16>(x);
    __half half;
    std::memcpy(&half.bits, &value, sizeof value);
    return half;
}
