// gelu_mlp's product with its activation, and its backward, by cuBLASLt's own epilogues (GELU is its tanh
// approximation):
//
//   gelu_aux_bias   pre = x w1^T + b1, act = gelu(pre)
//   dgelu_bgrad     dpre = (dout w2) gelu'(pre), db1 = sum over rows of dpre
//
// cuBLASLt is opened at run time: torch for CUDA has it in the process, and its C interface has kept these functions,
// numbers and structures since CUDA 11.4 (https://docs.nvidia.com/cuda/cublas/#using-the-cublaslt-api), so no header
// and no link is needed. What its heuristic said of a shape is kept, as asking costs more than a small product.
#include <dlfcn.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <tuple>

#include "../gelu_mlp.h"
#include "launch.cuh"

namespace cgpt {
namespace {

constexpr const char* kOp = "gelu_mlp";

enum class LtEpilogue : uint32_t {  // cublasLtEpilogue_t
    gelu = 32,
    gelu_bias = 36,
    gelu_aux = 160,
    gelu_aux_bias = 164,
    dgelu = 192,
    dgelu_bgrad = 208
};

// D (m, n) = epilogue(A (m, k) B (k, n)), all column-major, A transposed where asked for.
struct LtProblem {
    const void *a, *b;
    void *d, *bias, *aux;  // bias (m,) is read, or written by dgelu_bgrad; aux, like d, is written, or read by dgelu
    int64_t m, n, k, lda, ldb;
    bool transpose_a;
    DType dtype;
    LtEpilogue epilogue;
};

using Handle = void*;
using Object = void*;  // of a description, a layout, a preference

struct Algorithm {
    uint64_t data[8];
};
struct Heuristic {
    Algorithm algorithm;
    size_t workspace_bytes;
    int status;
    float waves;
    int reserved[4];
};

enum { kComputeFloat = 68, kFloat = 0, kHalf = 2, kBfloat16 = 14 };
enum { kTransposeA = 3, kEpilogue = 7, kBiasPointer = 8, kAuxPointer = 11, kAuxStride = 12 };
enum { kMaxWorkspaceBytes = 1, kMinAlignmentA = 5, kMinAlignmentB = 6, kMinAlignmentC = 7, kMinAlignmentD = 8 };

struct Library {
    int (*create)(Handle*);
    int (*description_create)(Object*, int compute, int scale);
    int (*description_set)(Object, int attribute, const void* value, size_t bytes);
    int (*layout_create)(Object*, int type, uint64_t rows, uint64_t cols, int64_t stride);
    int (*preference_create)(Object*);
    int (*preference_set)(Object, int attribute, const void* value, size_t bytes);
    int (*preference_destroy)(Object);
    int (*heuristic)(Handle, Object description, Object a, Object b, Object c, Object d, Object preference, int wanted,
                     Heuristic* results, int* found);
    int (*matmul)(Handle, Object description, const void* alpha, const void* a, Object layout_a, const void* b,
                  Object layout_b, const void* beta, const void* c, Object layout_c, void* d, Object layout_d,
                  const Algorithm*, void* workspace, size_t workspace_bytes, void* stream);
};

void check(const char* what, int status) {
    if (status == 0) return;
    throw std::runtime_error(std::string(kOp) + ": " + what + " returned cuBLAS status " + std::to_string(status));
}

Library open_library(const std::string& path) {
    void* handle = nullptr;
    for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so.11"})
        if (!handle) handle = dlopen(name, RTLD_NOLOAD | RTLD_LAZY);
    if (!handle && !path.empty()) handle = dlopen(path.c_str(), RTLD_LAZY | RTLD_LOCAL);
    if (!handle)
        throw std::runtime_error(
            std::string(kOp) + ": cublaslt needs libcublasLt.so of CUDA 11, 12 or 13: torch has not loaded one, and " +
            (path.empty() ? "none is installed beside it" : path + " did not open"));
    auto find = [&](auto& function, const char* name) {
        void* symbol = dlsym(handle, name);
        if (!symbol) throw std::runtime_error(std::string(kOp) + ": libcublasLt.so has no " + name);
        function = reinterpret_cast<std::decay_t<decltype(function)>>(symbol);
    };
    Library l;
    find(l.create, "cublasLtCreate");
    find(l.description_create, "cublasLtMatmulDescCreate");
    find(l.description_set, "cublasLtMatmulDescSetAttribute");
    find(l.layout_create, "cublasLtMatrixLayoutCreate");
    find(l.preference_create, "cublasLtMatmulPreferenceCreate");
    find(l.preference_set, "cublasLtMatmulPreferenceSetAttribute");
    find(l.preference_destroy, "cublasLtMatmulPreferenceDestroy");
    find(l.heuristic, "cublasLtMatmulAlgoGetHeuristic");
    find(l.matmul, "cublasLtMatmul");
    return l;
}

struct Plan {
    Object description, a, b, d;
    Algorithm algorithm;
};

using Key = std::tuple<int, DType, LtEpilogue, int64_t, int64_t, int64_t, int64_t, int64_t, bool, uint32_t, int64_t>;

// What all addresses are multiples of: 256 as torch allocates, 16 as the border demands, so two plans a shape at most.
uint32_t alignment_of(const LtProblem& p) {
    uintptr_t bits = 0;
    for (const void* q : {p.a, p.b, static_cast<const void*>(p.d), static_cast<const void*>(p.aux)})
        bits |= reinterpret_cast<uintptr_t>(q);
    return bits % 256 == 0 ? 256 : 16;
}

template <class Value>
void set(int (*setter)(Object, int, const void*, size_t), Object object, int attribute, const Value& value) {
    check("cublasLt*SetAttribute", setter(object, attribute, &value, sizeof value));
}

void set_pointers(const Library& l, const Plan& plan, const LtProblem& p) {
    if (p.bias) set(l.description_set, plan.description, kBiasPointer, p.bias);
    if (!p.aux) return;
    set(l.description_set, plan.description, kAuxPointer, p.aux);
    set(l.description_set, plan.description, kAuxStride, p.m);
}

Plan make_plan(const Library& l, Handle handle, const LtProblem& p, int64_t workspace_bytes) {
    const int type = p.dtype == DType::bf16 ? kBfloat16 : kHalf;
    Plan plan = {};
    check("cublasLtMatmulDescCreate", l.description_create(&plan.description, kComputeFloat, kFloat));
    set(l.description_set, plan.description, kTransposeA, int32_t(p.transpose_a));
    set(l.description_set, plan.description, kEpilogue, uint32_t(p.epilogue));
    set_pointers(l, plan, p);
    auto layout = [&](Object& to, int64_t rows, int64_t cols, int64_t stride) {
        check("cublasLtMatrixLayoutCreate", l.layout_create(&to, type, rows, cols, stride));
    };
    layout(plan.a, p.transpose_a ? p.k : p.m, p.transpose_a ? p.m : p.k, p.lda);
    layout(plan.b, p.k, p.n, p.ldb);
    layout(plan.d, p.m, p.n, p.m);
    Object preference = nullptr;
    check("cublasLtMatmulPreferenceCreate", l.preference_create(&preference));
    set(l.preference_set, preference, kMaxWorkspaceBytes, uint64_t(workspace_bytes));
    for (int which : {kMinAlignmentA, kMinAlignmentB, kMinAlignmentC, kMinAlignmentD})
        set(l.preference_set, preference, which, alignment_of(p));
    Heuristic best = {};
    int found = 0;
    check("cublasLtMatmulAlgoGetHeuristic",
          l.heuristic(handle, plan.description, plan.a, plan.b, plan.d, plan.d, preference, 1, &best, &found));
    check("cublasLtMatmulPreferenceDestroy", l.preference_destroy(preference));
    if (found == 0)
        throw std::runtime_error(std::string(kOp) + ": cuBLASLt has no algorithm for m " + std::to_string(p.m) +
                                 ", n " + std::to_string(p.n) + ", k " + std::to_string(p.k) + " with epilogue " +
                                 std::to_string(uint32_t(p.epilogue)));
    plan.algorithm = best.algorithm;
    return plan;
}

// A handle and the plans of a device live as long as the process. One product is described at a time, as a description
// holds the pointers of the call.
struct State {
    std::mutex mutex;
    bool open = false;
    Library library;
    std::map<int, Handle> handles;
    std::map<Key, Plan> plans;
};

State& state() {
    static State s;
    return s;
}

void matmul(const LtProblem& p, const LtWorkspace& lt, int device_id) {
    const cuda::DeviceGuard guard(kOp, device_id);
    void* stream = current_stream(device_id);  // takes the GIL, so before the lock
    State& s = state();
    const std::lock_guard<std::mutex> lock(s.mutex);
    if (!s.open) s.library = open_library(lt.library);
    s.open = true;
    const Library& l = s.library;
    Handle& handle = s.handles[device_id];
    if (!handle) check("cublasLtCreate", l.create(&handle));
    const Key key{device_id, p.dtype,       p.epilogue,      p.m,     p.n, p.k, p.lda,
                  p.ldb,     p.transpose_a, alignment_of(p), lt.bytes};
    auto known = s.plans.find(key);
    if (known == s.plans.end()) known = s.plans.emplace(key, make_plan(l, handle, p, lt.bytes)).first;
    const Plan& plan = known->second;
    set_pointers(l, plan, p);
    const float one = 1.0f, zero = 0.0f;
    check("cublasLtMatmul", l.matmul(handle, plan.description, &one, p.a, plan.a, p.b, plan.b, &zero, p.d, plan.d, p.d,
                                     plan.d, &plan.algorithm, lt.data, static_cast<size_t>(lt.bytes), stream));
}

}  // namespace

// A row-major (m, n) is a column-major (n, m), so what is computed is the transpose: act^T = w1 x^T. A single line has
// stride 0 here, where cuBLASLt wants one that it fits.
void gelu_mlp_cublaslt_fwd_cuda(const GeluMlpLinearFwdArgs& a, const LtWorkspace& lt, int device_id) {
    if (a.m == 0) return;
    const LtEpilogue epilogue = a.pre ? (a.b1 ? LtEpilogue::gelu_aux_bias : LtEpilogue::gelu_aux)
                                      : (a.b1 ? LtEpilogue::gelu_bias : LtEpilogue::gelu);
    const int64_t lda = std::max(a.w1.stride, a.w1.row_major ? a.k : a.n), ldb = std::max(a.x.stride, a.k);
    matmul({a.w1.data, a.x.data, a.act, const_cast<void*>(a.b1), a.pre, a.n, a.m, a.k, lda, ldb, a.w1.row_major,
            a.dtype, epilogue},
           lt, device_id);
}

// dpre^T = w2^T dout^T
void gelu_mlp_cublaslt_bwd_cuda(const GeluMlpLinearBwdArgs& a, const LtWorkspace& lt, int device_id) {
    const LtEpilogue epilogue = a.db1 ? LtEpilogue::dgelu_bgrad : LtEpilogue::dgelu;
    const int64_t lda = std::max(a.w2.stride, a.w2.row_major ? a.n : a.k), ldb = std::max(a.dout.stride, a.k);
    matmul({a.w2.data, a.dout.data, a.dpre, a.db1, const_cast<void*>(a.pre), a.n, a.m, a.k, lda, ldb, !a.w2.row_major,
            a.dtype, epilogue},
           lt, device_id);
}

}  // namespace cgpt
