// attention: arguments and launchers. Shapes and dtypes are in attention.cpp, which checks them.
#pragma once

#include <optional>

#include "cpu/isa.h"
#include "view.h"

namespace cgpt {

// A (batch, time, head, head dim) tensor: strides in elements, the head dim contiguous.
struct Heads {
    void* data;
    int64_t batch, time, head;
};

struct AttentionShape {
    int64_t B, Tq, Tk, H, Hkv, D;  // query head h reads key head h / (H / Hkv)
    bool causal;                   // query i sees keys j <= i + Tk - Tq
    float scale;
    DType dtype;
};

struct AttentionFwdArgs {
    AttentionShape shape;
    Heads q, k, v, out;
    float* lse;  // (B, H, Tq), null when no gradient will be asked for
};

struct AttentionBwdArgs {
    AttentionShape shape;
    Heads dout, q, k, v, out;
    const float* lse;
    Heads dq, dk, dv;
};

void attention_fwd(const View& q, const View& k, const View& v, bool causal, double softmax_scale, const View& out,
                   const std::optional<View>& lse);

void attention_bwd(const View& dout, const View& q, const View& k, const View& v, const View& out, const View& lse,
                   bool causal, double softmax_scale, const View& dq, const View& dk, const View& dv);

}  // namespace cgpt

CGPT_CPU_KERNEL(attention_fwd, AttentionFwdArgs)
CGPT_CPU_KERNEL(attention_bwd, AttentionBwdArgs)
