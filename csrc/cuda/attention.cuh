// What the attention kernels share: swizzled tiles of 16-bit values in shared memory, who sees whom, and the schedule
// of FlashAttention-2 (Dao 2023, arXiv 2307.08691) in tiles that fit every device from sm_80 on.
//
// A head dim is padded with zeros to the next of 64, 80, 96, 128, 192, 256. Tiles, chosen by two budgets: 255 registers
// a thread with no spills, and the 99 KB of shared memory that a block may have on sm_86 and sm_89, so that one
// configuration serves all. "rows": fragments of 16 rows that a warp owns; two of them halve the shared memory reads
// for each product, one is what the registers hold at large head dims. A thread keeps rows * D / 2 sums (dkdv twice
// that), and beside them rows * keys / 2 scores (backward: twice those of the part "at once"). Loops that come close to
// 255 so have their invariants in shared memory, which costs a read a tile. KB: the tiles; less than 1 comes on top.
//
//   forward  D  warps rows  queries x keys  ring   KB     dkdv  D  warps  rows  keys x queries  at once  KB
//           64      4    2        128 x 64     4   48          64      4     2        128 x 64       32  64
//           80      4    2        128 x 64     3   50          80      8     1        128 x 32       32  60
//           96      4    2        128 x 64     3   60          96      8     1        128 x 32       32  72
//          128      4    2        128 x 48     4   80         128      8     1        128 x 32       32  96
//          192      8    1        128 x 64     2   96         192  4 x 2     1         64 x 32       32  96
//          256      8    1        128 x 32     2   96         256  4 x 2     1         64 x 16       16  96
//
//   dq       D  warps rows  queries x keys        at once  KB
//           64      4    2        128 x 64             32  64
//           80      4    2        128 x 64             32  80
//           96      4    2        128 x 32             32  72
//          128      4    2        128 x 32             32  96
//          192      4    1         64 x 32             32  96
//          256      4    1         64 x 16             16  96
#pragma once

#include "../attention.h"
#include "launch.cuh"
#include "ptx.cuh"
#include "reduce.cuh"
#include "vec.cuh"

namespace cgpt::cuda {

inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kInfinity = __builtin_huge_valf();
inline constexpr size_t kMaxSharedBytes = 99 * 1024;

// A tile's rows of D 16-bit values, in chunks of 16 bytes. ldmatrix reads eight consecutive rows at one chunk, so the
// chunks of eight rows must lie in different banks: a row's length and the XOR together give all eight places of 16
// bytes, of which a row's length alone gives 8 / kTurn.
template <int D>
struct Tile {
    static_assert(D % 16 == 0);
    static constexpr int kChunks = D / 8, kRowBytes = 2 * D;
    static constexpr int kTurn = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : 2;
    static __device__ __forceinline__ int turn(int row) { return row / (8 / kTurn) % kTurn; }
    static __device__ __forceinline__ int at(int row, int chunk) {
        return row * kRowBytes + ((chunk ^ turn(row)) << 4);
    }
};

// The address a lane gives to ldmatrix_x4, as one register a tile and constants: `row` is a multiple of 8 and `chunk`
// even, so neither meets the lane's own row, and the lane's turn is an XOR on the address itself, whose tile begins at
// a multiple of 128 bytes.
template <int D>
struct LaneAddress {
    Shared own;
    __device__ __forceinline__ LaneAddress(Shared tile, int row, int chunk) : own(tile + Tile<D>::at(row, chunk)) {}
    __device__ __forceinline__ Shared at(int row, int chunk) const {
        const int low = chunk % Tile<D>::kTurn, rest = chunk - low;
        return (own ^ (low << 4)) + (row * Tile<D>::kRowBytes + (rest << 4));
    }
};

// Matrices in the order of mma's A operand (16 rows x 16 columns), which is that of two B operands, too, when read with
// _trans: 16 rows of k, 16 columns of n.
template <int D>
__device__ __forceinline__ LaneAddress<D> lane_rows_first(Shared tile) {
    const int lane = threadIdx.x % kWarp;
    return {tile, lane % 16, lane / 16};
}
// Two B operands whose tile holds n in its rows: 16 rows of n, 16 columns of k.
template <int D>
__device__ __forceinline__ LaneAddress<D> lane_columns_first(Shared tile) {
    const int lane = threadIdx.x % kWarp;
    return {tile, lane % 8 + lane / 16 * 8, lane / 8 % 2};
}

// Starts the copy of `Rows` rows of a tile; those past `rows` and columns past `head_dim` become zeros. kTurn threads
// share a row, so that a thread's places differ by constants.
template <int Rows, int D, int Threads, class T>
__device__ __forceinline__ void copy_tile(Shared to, const T* from, int64_t stride, int rows, int head_dim) {
    constexpr int kTurn = Tile<D>::kTurn, kStep = Threads / kTurn;
    static_assert(kStep % 8 == 0);
    const int row = static_cast<int>(threadIdx.x) / kTurn, chunk = static_cast<int>(threadIdx.x) % kTurn;
    const Shared place = to + Tile<D>::at(row, chunk);
    const T* source = from + row * stride + chunk * 8;
#pragma unroll
    for (int r = 0; r < Rows; r += kStep) {
        if (Rows % kStep != 0 && r + row >= Rows) break;
#pragma unroll
        for (int c = 0; c < Tile<D>::kChunks; c += kTurn) {
            const bool valid = r + row < rows && (c + chunk) * 8 < head_dim;
            cp_async16(place + (r * Tile<D>::kRowBytes + c * 16), source + c * 8, valid);
        }
        source += kStep * stride;
    }
}

// c[m][n] += a b^T over the tiles' columns: 16 * MT rows of `a` from row a_row, 8 * NT of `b` from row b_row. Two tiles
// that lie behind each other are one with more rows: constant rows cost no registers, another tile's addresses do.
template <class T, int D, int MT, int NT>
__device__ __forceinline__ void product_abt(float (&c)[MT][NT][4], Shared a, int a_row, Shared b, int b_row) {
    const LaneAddress<D> rows = lane_rows_first<D>(a), columns = lane_columns_first<D>(b);
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        uint32_t af[MT][4];
#pragma unroll
        for (int m = 0; m < MT; ++m) ldmatrix_x4(af[m], rows.at(a_row + 16 * m, 2 * k));
#pragma unroll
        for (int n = 0; n < NT; n += 2) {
            uint32_t bf[4];
            ldmatrix_x4(bf, columns.at(b_row + 8 * n, 2 * k));
#pragma unroll
            for (int m = 0; m < MT; ++m) {
                mma<T>(c[m][n], af[m], {bf[0], bf[1]});
                mma<T>(c[m][n + 1], af[m], {bf[2], bf[3]});
            }
        }
    }
}

