// Two vectors at a time, their values in the order that costs least. load2 gives the 2 W values from p on, store2 takes
// them back, and element<T>(j) says which of them is lane j % W of half j / W. bf16 comes as its even and its odd
// elements: of the same 32-bit lanes those are a shift and a mask, where W of them in order are a load, a shuffle and a
// shift, and they go back without being packed. The other types come in order. Sums along a row or down a column do not
// care.
#pragma once

#include "vec.h"

namespace cgpt::CGPT_ISA {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "bf16's even elements are the lower halves");

struct vf2 {
    vf half[2];
};

template <class T>
constexpr int element(int j) {
    return std::is_same_v<T, bf16> ? j % W * 2 + j / W : j;
}

template <class T>
CGPT_INLINE vf2 load2(const T* p) {
    return {load(p), load(p + W)};
}
CGPT_INLINE vf2 load2(const bf16* p) {
    vu bits;
    std::memcpy(&bits, p, sizeof bits);
    return {as_float(bits << 16), as_float(bits & 0xffff0000u)};
}

template <class T>
CGPT_INLINE void store2(T* p, vf2 x) {
    store(p, x.half[0]);
    store(p + W, x.half[1]);
}
// In the upper half of each lane, rounded to nearest even. A NaN is cut off: what arithmetic returns keeps its quiet
// bit.
CGPT_INLINE vu rounded_to_bf16(vf x) {
    const vu u = reinterpret_cast<vu>(x);
    return u + (x == x ? 0x7fffu + ((u >> 16) & 1u) : vu{});
}
CGPT_INLINE void store2(bf16* p, vf2 x) {
    const vu bits = (rounded_to_bf16(x.half[0]) >> 16) | (rounded_to_bf16(x.half[1]) & 0xffff0000u);
    std::memcpy(p, &bits, sizeof bits);
}

// Calls body(i, n, k) along [0, size) in steps of 2 W: n is that but for the last, shorter step, and k is 0 or 1 in
// turn, to index accumulators whose additions do not wait for each other.
template <class F>
CGPT_INLINE void for_pairs(int64_t size, F&& body) {
    const std::integral_constant<int64_t, 2 * W> full;
    int64_t i = 0;
    for (; i + 4 * W <= size; i += 4 * W) {
        body(i, full, std::integral_constant<int, 0>{});
        body(i + 2 * W, full, std::integral_constant<int, 1>{});
    }
    if (i + 2 * W <= size) {
        body(i, full, std::integral_constant<int, 0>{});
        i += 2 * W;
    }
    if (i < size) body(i, size - i, std::integral_constant<int, 1>{});
}
template <class T>
CGPT_INLINE vf2 get2(const T* p, std::integral_constant<int64_t, 2 * W>) {
    return load2(p);
}
template <class T>
CGPT_INLINE vf2 get2(const T* p, int64_t n) {
    T values[2 * W] = {};
    std::memcpy(values, p, n * sizeof(T));
    return load2(values);
}
template <class T>
CGPT_INLINE void put2(T* p, vf2 x, std::integral_constant<int64_t, 2 * W>) {
    store2(p, x);
}
template <class T>
CGPT_INLINE void put2(T* p, vf2 x, int64_t n) {
    T values[2 * W];
    store2(values, x);
    std::memcpy(p, values, n * sizeof(T));
}

// x, in T's order, with its elements from n on set to zero.
template <class T>
CGPT_INLINE vf2 keep2(vf2 x, std::integral_constant<int64_t, 2 * W>) {
    return x;
}
template <class T>
CGPT_INLINE vf2 keep2(vf2 x, int64_t n) {
    for (int j = 0; j < 2 * W; ++j)
        if (element<T>(j) >= n) x.half[j / W][j % W] = 0;
    return x;
}

// The values of a T array, or of the fp32 one that stands for it, in T's order; and back.
template <class T, class P, class N>
CGPT_INLINE vf2 get2_as(const P* p, N n) {
    const vf2 x = get2(p, n);
    if constexpr (std::is_same_v<T, P>) return x;
    vf2 y;
    for (int j = 0, from; j < 2 * W; ++j) from = element<T>(j), y.half[j / W][j % W] = x.half[from / W][from % W];
    return y;
}
template <class T, class P, class N>
CGPT_INLINE void put2_as(P* p, vf2 x, N n) {
    vf2 y = x;
    if constexpr (!std::is_same_v<T, P>)
        for (int j = 0, to; j < 2 * W; ++j) to = element<T>(j), y.half[to / W][to % W] = x.half[j / W][j % W];
    put2(p, y, n);
}

}  // namespace cgpt::CGPT_ISA
