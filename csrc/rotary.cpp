// The border of rotary: x (B, T, H, D) of any strides with the last dimension contiguous, out (B, T, H, D) contiguous,
// in one of fp32, bf16, fp16; cos and sin (at least T, R / 2) contiguous fp32 with 2 <= R <= D.
#include "rotary.h"

#include "check.h"

namespace cgpt {

void rotary(const View& x, const View& cos, const View& sin, const View& out, bool interleaved, bool inverse) {
    constexpr const char* kOp = "rotary";
    Arg(kOp, "x", x).dtype(kFloats).ndim(4).last_dim_contiguous();
    const int64_t time = x.size[1], dim = x.size[3];
    Arg(kOp, "cos", cos).on(x).dtype({DType::f32}).ndim(2).contiguous();
    if (cos.size[0] < time) fail(kOp, "cos", "at least " + std::to_string(time) + " rows", shape_of(cos));
    if (cos.size[1] < 1 || cos.size[1] > dim / 2)
        fail(kOp, "cos", "1 to " + std::to_string(dim / 2) + " columns for x " + shape_of(x), shape_of(cos));
    Arg(kOp, "sin", sin).on(x).dtype({DType::f32}).shape({cos.size[0], cos.size[1]}).contiguous();
    Arg(kOp, "out", out).on(x).dtype({x.dtype}).shape({x.size[0], time, x.size[2], dim}).contiguous();
    if (x.numel() == 0) return;
    const RotaryArgs args = {x.data,          cos.as<float>(),
                             sin.as<float>(), out.data,
                             x.size[0],       time,
                             x.size[2],       dim,
                             2 * cos.size[1], {x.stride[0], x.stride[1], x.stride[2]},
                             interleaved,     inverse,
                             x.dtype};
#if defined(CGPT_CUDA)
    if (x.device == Device::cuda && (x.size[0] * time > INT32_MAX || x.size[2] * dim > 1 << 30))
        fail(kOp, "x", "of fewer than 2^31 tokens of at most 2^30 values on a GPU", shape_of(x));
    if (x.device == Device::cuda) return rotary_cuda(args, x.device_id);
#endif
    if (x.device != Device::cpu) fail_device(kOp, x);
    rotary_cpu(args);
}

}  // namespace cgpt