// Sums of one product, rounded to T, as the next one's A operand: the layouts are the same, in half the registers.
template <class T, int MT, int KT>
__device__ __forceinline__ void to_operand(uint32_t (&a)[MT][KT / 2][4], const float (&p)[MT][KT][4]) {
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int k = 0; k < KT; ++k)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                a[m][k / 2][k % 2 * 2 + half] = pack<T>(p[m][k][2 * half], p[m][k][2 * half + 1]);
}

// c[m][n] += a b, where 16 * KT of b's rows from b_row are k; its columns n, 8 * NT of them from chunk b_chunk.
template <class T, int D, int MT, int KT, int NT>
__device__ __forceinline__ void product_ab(float (&c)[MT][NT][4], const uint32_t (&a)[MT][KT][4], Shared b, int b_row,
                                           int b_chunk) {
    const LaneAddress<D> rows = lane_rows_first<D>(b);
#pragma unroll
    for (int k = 0; k < KT; ++k)
#pragma unroll
        for (int n = 0; n < NT; n += 2) {
            uint32_t bf[4];
            ldmatrix_x4_trans(bf, rows.at(b_row + 16 * k, b_chunk + n));
#pragma unroll
            for (int m = 0; m < MT; ++m) {
                mma<T>(c[m][n], a[m][k], {bf[0], bf[1]});
                mma<T>(c[m][n + 1], a[m][k], {bf[2], bf[3]});
            }
        }
}

template <int MT, int NT>
__device__ __forceinline__ void clear(float (&c)[MT][NT][4]) {
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) c[m][n][i] = 0.0f;
}

// A warp writes 16 * MT rows x 8 * NT columns of sums, each row times its factor, through its own part of shared
// memory, so that memory sees 16-byte accesses. `tile`: the rows' first byte there, a multiple of 8 rows into a tile;
// `first_chunk`: where in the row they go; `to`: the first row; `rows`: how many of them there are.
template <class T, int D, int MT, int NT>
__device__ __forceinline__ void store_rows(const float (&c)[MT][NT][4], const float (&factor)[MT][2],
                                           unsigned char* tile, T* to, int64_t stride, int first_chunk, int rows,
                                           int head_dim) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                *reinterpret_cast<uint32_t*>(tile + Tile<D>::at(16 * m + 8 * half + g, first_chunk + n) + 4 * t) =
                    pack<T>(c[m][n][2 * half] * factor[m][half], c[m][n][2 * half + 1] * factor[m][half]);
    __syncwarp();
