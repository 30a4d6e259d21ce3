// The border of attention: q, out, dout, dq (B, Tq, H, D), k, v, dk, dv (B, Tk, Hkv, D) in one of fp32, bf16, fp16,
// any strides with the last dimension contiguous; Hkv divides H; D a multiple of 8 up to 256; lse (B, H, Tq) fp32.
#include "attention.h"

#include "check.h"

namespace cgpt {
namespace {

constexpr const char* kOp = "attention";
constexpr int64_t kMaxHeadDim = 256;

void check_like(const char* name, const View& v, const View& like) {
    Arg(kOp, name, v)
        .on(like)
        .dtype({like.dtype})
        .shape({like.size[0], like.size[1], like.size[2], like.size[3]})
        .last_dim_contiguous();
}

AttentionShape check_inputs(const View& q, const View& k, const View& v, bool causal, double scale) {
    Arg(kOp, "q", q).dtype(kFloats).ndim(4).last_dim_contiguous();
    const int64_t B = q.size[0], Tq = q.size[1], H = q.size[2], D = q.size[3];
    if (D < 8 || D > kMaxHeadDim || D % 8 != 0)
        fail(kOp, "head dim", "a multiple of 8 from 8 to " + std::to_string(kMaxHeadDim), std::to_string(D));
    Arg(kOp, "k", k).on(q).dtype({q.dtype}).shape({B, -1, -1, D}).last_dim_contiguous();
    const int64_t Tk = k.size[1], Hkv = k.size[2];
    if (Hkv == 0 ? H != 0 : H % Hkv != 0)
        fail(kOp, "k", "given with a number of heads that divides q's " + std::to_string(H), std::to_string(Hkv));
    check_like("v", v, k);
    return {B, Tq, Tk, H, Hkv, D, causal, static_cast<float>(scale), q.dtype};
}

void check_lse(const View& lse, const View& q) {
    Arg(kOp, "lse", lse).on(q).dtype({DType::f32}).shape({q.size[0], q.size[2], q.size[1]}).contiguous();
}

Heads heads(const View& v) { return {v.data, v.stride[0], v.stride[1], v.stride[2]}; }

}  // namespace

void attention_fwd(const View& q, const View& k, const View& v, bool causal, double softmax_scale, const View& out,
                   const std::optional<View>& lse) {
    const AttentionShape shape = check_inputs(q, k, v, causal, softmax_scale);
    check_like("out", out, q);
    if (lse) check_lse(*lse, q);
    if (q.device != Device::cpu) fail_device(kOp, q);
    attention_fwd_cpu({shape, heads(q), heads(k), heads(v), heads(out), data_or_null<float>(lse)});
}

void attention_bwd(const View& dout, const View& q, const View& k, const View& v, const View& out, const View& lse,
                   bool causal, double softmax_scale, const View& dq, const View& dk, const View& dv) {
    const AttentionShape shape = check_inputs(q, k, v, causal, softmax_scale);
    check_like("dout", dout, q);
    check_like("out", out, q);
    check_lse(lse, q);
    check_like("dq", dq, q);
    check_like("dk", dk, k);
    check_like("dv", dv, k);
    if (q.device != Device::cpu) fail_device(kOp, q);
    attention_bwd_cpu({shape, heads(dout), heads(q), heads(k), heads(v), heads(out), lse.as<float>(), heads(dq),
                       heads(dk), heads(dv)});
}

}  // namespace cgpt
