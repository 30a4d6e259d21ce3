// attention: arguments and launchers. Shapes and dtypes are in attention.cpp, which checks them.
//
// Query i of a sequence with Tq queries and Tk keys stands above key i + Tk - Tq: the last query above the last key.
#pragma once

#include <optional>

#include "cpu/isa.h"
#include "view.h"

namespace cgpt {

// A (batch, time, head, head dim) tensor: strides in elements, the head dim contiguous. With cu_seqlens, whose tensors
// are (total, head, head dim), the batch's stride is 0.
struct Heads {
    void* data;
    int64_t batch, time, head;
};

struct AttentionShape {
    int64_t B, Tq, Tk, H, Hkv,
        D;  // query head h reads key head h / (H / Hkv); with cu_seqlens Tq, Tk are the longest's
    // Query i sees keys i + Tk - Tq - window_left to i + Tk - Tq + window_right; negative: no limit. Causal is
    // window_right = 0. The border makes a limit that no query meets negative, so sums with them do not overflow.
    int64_t window_left, window_right;
    float scale;
    const float* alibi_slopes;  // null: none. Adds -slope * |i + Tk - Tq - j| to the scaled score of query i and key j
    int64_t alibi_stride;       // from one sequence's slopes to the next: 0 for (H), H for (B, H)
    // Null, or (B + 1) on the device: sequence b is rows cu[b] to cu[b + 1] of (total, H, D) tensors. On a GPU nobody
    // has read them: kernels clamp each to [0, total] and a sequence to Tq and Tk rows.
    const int32_t *cu_seqlens_q, *cu_seqlens_k;
    int64_t total_q, total_k;     // with cu_seqlens, the tensors' rows; else Tq, Tk
    int64_t lse_batch, lse_head;  // strides of lse and delta: (B, H, Tq), or with cu_seqlens (H, total_q) and batch 0
    DType dtype;
};

struct AttentionFwdArgs {
    AttentionShape shape;
    Heads q, k, v, out;
    float* lse;  // null when no gradient will be asked for
};

struct AttentionBwdArgs {
    AttentionShape shape;
    Heads dout, q, k, v, out;
    const float* lse;
    float* delta;  // scratch like lse, for the CUDA kernels
    Heads dq, dk, dv;
};

// attention_fwd's checks alone, for kernels that are not native. It asks for no more than the CPU kernels do.
void attention_check(const View& q, const View& k, const View& v, int64_t window_left, int64_t window_right,
                     double softmax_scale, const std::optional<View>& alibi_slopes,
                     const std::optional<View>& cu_seqlens_q, const std::optional<View>& cu_seqlens_k,
                     int64_t max_seqlen_q, int64_t max_seqlen_k, const View& out, const std::optional<View>& lse);

void attention_fwd(const View& q, const View& k, const View& v, int64_t window_left, int64_t window_right,
                   double softmax_scale, const std::optional<View>& alibi_slopes,
                   const std::optional<View>& cu_seqlens_q, const std::optional<View>& cu_seqlens_k,
                   int64_t max_seqlen_q, int64_t max_seqlen_k, const View& out, const std::optional<View>& lse);

void attention_bwd(const View& dout, const View& q, const View& k, const View& v, const View& out, const View& lse,
                   int64_t window_left, int64_t window_right, double softmax_scale,
                   const std::optional<View>& alibi_slopes, const std::optional<View>& cu_seqlens_q,
                   const std::optional<View>& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                   const View& delta, const View& dq, const View& dk, const View& dv);

#if defined(CGPT_CUDA)
void attention_fwd_cuda(const AttentionFwdArgs& args, int device_id);
void attention_bwd_cuda(const AttentionBwdArgs& args, int device_id);
#endif

}  // namespace cgpt

CGPT_CPU_KERNEL(attention_fwd, AttentionFwdArgs)
CGPT_CPU_KERNEL(attention_bwd, AttentionBwdArgs)
