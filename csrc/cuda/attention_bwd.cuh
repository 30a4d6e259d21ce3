// attention backward, in three launches and without atomics, so that two runs give the same bits:
//
//   delta   delta_i = sum_d dout_id out_id
//   dkdv    a block takes a tile of keys of one key head and walks over its query heads' queries that see them
//   dq      a block takes a tile of queries and walks over the keys that they see
//
//   p_ij = exp(s_ij - lse_i),  dv_j = sum_i p_ij dout_i,  ds_ij = p_ij (dout_i . v_j - delta_i),
//   dk_j = scale sum_i ds_ij q_i,  dq_i = scale sum_j ds_ij k_j           (Dao 2023, arXiv 2307.08691)
//
// Scores are computed twice, once by each walk: seven products where an atomic or ordered sum of dq would take five.
// The walk over queries computes them transposed, so that in both p and ds leave one product in the layout that the
// next reads and stay in registers. Shapes in attention.cpp, tiles in attention.cuh.
#pragma once

#include "attention.cuh"

namespace cgpt::cuda {

inline constexpr int kDeltaThreads = 256, kDeltaLanes = 8, kDeltaRows = kDeltaThreads / kDeltaLanes;

// Of all rows there are: packed sequences count as one.
__host__ __device__ inline int64_t delta_rows(const AttentionShape& s) {
    return s.cu_seqlens_q == nullptr ? s.Tq : s.total_q;
}

template <class T>
__global__ void __launch_bounds__(kDeltaThreads)
    attention_bwd_delta_kernel(const __grid_constant__ AttentionBwdArgs a) {
    const AttentionShape& s = a.shape;
    const int64_t rows = delta_rows(s);
    const Place at(static_cast<int>(ceil_div<int64_t>(rows, kDeltaRows)), static_cast<int>(s.H));
    const int lane = threadIdx.x % kDeltaLanes;
    const int64_t row = int64_t(at.tile) * kDeltaRows + threadIdx.x / kDeltaLanes;
    float sum = 0.0f;
    if (row < rows) {
        const T* dout = row_of<T>(a.dout, at.batch, at.head, row);
        const T* out = row_of<T>(a.out, at.batch, at.head, row);
        for (int d = lane * kVec; d < s.D; d += kDeltaLanes * kVec) {
            const Vec<T> x = load_vec(dout + d, kVec, true), y = load_vec(out + d, kVec, true);
#pragma unroll
            for (int i = 0; i < kVec; ++i) sum = fmaf(widen(x.at[i]), widen(y.at[i]), sum);
        }
    }
    sum = warp_sum<kDeltaLanes>(sum);
    if (lane == 0 && row < rows) a.delta[at.batch * s.lse_batch + at.head * s.lse_head + row] = sum;
}

// The probability of a pair from its product, as the forward pass scaled it.
struct Probability {
    float scale, slope;
    bool biased;
    __device__ __forceinline__ float operator()(float product, float lse, int away) const {
        float score = product * scale;
        if (biased) score = fmaf(product, scale, -slope * fabsf(static_cast<float>(away)));
        return exp2_approx((score - lse) * kLog2e);
    }
};

// What dkdv's loop has besides its tiles in shared memory, so that it does not hold registers.
template <class T, int Warps, int Queries>
struct DkdvKept {
    struct {
        float lse[Queries], delta[Queries], slope;
        int first_query;
    } stage[2];
    Bounds queries[Warps];
    int batch;
    int64_t q_begin;
    T *dk, *dv;  // of the block's first key
};

// Rows: of 16 keys for a warp. Halves: warps that share their keys, each with its part of dk's and dv's columns, which
// all of them together would not fit the registers. Queries: of a tile, `Part` of them at once in registers.
template <class T, int D, int Rows, int RowWarps, int Halves, int Queries, int Part>
__global__ void __launch_bounds__(RowWarps * Halves * kWarp)
    attention_bwd_dkdv_kernel(const __grid_constant__ AttentionBwdArgs a) {
    constexpr int kThreads = RowWarps * Halves * kWarp, kWarpRows = 16 * Rows, kKeys = RowWarps * kWarpRows;
    constexpr int kRow = Tile<D>::kRowBytes, kKeyBytes = kKeys * kRow, kTileBytes = Queries * kRow;
    constexpr int NT = D / Halves / 8, QT = Part / 8;
    static_assert(2 * Queries <= kThreads);
    const AttentionShape& s = a.shape;
    const Place at(static_cast<int>(ceil_div<int64_t>(s.Tk, kKeys)), static_cast<int>(s.Hkv));
    const Sequence seq(s, at.batch);
    const int j0 = at.tile * kKeys;  // the first keys are seen most where causal: they start first
    if (j0 >= seq.tk) return;
    const int j1 = min(j0 + kKeys, seq.tk) - 1, head_dim = static_cast<int>(s.D);
    const int group = static_cast<int>(s.H / s.Hkv);

    unsigned char* memory = shared_memory<unsigned char>();
    const Shared k_tile = shared_at(memory), v_tile = k_tile + kKeyBytes, tiles = v_tile + kKeyBytes;
    auto& kept = *reinterpret_cast<DkdvKept<T, RowWarps * Halves, Queries>*>(memory + 2 * kKeyBytes + 4 * kTileBytes);
    if (threadIdx.x == 0) {
        kept.batch = at.batch;
        kept.q_begin = seq.q_begin;
        kept.dk = row_of<T>(a.dk, at.batch, at.head, seq.k_begin + j0);
        kept.dv = row_of<T>(a.dv, at.batch, at.head, seq.k_begin + j0);
    }
    __syncthreads();

    const int first = seq.first_query(j0) / Queries, last = seq.last_query(j1);
    const int count = last < seq.first_query(j0) ? 0 : last / Queries + 1 - first, steps = count * group;
    // The step to be fetched: a tile of a head's queries, with lse and delta, one number a thread.
    int next_tile = first, next_head = at.head * group;
    const auto fetch = [&](int stage) {
        const int i0 = next_tile * Queries, batch = kept.batch;
        const int64_t row = kept.q_begin + i0;
        const T* q = row_of<T>(a.q, batch, next_head, row);
        const T* dout = row_of<T>(a.dout, batch, next_head, row);
        copy_tile<Queries, D, kThreads>(tiles + 2 * stage * kTileBytes, q, a.q.time, seq.tq - i0, head_dim);
        copy_tile<Queries, D, kThreads>(tiles + (2 * stage + 1) * kTileBytes, dout, a.dout.time, seq.tq - i0, head_dim);
        const int i = static_cast<int>(threadIdx.x) % Queries;
        const float* from = threadIdx.x < Queries ? a.lse : a.delta;
        float statistic = 0.0f;
        if (threadIdx.x < 2 * Queries && i < seq.tq - i0)
            statistic = from[batch * s.lse_batch + next_head * s.lse_head + row + i];
        if (threadIdx.x == 0) {
            kept.stage[stage].first_query = i0;
            kept.stage[stage].slope =
                s.alibi_slopes == nullptr ? 0.0f : s.alibi_slopes[batch * s.alibi_stride + next_head];
        }
        if (++next_tile == first + count) next_tile = first, ++next_head;
        return statistic;
    };
    const auto keep = [&](int stage, float statistic) {
        float* to = threadIdx.x < Queries ? kept.stage[stage].lse : kept.stage[stage].delta;
        if (threadIdx.x < 2 * Queries) to[threadIdx.x % Queries] = statistic;
    };

    copy_tile<kKeys, D, kThreads>(k_tile, row_of<T>(a.k, at.batch, at.head, seq.k_begin + j0), a.k.time, seq.tk - j0,
                                  head_dim);
    copy_tile<kKeys, D, kThreads>(v_tile, row_of<T>(a.v, at.batch, at.head, seq.k_begin + j0), a.v.time, seq.tk - j0,
                                  head_dim);
    if (steps > 0) keep(0, fetch(0));
    cp_async_commit();

    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4, warp = static_cast<int>(threadIdx.x) / kWarp;
    const int warp_row = warp % RowWarps * kWarpRows, chunk = Halves == 1 ? 0 : warp / RowWarps * NT;
    const int w0 = j0 + warp_row;
    if (lane == 0) kept.queries[warp] = seq.queries_of(w0, w0 + kWarpRows - 1);
    float dk[Rows][NT][4], dv[Rows][NT][4];
    clear(dk);
    clear(dv);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        const int stage = step % 2;
        cp_async_wait<0>();
        __syncthreads();
        float statistic = 0.0f;
        if (step + 1 < steps) statistic = fetch(1 - stage);
        cp_async_commit();
#pragma unroll 1
        for (int part = 0; part < Queries; part += Part) {
            const int i0 = kept.stage[stage].first_query + part, i1 = i0 + Part - 1;
            if (!kept.queries[warp].any(i0, i1)) continue;
            const Shared q_part = tiles + (2 * stage * kTileBytes + part * kRow);
            float p[Rows][QT][4];
            clear(p);
            product_abt<T, D>(p, k_tile + warp_row * kRow, 0, q_part, 0);
            const Probability probability = {s.scale, kept.stage[stage].slope, s.alibi_slopes != nullptr};
            const float *lse = kept.stage[stage].lse + part + 2 * t, *delta = kept.stage[stage].delta + part + 2 * t;
#pragma unroll
            for (int m = 0; m < Rows; ++m)
#pragma unroll
                for (int n = 0; n < QT; ++n)
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        p[m][n][e] =
                            probability(p[m][n][e], lse[8 * n + e % 2],
                                        seq.above(i0 + 2 * t) - (w0 + g) + (8 * n + e % 2 - 16 * m - e / 2 * 8));
            const auto hide = [&](float (&x)[Rows][QT][4]) {
                const Mask mask(seq, i0 + 2 * t, w0 + g);
#pragma unroll
                for (int m = 0; m < Rows; ++m)
#pragma unroll
                    for (int n = 0; n < QT; ++n)
#pragma unroll
                        for (int e = 0; e < 4; ++e)
                            if (!mask.seen(8 * n + e % 2, 16 * m + e / 2 * 8)) x[m][n][e] = 0.0f;
            };
            const bool whole = kept.queries[warp].all(i0, i1);
            if (!whole) hide(p);
            uint32_t operand[Rows][QT / 2][4];
            to_operand<T>(operand, p);
            product_ab<T, D>(dv, operand, q_part, Queries, chunk);
            float ds[Rows][QT][4];
            clear(ds);
            product_abt<T, D>(ds, k_tile + warp_row * kRow, kKeys, q_part, Queries);
#pragma unroll
            for (int m = 0; m < Rows; ++m)
#pragma unroll
                for (int n = 0; n < QT; ++n)
#pragma unroll
                    for (int e = 0; e < 4; ++e) ds[m][n][e] = p[m][n][e] * (ds[m][n][e] - delta[8 * n + e % 2]);
            if (!whole) hide(ds);
            to_operand<T>(operand, ds);
            product_ab<T, D>(dk, operand, q_part, 0, chunk);
        }
        keep(1 - stage, statistic);
    }
    cp_async_wait<0>();
    __syncthreads();  // the gradients take the places of k and v
    float scale[Rows][2], one[Rows][2];
#pragma unroll
    for (int m = 0; m < Rows; ++m) scale[m][0] = scale[m][1] = s.scale, one[m][0] = one[m][1] = 1.0f;
    unsigned char* place = memory + warp_row * kRow;
    store_rows<T, D>(dk, scale, place, kept.dk + warp_row * a.dk.time, a.dk.time, chunk, seq.tk - w0, head_dim);
    store_rows<T, D>(dv, one, place + kKeyBytes, kept.dv + warp_row * a.dv.time, a.dv.time, chunk, seq.tk - w0,
                     head_dim);
}

