// The border of grad_norm: grads contiguous in fp32, bf16 or fp16 on one device; norm () fp32 on it; workspace (n,)
// fp64 with n what grad_norm_workspace asks for, given on a GPU.
#include "grad_norm.h"

#include "check.h"

namespace cgpt {

namespace {

constexpr const char* kOp = "grad_norm";

std::vector<GradNormTensor> check_grads(const std::vector<View>& grads) {
    std::vector<GradNormTensor> tensors;
    tensors.reserve(grads.size());
    for (size_t i = 0; i < grads.size(); ++i) {
        Arg(kOp, "grads[" + std::to_string(i) + "]", grads[i]).on(grads[0]).dtype(kFloats).contiguous();
        tensors.push_back({grads[i].data, grads[i].numel(), grads[i].dtype});
    }
    return tensors;
}

int64_t chunks_of([[maybe_unused]] const std::vector<View>& grads) {
    int64_t chunks = 0;
#if defined(CGPT_CUDA)
    if (!grads.empty() && grads[0].device == Device::cuda)
        for (const View& grad : grads) chunks += grad_norm_chunks(grad.numel());
#endif
    return chunks;
}

}  // namespace

void grad_norm(const std::vector<View>& grads, const View& norm, const std::optional<View>& workspace) {
    Arg(kOp, "norm", norm).dtype({DType::f32}).shape({});
    const std::vector<GradNormTensor> tensors = check_grads(grads);
    if (!grads.empty()) Arg(kOp, "norm", norm).on(grads[0]);
    const int64_t chunks = chunks_of(grads);
    if (workspace) Arg(kOp, "workspace", *workspace).on(norm).dtype({DType::f64}).shape({chunks}).contiguous();
    if (chunks != 0 && !workspace) fail(kOp, "workspace", "given on a GPU", "None");
    const GradNormArgs args = {tensors.data(), static_cast<int64_t>(tensors.size()), norm.as<float>(),
                               data_or_null<double>(workspace)};
#if defined(CGPT_CUDA)
    if (norm.device == Device::cuda) return grad_norm_cuda(args, norm.device_id);
#endif
    if (norm.device != Device::cpu) fail_device(kOp, norm);
    grad_norm_cpu(args);
}

int64_t grad_norm_workspace(const std::vector<View>& grads) {
    check_grads(grads);
    return chunks_of(grads);
}

}  // namespace cgpt
