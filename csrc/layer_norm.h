// layer_norm: arguments and launchers. Shapes and dtypes are in layer_norm.cpp, which checks them.
#pragma once

#include <optional>

#include "cpu/isa.h"
#include "view.h"

namespace cgpt {

struct LayerNormFwdArgs {
    const void *x, *residual, *weight, *bias;  // residual and bias may be null
    void *y, *h;                               // h = x + residual, null without residual
    float *mean, *rstd;                        // null when no gradient will be asked for
    int64_t rows, cols;
    float eps;
    DType dtype, weight_dtype;  // weight_dtype is dtype or f32
};

struct LayerNormBwdArgs {
    const void *dout, *dh;  // dh: gradient that reached h itself, may be null
    const void *h, *weight;
    const float *mean, *rstd;
    void *dx, *dweight, *dbias;  // dbias may be null
    float* partials;             // (partials_count, 2, cols), what blocks of rows add to dweight and dbias; CUDA only
    int64_t partials_count;
    int64_t rows, cols;
    DType dtype, weight_dtype;
};

void layer_norm_fwd(const View& x, const std::optional<View>& residual, const View& weight,
                    const std::optional<View>& bias, double eps, const View& y, const std::optional<View>& h,
                    const std::optional<View>& mean, const std::optional<View>& rstd);

void layer_norm_bwd(const View& dout, const std::optional<View>& dh, const View& h, const View& weight,
                    const View& mean, const View& rstd, const View& dx, const View& dweight,
                    const std::optional<View>& dbias, const std::optional<View>& workspace);

// How many (2, D) fp32 partial sums layer_norm_bwd's workspace must hold for h: 0 on a CPU, which needs none.
int64_t layer_norm_workspace(const View& h);

#if defined(CGPT_CUDA)
void layer_norm_fwd_cuda(const LayerNormFwdArgs& args, int device_id);
void layer_norm_bwd_cuda(const LayerNormBwdArgs& args, int device_id);
int64_t layer_norm_workspace_cuda(int64_t rows, int64_t cols, DType dtype, int device_id);
#endif

}  // namespace cgpt

CGPT_CPU_KERNEL(layer_norm_fwd, LayerNormFwdArgs)
CGPT_CPU_KERNEL(layer_norm_bwd, LayerNormBwdArgs)
