// attention forward: out = softmax(scale * q k^T - slope * |distance|) v and lse, the natural logarithm of each query's
// sum of exponentials; -inf, and out zero, for a query that sees no key. Shapes in attention.cpp, tiles in
// attention.cuh.
//
// A block takes a tile of queries and walks over the keys that they see; a warp keeps its own rows' sums, maxima and
// outputs in registers (FlashAttention-2). K and V tiles come in turn through one ring, so that a ring of two copies V
// under q k^T and the next K under p v, and a longer one runs further ahead. Tiles that a warp does not see at all are
// passed over; the test of each pair runs only in tiles that are seen in part: that branch is the same for a whole
// warp, so the loop stands once in the instruction cache instead of once with masks and once without.
//
// Scores: exp2((s - max) * scale * log2 e) with the difference first, so that the largest is 1 exactly however large
// the scores are. With slopes, or a scale that is not positive, scores are scaled first (`general`).
#pragma once

#include "attention.cuh"

namespace cgpt::cuda {

// What the loop seldom or never needs, in shared memory behind the tiles: every register is taken.
template <class T, int Warps>
struct FwdKept {
    Bounds keys[Warps];
    const T *k, *v;  // of the sequence's first key
    T* out;          // of the block's first query
    float* lse;      // likewise, or null
    float slope;
};

template <class T, int D, int Rows, int Warps, int Keys, int Ring, bool QueriesInRegisters>
__global__ void __launch_bounds__(Warps* kWarp) attention_fwd_kernel(const __grid_constant__ AttentionFwdArgs a) {
    constexpr int kThreads = Warps * kWarp, kWarpRows = 16 * Rows, kQueries = Warps * kWarpRows;
    constexpr int kQueryBytes = kQueries * Tile<D>::kRowBytes, kTileBytes = Keys * Tile<D>::kRowBytes;
    constexpr int KT = Keys / 8, NT = D / 8;
    const AttentionShape& s = a.shape;
    const int tiles = static_cast<int>(ceil_div<int64_t>(s.Tq, kQueries));
    const Place at(tiles, static_cast<int>(s.H));
    const Sequence seq(s, at.batch);
    const int i0 = (tiles - 1 - at.tile) * kQueries;  // the last queries see most keys where causal: they start first
    if (i0 >= seq.tq) return;
    const int i1 = min(i0 + kQueries, seq.tq) - 1, head_dim = static_cast<int>(s.D);
    const int key_head = at.head / static_cast<int>(s.H / s.Hkv);
    const T* q = row_of<T>(a.q, at.batch, at.head, seq.q_begin + i0);

    unsigned char* memory = shared_memory<unsigned char>();
    auto& kept = *reinterpret_cast<FwdKept<T, Warps>*>(memory + kQueryBytes + Ring * kTileBytes);
    const Shared q_tile = shared_at(memory), ring = q_tile + kQueryBytes;
    if (threadIdx.x == 0) {
        kept.k = row_of<T>(a.k, at.batch, key_head, seq.k_begin);
        kept.v = row_of<T>(a.v, at.batch, key_head, seq.k_begin);
        kept.out = row_of<T>(a.out, at.batch, at.head, seq.q_begin + i0);
        kept.lse =
            a.lse == nullptr ? nullptr : a.lse + at.batch * s.lse_batch + at.head * s.lse_head + seq.q_begin + i0;
        kept.slope = s.alibi_slopes == nullptr ? 0.0f : s.alibi_slopes[at.batch * s.alibi_stride + at.head];
    }
    __syncthreads();
    const int first = seq.first_key(i0) / Keys, last = seq.last_key(i1);
    const int end = last < seq.first_key(i0) ? first : last / Keys + 1;
    int reading = 0;  // the ring's slot that is computed with; the one before it is filled
    const auto fetch = [&](const T* from, int64_t stride, int tile, int slot) {
        if (tile < end)
            copy_tile<Keys, D, kThreads>(ring + slot * kTileBytes, from + int64_t(tile) * Keys * stride, stride,
                                         seq.tk - tile * Keys, head_dim);
        cp_async_commit();
    };
    const auto fetch_k = [&](int tile) { fetch(kept.k, a.k.time, tile, reading == 0 ? Ring - 1 : reading - 1); };
    const auto fetch_v = [&](int tile) { fetch(kept.v, a.v.time, tile, reading == 0 ? Ring - 1 : reading - 1); };
    const auto next = [&] {  // the tile at `reading` is there for all, and all have left the one before it
        cp_async_wait<Ring - 2>();
        __syncthreads();
    };

    copy_tile<kQueries, D, kThreads>(q_tile, q, a.q.time, seq.tq - i0, head_dim);
    fetch(kept.k, a.k.time, first, 0);
    if constexpr (Ring > 2) fetch(kept.v, a.v.time, first, 1);
    if constexpr (Ring > 3) fetch(kept.k, a.k.time, first + 1, 2);

    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4, warp = static_cast<int>(threadIdx.x) / kWarp;
    const int warp_row = warp * kWarpRows, w0 = i0 + warp_row;
    if (lane == 0) kept.keys[warp] = seq.keys_of(w0, w0 + kWarpRows - 1);
    const bool general = s.alibi_slopes != nullptr || !(s.scale > 0.0f);
    const float unit = general ? 1.0f : s.scale, to_exp2 = unit * kLog2e;

    float out[Rows][NT][4], top[Rows][2], sum[Rows][2];
    clear(out);
#pragma unroll
    for (int m = 0; m < Rows; ++m) top[m][0] = top[m][1] = -kInfinity, sum[m][0] = sum[m][1] = 0.0f;
    uint32_t qf[QueriesInRegisters ? D / 16 : 1][Rows][4];

#pragma unroll 1
    for (int tile = first; tile < end; ++tile) {
        const int j0 = tile * Keys, j1 = j0 + Keys - 1;
        uint32_t weights[Rows][KT / 2][4];
        next();
        const bool any = kept.keys[warp].any(j0, j1);
        if constexpr (Ring == 2) fetch_v(tile);
        if constexpr (Ring == 3) fetch_k(tile + 1);
        if constexpr (Ring == 4) fetch_v(tile + 1);
        if constexpr (QueriesInRegisters)
            if (tile == first) {
                const LaneAddress<D> rows = lane_rows_first<D>(q_tile + warp_row * Tile<D>::kRowBytes);
#pragma unroll
                for (int c = 0; c < D / 16; ++c)
#pragma unroll
                    for (int m = 0; m < Rows; ++m) ldmatrix_x4(qf[c][m], rows.at(16 * m, 2 * c));
            }
        if (any) {
            const Shared k_tile = ring + reading * kTileBytes;
            float p[Rows][KT][4];
            clear(p);
            if constexpr (QueriesInRegisters) {
                const LaneAddress<D> columns = lane_columns_first<D>(k_tile);
#pragma unroll
                for (int c = 0; c < D / 16; ++c)
#pragma unroll
                    for (int n = 0; n < KT; n += 2) {
                        uint32_t kf[4];
                        ldmatrix_x4(kf, columns.at(8 * n, 2 * c));
#pragma unroll
                        for (int m = 0; m < Rows; ++m) {
                            mma<T>(p[m][n], qf[c][m], {kf[0], kf[1]});
                            mma<T>(p[m][n + 1], qf[c][m], {kf[2], kf[3]});
                        }
                    }
            } else {
                product_abt<T, D>(p, q_tile + warp_row * Tile<D>::kRowBytes, 0, k_tile, 0);
            }
            if (general) {
                const float slope = kept.slope;
#pragma unroll
                for (int m = 0; m < Rows; ++m)
#pragma unroll
                    for (int n = 0; n < KT; ++n)
#pragma unroll
                        for (int e = 0; e < 4; ++e) {
                            const int away = seq.above(w0 + g) - (j0 + 2 * t) + (16 * m + e / 2 * 8 - 8 * n - e % 2);
                            p[m][n][e] = fmaf(p[m][n][e], s.scale, -slope * fabsf(static_cast<float>(away)));
                        }
            }
            if (!kept.keys[warp].all(j0, j1)) {
                const Mask mask(seq, w0 + g, j0 + 2 * t);
#pragma unroll
                for (int m = 0; m < Rows; ++m)
#pragma unroll
                    for (int n = 0; n < KT; ++n)
#pragma unroll
                        for (int e = 0; e < 4; ++e)
                            if (!mask.seen(16 * m + e / 2 * 8, 8 * n + e % 2)) p[m][n][e] = -kInfinity;
            }
            bool moved = false;
            float shrink[Rows][2];
#pragma unroll
            for (int m = 0; m < Rows; ++m)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float best = -kInfinity;
#pragma unroll
                    for (int n = 0; n < KT; ++n) best = fmaxf(best, fmaxf(p[m][n][2 * half], p[m][n][2 * half + 1]));
                    best = fmaxf(top[m][half], warp_max<4>(best));
                    const float base = best == -kInfinity ? 0.0f : best;  // -inf - -inf would be NaN
                    const float factor = exp2_approx((top[m][half] - base) * to_exp2);
                    float total = 0.0f;
#pragma unroll
                    for (int n = 0; n < KT; ++n)
#pragma unroll
                        for (int e = 0; e < 2; ++e) {
                            float& x = p[m][n][2 * half + e];
                            x = exp2_approx((x - base) * to_exp2);
                            total += x;
                        }
                    sum[m][half] = fmaf(sum[m][half], factor, total);
                    top[m][half] = best;
                    shrink[m][half] = factor;
                    moved = moved || factor != 1.0f;
                }
            to_operand<T>(weights, p);
            if (__any_sync(0xffffffffu, moved)) {  // rarely after the first tiles; times 1 changes nothing
#pragma unroll
                for (int m = 0; m < Rows; ++m)
#pragma unroll
                    for (int n = 0; n < NT; ++n)
#pragma unroll
                        for (int e = 0; e < 4; ++e) out[m][n][e] *= shrink[m][e / 2];
            }
        }
        reading = reading + 1 == Ring ? 0 : reading + 1;
        next();
        if constexpr (Ring == 2) fetch_k(tile + 1);
        if constexpr (Ring == 3) fetch_v(tile + 1);
        if constexpr (Ring == 4) fetch_k(tile + 2);
        if (any) product_ab<T, D>(out, weights, ring + reading * kTileBytes, 0, 0);
        reading = reading + 1 == Ring ? 0 : reading + 1;
    }
    cp_async_wait<0>();  // where no key is seen nobody has waited for the queries, whose place the outputs take
    __syncthreads();

#pragma unroll
    for (int m = 0; m < Rows; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int i = w0 + 16 * m + 8 * half + g;
            const float total = warp_sum<4>(sum[m][half]);
            if (a.lse != nullptr && t == 0 && i < seq.tq) kept.lse[i - i0] = top[m][half] * unit + logf(total);
            // Scores that are all -inf give 0/0, as they do in torch; only a query that sees no key gives zero.
            sum[m][half] = seq.first_key(i) <= seq.last_key(i) ? __fdividef(1.0f, total) : 0.0f;
        }
    store_rows<T, D>(out, sum, memory + warp_row * Tile<D>::kRowBytes, kept.out + warp_row * a.out.time, a.out.time, 0,
                     seq.tq - w0, head_dim);
}

template <class T>
void attention_fwd_launch(const AttentionFwdArgs& a, void* stream) {
    with_head_dim(a.shape.D, [&](auto head_dim) {
        constexpr int D = decltype(head_dim)::value;
        constexpr bool kSmall = D <= 128;
        constexpr int kRows = kSmall ? 2 : 1, kWarps = kSmall ? 4 : 8, kQueries = 16 * kRows * kWarps;
        constexpr int kKeys = D == 128 ? 48 : D == 256 ? 32 : 64;
        constexpr int kRing = D == 64 || D == 128 ? 4 : kSmall ? 3 : 2;
        constexpr size_t kBytes = (kQueries + kRing * kKeys) * Tile<D>::kRowBytes + sizeof(FwdKept<T, kWarps>);
        static_assert(kBytes <= kMaxSharedBytes);
        const int64_t blocks = ceil_div<int64_t>(a.shape.Tq, kQueries) * a.shape.H * a.shape.B;
        launch("attention", attention_fwd_kernel<T, D, kRows, kWarps, kKeys, kRing, (D <= 80)>,
               dim3(static_cast<unsigned>(blocks)), dim3(kWarps * kWarp), kBytes, stream, a);
    });
}

}  // namespace cgpt::cuda
