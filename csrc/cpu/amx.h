// AMX: eight registers a thread, tiles of 16 rows by 64 bytes, and one instruction that multiplies two of them, bf16
// pairs summed in fp32 (TDPBF16PS, Intel's Software Developer's Manual, volume 2). A tile of pairs of A has 16 rows and
// 16 of k, one of B 16 of k and 16 columns, one of sums 16 by 16.
//
// Every tile has its full size: what is smaller is padded. That costs a product of a few rows up to all of 16, but a
// sum's order, and so its bits, is the same wherever in a tile it stands.
#pragma once

#include "vec.h"

namespace cgpt::CGPT_ISA {

#if defined(__AMX_BF16__)

inline constexpr int64_t kTileSide = 16;  // rows of a tile, and 32-bit elements of its rows

struct TileShapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
static_assert(sizeof(TileShapes) == 64);

// In static memory: gcc's intrinsic says that it reads the first 8 bytes, so the rest of a local might go unwritten.
alignas(64) inline constexpr TileShapes kTileShapes = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// Shapes this thread's tiles. They are unusable before and after; empty they cost a switch of threads nothing.
CGPT_INLINE void hold_tiles() { _tile_loadconfig(&kTileShapes); }
CGPT_INLINE void release_tiles() { _tile_release(); }

// The sums of R by C tiles over `depth` of k, in steps of 16 (the last one whole too), to `sums` (16 R, ld). a points
// to the first row, b to the first of k, and their rows are lda and ldb elements apart; A's next step of k is at a +
// step.
template <int R, int C>
CGPT_INLINE void sum_tiles(int64_t depth, const void* a, int64_t lda, int64_t step, const void* b, int64_t ldb,
                           float* sums, int64_t ld) {
    static_assert((R == 1 || R == 2) && (C == 1 || C == 2));
    const char *rows = static_cast<const char*>(a), *columns = static_cast<const char*>(b);
    const int64_t row = lda * 4, line = ldb * 4;
    asm volatile("" ::: "memory");  // gcc's loads of tiles do not say that they read memory
    _tile_zero(0);
    if constexpr (C == 2) _tile_zero(1);
    if constexpr (R == 2) _tile_zero(2);
    if constexpr (R == 2 && C == 2) _tile_zero(3);
    for (int64_t k = 0; k < depth; k += kTileSide) {
        _tile_loadd(6, columns, line);
        _tile_loadd(4, rows, row);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (R == 2) {
            _tile_loadd(5, rows + kTileSide * row, row);
            _tile_dpbf16ps(2, 5, 6);
        }
        if constexpr (C == 2) {
            _tile_loadd(7, columns + kTileSide * 4, line);
            _tile_dpbf16ps(1, 4, 7);
            if constexpr (R == 2) _tile_dpbf16ps(3, 5, 7);
        }
        rows += step * 4;
        columns += kTileSide * line;
    }
    _tile_stored(0, sums, ld * 4);
    if constexpr (C == 2) _tile_stored(1, sums + kTileSide, ld * 4);
    if constexpr (R == 2) _tile_stored(2, sums + kTileSide * ld, ld * 4);
    if constexpr (R == 2 && C == 2) _tile_stored(3, sums + kTileSide * ld + kTileSide, ld * 4);
}

#else
inline void hold_tiles() {}
inline void release_tiles() {}
#endif

}  // namespace cgpt::CGPT_ISA
