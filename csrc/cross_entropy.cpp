// The border of cross_entropy: x (..., D) and weight (V, D) of any strides in one of fp32, bf16, fp16; target (...)
// int64 contiguous, each an id in [0, vocab_size) or ignore_index; logits (rows, vocab_size) with contiguous rows that
// do not overlap, fp32 or bf16; dout and loss (rows,) fp32.
#include "cross_entropy.h"

#include "check.h"

namespace cgpt {
namespace {

constexpr const char* kOp = "cross_entropy";

// A kernel reads logits[target]: no target passes unread.
int64_t check_targets(const View& target, int64_t ignore_index, int64_t vocab_size) {
    const int64_t* ids = target.as<int64_t>();
    const int64_t n = target.numel();
    int64_t ignored = 0;
    for (int64_t i = 0; i < n; ++i) {
        if (ids[i] == ignore_index)
            ++ignored;
        else if (ids[i] < 0 || ids[i] >= vocab_size)
            fail(kOp, "target",
                 "in [0, " + std::to_string(vocab_size) + ") or ignore_index " + std::to_string(ignore_index),
                 std::to_string(ids[i]));
    }
    return n - ignored;
}

}  // namespace

int64_t cross_entropy_check(const View& x, const View& weight, const View& target, int64_t ignore_index,
                            int64_t vocab_size) {
    Arg(kOp, "x", x).dtype(kFloats);
    if (x.ndim == 0) fail(kOp, "x", "at least 1-dimensional", "a scalar");
    const int64_t D = x.size[x.ndim - 1];
    if (D == 0) fail(kOp, "x", "non-empty in its last dimension", shape_of(x));
    Arg(kOp, "weight", weight).on(x).dtype({x.dtype}).shape({-1, D});
    if (vocab_size < 1 || vocab_size > weight.size[0])
        fail(kOp, "vocab_size", "in [1, " + std::to_string(weight.size[0]) + "]", std::to_string(vocab_size));
    Arg(kOp, "target", target).on(x).dtype({DType::i64}).contiguous();
    View wanted = x;
    wanted.ndim = x.ndim - 1;
    bool same = target.ndim == wanted.ndim;
    for (int i = 0; same && i < target.ndim; ++i) same = target.size[i] == x.size[i];
    if (!same) fail(kOp, "target", shape_of(wanted), shape_of(target));
    if (x.device != Device::cpu) fail_device(kOp, x);
    return check_targets(target, ignore_index, vocab_size);
}

double cross_entropy_rows(const View& logits, const View& target, const std::optional<View>& dout, const View& loss,
                          int64_t ignore_index, double z_loss) {
    Arg(kOp, "logits", logits).dtype({DType::f32, DType::bf16}).ndim(2).last_dim_contiguous();
    const int64_t rows = logits.size[0], cols = logits.size[1];
    if (cols == 0) fail(kOp, "logits", "non-empty in its last dimension", shape_of(logits));
    if (rows > 1 && logits.stride[0] < cols)
        fail(kOp, "logits", "of rows that do not overlap", "row stride " + std::to_string(logits.stride[0]));
    Arg(kOp, "target", target).on(logits).dtype({DType::i64}).shape({rows}).contiguous();
    Arg(kOp, "loss", loss).on(logits).dtype({DType::f32}).shape({rows}).contiguous();
    if (dout) Arg(kOp, "dout", *dout).on(logits).dtype({DType::f32}).shape({rows}).contiguous();
    if (logits.device != Device::cpu) fail_device(kOp, logits);
    check_targets(target, ignore_index, cols);
    cross_entropy_rows_cpu({logits.data, target.as<int64_t>(), data_or_null<float>(dout), loss.as<float>(), rows, cols,
                            logits.stride[0], ignore_index, static_cast<float>(z_loss), logits.dtype});
    double sum = 0;
    for (int64_t i = 0; i < rows; ++i) sum += loss.as<float>()[i];
    return sum;
}

void cross_entropy_add(const View& a, const View& b, const View& out) {
    Arg(kOp, "a", a).dtype({DType::f32, DType::bf16}).ndim(2).contiguous();
    Arg(kOp, "b", b).on(a).dtype({DType::bf16}).shape({a.size[0], a.size[1]}).contiguous();
    Arg(kOp, "out", out).on(a).dtype({DType::f32, DType::bf16}).shape({a.size[0], a.size[1]}).contiguous();
    if (a.device != Device::cpu) fail_device(kOp, a);
    cross_entropy_add_cpu({a.data, b.data, out.data, a.numel(), a.dtype, out.dtype});
}

}  // namespace cgpt
