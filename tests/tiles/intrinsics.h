// AMX's intrinsics in software, after the pseudo-code of Intel's Software Developer's Manual, volume 2 (LDTILECFG,
// TILELOADD, TILESTORED, TILEZERO, TDPBF16PS, TILERELEASE). Included before a kernel's own text (-include), it puts
// itself in the place of the compiler's intrinsics; needs AVX-512. What the processor answers with #UD or #GP throws.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

namespace standin {

constexpr int kNames = 8, kRows = 16, kBytes = 64;  // palette 1

struct Tile {
    int rows, bytes;
    alignas(64) uint8_t row[kRows][kBytes];
};

struct State {
    bool configured;
    Tile tile[kNames];
    uint64_t configurations, products;  // executed by this thread
};
inline thread_local State state{};

[[noreturn]] inline void fault(const std::string& what) { throw std::runtime_error("tiles: " + what); }

inline Tile& named(int name) {
    if (!state.configured) fault("used where none are configured");
    if (name < 0 || name >= kNames) fault("number must be 0 to 7, got " + std::to_string(name));
    if (state.tile[name].rows == 0) fault("number " + std::to_string(name) + " has no shape");
    return state.tile[name];
}

inline void release() {
    state.configured = false;
    std::memset(state.tile, 0, sizeof state.tile);
}

inline void load_configuration(const void* memory) {
    uint8_t bytes[64];
    uint16_t columns[16];
    std::memcpy(bytes, memory, 64);
    std::memcpy(columns, bytes + 16, 32);
    if (bytes[0] > 1) fault("palette must be 0 or 1, got " + std::to_string(bytes[0]));
    release();
    if (bytes[0] == 0) return;
    for (int i = 1; i < 16; ++i)  // the start row is for interrupted loads alone
        if (bytes[i] != 0) fault("configuration's byte " + std::to_string(i) + " must be 0");
    for (int i = 0; i < 16; ++i) {
        const int rows = bytes[48 + i];
        if (i >= kNames && (rows || columns[i])) fault("palette 1 has no tile " + std::to_string(i));
        if ((rows == 0) != (columns[i] == 0) || rows > kRows || columns[i] > kBytes)
            fault("shape of " + std::to_string(i) + " must be up to 16 by 64, got " + std::to_string(rows) + " by " +
                  std::to_string(columns[i]));
        if (i < kNames) state.tile[i].rows = rows, state.tile[i].bytes = columns[i];
    }
    state.configured = true;
    ++state.configurations;
}

template <int name>
void zero() {
    std::memset(named(name).row, 0, sizeof(Tile::row));
}

template <int name>
void load(const void* base, int64_t stride) {
    Tile& t = named(name);
    std::memset(t.row, 0, sizeof t.row);
    for (int r = 0; r < t.rows; ++r) std::memcpy(t.row[r], static_cast<const char*>(base) + r * stride, t.bytes);
}

template <int name>
void store(void* base, int64_t stride) {
    const Tile& t = named(name);
    for (int r = 0; r < t.rows; ++r) std::memcpy(static_cast<char*>(base) + r * stride, t.row[r], t.bytes);
}

// c (rows, n) += a (rows, k) b (k, n) in pairs: the two halves' products are summed apart over all of k, each by a
// fused multiply-add, then added to each other, then to c; nearest even, denormals 0 in and out, whatever the caller's
// MXCSR.
inline void sum_products(Tile& c, const Tile& a, const Tile& b) {
    for (int m = 0; m < c.rows; ++m) {
        __m512 even = _mm512_setzero_ps(), odd = even;
        for (int k = 0; k < a.bytes / 4; ++k) {
            uint32_t pair;
            std::memcpy(&pair, a.row[m] + 4 * k, 4);
            const __m512i x = _mm512_set1_epi32(pair), y = _mm512_load_si512(b.row[k]);
            const __m512i high = _mm512_set1_epi32(0xffff0000);
            even = _mm512_fmadd_ps((__m512)_mm512_slli_epi32(x, 16), (__m512)_mm512_slli_epi32(y, 16), even);
            odd = _mm512_fmadd_ps((__m512)_mm512_and_si512(x, high), (__m512)_mm512_and_si512(y, high), odd);
        }
        _mm512_store_ps(c.row[m], _mm512_add_ps(_mm512_load_ps(c.row[m]), _mm512_add_ps(even, odd)));
    }
}

template <int to, int left, int right>
void multiply() {
    static_assert(to != left && to != right && left != right, "three different tiles");
    Tile &c = named(to), &a = named(left), &b = named(right);
    const auto shape = [](const Tile& t) { return std::to_string(t.rows) + " by " + std::to_string(t.bytes); };
    if (a.bytes % 4 || c.bytes % 4 || a.rows != c.rows || b.rows != a.bytes / 4 || b.bytes != c.bytes)
        fault("product of " + shape(a) + " and " + shape(b) + " does not fit " + shape(c));
    constexpr unsigned kExact = 0x1f80, kDenormalsAreZero = 0x40, kFlushToZero = 0x8000;
    const unsigned before = _mm_getcsr();
    _mm_setcsr(kExact | kDenormalsAreZero | kFlushToZero);
    asm volatile("" ::: "memory");  // operands are in memory: no arithmetic moves out of here
    sum_products(c, a, b);
    asm volatile("" ::: "memory");
    _mm_setcsr(before);
    ++state.products;
}

}  // namespace standin

#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(memory) standin::load_configuration(memory)
#define _tile_release() standin::release()
#define _tile_zero(tile) standin::zero<tile>()
#define _tile_loadd(tile, base, stride) standin::load<tile>(base, stride)
#define _tile_stream_loadd(tile, base, stride) standin::load<tile>(base, stride)
#define _tile_stored(tile, base, stride) standin::store<tile>(base, stride)
#define _tile_dpbf16ps(to, left, right) standin::multiply<to, left, right>()
