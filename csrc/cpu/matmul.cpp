// The three loops around a register tile of Goto and van de Geijn (2008, doi 10.1145/1356052.1356053): columns in
// blocks whose part of B is packed once, by all threads, and stays in the last-level cache; rows in blocks that one
// thread packs for itself and that stay in its second-level cache; the sum in parts of kDeepest. Packed operands are
// elements of gemm.h: pairs of bf16 where the instruction set multiplies those, floats elsewhere.
#include "matmul.h"

#include <algorithm>
#include <vector>

#include "gemm.h"
#include "scratch.h"
#include "threads.h"

namespace cgpt::CGPT_ISA {
namespace {

template <class E>
inline constexpr int64_t kPanel = kTileVecs<E> * W;  // columns of a panel of B
inline constexpr int64_t kRun = 16;                  // elements of one row that lie side by side in packed A
inline constexpr int64_t kBlockBytes = 192 << 10;    // of packed rows of A: beside a panel in a second-level cache
inline constexpr int64_t kColumnsBytes = 6 << 20;    // of packed panels of B
inline constexpr int64_t kRowsBytes = 16 << 20;      // of rows that lie across the sum, packed, and of unfinished sums

// Values of one part of the sum: a panel of 512 or 256 KiB. In fp32 the parts also keep the error of a long sum down.
template <class E>
inline constexpr int64_t kDeepest = kHeld<E> == 2 ? 4096 : 1024;

// Values as elements along the sum: element e of a line holds its values [e * held, (e + 1) * held).
template <class E, class T>
CGPT_INLINE vu elements_along(const T* line, int64_t values) {
    vu x{};
    if constexpr (kHeld<E> == 1)
        x = values >= W  ? reinterpret_cast<vu>(load(line))
            : values > 0 ? reinterpret_cast<vu>(load_n(line, values))
                         : x;
    else if (values >= 2 * W)
        std::memcpy(&x, line, sizeof x);
    else if (values > 0)
        std::memcpy(&x, line, values * sizeof(T));
    return x;
}

// Element e of W neighbouring lines: the values that stand at [e * held, (e + 1) * held) across the sum, from `line` on
// in lines `stride` apart, of which there are `depth`; `n` neighbours.
template <class E, class T, class N>
CGPT_INLINE vu element_across(const T* line, int64_t stride, int64_t depth, N n) {
    if constexpr (kHeld<E> == 1) {
        return reinterpret_cast<vu>(get(line, n));
    } else {
        const auto bits = [&](const T* p) {
            vh x{};
            std::memcpy(&x, p, n * sizeof(T));
            return widen_bits(x);
        };
        return depth > 1 ? bits(line) | bits(line + stride) << 16 : bits(line);
    }
}

CGPT_INLINE void store_bits(void* p, vu x) { std::memcpy(p, &x, sizeof x); }

// `lines` <= W of the operand's lines along the sum, from line `first` and value k0 on, as `depth` values of elements
// across it: vector e has element e of each line. Lines beyond `lines` are zero. put(e, vector) takes them.
template <class E, class T, class Put>
CGPT_INLINE void turn(const Lines<T>& x, int64_t first, int64_t lines, int64_t k0, int64_t depth, Put&& put) {
    constexpr int64_t held = kHeld<E>;
    for (int64_t e = 0; e * held < depth; e += W) {
        vu block[W];
        for (int64_t i = 0; i < W; ++i)
            block[i] =
                i < lines ? elements_along<E>(x.data + (first + i) * x.stride + k0 + e * held, depth - e * held) : vu{};
        transpose(block);
        const int64_t here = std::min<int64_t>(W, (depth - e * held + held - 1) / held);
        for (int64_t i = 0; i < here; ++i) put(e + i, block[i]);
    }
}

// Where packed rows of A have element e of row r: groups of kTileRows rows, in them runs of kRun elements, row by row.
// A tile then reads one stretch of memory, at offsets that are known when it is compiled.
template <class E>
CGPT_INLINE int64_t packed_at(int64_t r, int64_t e, int64_t elements) {
    constexpr int64_t group = kTileRows<E>;
    return (r / group * (elements / kRun) + e / kRun) * group * kRun + r % group * kRun + e % kRun;
}

template <class E>
CGPT_INLINE int64_t whole_groups(int64_t rows) {
    return (rows + kTileRows<E> - 1) / kTileRows<E> * kTileRows<E>;
}

// Rows [row, row + rows) of A and their values [k0, k0 + depth) to `to`, zeros up to whole groups and runs. Of an A
// that lies along the sum.
template <class E, class T>
void pack_rows(const Lines<T>& a, int64_t row, int64_t rows, int64_t k0, int64_t depth, int64_t elements, E* to) {
    for (int64_t r = 0; r < whole_groups<E>(rows); ++r) {
        const T* line = a.data + (row + r) * a.stride + k0;
        for (int64_t e = 0; e < elements; e += W) {
            const int64_t left = r < rows ? depth - e * kHeld<E> : 0;
            store_bits(to + packed_at<E>(r, e, elements), elements_along<E>(line + e * kHeld<E>, left));
        }
    }
}

// The same of an A that lies across the sum, and elements [e, e + W) alone: its lines are read from end to end.
template <class E, class T>
void pack_rows_across(const Lines<T>& a, int64_t row, int64_t rows, int64_t k0, int64_t depth, int64_t elements,
                      int64_t e, E* to) {
    constexpr int64_t held = kHeld<E>;
    const std::integral_constant<int64_t, W> full;
    for (int64_t r = 0; r < whole_groups<E>(rows); r += W) {
        const int64_t n = std::min<int64_t>(W, rows - r);
        vu block[W];
#pragma GCC unroll 16
        for (int64_t i = 0; i < W; ++i) {
            const int64_t left = n > 0 ? depth - (e + i) * held : 0;
            const T* line = a.data + (k0 + (e + i) * held) * a.stride + row + r;
            block[i] = left <= 0 ? vu{}
                       : n == W  ? element_across<E>(line, a.stride, left, full)
                                 : element_across<E>(line, a.stride, left, n);
        }
        transpose(block);
        for (int64_t i = 0; i < std::min<int64_t>(W, whole_groups<E>(rows) - r); ++i)
            store_bits(to + packed_at<E>(r + i, e, elements), block[i]);
    }
}

// Columns [column, column + columns) of one panel of B, (elements, vecs * W), zeros beyond `columns` and `depth`.
template <class E, class T>
void pack_panel(const Lines<T>& b, int64_t column, int64_t columns, int64_t vecs, int64_t k0, int64_t depth,
                int64_t elements, E* to) {
    constexpr int64_t held = kHeld<E>;
    const int64_t ld = vecs * W;
    if (b.along) {
        for (int64_t v = 0; v < vecs; ++v) {
            turn<E>(b, column + v * W, std::min<int64_t>(W, columns - v * W), k0, depth,
                    [&](int64_t e, vu x) { store_bits(to + e * ld + v * W, x); });
        }
    } else {
        for (int64_t e = 0; e * held < depth; ++e) {
            const T* line = b.data + (k0 + e * held) * b.stride + column;
            const int64_t left = depth - e * held;
            for_lanes(columns, [&](int64_t c, auto n) {
                store_bits(to + e * ld + c, element_across<E>(line + c, b.stride, left, n));
            });
        }
    }
    std::fill(to + (depth + held - 1) / held * ld, to + elements * ld, E{});
}

// One tile, of C vectors' columns and the whole depth of its operands, to `tile` (kTileRows, kPanel).
template <int C, class E>
__attribute__((noinline)) void multiply_tile(int64_t elements, const E* a, const E* b, float* tile) {
    constexpr int R = kTileRows<E>;
    vf c[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < C; ++v) c[r][v] = vf{};
    for (int64_t e = 0; e < elements; e += kRun, a += R * kRun, b += kRun * C * W) {
#pragma GCC unroll 2
        for (int64_t i = 0; i < kRun; ++i) {
            decltype(load(b)) line[C];
#pragma GCC unroll 4
            for (int v = 0; v < C; ++v) line[v] = load(b + (i * C + v) * W);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const auto x = broadcast(a + r * kRun + i);
#pragma GCC unroll 4
                for (int v = 0; v < C; ++v) c[r][v] = madd(x, line[v], c[r][v]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < C; ++v) store(tile + r * kPanel<E> + v * W, c[r][v]);
}

#if defined(__AMX_BF16__)
template <int C>
__attribute__((noinline)) void multiply_tile(int64_t elements, const bf16x2* a, const bf16x2* b, float* tile) {
    constexpr int64_t group = kTileRows<bf16x2>;
    static_assert(kRun == kTileSide);
    sum_tiles<group / kTileSide, C>(elements, a, kRun, group * kRun, b, C * W, tile, kPanel<bf16x2>);
}
#endif

template <class E, int C = kTileVecs<E>>
void multiply(int64_t vecs, int64_t elements, const E* a, const E* b, float* tile) {
    if constexpr (C > 1)
        if (vecs < C) return multiply<E, C - 1>(vecs, elements, a, b, tile);
    multiply_tile<C>(elements, a, b, tile);
}

// One part of the sum of one block of columns: rows' blocks against B's packed panels.
template <class T>
void matmul_part(const Lines<T>& a, const Lines<T>& b, int64_t row0, int64_t rows, int64_t column0, int64_t columns,
                 int64_t k, int64_t k0, int64_t depth, int64_t height, float* sums, Element<T>* packed,
                 Element<T>* packed_rows, const Finish& finish, const Foresee& foresee) {
    using E = Element<T>;
    constexpr int64_t group = kTileRows<E>, panel = kPanel<E>;
    const int64_t elements = (depth + kHeld<E> * kRun - 1) / (kHeld<E> * kRun) * kRun;
    const int64_t panels = (columns + panel - 1) / panel;
    const auto vecs_of = [&](int64_t p) { return (std::min(panel, columns - p * panel) + W - 1) / W; };
    parallel_for(panels, [&](int64_t p) {
        pack_panel<E>(b, column0 + p * panel, std::min(panel, columns - p * panel), vecs_of(p), k0, depth, elements,
                      packed + p * elements * panel);
    });

    if (packed_rows)
        parallel_for(elements / W,
                     [&](int64_t e) { pack_rows_across<E>(a, row0, rows, k0, depth, elements, e * W, packed_rows); });
    const int64_t blocks = (rows + height - 1) / height;
    const int64_t pieces = std::clamp<int64_t>((4 * num_threads() + blocks - 1) / blocks, 1, panels);
    parallel_for(blocks * pieces, [&](int64_t task) {
        const int64_t first = task / pieces * height, here = std::min(height, rows - first);
        const int64_t p0 = panels * (task % pieces) / pieces, p1 = panels * (task % pieces + 1) / pieces;
        const Tiles<E> tiles;
        Scratch scratch(whole_groups<E>(height) * elements + group * panel);
        float* tile = scratch.take(group * panel);
        E* block = packed_rows ? packed_rows + first * elements : scratch.take<E>(whole_groups<E>(here) * elements);
        if (!packed_rows) pack_rows<E>(a, row0 + first, here, k0, depth, elements, block);
        for (int64_t p = p0; p < p1; ++p) {
            const int64_t column = p * panel, width = std::min(panel, columns - column);
            for (int64_t r = 0; r < here; r += group) {
                const int64_t height_here = std::min<int64_t>(group, here - r);
                if (k0 + depth >= k) foresee(row0 + first + r, column0 + column, height_here, width);
                multiply(vecs_of(p), elements, block + r * elements, packed + p * elements * panel, tile);
                for (int64_t i = 0; sums && i < height_here; ++i) {
                    float* sum = sums + (first + r + i) * panels * panel + column;
                    for (int64_t c = 0; c < width; c += W) {
                        const vf x = load(tile + i * panel + c);
                        const vf total = k0 == 0 ? x : load(sum + c) + x;
                        store(k0 + depth < k ? sum + c : tile + i * panel + c, total);
                    }
                }
                if (k0 + depth >= k) finish(tile, panel, row0 + first + r, column0 + column, height_here, width);
            }
        }
    });
}

// Memory that all threads of a product share, kept by the thread that asks for it: fresh memory costs page faults.
// There are three of them.
inline float* workspace(int which, int64_t floats) {
    static thread_local std::vector<float> memories[3];
    std::vector<float>& memory = memories[which];
#if defined(__SANITIZE_ADDRESS__)
    memory = std::vector<float>(floats, NAN);  // with the ends that were asked for, and nothing of an earlier product
    return memory.data();
#else
    constexpr int64_t line = 16;  // floats of a cache line
    if (static_cast<int64_t>(memory.size()) < floats + line) memory = {}, memory.resize(floats + line);
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    return memory.data() + (4 * line - address % (4 * line)) % (4 * line) / 4;
#endif
}

}  // namespace

// Rows of a block: few enough for the second-level cache, and for some 64 blocks to share out. Depends on the shape
// alone.
template <class T>
int64_t block_rows(int64_t m, int64_t k) {
    using E = Element<T>;
    constexpr int64_t group = kTileRows<E>;
    const int64_t bytes = std::min(k, kDeepest<E>) / kHeld<E> * 4 + 1;
    const int64_t most = std::clamp<int64_t>(kBlockBytes / bytes / group, 1, 16), shared = m / 64 / group;
    return std::clamp<int64_t>(shared, std::min<int64_t>(2, most), most) * group;
}

template <class T>
void matmul(const Lines<T>& a, const Lines<T>& b, int64_t m, int64_t n, int64_t k, const Finish& finish,
            const Foresee& foresee) {
    using E = Element<T>;
    constexpr int64_t step = kHeld<E> * kRun, panel = kPanel<E>;
    const int64_t parts = std::max<int64_t>(1, (k + kDeepest<E> - 1) / kDeepest<E>);
    const int64_t depth = std::max((k + parts * step - 1) / (parts * step) * step, step), elements = depth / kHeld<E>;
    const int64_t fitting = std::max<int64_t>(1, kColumnsBytes / (elements * 4 * panel));
    const int64_t panels = std::min(fitting, (n + panel - 1) / panel), columns = panels * panel;
    // Rows at a time: all, but for what is kept of each in memory that the threads share.
    const int64_t shared = (a.along ? 0 : elements) + (parts == 1 ? 0 : columns), height = block_rows<T>(m, k);
    const int64_t rows = shared == 0 ? m : std::min(m, std::max<int64_t>(1, kRowsBytes / 4 / shared / height) * height);
    E* packed = reinterpret_cast<E*>(workspace(0, columns * elements));
    E* packed_rows = a.along ? nullptr : reinterpret_cast<E*>(workspace(1, whole_groups<E>(rows) * elements));
    float* sums = parts == 1 ? nullptr : workspace(2, rows * columns);
    for (int64_t row = 0; row < m; row += rows)
        for (int64_t column = 0; column < n; column += columns)
            for (int64_t k0 = 0; k0 == 0 || k0 < k; k0 += depth)
                matmul_part(a, b, row, std::min(rows, m - row), column, std::min(columns, n - column), k, k0,
                            std::min(depth, k - k0), height, sums, packed, packed_rows, finish, foresee);
}

#define CGPT_MATMUL_OF(T)                             \
    template int64_t block_rows<T>(int64_t, int64_t); \
    template void matmul(const Lines<T>&, const Lines<T>&, int64_t, int64_t, int64_t, const Finish&, const Foresee&);
CGPT_MATMUL_OF(float)
CGPT_MATMUL_OF(bf16)
CGPT_MATMUL_OF(f16)

}  // namespace cgpt::CGPT_ISA
