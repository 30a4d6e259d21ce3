// The border of layer_norm: x, residual, y, h, dout, dh, dx (..., D) contiguous in one of fp32, bf16, fp16;
// weight, bias, dweight, dbias (D,) in that dtype or fp32; mean, rstd (rows,) fp32; workspace (n, 2, D) fp32 with n
// what layer_norm_workspace asks for, given on a GPU.
#include "layer_norm.h"

#include "check.h"

namespace cgpt {
namespace {

constexpr const char* kOp = "layer_norm";
constexpr int64_t kMostColumns = 1 << 24;  // the CUDA kernels count columns in 32 bits

void check_like(const char* name, const View& v, const View& x) {
    Arg arg(kOp, name, v);
    arg.on(x).dtype({x.dtype}).contiguous();
    bool same = v.ndim == x.ndim;
    for (int i = 0; same && i < x.ndim; ++i) same = v.size[i] == x.size[i];
    if (!same) fail(kOp, name, shape_of(x), shape_of(v));
}

void check_weight(const char* name, const View& v, const View& x, DType dtype) {
    Arg(kOp, name, v).on(x).dtype({dtype}).shape({x.size[x.ndim - 1]}).contiguous();
}

void check_statistic(const char* name, const View& v, const View& x, int64_t rows) {
    Arg(kOp, name, v).on(x).dtype({DType::f32}).shape({rows}).contiguous();
}

int64_t check_x(const char* name, const View& x) {
    Arg(kOp, name, x).dtype(kFloats).contiguous();
    if (x.ndim == 0) fail(kOp, name, "at least 1-dimensional", "a scalar");
    if (x.size[x.ndim - 1] == 0) fail(kOp, name, "non-empty in its last dimension", shape_of(x));
    if (x.device == Device::cuda && x.size[x.ndim - 1] > kMostColumns)
        fail(kOp, name, "of at most 2^24 columns on a GPU", shape_of(x));
    return x.numel() / x.size[x.ndim - 1];
}

}  // namespace

void layer_norm_fwd(const View& x, const std::optional<View>& residual, const View& weight,
                    const std::optional<View>& bias, double eps, const View& y, const std::optional<View>& h,
                    const std::optional<View>& mean, const std::optional<View>& rstd) {
    const int64_t rows = check_x("x", x);
    Arg(kOp, "weight", weight).dtype({x.dtype, DType::f32});
    check_weight("weight", weight, x, weight.dtype);
    if (bias) check_weight("bias", *bias, x, weight.dtype);
    if (residual) check_like("residual", *residual, x);
    check_like("y", y, x);
    if (residual.has_value() != h.has_value()) fail(kOp, "h", "given exactly when residual is", "one of them");
    if (h) check_like("h", *h, x);
    if (mean.has_value() != rstd.has_value()) fail(kOp, "rstd", "given exactly when mean is", "one of them");
    if (mean) check_statistic("mean", *mean, x, rows);
    if (rstd) check_statistic("rstd", *rstd, x, rows);
    const LayerNormFwdArgs args = {x.data,
                                   data_or_null<void>(residual),
                                   weight.data,
                                   data_or_null<void>(bias),
                                   y.data,
                                   data_or_null<void>(h),
                                   data_or_null<float>(mean),
                                   data_or_null<float>(rstd),
                                   rows,
                                   x.size[x.ndim - 1],
                                   static_cast<float>(eps),
                                   x.dtype,
                                   weight.dtype};
#if defined(CGPT_CUDA)
    if (x.device == Device::cuda) return layer_norm_fwd_cuda(args, x.device_id);
#endif
    if (x.device != Device::cpu) fail_device(kOp, x);
    layer_norm_fwd_cpu(args);
}

void layer_norm_bwd(const View& dout, const std::optional<View>& dh, const View& h, const View& weight,
                    const View& mean, const View& rstd, const View& dx, const View& dweight,
                    const std::optional<View>& dbias, const std::optional<View>& workspace) {
    const int64_t rows = check_x("x", h), cols = h.size[h.ndim - 1];
    Arg(kOp, "weight", weight).dtype({h.dtype, DType::f32});
    check_weight("weight", weight, h, weight.dtype);
    check_like("dout", dout, h);
    if (dh) check_like("dh", *dh, h);
    check_like("dx", dx, h);
    check_weight("dweight", dweight, h, weight.dtype);
    if (dbias) check_weight("dbias", *dbias, h, weight.dtype);
    check_statistic("mean", mean, h, rows);
    check_statistic("rstd", rstd, h, rows);
    const int64_t partials = layer_norm_workspace(h);
    if (workspace) Arg(kOp, "workspace", *workspace).on(h).dtype({DType::f32}).shape({partials, 2, cols}).contiguous();
    if (partials != 0 && !workspace) fail(kOp, "workspace", "given on a GPU", "None");
    const LayerNormBwdArgs args = {dout.data,
                                   data_or_null<void>(dh),
                                   h.data,
                                   weight.data,
                                   mean.as<float>(),
                                   rstd.as<float>(),
                                   dx.data,
                                   dweight.data,
                                   data_or_null<void>(dbias),
                                   data_or_null<float>(workspace),
                                   partials,
                                   rows,
                                   cols,
                                   h.dtype,
                                   weight.dtype};
#if defined(CGPT_CUDA)
    if (h.device == Device::cuda) return layer_norm_bwd_cuda(args, h.device_id);
#endif
    if (h.device != Device::cpu) fail_device(kOp, h);
    layer_norm_bwd_cpu(args);
}

int64_t layer_norm_workspace(const View& h) {
    [[maybe_unused]] const int64_t rows = check_x("x", h);
#if defined(CGPT_CUDA)
    if (h.device == Device::cuda) return layer_norm_workspace_cuda(rows, h.size[h.ndim - 1], h.dtype, h.device_id);
#endif
    return 0;
}

}  // namespace cgpt