// What dq's loop needs seldom, behind its tiles in shared memory.
template <class T, int Warps, int Queries>
struct DqKept {
    Bounds keys[Warps];
    float lse[Queries], delta[Queries], slope;
    const T *k, *v;  // of the sequence's first key
    T* dq;           // of the block's first query
};

template <class T, int D, int Rows, int Warps, int Keys, int Part>
__global__ void __launch_bounds__(Warps* kWarp) attention_bwd_dq_kernel(const __grid_constant__ AttentionBwdArgs a) {
    constexpr int kThreads = Warps * kWarp, kWarpRows = 16 * Rows, kQueries = Warps * kWarpRows;
    constexpr int kRow = Tile<D>::kRowBytes, kQueryBytes = kQueries * kRow, kTileBytes = Keys * kRow;
    constexpr int NT = D / 8, KT = Part / 8;
    const AttentionShape& s = a.shape;
    const int query_tiles = static_cast<int>(ceil_div<int64_t>(s.Tq, kQueries));
    const Place at(query_tiles, static_cast<int>(s.H));
    const Sequence seq(s, at.batch);
    const int i0 = (query_tiles - 1 - at.tile) * kQueries;
    if (i0 >= seq.tq) return;
    const int i1 = min(i0 + kQueries, seq.tq) - 1, head_dim = static_cast<int>(s.D);
    const int key_head = at.head / static_cast<int>(s.H / s.Hkv);

    unsigned char* memory = shared_memory<unsigned char>();
    const Shared q_tile = shared_at(memory), dout_tile = q_tile + kQueryBytes, tiles = dout_tile + kQueryBytes;
    auto& kept = *reinterpret_cast<DqKept<T, Warps, kQueries>*>(memory + 2 * kQueryBytes + 4 * kTileBytes);
    for (int i = static_cast<int>(threadIdx.x); i < kQueries; i += kThreads) {
        const int64_t from = at.batch * s.lse_batch + at.head * s.lse_head + seq.q_begin + i0 + i;
        kept.lse[i] = i0 + i < seq.tq ? a.lse[from] : 0.0f;
        kept.delta[i] = i0 + i < seq.tq ? a.delta[from] : 0.0f;
    }
    if (threadIdx.x == 0) {
        kept.slope = s.alibi_slopes == nullptr ? 0.0f : s.alibi_slopes[at.batch * s.alibi_stride + at.head];
        kept.k = row_of<T>(a.k, at.batch, key_head, seq.k_begin);
        kept.v = row_of<T>(a.v, at.batch, key_head, seq.k_begin);
        kept.dq = row_of<T>(a.dq, at.batch, at.head, seq.q_begin + i0);
    }
    __syncthreads();
    const int first = seq.first_key(i0) / Keys, last = seq.last_key(i1);
    const int end = last < seq.first_key(i0) ? first : last / Keys + 1;
    const auto fetch = [&](int tile, int stage) {
        const int64_t row = int64_t(tile) * Keys;
        const int rows = seq.tk - tile * Keys;
        copy_tile<Keys, D, kThreads>(tiles + 2 * stage * kTileBytes, kept.k + row * a.k.time, a.k.time, rows, head_dim);
        copy_tile<Keys, D, kThreads>(tiles + (2 * stage + 1) * kTileBytes, kept.v + row * a.v.time, a.v.time, rows,
                                     head_dim);
    };
    copy_tile<kQueries, D, kThreads>(q_tile, row_of<T>(a.q, at.batch, at.head, seq.q_begin + i0), a.q.time, seq.tq - i0,
                                     head_dim);
    copy_tile<kQueries, D, kThreads>(dout_tile, row_of<T>(a.dout, at.batch, at.head, seq.q_begin + i0), a.dout.time,
                                     seq.tq - i0, head_dim);
    if (first < end) fetch(first, 0);
    cp_async_commit();

    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    const int warp = static_cast<int>(threadIdx.x) / kWarp, warp_row = warp * kWarpRows, w0 = i0 + warp_row;
    if (lane == 0) kept.keys[warp] = seq.keys_of(w0, w0 + kWarpRows - 1);
    float dq[Rows][NT][4];
    clear(dq);

#pragma unroll 1
    for (int tile = first; tile < end; ++tile) {
        const int stage = (tile - first) % 2;
        cp_async_wait<0>();
        __syncthreads();
        if (tile + 1 < end) fetch(tile + 1, 1 - stage);
        cp_async_commit();
#pragma unroll 1
        for (int part = 0; part < Keys; part += Part) {
            const int j0 = tile * Keys + part, j1 = j0 + Part - 1;
            if (!kept.keys[warp].any(j0, j1)) continue;
            const Shared k_part = tiles + (2 * stage * kTileBytes + part * kRow);
            float p[Rows][KT][4], ds[Rows][KT][4];
            clear(p);
            product_abt<T, D>(p, q_tile + warp_row * kRow, 0, k_part, 0);
            const Probability probability = {s.scale, kept.slope, s.alibi_slopes != nullptr};
            const float *lse = kept.lse + warp_row + g, *delta = kept.delta + warp_row + g;
#pragma unroll
            for (int m = 0; m < Rows; ++m)
#pragma unroll
                for (int n = 0; n < KT; ++n)
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        p[m][n][e] =
                            probability(p[m][n][e], lse[16 * m + e / 2 * 8],
                                        seq.above(w0 + g) - (j0 + 2 * t) + (16 * m + e / 2 * 8 - 8 * n - e % 2));
            clear(ds);
            product_abt<T, D>(ds, q_tile + warp_row * kRow, kQueries, k_part, Keys);
#pragma unroll
            for (int m = 0; m < Rows; ++m)
#pragma unroll
                for (int n = 0; n < KT; ++n)
#pragma unroll
                    for (int e = 0; e < 4; ++e) ds[m][n][e] = p[m][n][e] * (ds[m][n][e] - delta[16 * m + e / 2 * 8]);
            if (!kept.keys[warp].all(j0, j1)) {
                const Mask mask(seq, w0 + g, j0 + 2 * t);
#pragma unroll
                for (int m = 0; m < Rows; ++m)
#pragma unroll
                    for (int n = 0; n < KT; ++n)
#pragma unroll
                        for (int e = 0; e < 4; ++e)
                            if (!mask.seen(16 * m + e / 2 * 8, 8 * n + e % 2)) ds[m][n][e] = 0.0f;
            }
            uint32_t operand[Rows][KT / 2][4];
            to_operand<T>(operand, ds);
            product_ab<T, D>(dq, operand, k_part, 0, 0);
        }
    }
    cp_async_wait<0>();
    __syncthreads();
    float scale[Rows][2];
#pragma unroll
    for (int m = 0; m < Rows; ++m) scale[m][0] = scale[m][1] = s.scale;
    store_rows<T, D>(dq, scale, memory + warp_row * kRow, kept.dq + warp_row * a.dq.time, a.dq.time, 0, seq.tq - w0,
                     head_dim);
}

