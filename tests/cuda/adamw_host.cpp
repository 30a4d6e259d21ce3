// csrc/cuda/adamw.cu as it ships, on the stand-in runtime, behind one C function for ctypes.
#include "cuda/adamw.cu"

namespace cgpt {
void* current_stream(int) { return nullptr; }
}  // namespace cgpt

// rows: of each tensor param, grad, exp_avg, exp_avg_sq, rest, step, numel, dtype, grad_dtype. Returns the launches.
extern "C" int adamw_host(const int64_t* rows, int64_t count, int weights, const double* numbers, int64_t step,
                          int step_dtype, const void* lr, const float* grad_scale, int maximize) {
    using namespace cgpt;
    std::vector<AdamWTensor> tensors;
    for (int64_t i = 0; i < count; ++i, rows += 9) {
        auto at = [&](int k) { return reinterpret_cast<void*>(rows[k]); };
        tensors.push_back({at(0), at(1), static_cast<float*>(at(2)), static_cast<float*>(at(3)), at(4), at(5), rows[6],
                           static_cast<DType>(rows[7]), static_cast<DType>(rows[8])});
    }
    AdamWHyper hyper = {numbers[0],   numbers[1], numbers[2], numbers[3], numbers[4],
                        step,         lr,         grad_scale, DType::f32, static_cast<DType>(step_dtype),
                        maximize != 0};
    launches = 0;
    adamw_cuda({hyper, static_cast<Weights>(weights), tensors.data(), count, nullptr}, 0);
    return launches;
}
