// gelu_mlp: arguments and launchers of its matrix products with what follows them, and of what stands between torch's
// own products. Shapes and dtypes are in gelu_mlp.cpp, which checks them.
//
// F is the hidden width. pre holds what the activation reads: (rows, F), or for SwiGLU (rows, 2 F), the gate's columns
// and then the up projection's. Sums over rows on a GPU are taken in two steps of a fixed order: of kPartialRows rows
// each into `partials` (ceil(rows / kPartialRows), columns) of fp32, then over those.
#pragma once

#include <optional>
#include <string>

#include "cpu/isa.h"
#include "linear.h"
#include "view.h"

namespace cgpt {

enum class Activation : uint8_t { gelu, gelu_tanh, swiglu };

inline constexpr int kPartialRows = 32;

struct GeluMlpFwdArgs {
    const void* pre;
    void* act;           // may be pre, but for SwiGLU
    int64_t rows, cols;  // of act
    DType dtype;
    Activation activation;
};

struct GeluMlpBwdArgs {
    const void *pre, *dact;
    void *act, *dpre, *dbias;  // dpre may be dact, but for SwiGLU; dbias may be null
    float* partials;           // on a GPU, where dbias is not null
    int64_t rows, cols;        // of act
    DType dtype;
    Activation activation;
};

struct GeluMlpBiasGradArgs {
    const void* dout;
    void* dbias;
    float* partials;  // on a GPU
    int64_t rows, cols;
    DType dtype;
};

enum class GemmTileChoice : uint8_t { automatic, large, medium, small };  // 128 x 256, 128 x 128, 64 x 64

// out = a b^T + bias;  a (m, k), b (n, k), out (m, n) contiguous
struct GeluMlpProductArgs {
    Matrix a, b;
    const void* bias;  // may be null
    void* out;
    int64_t m, n, k;
    DType dtype;
    GemmTileChoice tile;
};

// pre = x w1^T + b1, act = f(pre);  x (m, k), w1 (n, k) or for SwiGLU (2 n, k), act (m, n)
struct GeluMlpLinearFwdArgs {
    Matrix x, w1;
    const void* b1;   // may be null
    void *pre, *act;  // pre may be null
    int64_t m, n, k;
    DType dtype;
    Activation activation;
    GemmTileChoice tile;
};

// dpre = (dout w2) f'(pre), act = f(pre), db1 = sum over rows of dpre;  dout (m, k), w2 (k, n), act (m, n)
struct GeluMlpLinearBwdArgs {
    Matrix dout, w2;
    const void* pre;
    void *dpre, *act, *db1;  // act and db1 may be null
    float* partials;         // where db1 is not null
    int64_t m, n, k;
    DType dtype;
    Activation activation;
    GemmTileChoice tile;
};

// What cuBLASLt is given besides: memory to work in, and where its library is should torch not have loaded one.
struct LtWorkspace {
    void* data;
    int64_t bytes;
    std::string library;
};

// The border before the first matrix product: what gelu_mlp's own arguments must be.
void gelu_mlp_check(const View& x, const View& w1, const std::optional<View>& b1, const View& w2,
                    const std::optional<View>& b2, const std::string& activation);

void gelu_mlp_fwd(const View& pre, const View& act, const std::string& activation);

void gelu_mlp_bwd(const View& pre, const View& dact, const View& act, const View& dpre,
                  const std::optional<View>& dbias, const std::optional<View>& partials, const std::string& activation);

void gelu_mlp_bias_grad(const View& dout, const View& dbias, const std::optional<View>& partials);

// The matrix products of csrc/cuda/gemm.cuh. `tile` is "auto", or by name for tests and benches.
void gelu_mlp_product(const View& a, const View& b, const std::optional<View>& bias, const View& out,
                      const std::string& tile);

void gelu_mlp_linear_fwd(const View& x, const View& w1, const std::optional<View>& b1, const std::optional<View>& pre,
                         const View& act, const std::string& activation, const std::string& tile);

void gelu_mlp_linear_bwd(const View& dout, const View& w2, const View& pre, const View& dpre,
                         const std::optional<View>& act, const std::optional<View>& db1,
                         const std::optional<View>& partials, const std::string& activation, const std::string& tile);

// The same with cuBLASLt's epilogues, "gelu_tanh" alone. `workspace` is of bytes.
void gelu_mlp_cublaslt_fwd(const View& x, const View& w1, const std::optional<View>& b1, const std::optional<View>& pre,
                           const View& act, const View& workspace, const std::string& library);

void gelu_mlp_cublaslt_bwd(const View& dout, const View& w2, const View& pre, const View& dpre,
                           const std::optional<View>& db1, const View& workspace, const std::string& library);

#if defined(CGPT_CUDA)
void gelu_mlp_fwd_cuda(const GeluMlpFwdArgs& args, int device_id);
void gelu_mlp_bwd_cuda(const GeluMlpBwdArgs& args, int device_id);
void gelu_mlp_bias_grad_cuda(const GeluMlpBiasGradArgs& args, int device_id);
void gelu_mlp_product_cuda(const GeluMlpProductArgs& args, int device_id);
void gelu_mlp_linear_fwd_cuda(const GeluMlpLinearFwdArgs& args, int device_id);
void gelu_mlp_linear_bwd_cuda(const GeluMlpLinearBwdArgs& args, int device_id);
void gelu_mlp_cublaslt_fwd_cuda(const GeluMlpLinearFwdArgs& args, const LtWorkspace& lt, int device_id);
void gelu_mlp_cublaslt_bwd_cuda(const GeluMlpLinearBwdArgs& args, const LtWorkspace& lt, int device_id);
#endif

}  // namespace cgpt

CGPT_CPU_KERNEL(gelu_mlp_fwd, GeluMlpFwdArgs)
CGPT_CPU_KERNEL(gelu_mlp_bwd, GeluMlpBwdArgs)
CGPT_CPU_KERNEL(gelu_mlp_bias_grad, GeluMlpBiasGradArgs)
CGPT_CPU_KERNEL(gelu_mlp_linear_fwd, GeluMlpLinearFwdArgs)
CGPT_CPU_KERNEL(gelu_mlp_linear_bwd, GeluMlpLinearBwdArgs)