template <class T>
void attention_bwd_launch(const AttentionBwdArgs& a, void* stream) {
    const AttentionShape& s = a.shape;
    const auto run = [&](auto kernel, int64_t tiles, int64_t heads, int threads, size_t bytes) {
        const int64_t blocks = tiles * heads * s.B;
        if (blocks > 0)
            launch("attention", kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), bytes, stream, a);
    };
    const int64_t delta_tiles = ceil_div<int64_t>(delta_rows(s), kDeltaRows) * s.H;
    const unsigned delta_blocks = static_cast<unsigned>(s.cu_seqlens_q == nullptr ? delta_tiles * s.B : delta_tiles);
    if (delta_blocks > 0)
        launch("attention", attention_bwd_delta_kernel<T>, dim3(delta_blocks), dim3(kDeltaThreads), 0, stream, a);
    with_head_dim(s.D, [&](auto head_dim) {
        constexpr int D = decltype(head_dim)::value, kRow = Tile<D>::kRowBytes, kAtOnce = D == 256 ? 16 : 32;
        {
            constexpr int kRows = D == 64 ? 2 : 1, kRowWarps = D == 64 || D > 128 ? 4 : 8, kHalves = D > 128 ? 2 : 1;
            constexpr int kKeys = 16 * kRows * kRowWarps, kQueries = D == 64 ? 64 : D == 256 ? 16 : 32;
            constexpr size_t kBytes =
                (2 * kKeys + 4 * kQueries) * kRow + sizeof(DkdvKept<T, kRowWarps * kHalves, kQueries>);
            static_assert(kBytes <= kMaxSharedBytes);
            run(attention_bwd_dkdv_kernel<T, D, kRows, kRowWarps, kHalves, kQueries, kAtOnce>,
                ceil_div<int64_t>(s.Tk, kKeys), s.Hkv, kRowWarps * kHalves * kWarp, kBytes);
        }
        {
            constexpr int kRows = D <= 128 ? 2 : 1, kWarps = 4, kQueries = 16 * kRows * kWarps;
            constexpr int kKeys = D <= 80 ? 64 : D == 256 ? 16 : 32;
            constexpr size_t kBytes = (2 * kQueries + 4 * kKeys) * kRow + sizeof(DqKept<T, kWarps, kQueries>);
            static_assert(kBytes <= kMaxSharedBytes);
            run(attention_bwd_dq_kernel<T, D, kRows, kWarps, kKeys, kAtOnce>, ceil_div<int64_t>(s.Tq, kQueries), s.H,
                kWarps * kWarp, kBytes);
        }
    });
}

}  // namespace cgpt::cuda
