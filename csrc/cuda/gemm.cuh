// A matrix product of bf16 or fp16 with fp32 sums, and an epilogue on its tiles while they are on chip:
//
//   C (m, n) = A (m, k) B (n, k)^T,   C handed to the epilogue in rows of fp32
//
// Either operand lies along k (its rows are contiguous: x and W of x W^T) or across it (its columns are: both operands
// of dY^T X, which sums over tokens). m, n and k are any: tiles past an edge are filled with zeros.
//
// Schedule (sm_80): one tile of C a block. cp.async fills a ring of kStages tiles of 32 along k; ldmatrix, transposing
// for an operand across k, feeds mma.sync m16n8k16 with the next fragments loaded while the present ones are
// multiplied. Blocks walk C in bands of eight tile rows, so that the operands of the blocks at work fit in L2. After
// NVIDIA's CUTLASS (github.com/NVIDIA/cutlass, media/docs/efficient_gemm.md) for the pipeline, and Triton's matrix
// multiplication tutorial for the bands.
#pragma once

#include "ptx.cuh"
#include "reduce.cuh"
#include "vec.cuh"

namespace cgpt::cuda {

inline constexpr int kGemmDepth = 32;  // along k, a stage

struct GemmOperand {
    const void* data;
    int64_t stride;  // elements from row to row (along k) or from k to k (across)
};

struct GemmProblem {
    GemmOperand a, b;
    int64_t m, n, k;  // k below 2^31
    // Where not 0, B has a second row for each of C's columns, `pair` further down: an epilogue gets both products side
    // by side (the gate and the up projection of SwiGLU).
    int64_t pair;
};

// kM x kN of C a block, kWarpM x kWarpN a warp.
template <int kM_, int kN_, int kWarpM_, int kWarpN_, int kStages_, int kBlocks_>
struct GemmTile {
    static constexpr int kM = kM_, kN = kN_, kWarpM = kWarpM_, kWarpN = kWarpN_, kStages = kStages_;
    static constexpr int kBlocks = kBlocks_;  // on a multiprocessor at once
    static constexpr int kWarpsN = kN / kWarpN, kThreads = kM / kWarpM * kWarpsN * kWarp;
    static constexpr int kBytesA = kM * kGemmDepth * 2, kStageBytes = kBytesA + kN * kGemmDepth * 2;
    // 16 rows of a warp's part of C, fp32. The pitch, 8 more than a multiple of 32 banks, spreads the eight rows that a
    // warp writes at once over all banks.
    static constexpr int kPitch = kWarpN + 8, kStagingFloats = 16 * kPitch;
    static constexpr int kSharedBytes = kStages * kStageBytes;
    static_assert(kWarpN == 32 || kWarpN == 64, "the epilogue's lanes are laid out for these");
    static_assert(kThreads / kWarp * kStagingFloats * 4 <= kSharedBytes, "the staging area reuses the ring");
};

// kRows rows of an operand, 32 deep, in shared memory.
//
// Along k a row is four chunks of 16 bytes, and chunk c lies at place c ^ (row / 2 % 4); across k, one k is kRows / 8
// chunks, and chunk c lies at c ^ (k % 8). Either way the eight rows that ldmatrix reads at once are in eight different
// groups of four banks.
template <class T, int kRows, bool kAlong, int kThreads>
struct OperandTile {
    static constexpr int kChunks = kAlong ? kGemmDepth / 8 : kRows / 8;  // a line
    static constexpr int kLineBytes = kChunks * 16, kStep = kThreads / kChunks;
    static constexpr int kCopies = kRows * (kGemmDepth / 8) / kThreads;
    static_assert(kThreads % kChunks == 0 && kStep % 8 == 0, "a thread's copies lie in one column of chunks");

    static __device__ __forceinline__ int place(int line, int chunk) {
        return line * kLineBytes + (chunk ^ (kAlong ? line / 2 % 4 : line % 8)) * 16;
    }

    // This thread's copies of the tile that starts at row `first`. `kGroup`: of so many rows of a tile, half are the
    // second rows of GemmProblem::pair.
    const T* from[kAlong ? kCopies : 1];
    int64_t stride;
    int left;         // of k, from this thread's part of the tile on; across k none where its rows do not exist
    uint32_t inside;  // along k: by copy, whether its row exists
    int to;

