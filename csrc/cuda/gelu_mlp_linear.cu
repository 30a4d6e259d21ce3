// gelu_mlp's matrix products with what follows them in one kernel each (bf16 and fp16): gemm.cuh with the epilogues of
// gelu_mlp_epilogue.cuh. The backward product writes act besides dpre: its epilogue has just read pre, so that costs
// one write of act, where a pass of its own would read pre again, and keeping act from the forward pass would hold
// memory.
#include "gelu_mlp_gemm.cuh"
#include "sum_rows.cuh"

namespace cgpt {
namespace {

using namespace cuda;

constexpr const char* kOp = "gelu_mlp";

template <class F>
void with_half_type(DType dtype, F&& f) {
    if (dtype == DType::bf16) return f(bf16{});
    f(f16{});
}

}  // namespace

void gelu_mlp_product_cuda(const GeluMlpProductArgs& a, int device_id) {
    const DeviceGuard guard(kOp, device_id);
    with_half_type(a.dtype, [&](auto type) {
        using T = decltype(type);
        GeluMlpEpilogue<T> epilogue = {};
        epilogue.work = GemmWork::product;
        epilogue.bias = static_cast<const T*>(a.bias);
        epilogue.out = static_cast<T*>(a.out);
        epilogue.m = a.m;
        epilogue.n = a.n;
        gelu_mlp_gemm<T>(kOp, {{a.a.data, a.a.stride}, {a.b.data, a.b.stride}, a.m, a.n, a.k, 0}, a.a.row_major,
                         a.b.row_major, epilogue, a.tile, device_id);
    });
}

void gelu_mlp_linear_fwd_cuda(const GeluMlpLinearFwdArgs& a, int device_id) {
    const DeviceGuard guard(kOp, device_id);
    with_half_type(a.dtype, [&](auto type) {
        using T = decltype(type);
        GeluMlpEpilogue<T> epilogue = {};
        epilogue.work = GemmWork::forward;
        epilogue.activation = a.activation;
        epilogue.bias = static_cast<const T*>(a.b1);
        epilogue.out = static_cast<T*>(a.pre);
        epilogue.act = static_cast<T*>(a.act);
        epilogue.m = a.m;
        epilogue.n = a.n;
        const int64_t pair = a.activation == Activation::swiglu ? a.n : 0;
        gelu_mlp_gemm<T>(kOp, {{a.x.data, a.x.stride}, {a.w1.data, a.w1.stride}, a.m, a.n, a.k, pair}, a.x.row_major,
                         a.w1.row_major, epilogue, a.tile, device_id);
    });
}

void gelu_mlp_linear_bwd_cuda(const GeluMlpLinearBwdArgs& a, int device_id) {
    const DeviceGuard guard(kOp, device_id);
    with_half_type(a.dtype, [&](auto type) {
        using T = decltype(type);
        GeluMlpEpilogue<T> epilogue = {};
        epilogue.work = GemmWork::backward;
        epilogue.activation = a.activation;
        epilogue.pre_in = static_cast<const T*>(a.pre);
        epilogue.act = static_cast<T*>(a.act);
        epilogue.dpre = static_cast<T*>(a.dpre);
        epilogue.partials = a.partials;
        epilogue.m = a.m;
        epilogue.n = a.n;
        // w2 (k, n) is B^T: what is a row of w2 is a column of B.
        gelu_mlp_gemm<T>(kOp, {{a.dout.data, a.dout.stride}, {a.w2.data, a.w2.stride}, a.m, a.n, a.k, 0},
                         a.dout.row_major, !a.w2.row_major, epilogue, a.tile, device_id);
    });
    if (a.db1 == nullptr) return;
    const int64_t columns = a.activation == Activation::swiglu ? 2 * a.n : a.n;
    sum_rows(kOp, a.partials, (a.m + kPartialRows - 1) / kPartialRows, columns, a.db1, a.dtype, device_id);
}

}  // namespace cgpt
