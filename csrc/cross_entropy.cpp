// The border of cross_entropy: x (..., D) and weight (V, D) of any strides in one of fp32, bf16, fp16; target (...)
// int64 contiguous, each an id in [0, vocab_size) or ignore_index; logits (rows, vocab_size) with contiguous rows that
// do not overlap, fp32 or bf16; dout, loss and losses (rows,) fp32.
#include "cross_entropy.h"

#include <algorithm>

#include "check.h"

namespace cgpt {
namespace {

constexpr const char* kOp = "cross_entropy";

// A CPU kernel reads logits[target]: no target passes unread.
void check_targets(const View& target, int64_t ignore_index, int64_t vocab_size) {
    const int64_t* ids = target.as<int64_t>();
    const int64_t n = target.numel();
    for (int64_t i = 0; i < n; ++i)
        if (ids[i] != ignore_index && (ids[i] < 0 || ids[i] >= vocab_size))
            fail(kOp, "target",
                 "in [0, " + std::to_string(vocab_size) + ") or ignore_index " + std::to_string(ignore_index),
                 std::to_string(ids[i]));
}

int64_t count_of(const CrossEntropyMeanArgs& a) {
    int64_t count = 0;
    for (int64_t i = 0; i < a.rows; ++i) count += a.target[i] != a.ignore_index;
    return count;
}

}  // namespace

void cross_entropy_check(const View& x, const View& weight, const View& target, int64_t ignore_index,
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
#if defined(CGPT_CUDA)
    if (x.device == Device::cuda) return;
#endif
    if (x.device != Device::cpu) fail_device(kOp, x);
    check_targets(target, ignore_index, vocab_size);
}

void cross_entropy_rows(const View& logits, const View& target, const std::optional<View>& dout, const View& loss,
                        int64_t ignore_index, double z_loss) {
    Arg(kOp, "logits", logits).dtype({DType::f32, DType::bf16}).ndim(2).last_dim_contiguous();
    const int64_t rows = logits.size[0], cols = logits.size[1];
    if (cols == 0) fail(kOp, "logits", "non-empty in its last dimension", shape_of(logits));
    if (rows > 1 && logits.stride[0] < cols)
        fail(kOp, "logits", "of rows that do not overlap", "row stride " + std::to_string(logits.stride[0]));
    if (rows > INT32_MAX) fail(kOp, "logits", "of fewer than 2^31 rows", shape_of(logits));
    Arg(kOp, "target", target).on(logits).dtype({DType::i64}).shape({rows}).contiguous();
    Arg(kOp, "loss", loss).on(logits).dtype({DType::f32}).shape({rows}).contiguous();
    if (dout) Arg(kOp, "dout", *dout).on(logits).dtype({DType::f32}).shape({rows}).contiguous();
    const CrossEntropyArgs args = {
        logits.data,      target.as<int64_t>(), data_or_null<float>(dout),  loss.as<float>(), rows, cols,
        logits.stride[0], ignore_index,         static_cast<float>(z_loss), logits.dtype};
#if defined(CGPT_CUDA)
    if (logits.device == Device::cuda) return cross_entropy_rows_cuda(args, logits.device_id);
#endif
    if (logits.device != Device::cpu) fail_device(kOp, logits);
    check_targets(target, ignore_index, cols);
    cross_entropy_rows_cpu(args);
}

void cross_entropy_share(const View& target, int64_t ignore_index, const View& dout) {
    Arg(kOp, "target", target).dtype({DType::i64}).ndim(1).contiguous();
    const int64_t rows = target.size[0];
    Arg(kOp, "dout", dout).on(target).dtype({DType::f32}).shape({rows}).contiguous();
    const CrossEntropyMeanArgs args = {nullptr, target.as<int64_t>(), dout.as<float>(), rows, ignore_index, true};
#if defined(CGPT_CUDA)
    if (target.device == Device::cuda) return cross_entropy_mean_cuda(args, target.device_id);
#endif
    if (target.device != Device::cpu) fail_device(kOp, target);
    const auto count = static_cast<double>(std::max<int64_t>(count_of(args), 1));
    std::fill(args.out, args.out + rows, static_cast<float>(1.0 / count));
}

void cross_entropy_total(const View& losses, const View& target, int64_t ignore_index, bool mean, const View& out) {
    Arg(kOp, "losses", losses).dtype({DType::f32}).ndim(1).contiguous();
    const int64_t rows = losses.size[0];
    Arg(kOp, "target", target).on(losses).dtype({DType::i64}).shape({rows}).contiguous();
    Arg(kOp, "out", out).on(losses).dtype({DType::f32}).shape({});
    // An empty tensor has no memory to tell the kernel that losses were given.
    const float* given = rows ? losses.as<float>() : out.as<float>();
    const CrossEntropyMeanArgs args = {given, target.as<int64_t>(), out.as<float>(), rows, ignore_index, mean};
#if defined(CGPT_CUDA)
    if (losses.device == Device::cuda) return cross_entropy_mean_cuda(args, losses.device_id);
#endif
    if (losses.device != Device::cpu) fail_device(kOp, losses);
    double sum = 0;
    for (int64_t i = 0; i < rows; ++i) sum += args.losses[i];
    *args.out = static_cast<float>(mean ? sum / static_cast<double>(count_of(args)) : sum);
}

void cross_entropy_add(const View& a, const View& b, const View& out) {
    Arg(kOp, "a", a).dtype({DType::f32, DType::bf16}).ndim(2).contiguous();
    Arg(kOp, "b", b).on(a).dtype({DType::bf16}).shape({a.size[0], a.size[1]}).contiguous();
    Arg(kOp, "out", out).on(a).dtype({DType::f32, DType::bf16}).shape({a.size[0], a.size[1]}).contiguous();
    [[maybe_unused]] const CrossEntropyAddArgs args = {a.data, b.data, out.data, a.numel(), a.dtype, out.dtype};
#if defined(CGPT_CUDA)
    if (a.device == Device::cuda) return cross_entropy_add_cuda(args, a.device_id);
#endif
    fail_device(kOp, a);
}

}  // namespace cgpt
