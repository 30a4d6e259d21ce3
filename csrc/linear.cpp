// The border of linear: a (m, k), b (n, k), each contiguous in rows or in columns, bias (n,) contiguous, out (m, n)
// with contiguous rows; all in one of fp32, bf16, fp16, on a CPU. A GPU's products are torch's.
#include "linear.h"

#include "check.h"

namespace cgpt {
namespace {

constexpr const char* kOp = "linear";

// The stride of a result's rows.
int64_t check_rows(const char* name, const View& v, const View& a, int64_t m, int64_t n) {
    Arg(kOp, name, v).on(a).dtype({a.dtype, DType::f32}).shape({m, n});
    const Matrix rows = matrix(kOp, name, v);
    if (!rows.row_major && v.numel() != 0) fail(kOp, name, "contiguous in rows", "one that is contiguous in columns");
    return rows.stride;
}

}  // namespace

Matrix matrix(const char* op, const char* name, const View& v) {
    Arg(op, name, v).ndim(2);
    const int64_t rows = v.size[0], cols = v.size[1];
    const bool along = (cols <= 1 || v.stride[1] == 1) && (rows <= 1 || v.stride[0] >= cols);
    const bool across = (rows <= 1 || v.stride[0] == 1) && (cols <= 1 || v.stride[1] >= rows);
    if (!along && !across)
        fail(op, name, "contiguous in rows or in columns",
             "shape " + shape_of(v) + " with strides (" + std::to_string(v.stride[0]) + ", " +
                 std::to_string(v.stride[1]) + ")");
    return {v.data, along ? v.stride[0] : v.stride[1], along};
}

void linear_check(const View& x, const View& weight, const std::optional<View>& bias) {
    Arg(kOp, "x", x).dtype(kFloats);
    if (x.ndim == 0) fail(kOp, "x", "at least 1-dimensional", "a scalar");
    const int64_t width = x.size[x.ndim - 1];
    if (width == 0) fail(kOp, "x", "non-empty in its last dimension", shape_of(x));
    Arg(kOp, "weight", weight).on(x).dtype({x.dtype}).shape({-1, width});
    if (weight.size[0] == 0) fail(kOp, "weight", "non-empty", shape_of(weight));
    if (bias) Arg(kOp, "bias", *bias).on(x).dtype({x.dtype}).shape({weight.size[0]}).contiguous();
}

void linear(const View& a, const View& b, const std::optional<View>& bias, float scale, const std::optional<View>& add,
            const View& out) {
    LinearArgs args = {};
    Arg(kOp, "a", a).dtype(kFloats);
    args.a = matrix(kOp, "a", a);
    args.m = a.size[0], args.k = a.size[1];
    Arg(kOp, "b", b).on(a).dtype({a.dtype}).shape({-1, args.k});
    args.b = matrix(kOp, "b", b);
    args.n = b.size[0];
    if (bias) Arg(kOp, "bias", *bias).on(a).dtype({a.dtype}).shape({args.n}).contiguous();
    args.out_stride = check_rows("out", out, a, args.m, args.n);
    if (add) args.add_stride = check_rows("add", *add, a, args.m, args.n);
    if (a.device != Device::cpu) fail_device(kOp, a);
    args.bias = data_or_null<void>(bias);
    args.add = data_or_null<void>(add);
    args.out = out.data;
    args.scale = scale;
    args.dtype = a.dtype, args.out_dtype = out.dtype, args.add_dtype = add ? add->dtype : a.dtype;
    if (args.m > 0 && args.n > 0) linear_cpu(args);
}

}  // namespace cgpt
