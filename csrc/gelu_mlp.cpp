// The border of gelu_mlp. Its own arguments, all in one of fp32, bf16, fp16: x (..., D), w1 (F, D) or for SwiGLU
// (2 F, D), w2 (D, F) of any strides, b1 (F,) or (2 F,), b2 (D,) contiguous. Between the matrix products: pre and dpre
// (rows, F) or (rows, 2 F), act, dact (rows, F) and dout (rows, D) contiguous, biases and their gradients contiguous,
// all in that dtype. Operands of matrix products have contiguous rows or columns; on a GPU (csrc/cuda/gemm.cuh) they
// are bf16 or fp16, begin at 16-byte boundaries and have a multiple of 8 values.
#include "gelu_mlp.h"

#include "check.h"

namespace cgpt {
namespace {

constexpr const char* kOp = "gelu_mlp";

Activation activation_of(const std::string& name) {
    if (name == "gelu") return Activation::gelu;
    if (name == "gelu_tanh") return Activation::gelu_tanh;
    if (name == "swiglu") return Activation::swiglu;
    fail(kOp, "activation", "gelu or gelu_tanh or swiglu", name);
}

int64_t width_of(Activation activation, int64_t hidden) {
    return activation == Activation::swiglu ? 2 * hidden : hidden;
}

void check_matrix(const char* name, const View& v) {
    Arg(kOp, name, v).dtype(kFloats).ndim(2).contiguous();
    if (v.size[1] == 0) fail(kOp, name, "non-empty in its last dimension", shape_of(v));
}

void check_output(const char* name, const View& v, const View& like, int64_t rows, int64_t cols) {
    Arg(kOp, name, v).on(like).dtype({like.dtype}).shape({rows, cols}).contiguous();
}

void check_bias(const char* name, const View& v, const View& x, int64_t extent) {
    Arg(kOp, name, v).on(x).dtype({x.dtype}).shape({extent}).contiguous();
}

// The hidden width that pre (rows, F) or (rows, 2 F) has.
int64_t hidden_of(const View& pre, Activation activation) {
    if (activation != Activation::swiglu) return pre.size[1];
    if (pre.size[1] % 2 != 0) fail(kOp, "pre", "even in its last dimension, a gate and an up half", shape_of(pre));
    return pre.size[1] / 2;
}

// On a GPU a sum over rows goes through `partials`; null where no sum is asked for.
float* check_partials(const std::optional<View>& partials, const View& like, int64_t rows, int64_t cols, bool summed) {
    if (!summed || (like.device == Device::cpu && !partials)) return nullptr;
    const int64_t parts = (rows + kPartialRows - 1) / kPartialRows;
    if (!partials) {
        const std::string wanted = "float32 of (" + std::to_string(parts) + ", " + std::to_string(cols) + ")";
        fail(kOp, "partials", wanted, "None");
    }
    Arg(kOp, "partials", *partials).on(like).dtype({DType::f32}).shape({parts, cols}).contiguous();
    return partials->as<float>();
}

bool at_16_bytes(const View& v) { return reinterpret_cast<uintptr_t>(v.data) % 16 == 0; }

void check_aligned(const char* name, const View& v) {
    if (!at_16_bytes(v)) fail(kOp, name, "at a 16-byte boundary", "one that is not");
}

// An operand of gemm.cuh: `lines` contiguous lines of `length` values, `stride` apart.
bool lines_fit(int64_t lines, int64_t length, int64_t stride, int64_t step) {
    return length % 8 == 0 && (step == 1 || length <= 1) && (lines <= 1 || (stride % 8 == 0 && stride >= length));
}

Matrix gemm_operand(const char* name, const View& v) {
    Arg(kOp, name, v).dtype({DType::bf16, DType::f16}).ndim(2);
    const bool rows = lines_fit(v.size[0], v.size[1], v.stride[0], v.stride[1]);
    const bool cols = lines_fit(v.size[1], v.size[0], v.stride[1], v.stride[0]);
    if (!rows && !cols)
        fail(kOp, name, "contiguous in rows or in columns, in multiples of 8",
             "shape " + shape_of(v) + " with strides (" + std::to_string(v.stride[0]) + ", " +
                 std::to_string(v.stride[1]) + ")");
    check_aligned(name, v);
    const int line = rows ? 0 : 1;  // a single line's stride is any number: 0 keeps every address aligned
    return {v.data, v.size[line] > 1 ? v.stride[line] : 0, rows};
}

// An operand of a product that a CPU serves too, where any dtype and length will do.
Matrix operand(const char* name, const View& v) {
    if (v.device != Device::cpu) return gemm_operand(name, v);
    Arg(kOp, name, v).dtype(kFloats);
    return matrix(kOp, name, v);
}

void check_depth(const char* name, int64_t depth) {  // gemm.cuh counts it in 32 bits
    if (depth > INT32_MAX - 64)
        fail(kOp, name, "below 2147483584 in the dimension that is summed", std::to_string(depth));
}

void check_gemm_output(const char* name, const View& v, const View& like, int64_t rows, int64_t cols) {
    check_output(name, v, like, rows, cols);
    if (cols % 8 != 0) fail(kOp, name, "a multiple of 8 in its last dimension", shape_of(v));
    check_aligned(name, v);
}

void check_product_output(const char* name, const View& v, const View& like, int64_t rows, int64_t cols) {
    v.device == Device::cpu ? check_output(name, v, like, rows, cols) : check_gemm_output(name, v, like, rows, cols);
}

GemmTileChoice tile_of(const std::string& name) {
    if (name == "auto") return GemmTileChoice::automatic;
    if (name == "128x256") return GemmTileChoice::large;
    if (name == "128x128") return GemmTileChoice::medium;
    if (name == "64x64") return GemmTileChoice::small;
    fail(kOp, "tile", "auto or 128x256 or 128x128 or 64x64", name);
}

}  // namespace

void gelu_mlp_check(const View& x, const View& w1, const std::optional<View>& b1, const View& w2,
                    const std::optional<View>& b2, const std::string& activation) {
    const Activation f = activation_of(activation);
    Arg(kOp, "x", x).dtype(kFloats);
    if (x.ndim == 0) fail(kOp, "x", "at least 1-dimensional", "a scalar");
    const int64_t width = x.size[x.ndim - 1];
    if (width == 0) fail(kOp, "x", "non-empty in its last dimension", shape_of(x));
    Arg(kOp, "w1", w1).on(x).dtype({x.dtype}).shape({-1, width});
    if (w1.size[0] == 0) fail(kOp, "w1", "non-empty", shape_of(w1));
    if (f == Activation::swiglu && w1.size[0] % 2 != 0)
        fail(kOp, "w1", "even in its first dimension, gate rows and up rows", shape_of(w1));
    if (b1) check_bias("b1", *b1, x, w1.size[0]);
    Arg(kOp, "w2", w2).on(x).dtype({x.dtype}).shape({width, f == Activation::swiglu ? w1.size[0] / 2 : w1.size[0]});
    if (b2) check_bias("b2", *b2, x, width);
}

void gelu_mlp_fwd(const View& pre, const View& act, const std::string& activation) {
    const Activation f = activation_of(activation);
    check_matrix("pre", pre);
    const int64_t rows = pre.size[0], hidden = hidden_of(pre, f);
    check_output("act", act, pre, rows, hidden);
    const GeluMlpFwdArgs args = {pre.data, act.data, rows, hidden, pre.dtype, f};
#if defined(CGPT_CUDA)
    if (pre.device == Device::cuda) return gelu_mlp_fwd_cuda(args, pre.device_id);
#endif
    if (pre.device != Device::cpu) fail_device(kOp, pre);
    gelu_mlp_fwd_cpu(args);
}

void gelu_mlp_bwd(const View& pre, const View& dact, const View& act, const View& dpre,
                  const std::optional<View>& dbias, const std::optional<View>& partials,
                  const std::string& activation) {
    const Activation f = activation_of(activation);
    check_matrix("pre", pre);
    const int64_t rows = pre.size[0], width = pre.size[1], hidden = hidden_of(pre, f);
    check_output("dact", dact, pre, rows, hidden);
    check_output("act", act, pre, rows, hidden);
    check_output("dpre", dpre, pre, rows, width);
    if (dbias) check_bias("dbias", *dbias, pre, width);
    const GeluMlpBwdArgs args = {pre.data,
                                 dact.data,
                                 act.data,
                                 dpre.data,
                                 data_or_null<void>(dbias),
                                 check_partials(partials, pre, rows, width, dbias.has_value()),
                                 rows,
                                 hidden,
                                 pre.dtype,
                                 f};
#if defined(CGPT_CUDA)
    if (pre.device == Device::cuda) return gelu_mlp_bwd_cuda(args, pre.device_id);
#endif
    if (pre.device != Device::cpu) fail_device(kOp, pre);
    gelu_mlp_bwd_cpu(args);
}

void gelu_mlp_bias_grad(const View& dout, const View& dbias, const std::optional<View>& partials) {
    check_matrix("dout", dout);
    const int64_t rows = dout.size[0], cols = dout.size[1];
    check_bias("dbias", dbias, dout, cols);
    const GeluMlpBiasGradArgs args = {dout.data, dbias.data, check_partials(partials, dout, rows, cols, true),
                                      rows,      cols,       dout.dtype};
#if defined(CGPT_CUDA)
    if (dout.device == Device::cuda) return gelu_mlp_bias_grad_cuda(args, dout.device_id);
#endif
    if (dout.device != Device::cpu) fail_device(kOp, dout);
    gelu_mlp_bias_grad_cpu(args);
}

void gelu_mlp_product(const View& a, const View& b, const std::optional<View>& bias, const View& out,
                      const std::string& tile) {
    GeluMlpProductArgs args = {};
    args.tile = tile_of(tile);
    args.a = gemm_operand("a", a);
    args.m = a.size[0];
    args.k = a.size[1];
    check_depth("a", args.k);
    Arg(kOp, "b", b).on(a).dtype({a.dtype}).shape({-1, args.k});
    args.b = gemm_operand("b", b);
    args.n = b.size[0];
    if (!args.a.row_major && args.b.row_major && a.numel() != 0 && b.numel() != 0)
        fail(kOp, "b", "contiguous in columns, as a is", "one that is contiguous in rows");
    if (bias) {
        check_bias("bias", *bias, a, args.n);
        check_aligned("bias", *bias);
    }
    check_gemm_output("out", out, a, args.m, args.n);
    args.bias = data_or_null<void>(bias);
    args.out = out.data;
    args.dtype = a.dtype;
#if defined(CGPT_CUDA)
    if (a.device == Device::cuda) return gelu_mlp_product_cuda(args, a.device_id);
#endif
    fail_device(kOp, a);
}

namespace {

GeluMlpLinearFwdArgs check_linear_fwd(const View& x, const View& w1, const std::optional<View>& b1,
                                      const std::optional<View>& pre, const View& act, const std::string& activation) {
    GeluMlpLinearFwdArgs args = {};
    args.activation = activation_of(activation);
    args.x = operand("x", x);
    if (!args.x.row_major && x.numel() != 0) fail(kOp, "x", "contiguous in rows", "one that is contiguous in columns");
    args.m = x.size[0];
    args.k = x.size[1];
    check_depth("x", args.k);
    Arg(kOp, "act", act).on(x).dtype({x.dtype}).shape({args.m, -1});
    args.n = act.size[1];
    check_product_output("act", act, x, args.m, args.n);
    const int64_t width = width_of(args.activation, args.n);
    Arg(kOp, "w1", w1).on(x).dtype({x.dtype}).shape({width, args.k});
    args.w1 = operand("w1", w1);
    if (b1) {
        check_bias("b1", *b1, x, width);
        if (x.device != Device::cpu) check_aligned("b1", *b1);
    }
    if (pre) check_product_output("pre", *pre, x, args.m, width);
    args.b1 = data_or_null<void>(b1);
    args.pre = data_or_null<void>(pre);
    args.act = act.data;
    args.dtype = x.dtype;
    return args;
}

GeluMlpLinearBwdArgs check_linear_bwd(const View& dout, const View& w2, const View& pre, const View& dpre,
                                      const std::optional<View>& act, const std::optional<View>& db1,
                                      const std::string& activation) {
    GeluMlpLinearBwdArgs args = {};
    args.activation = activation_of(activation);
    args.dout = operand("dout", dout);
    if (!args.dout.row_major && dout.numel() != 0)
        fail(kOp, "dout", "contiguous in rows", "one that is contiguous in columns");
    args.m = dout.size[0];
    args.k = dout.size[1];
    check_depth("dout", args.k);
    Arg(kOp, "w2", w2).on(dout).dtype({dout.dtype}).shape({args.k, -1});
    args.w2 = operand("w2", w2);
    args.n = w2.size[1];
    const int64_t width = width_of(args.activation, args.n);
    check_product_output("pre", pre, dout, args.m, width);
    check_product_output("dpre", dpre, dout, args.m, width);
    if (act) check_product_output("act", *act, dout, args.m, args.n);
    if (db1) check_bias("db1", *db1, dout, width);
    args.pre = pre.data;
    args.dpre = dpre.data;
    args.act = data_or_null<void>(act);
    args.db1 = data_or_null<void>(db1);
    args.dtype = dout.dtype;
    return args;
}

void check_cpu(Activation activation) {  // whose tiles hold no gate and its up projection at once
    if (activation == Activation::swiglu) fail(kOp, "activation", "gelu or gelu_tanh", "swiglu");
}

}  // namespace

void gelu_mlp_linear_fwd(const View& x, const View& w1, const std::optional<View>& b1, const std::optional<View>& pre,
                         const View& act, const std::string& activation, const std::string& tile) {
    GeluMlpLinearFwdArgs args = check_linear_fwd(x, w1, b1, pre, act, activation);
    args.tile = tile_of(tile);
#if defined(CGPT_CUDA)
    if (x.device == Device::cuda) return gelu_mlp_linear_fwd_cuda(args, x.device_id);
#endif
    if (x.device != Device::cpu) fail_device(kOp, x);
    check_cpu(args.activation);
    if (args.m > 0 && args.n > 0) gelu_mlp_linear_fwd_cpu(args);
}

void gelu_mlp_linear_bwd(const View& dout, const View& w2, const View& pre, const View& dpre,
                         const std::optional<View>& act, const std::optional<View>& db1,
                         const std::optional<View>& partials, const std::string& activation, const std::string& tile) {
    GeluMlpLinearBwdArgs args = check_linear_bwd(dout, w2, pre, dpre, act, db1, activation);
    args.tile = tile_of(tile);
    args.partials = check_partials(partials, dout, args.m, width_of(args.activation, args.n), db1.has_value());
    if (args.partials && dout.device != Device::cpu) check_aligned("partials", *partials);
#if defined(CGPT_CUDA)
    if (dout.device == Device::cuda) return gelu_mlp_linear_bwd_cuda(args, dout.device_id);
#endif
    if (dout.device != Device::cpu) fail_device(kOp, dout);
    check_cpu(args.activation);
    if (args.n > 0) gelu_mlp_linear_bwd_cpu(args);
}

namespace {

LtWorkspace check_workspace(const View& workspace, const View& like, const std::string& library) {
    Arg(kOp, "workspace", workspace).on(like).ndim(1).contiguous();
    check_aligned("workspace", workspace);
    return {workspace.data, workspace.numel(), library};
}

}  // namespace

void gelu_mlp_cublaslt_fwd(const View& x, const View& w1, const std::optional<View>& b1, const std::optional<View>& pre,
                           const View& act, const View& workspace, const std::string& library) {
    [[maybe_unused]] const GeluMlpLinearFwdArgs args = check_linear_fwd(x, w1, b1, pre, act, "gelu_tanh");
    [[maybe_unused]] const LtWorkspace lt = check_workspace(workspace, x, library);
#if defined(CGPT_CUDA)
    if (x.device == Device::cuda) return gelu_mlp_cublaslt_fwd_cuda(args, lt, x.device_id);
#endif
    fail_device(kOp, x);
}

void gelu_mlp_cublaslt_bwd(const View& dout, const View& w2, const View& pre, const View& dpre,
                           const std::optional<View>& db1, const View& workspace, const std::string& library) {
    [[maybe_unused]] const GeluMlpLinearBwdArgs args =
        check_linear_bwd(dout, w2, pre, dpre, std::nullopt, db1, "gelu_tanh");
    [[maybe_unused]] const LtWorkspace lt = check_workspace(workspace, dout, library);
    if (dout.size[0] == 0) fail(kOp, "dout", "non-empty for cublaslt", shape_of(dout));
#if defined(CGPT_CUDA)
    if (dout.device == Device::cuda) return gelu_mlp_cublaslt_bwd_cuda(args, lt, dout.device_id);
#endif
    fail_device(kOp, dout);
}

}  // namespace cgpt
