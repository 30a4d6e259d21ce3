// The border of grad_norm: grads contiguous in fp32, bf16 or fp16 on one device; norm () fp32 on it.
#include "grad_norm.h"

#include "check.h"

namespace cgpt {

void grad_norm(const std::vector<View>& grads, const View& norm) {
    constexpr const char* kOp = "grad_norm";
    Arg(kOp, "norm", norm).dtype({DType::f32}).shape({});
    std::vector<GradNormTensor> tensors;
    tensors.reserve(grads.size());
    for (size_t i = 0; i < grads.size(); ++i) {
        Arg(kOp, "grads[" + std::to_string(i) + "]", grads[i]).on(grads[0]).dtype(kFloats).contiguous();
        tensors.push_back({grads[i].data, grads[i].numel(), grads[i].dtype});
    }
    if (!grads.empty()) Arg(kOp, "norm", norm).on(grads[0]);
    if (norm.device != Device::cpu) fail_device(kOp, norm);
    grad_norm_cpu({tensors.data(), static_cast<int64_t>(tensors.size()), norm.as<float>()});
}

}  // namespace cgpt
