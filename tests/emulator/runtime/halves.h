// bf16 and fp16 as 16 bits and as the fp32 they stand for.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulator {

inline float bits_to_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t float_to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float half_to_float(uint16_t h) {
    const int exponent = h >> 10 & 31, fraction = h & 1023;
    const float sign = h & 0x8000 ? -1.0f : 1.0f;
    if (exponent == 31) return fraction ? bits_to_float(uint32_t(h & 0x8000) << 16 | 0x7fc00000u) : sign * INFINITY;
    return sign * (exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(float(fraction), -24));
}

// To nearest even.
inline uint16_t float_to_half(float x) {
    const uint16_t sign = float_to_bits(x) >> 16 & 0x8000;
    if (x != x) return sign | 0x7e00;
    const float size = std::fabs(x);
    if (size >= 65520.0f) return sign | 0x7c00;
    if (size < 0x1p-14f) return sign | static_cast<uint16_t>(std::nearbyint(size * 0x1p24f));
    int exponent;
    const float fraction = std::frexp(size, &exponent);  // size = fraction * 2^exponent, fraction in [0.5, 1)
    return sign |
           static_cast<uint16_t>(((exponent + 14) << 10) - 1024 + static_cast<int>(std::nearbyint(fraction * 2048)));
}

inline uint16_t float_to_bf16(float x) {
    const uint32_t bits = float_to_bits(x);
    if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_half(uint32_t bits, bool bf16) {
    return bf16 ? bits_to_float(bits << 16) : half_to_float(static_cast<uint16_t>(bits));
}

}  // namespace emulator
