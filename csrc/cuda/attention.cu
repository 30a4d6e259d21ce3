// attention's launchers. The kernels are compiled a dtype a file, so that compilers run side by side.
#include "../attention.h"
#include "launch.cuh"
#include "vec.cuh"

namespace cgpt {
namespace cuda {

template <class T>
void attention_fwd_launch(const AttentionFwdArgs& a, void* stream);  // attention_fwd_<dtype>.cu
template <class T>
void attention_bwd_launch(const AttentionBwdArgs& a, void* stream);  // attention_bwd_<dtype>.cu

}  // namespace cuda

void attention_fwd_cuda(const AttentionFwdArgs& a, int device_id) {
    const AttentionShape& s = a.shape;
    if (s.B == 0 || s.H == 0 || s.Tq == 0) return;
    const cuda::DeviceGuard guard("attention", device_id);
    const auto run =
        s.dtype == DType::bf16 ? cuda::attention_fwd_launch<cuda::bf16> : cuda::attention_fwd_launch<cuda::f16>;
    run(a, current_stream(device_id));
}

void attention_bwd_cuda(const AttentionBwdArgs& a, int device_id) {
    const AttentionShape& s = a.shape;
    if (s.B == 0 || s.H == 0) return;
    const cuda::DeviceGuard guard("attention", device_id);
    const auto run =
        s.dtype == DType::bf16 ? cuda::attention_bwd_launch<cuda::bf16> : cuda::attention_bwd_launch<cuda::f16>;
    run(a, current_stream(device_id));
}

}  // namespace cgpt