    template <int kGroup>
    __device__ __forceinline__ void init(const GemmOperand& operand, int64_t first, int64_t rows, int64_t k,
                                         int64_t pair) {
        const int line = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
        stride = operand.stride;
        to = place(line, chunk);
        inside = 0;
        left = int(k) - (kAlong ? chunk * 8 : line);
#pragma unroll
        for (int i = 0; i < (kAlong ? kCopies : 1); ++i) {
            int in_tile = kAlong ? line + i * kStep : chunk * 8;
            int64_t second = 0;
            if (pair != 0) {
                if (in_tile % kGroup >= kGroup / 2) second = pair;
                in_tile = in_tile / kGroup * (kGroup / 2) + in_tile % (kGroup / 2);
            }
            const int64_t row = first + in_tile;
            const bool exists = row < rows;
            inside |= uint32_t(exists) << i;
            from[i] = static_cast<const T*>(operand.data);
            if (exists) from[i] += kAlong ? (row + second) * stride + chunk * 8 : row + second + line * stride;
        }
        if (!kAlong && !inside) left = 0;
    }

    // Starts the copies of the present 32 of k and goes on to the next. What does not exist is pointed at, but not
    // read.
    __device__ __forceinline__ void load(Shared tile) {
        if (kAlong && left <= 0) inside = 0;
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
            const T* source = kAlong ? from[i] : from[0] + i * kStep * stride;
            // kStep lines further on, the chunks' places are the same ones.
            cp_async16(tile + (to + i * kStep * kLineBytes), source, kAlong ? inside >> i & 1 : left > i * kStep);
            if (kAlong) from[i] += kGemmDepth;
        }
        if (!kAlong) from[0] += kGemmDepth * stride;
        left -= kGemmDepth;
    }
};

// Where a lane's ldmatrix addresses begin for a warp whose part of the tile starts at row `first`; the fragments of 16
// rows and 16 of k are then at an offset that is the same for every lane.
template <class Tile, bool kAlong, bool kIsA>
__device__ __forceinline__ int fragment_base(int first, int lane) {
    // Matrices 0 to 3 of an x4 load: for A rows first, then k; for B k first, then rows.
    const int low = lane / 8 % 2, high = lane / 16;
    const int row = lane % 8 + 8 * (kIsA ? low : high), k = kIsA ? high : low;
    if constexpr (kAlong) return Tile::place(first + row, k);
    return Tile::place(lane % 8 + 8 * k, first / 8 + (kIsA ? low : high));
}

template <class Tile, bool kAlong>
__device__ __forceinline__ void load_fragment(uint32_t (&r)[4], Shared tile, int base, int i, int step) {
    if constexpr (kAlong)
        ldmatrix_x4(r, tile + ((base ^ (step * 32)) + i * 16 * Tile::kLineBytes));
    else
        ldmatrix_x4_trans(r, tile + ((base ^ (i * 32)) + step * 16 * Tile::kLineBytes));
}

