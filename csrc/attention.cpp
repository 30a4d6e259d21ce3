// The border of attention: q, out, dout, dq (B, Tq, H, D), k, v, dk, dv (B, Tk, Hkv, D) in one of fp32, bf16, fp16,
// any strides with the last dimension contiguous; Hkv divides H; D a multiple of 8 up to 256; lse, delta (B, H, Tq)
// fp32; alibi_slopes (H) or (B, H) fp32. With cu_seqlens_q and cu_seqlens_k (B + 1) int32, the batch is packed: q
// (total_q, H, D), k (total_k, Hkv, D), lse (H, total_q).
// CUDA kernels take bf16 and fp16, and read 16 bytes at a time: pointers and strides must be multiples of that.
#include "attention.h"

#include <algorithm>

#include "check.h"

namespace cgpt {
namespace {

constexpr const char* kOp = "attention";
constexpr int64_t kMaxHeadDim = 256;

// Which keys a query sees and what their scores are.
struct Options {
    int64_t window_left, window_right;
    double scale;
    const std::optional<View>&alibi_slopes, &cu_seqlens_q, &cu_seqlens_k;
    int64_t max_seqlen_q, max_seqlen_k;
};

void check_like(const char* name, const View& v, const View& like) {
    Arg arg(kOp, name, v);
    arg.on(like).dtype({like.dtype});
    if (like.ndim == 3)
        arg.shape({like.size[0], like.size[1], like.size[2]});
    else
        arg.shape({like.size[0], like.size[1], like.size[2], like.size[3]});
    arg.last_dim_contiguous();
}

// On the CPU also what cu_seqlens says; on a GPU that would take a synchronisation, and the kernels clamp.
void check_seqlens(const std::string& name, const View& cu, const View& q, int64_t B, int64_t total, int64_t longest) {
    Arg(kOp, "cu_seqlens_" + name, cu).on(q).dtype({DType::i32}).shape({B + 1}).contiguous();
    if (longest < 0) fail(kOp, "max_seqlen_" + name, "at least 0", std::to_string(longest));
    if (cu.device != Device::cpu) return;
    const int32_t* at = cu.as<int32_t>();
    if (at[0] != 0) fail(kOp, "cu_seqlens_" + name, "0 at first", std::to_string(at[0]));
    for (int64_t b = 0; b < B; ++b) {
        const int64_t length = static_cast<int64_t>(at[b + 1]) - at[b];
        if (length < 0)
            fail(kOp, "cu_seqlens_" + name, "never falling",
                 std::to_string(at[b]) + " before " + std::to_string(at[b + 1]));
        if (length > longest)
            fail(kOp, "max_seqlen_" + name, "at least the longest sequence's " + std::to_string(length),
                 std::to_string(longest));
    }
    if (at[B] != total)
        fail(kOp, "cu_seqlens_" + name, std::to_string(total) + " at last, as many rows as there are",
             std::to_string(at[B]));
}

// A limit that no query of a sequence of at most T meets is none.
int64_t limit(int64_t window, int64_t T) { return window < 0 || window >= T - 1 ? -1 : window; }

AttentionShape check_inputs(const View& q, const View& k, const View& v, const Options& o) {
    const bool varlen = o.cu_seqlens_q.has_value();
    if (varlen != o.cu_seqlens_k.has_value())
        fail(kOp, varlen ? "cu_seqlens_k" : "cu_seqlens_q", "given where the other is", "None");
    const int heads = varlen ? 1 : 2;  // the dimension of the heads
    Arg(kOp, "q", q).dtype(kFloats).ndim(heads + 2).last_dim_contiguous();
    const int64_t H = q.size[heads], D = q.size[heads + 1];
    if (D < 8 || D > kMaxHeadDim || D % 8 != 0)
        fail(kOp, "head dim", "a multiple of 8 from 8 to " + std::to_string(kMaxHeadDim), std::to_string(D));
    Arg arg(kOp, "k", k);
    arg.on(q).dtype({q.dtype});
    if (varlen)
        arg.shape({-1, -1, D});
    else
        arg.shape({q.size[0], -1, -1, D});
    arg.last_dim_contiguous();
    const int64_t Hkv = k.size[heads];
    if (Hkv == 0 ? H != 0 : H % Hkv != 0)
        fail(kOp, "k", "given with a number of heads that divides q's " + std::to_string(H), std::to_string(Hkv));
    check_like("v", v, k);

    int64_t B = q.size[0];
    const int64_t total_q = q.size[heads - 1], total_k = k.size[heads - 1];
    int64_t Tq = total_q, Tk = total_k;
    if (varlen) {
        const View& cu = *o.cu_seqlens_q;
        if (cu.ndim != 1 || cu.size[0] == 0) fail(kOp, "cu_seqlens_q", "(B + 1,)", shape_of(cu));
        B = cu.size[0] - 1;
        check_seqlens("q", cu, q, B, total_q, o.max_seqlen_q);
        check_seqlens("k", *o.cu_seqlens_k, q, B, total_k, o.max_seqlen_k);
        Tq = std::min(total_q, o.max_seqlen_q);
        Tk = std::min(total_k, o.max_seqlen_k);
    }
    int64_t alibi_stride = 0;
    if (o.alibi_slopes) {
        Arg slopes(kOp, "alibi_slopes", *o.alibi_slopes);
        slopes.on(q).dtype({DType::f32});
        if (o.alibi_slopes->ndim == 2) {
            slopes.shape({B, H});
            alibi_stride = H;
        } else {
            slopes.shape({H});
        }
        slopes.contiguous();
    }
    return {B,
            Tq,
            Tk,
            H,
            Hkv,
            D,
            limit(o.window_left, Tk),
            limit(o.window_right, Tq),
            static_cast<float>(o.scale),
            data_or_null<float>(o.alibi_slopes),
            alibi_stride,
            data_or_null<int32_t>(o.cu_seqlens_q),
            data_or_null<int32_t>(o.cu_seqlens_k),
            total_q,
            total_k,
            varlen ? 0 : H * Tq,
            total_q,
            q.dtype};
}

void check_statistic(const char* name, const View& v, const View& q) {
    Arg arg(kOp, name, v);
    arg.on(q).dtype({DType::f32});
    if (q.ndim == 3)
        arg.shape({q.size[1], q.size[0]});
    else
        arg.shape({q.size[0], q.size[2], q.size[1]});
    arg.contiguous();
}

// What the CUDA kernels ask for beyond that.
[[maybe_unused]] void check_cuda(std::initializer_list<std::pair<const char*, const View&>> tensors) {
    for (const auto& [name, v] : tensors) {
        if (v.dtype == DType::f32)
            throw TypeError(std::string(kOp) + ": " + name + " must be bfloat16 or float16 for the CUDA kernel" +
                            " (float32 is Triton's), got float32");
        if (v.numel() == 0) continue;
        if (reinterpret_cast<uintptr_t>(v.data) % 16 != 0)
            fail(kOp, name, "aligned to 16 bytes", "an address that is not");
        for (int i = 0; i < v.ndim - 1; ++i)
            if (v.size[i] > 1 && v.stride[i] % 8 != 0)
                fail(kOp, name, "given with strides that are multiples of 8", std::to_string(v.stride[i]));
    }
}

Heads heads(const View& v) {
    if (v.ndim == 3) return {v.data, 0, v.stride[0], v.stride[1]};
    return {v.data, v.stride[0], v.stride[1], v.stride[2]};
}

AttentionFwdArgs check_fwd(const View& q, const View& k, const View& v, const Options& o, const View& out,
                           const std::optional<View>& lse) {
    const AttentionShape shape = check_inputs(q, k, v, o);
    check_like("out", out, q);
    if (lse) check_statistic("lse", *lse, q);
    return {shape, heads(q), heads(k), heads(v), heads(out), data_or_null<float>(lse)};
}

}  // namespace

void attention_check(const View& q, const View& k, const View& v, int64_t window_left, int64_t window_right,
                     double softmax_scale, const std::optional<View>& alibi_slopes,
                     const std::optional<View>& cu_seqlens_q, const std::optional<View>& cu_seqlens_k,
                     int64_t max_seqlen_q, int64_t max_seqlen_k, const View& out, const std::optional<View>& lse) {
    check_fwd(q, k, v,
              {window_left, window_right, softmax_scale, alibi_slopes, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
               max_seqlen_k},
              out, lse);
}

void attention_fwd(const View& q, const View& k, const View& v, int64_t window_left, int64_t window_right,
                   double softmax_scale, const std::optional<View>& alibi_slopes,
                   const std::optional<View>& cu_seqlens_q, const std::optional<View>& cu_seqlens_k,
                   int64_t max_seqlen_q, int64_t max_seqlen_k, const View& out, const std::optional<View>& lse) {
    const AttentionFwdArgs args = check_fwd(q, k, v,
                                            {window_left, window_right, softmax_scale, alibi_slopes, cu_seqlens_q,
                                             cu_seqlens_k, max_seqlen_q, max_seqlen_k},
                                            out, lse);
#if defined(CGPT_CUDA)
    if (q.device == Device::cuda) {
        check_cuda({{"q", q}, {"k", k}, {"v", v}, {"out", out}});
        return attention_fwd_cuda(args, q.device_id);
    }
#endif
    if (q.device != Device::cpu) fail_device(kOp, q);
    attention_fwd_cpu(args);
}

void attention_bwd(const View& dout, const View& q, const View& k, const View& v, const View& out, const View& lse,
                   int64_t window_left, int64_t window_right, double softmax_scale,
                   const std::optional<View>& alibi_slopes, const std::optional<View>& cu_seqlens_q,
                   const std::optional<View>& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                   const View& delta, const View& dq, const View& dk, const View& dv) {
    const AttentionShape shape = check_inputs(q, k, v,
                                              {window_left, window_right, softmax_scale, alibi_slopes, cu_seqlens_q,
                                               cu_seqlens_k, max_seqlen_q, max_seqlen_k});
    check_like("dout", dout, q);
    check_like("out", out, q);
    check_statistic("lse", lse, q);
    check_statistic("delta", delta, q);
    check_like("dq", dq, q);
    check_like("dk", dk, k);
    check_like("dv", dv, k);
    const AttentionBwdArgs args = {shape,           heads(dout),       heads(q),  heads(k),  heads(v), heads(out),
                                   lse.as<float>(), delta.as<float>(), heads(dq), heads(dk), heads(dv)};
#if defined(CGPT_CUDA)
    if (q.device == Device::cuda) {
        check_cuda({{"dout", dout}, {"q", q}, {"k", k}, {"v", v}, {"out", out}, {"dq", dq}, {"dk", dk}, {"dv", dv}});
        return attention_bwd_cuda(args, q.device_id);
    }
#endif
    if (q.device != Device::cpu) fail_device(kOp, q);
    attention_bwd_cpu(args);
}

}  // namespace cgpt
