// The border of grad_norm and grad_square_sums: grads contiguous in fp32, bf16 or fp16 on one device; norm () fp32 on
// it; workspace and sums (n,) fp64 on it, one a chunk.
#include "grad_norm.h"

#include "check.h"

namespace cgpt {

namespace {

std::vector<GradNormTensor> check_grads(const char* op, const std::vector<View>& grads) {
    std::vector<GradNormTensor> tensors;
    tensors.reserve(grads.size());
    for (size_t i = 0; i < grads.size(); ++i) {
        Arg(op, "grads[" + std::to_string(i) + "]", grads[i]).on(grads[0]).dtype(kFloats).contiguous();
        tensors.push_back({grads[i].data, grads[i].numel(), grads[i].dtype});
    }
    return tensors;
}

int64_t chunks_of(const std::vector<View>& grads, int64_t chunk) {
    int64_t chunks = 0;
    for (const View& grad : grads) chunks += grad_norm_chunks(grad.numel(), chunk);
    return chunks;
}

// norm: null where the sums are all that is wanted.
void run(const char* op, const char* sums_name, const std::vector<View>& grads, int64_t chunk, const View& sums,
         const View* norm) {
    const std::vector<GradNormTensor> tensors = check_grads(op, grads);
    Arg(op, sums_name, sums).dtype({DType::f64}).shape({chunks_of(grads, chunk)}).contiguous();
    if (norm) Arg(op, "norm", *norm).on(sums).dtype({DType::f32}).shape({});
    if (!grads.empty()) Arg(op, sums_name, sums).on(grads[0]);
    const GradNormArgs args = {tensors.data(), static_cast<int64_t>(tensors.size()), chunk, sums.as<double>(),
                               norm ? norm->as<float>() : nullptr};
#if defined(CGPT_CUDA)
    if (sums.device == Device::cuda) return grad_norm_cuda(args, sums.device_id);
#endif
    if (sums.device != Device::cpu) fail_device(op, sums);
    grad_norm_cpu(args);
}

}  // namespace

void grad_norm(const std::vector<View>& grads, const View& norm, const View& workspace) {
    run("grad_norm", "workspace", grads, kGradNormChunk, workspace, &norm);
}

void grad_square_sums(const std::vector<View>& grads, const View& sums, int64_t chunk) {
    if (chunk < 1 || chunk > kGradNormLongestChunk)
        fail("grad_square_sums", "chunk", "from 1 to " + std::to_string(kGradNormLongestChunk), std::to_string(chunk));
    run("grad_square_sums", "sums", grads, chunk, sums, nullptr);
}

int64_t grad_norm_workspace(const std::vector<View>& grads) {
    check_grads("grad_norm", grads);
    return chunks_of(grads, kGradNormChunk);
}

}  // namespace cgpt