// Epilogue: a struct with
//   template <int kWarpN> void begin(int64_t col, int lane)                           a warp's columns of C start there
//   template <int kWarpN> void rows16(const float* staging, int pitch, int64_t row)    16 rows of them
template <class T, class Tile, bool kAlongA, bool kAlongB, class Epilogue>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks) gemm_kernel(GemmProblem p, Epilogue epilogue) {
    using TileA = OperandTile<T, Tile::kM, kAlongA, Tile::kThreads>;
    using TileB = OperandTile<T, Tile::kN, kAlongB, Tile::kThreads>;
    constexpr int kFragsM = Tile::kWarpM / 16, kFragsN = Tile::kWarpN / 16, kSteps = kGemmDepth / 16;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int warp_m = warp / Tile::kWarpsN * Tile::kWarpM, warp_n = warp % Tile::kWarpsN * Tile::kWarpN;

    // Bands of eight tile rows, walked down first.
    constexpr int kBand = 8, kColumns = Tile::kN;
    const int columns = p.pair != 0 ? kColumns / 2 : kColumns;
    const int tiles_m = int((p.m + Tile::kM - 1) / Tile::kM), tiles_n = int((p.n + columns - 1) / columns);
    const int band = int(blockIdx.x) / (kBand * tiles_n), in_band = int(blockIdx.x) % (kBand * tiles_n);
    const int high = min(kBand, tiles_m - band * kBand);
    const int64_t row0 = int64_t(band * kBand + in_band % high) * Tile::kM, col0 = int64_t(in_band / high) * columns;

    const Shared ring = shared_at(shared_memory<unsigned char>());
    TileA a;
    TileB b;
    a.template init<Tile::kWarpM>(p.a, row0, p.m, p.k, 0);
    b.template init<Tile::kWarpN>(p.b, col0, p.n, p.k, p.pair);
    const int base_a = fragment_base<TileA, kAlongA, true>(warp_m, lane);
    const int base_b = fragment_base<TileB, kAlongB, false>(warp_n, lane);

    float acc[kFragsM][2 * kFragsN][4] = {};
    uint32_t frag_a[2][kFragsM][4], frag_b[2][kFragsN][4];
    auto load_fragments = [&](int slot, int step, int buffer) {
        const Shared at = ring + slot * Tile::kStageBytes;
#pragma unroll
        for (int i = 0; i < kFragsM; ++i) load_fragment<TileA, kAlongA>(frag_a[buffer][i], at, base_a, i, step);
#pragma unroll
        for (int j = 0; j < kFragsN; ++j)
            load_fragment<TileB, kAlongB>(frag_b[buffer][j], at + Tile::kBytesA, base_b, j, step);
    };

    const int stages = int((p.k + kGemmDepth - 1) / kGemmDepth);
    int filled = 0, fill_slot = 0;
    auto fill = [&] {  // one commit a call, so that counting groups counts stages
        if (filled < stages) {
            const Shared at = ring + fill_slot * Tile::kStageBytes;
            a.load(at);
            b.load(at + Tile::kBytesA);
        }
        cp_async_commit();
        ++filled;
        fill_slot = fill_slot + 1 == Tile::kStages ? 0 : fill_slot + 1;
    };
#pragma unroll 1
    for (int i = 0; i < Tile::kStages - 1; ++i) fill();
    cp_async_wait<Tile::kStages - 2>();
    __syncthreads();
    if (stages > 0) load_fragments(0, 0, 0);

    int slot = 0;
#pragma unroll 1
    for (int stage = 0; stage < stages; ++stage) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            if (step == kSteps - 1) {  // the next stage has landed, and every warp is done reading the one before this
                cp_async_wait<Tile::kStages - 2>();
                __syncthreads();
                slot = slot + 1 == Tile::kStages ? 0 : slot + 1;
                if (stage + 1 < stages) load_fragments(slot, 0, (step + 1) % 2);
            } else {
                load_fragments(slot, step + 1, (step + 1) % 2);
            }
            if (step == 0) fill();
#pragma unroll
            for (int i = 0; i < kFragsM; ++i)
#pragma unroll
                for (int j = 0; j < 2 * kFragsN; ++j) {
                    const uint32_t* pair = &frag_b[step % 2][j / 2][j % 2 * 2];
                    const uint32_t column[2] = {pair[0], pair[1]};
                    mma<T>(acc[i][j], frag_a[step % 2][i], column);
                }
        }
    }
    cp_async_wait<0>();
    __syncthreads();

    // Fragments to rows, 16 at a time, through a staging area of the warp's own. One copy of the epilogue's code for
    // all of them: the branches on i only pick registers.
    float* staging = shared_memory<float>() + warp * Tile::kStagingFloats;
    epilogue.template begin<Tile::kWarpN>(col0 + (p.pair != 0 ? warp_n / 2 : warp_n), lane);
#pragma unroll 1
    for (int i = 0; i < kFragsM; ++i) {
#pragma unroll
        for (int k = 0; k < kFragsM; ++k) {
            if (k != i) continue;
#pragma unroll
            for (int j = 0; j < 2 * kFragsN; ++j) {
                float* to = staging + lane / 4 * Tile::kPitch + j * 8 + lane % 4 * 2;
                *reinterpret_cast<float2*>(to) = make_float2(acc[k][j][0], acc[k][j][1]);
                *reinterpret_cast<float2*>(to + 8 * Tile::kPitch) = make_float2(acc[k][j][2], acc[k][j][3]);
            }
        }
        __syncwarp();
        epilogue.template rows16<Tile::kWarpN>(staging, Tile::kPitch, row0 + warp_m + i * 16);
        __syncwarp();
    }
}

}  // namespace cgpt::cuda
