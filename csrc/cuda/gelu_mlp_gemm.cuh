// gelu_mlp's matrix products: which tile and layout of gemm.cuh serves a problem. Each type has a file of its own that
// instantiates this, so that the kernels of both compile side by side.
#pragma once

#include "gelu_mlp_epilogue.cuh"
#include "launch.cuh"

namespace cgpt::cuda {

using LargeTile = GemmTile<128, 256, 64, 64, 4, 1>;
using MediumTile = GemmTile<128, 128, 64, 64, 4, 2>;
using SmallTile = GemmTile<64, 64, 32, 32, 4, 4>;

template <class T, class Tile, bool kAlongA, bool kAlongB>
void run_tile(const char* op, const GemmProblem& p, const GeluMlpEpilogue<T>& epilogue, int device_id) {
    const int64_t columns = p.pair != 0 ? Tile::kN / 2 : Tile::kN;
    const int64_t tiles = (p.m + Tile::kM - 1) / Tile::kM * ((p.n + columns - 1) / columns);
    launch(op, gemm_kernel<T, Tile, kAlongA, kAlongB, GeluMlpEpilogue<T>>, dim3(static_cast<unsigned>(tiles)),
           dim3(Tile::kThreads), Tile::kSharedBytes, current_stream(device_id), p, epilogue);
}

// The tile with the least time by this model: every multiprocessor works through its share of the tiles in whole
// rounds, and a larger tile needs fewer bytes of shared memory for a product (its rate, against the largest's, is what
// ldmatrix leaves of the tensor cores' time; not yet measured).
template <class Tile>
double time_of(const GemmProblem& p, int multiprocessors, double rate) {
    const int64_t columns = p.pair != 0 ? Tile::kN / 2 : Tile::kN;
    const int64_t tiles = (p.m + Tile::kM - 1) / Tile::kM * ((p.n + columns - 1) / columns);
    const int64_t at_once = int64_t(multiprocessors) * Tile::kBlocks;
    return double((tiles + at_once - 1) / at_once) * Tile::kBlocks * Tile::kM * Tile::kN / rate;
}

inline GemmTileChoice choose_tile(const char* op, const GemmProblem& p, GemmTileChoice wish, int device_id) {
    if (wish != GemmTileChoice::automatic) return wish;
    const int count = multiprocessors(op, device_id);
    const double large = time_of<LargeTile>(p, count, 1.0), medium = time_of<MediumTile>(p, count, 0.95),
                 small = time_of<SmallTile>(p, count, 0.6);
    if (small < medium && small < large) return GemmTileChoice::small;
    return medium <= large ? GemmTileChoice::medium : GemmTileChoice::large;
}

template <class T, bool kAlongA, bool kAlongB>
void run_layout(const char* op, const GemmProblem& p, const GeluMlpEpilogue<T>& epilogue, GemmTileChoice tile,
                int device_id) {
    switch (choose_tile(op, p, tile, device_id)) {
        case GemmTileChoice::large:
            return run_tile<T, LargeTile, kAlongA, kAlongB>(op, p, epilogue, device_id);
        case GemmTileChoice::small:
            return run_tile<T, SmallTile, kAlongA, kAlongB>(op, p, epilogue, device_id);
        default:
            return run_tile<T, MediumTile, kAlongA, kAlongB>(op, p, epilogue, device_id);
    }
}

// Three of the four layouts are there: a product of an A across k with a B along k is not one that gelu_mlp needs.
template <class T>
void gelu_mlp_gemm(const char* op, const GemmProblem& p, bool along_a, bool along_b, const GeluMlpEpilogue<T>& epilogue,
                   GemmTileChoice tile, int device_id) {
    if (p.m == 0 || p.n == 0) return;
    if (!along_a) return run_layout<T, false, false>(op, p, epilogue, tile, device_id);
    if (along_b) return run_layout<T, true, true>(op, p, epilogue, tile, device_id);
    return run_layout<T, true, false>(op, p, epilogue, tile, device_id);
}

extern template void gelu_mlp_gemm(const char*, const GemmProblem&, bool, bool, const GeluMlpEpilogue<bf16>&,
                                   GemmTileChoice, int);
extern template void gelu_mlp_gemm(const char*, const GemmProblem&, bool, bool, const GeluMlpEpilogue<f16>&,
                                   GemmTileChoice, int);

}  // namespace cgpt::cuda
