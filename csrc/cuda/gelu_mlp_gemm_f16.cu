// gelu_mlp's matrix products in f16.
#include "gelu_mlp_gemm.cuh"

namespace cgpt::cuda {

template void gelu_mlp_gemm(const char*, const GemmProblem&, bool, bool, const GeluMlpEpilogue<f16>&, GemmTileChoice,
                            int);

}  // namespace cgpt::cuda
