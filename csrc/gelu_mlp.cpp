// The border of gelu_mlp. Its own arguments, all in one of fp32, bf16, fp16: x (..., D), w1 (F, D), w2 (D, F) of
// any strides, b1 (F,), b2 (D,) contiguous. Between the matrix products: pre, act, dact, dpre (rows, F) and dout
// (rows, D) contiguous, biases and their gradients contiguous, all in that dtype.
#include "gelu_mlp.h"

#include "check.h"

namespace cgpt {
namespace {

constexpr const char* kOp = "gelu_mlp";

void check_matrix(const char* name, const View& v) {
    Arg(kOp, name, v).dtype(kFloats).ndim(2).contiguous();
    if (v.size[1] == 0) fail(kOp, name, "non-empty in its last dimension", shape_of(v));
}

void check_like(const char* name, const View& v, const View& pre) {
    Arg(kOp, name, v).on(pre).dtype({pre.dtype}).shape({pre.size[0], pre.size[1]}).contiguous();
}

void check_bias(const char* name, const View& v, const View& x, int64_t extent) {
    Arg(kOp, name, v).on(x).dtype({x.dtype}).shape({extent}).contiguous();
}

}  // namespace

void gelu_mlp_check(const View& x, const View& w1, const std::optional<View>& b1, const View& w2,
                    const std::optional<View>& b2) {
    Arg(kOp, "x", x).dtype(kFloats);
    if (x.ndim == 0) fail(kOp, "x", "at least 1-dimensional", "a scalar");
    const int64_t width = x.size[x.ndim - 1];
    if (width == 0) fail(kOp, "x", "non-empty in its last dimension", shape_of(x));
    Arg(kOp, "w1", w1).on(x).dtype({x.dtype}).shape({-1, width});
    const int64_t hidden = w1.size[0];
    if (hidden == 0) fail(kOp, "w1", "non-empty", shape_of(w1));
    if (b1) check_bias("b1", *b1, x, hidden);
    Arg(kOp, "w2", w2).on(x).dtype({x.dtype}).shape({width, hidden});
    if (b2) check_bias("b2", *b2, x, width);
}

void gelu_mlp_fwd(const View& pre, const std::optional<View>& bias, const View& act, bool tanh) {
    check_matrix("pre", pre);
    if (bias) check_bias("bias", *bias, pre, pre.size[1]);
    check_like("act", act, pre);
    if (pre.device != Device::cpu) fail_device(kOp, pre);
    gelu_mlp_fwd_cpu({pre.data, data_or_null<void>(bias), act.data, pre.size[0], pre.size[1], pre.dtype, tanh});
}

void gelu_mlp_bwd(const View& pre, const std::optional<View>& bias, const View& dact, const View& act, const View& dpre,
                  const std::optional<View>& dbias, bool tanh) {
    check_matrix("pre", pre);
    if (bias) check_bias("bias", *bias, pre, pre.size[1]);
    check_like("dact", dact, pre);
    check_like("act", act, pre);
    check_like("dpre", dpre, pre);
    if (dbias) check_bias("dbias", *dbias, pre, pre.size[1]);
    if (pre.device != Device::cpu) fail_device(kOp, pre);
    gelu_mlp_bwd_cpu({pre.data, data_or_null<void>(bias), dact.data, act.data, dpre.data, data_or_null<void>(dbias),
                      pre.size[0], pre.size[1], pre.dtype, tanh});
}

void gelu_mlp_bias_grad(const View& dout, const View& dbias) {
    check_matrix("dout", dout);
    check_bias("dbias", dbias, dout, dout.size[1]);
    if (dout.device != Device::cpu) fail_device(kOp, dout);
    gelu_mlp_bias_grad_cpu({dout.data, dbias.data, dout.size[0], dout.size[1], dout.dtype});
}

}  // namespace cgpt