#pragma unroll 4
    for (int i = lane; i < 16 * MT * NT; i += kWarp) {
        const int row = i / NT, chunk = first_chunk + i % NT;
        if (row < rows && chunk * 8 < head_dim)
            *reinterpret_cast<uint4*>(to + row * stride + chunk * 8) =
                *reinterpret_cast<const uint4*>(tile + Tile<D>::at(row, chunk));
    }
}

// Which of one side's rows some of a warp's rows meet, and which all of them do. Kept in shared memory: in loops that
// have no register to spare.
struct Bounds {
    int any_first, any_last, all_first, all_last;
    __device__ __forceinline__ bool any(int first, int last) const { return any_first <= last && first <= any_last; }
    __device__ __forceinline__ bool all(int first, int last) const { return all_first <= first && last <= all_last; }
};

// One sequence: where its rows begin (0 unless packed), how many there are and what its queries see.
struct Sequence {
    int64_t q_begin, k_begin;
    int tq, tk, left, right;

    __device__ __forceinline__ Sequence(const AttentionShape& s, int b) {
        const auto span = [b](const int32_t* cu, int64_t total, int64_t longest, int64_t& begin) {
            begin = 0;
            if (cu == nullptr) return static_cast<int>(longest);
            const auto within = [](int64_t x, int64_t low, int64_t high) {
                return x < low ? low : x > high ? high : x;
            };
            begin = within(cu[b], 0, total);
            return static_cast<int>(within(within(cu[b + 1], 0, total) - begin, 0, longest));
        };
        tq = span(s.cu_seqlens_q, s.total_q, s.Tq, q_begin);
        tk = span(s.cu_seqlens_k, s.total_k, s.Tk, k_begin);
        left = s.window_left < 0 || s.window_left > tk ? tk : static_cast<int>(s.window_left);
        right = s.window_right < 0 || s.window_right > tq ? tq : static_cast<int>(s.window_right);
    }
    // The key that query i stands above.
    __device__ __forceinline__ int above(int i) const { return i + tk - tq; }
    __device__ __forceinline__ int first_key(int i) const { return max(0, above(i) - left); }
    __device__ __forceinline__ int last_key(int i) const { return min(tk - 1, above(i) + right); }
    __device__ __forceinline__ int first_query(int j) const { return max(0, j - (tk - tq) - right); }
    __device__ __forceinline__ int last_query(int j) const { return min(tq - 1, j - (tk - tq) + left); }
    // What queries i0 to i1, or keys j0 to j1, see and are seen by, where there are as many; both ends included.
    __device__ __forceinline__ Bounds keys_of(int i0, int i1) const {
        i1 = min(i1, tq - 1);
        return {first_key(i0), i1 < i0 ? -1 : last_key(i1), first_key(i1), last_key(i0)};
    }
    __device__ __forceinline__ Bounds queries_of(int j0, int j1) const {
        j1 = min(j1, tk - 1);
        return {first_query(j0), j1 < j0 ? -1 : last_query(j1), first_query(j1), last_query(j0)};
    }
};

// Whether a query sees a key, from a thread's first query and first key: the rest are constants away, so all pairs of a
// tile share four registers.
struct Mask {
    int low, high, last_i, last_j;
    __device__ __forceinline__ Mask(const Sequence& seq, int i, int j)
        : low(seq.above(i) - seq.left - j),
          high(seq.above(i) + seq.right - j),
          last_i(seq.tq - 1 - i),
          last_j(seq.tk - 1 - j) {}
    __device__ __forceinline__ bool seen(int i, int j) const {
        return low <= j - i && j - i <= high && i <= last_i && j <= last_j;
    }
};

// Which tile of which head of which sequence a block works on. The tile runs fastest: a head's keys stay in L2.
struct Place {
    int tile, head, batch;
    __device__ __forceinline__ Place(int tiles, int heads)
        : tile(blockIdx.x % tiles), head(blockIdx.x / tiles % heads), batch(blockIdx.x / tiles / heads) {}
};

template <class T>
__device__ __forceinline__ T* row_of(const Heads& x, int batch, int head, int64_t row) {
    return static_cast<T*>(x.data) + batch * x.batch + head * x.head + row * x.time;
}

template <class T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
    return (a + b - 1) / b;
}

// Calls f with the padded head dim as a constant.
template <class F>
void with_head_dim(int64_t head_dim, F&& f) {
    if (head_dim <= 64) return f(std::integral_constant<int, 64>{});
    if (head_dim <= 80) return f(std::integral_constant<int, 80>{});
    if (head_dim <= 96) return f(std::integral_constant<int, 96>{});
    if (head_dim <= 128) return f(std::integral_constant<int, 128>{});
    if (head_dim <= 192) return f(std::integral_constant<int, 192>{});
    f(std::integral_constant<int, 256>{});
}

}  // namespace cgpt::cuda
