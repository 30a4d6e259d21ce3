// gelu_mlp: arguments and launchers of what stands between torch's matrix products. Shapes and dtypes are in
// gelu_mlp.cpp, which checks them.
#pragma once

#include <optional>

#include "cpu/isa.h"
#include "view.h"

namespace cgpt {

struct GeluMlpFwdArgs {
    const void *pre, *bias;  // bias may be null
    void* act;               // may be pre
    int64_t rows, cols;
    DType dtype;
    bool tanh;
};

struct GeluMlpBwdArgs {
    const void *pre, *bias, *dact;  // bias may be null
    void *act, *dpre, *dbias;       // dpre may be dact; dbias may be null
    int64_t rows, cols;
    DType dtype;
    bool tanh;
};

struct GeluMlpBiasGradArgs {
    const void* dout;
    void* dbias;
    int64_t rows, cols;
    DType dtype;
};

// The border before the first matrix product: what gelu_mlp's own arguments must be.
void gelu_mlp_check(const View& x, const View& w1, const std::optional<View>& b1, const View& w2,
                    const std::optional<View>& b2);

void gelu_mlp_fwd(const View& pre, const std::optional<View>& bias, const View& act, bool tanh);

void gelu_mlp_bwd(const View& pre, const std::optional<View>& bias, const View& dact, const View& act, const View& dpre,
                  const std::optional<View>& dbias, bool tanh);

void gelu_mlp_bias_grad(const View& dout, const View& dbias);

}  // namespace cgpt

CGPT_CPU_KERNEL(gelu_mlp_fwd, GeluMlpFwdArgs)
CGPT_CPU_KERNEL(gelu_mlp_bwd, GeluMlpBwdArgs)
CGPT_CPU_KERNEL(gelu_mlp_bias_grad, GeluMlpBiasGradArgs)
