// A libcublasLt for tests: the functions that csrc/cuda/cublaslt.cpp opens, as NVIDIA's manual describes them, in plain
// loops over host memory. A missing attribute, a stride that does not fit or a null pointer is a status, not a guess.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

enum { kOk = 0, kInvalid = 7, kNotSupported = 15 };

struct Description {
    int32_t transpose_a = 0;
    uint32_t epilogue = 1;
    void *bias = nullptr, *aux = nullptr;
    int64_t aux_stride = 0;
};
struct Layout {
    int type;
    int64_t rows, cols, stride;
};
struct Heuristic {
    uint64_t algorithm[8];
    size_t workspace_bytes;
    int status;
    float waves;
    int reserved[4];
};

uint16_t to_bf16(double x) {
    const float f = static_cast<float>(x);
    uint32_t u;
    std::memcpy(&u, &f, 4);
    return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

double from_bf16(uint16_t bits) {
    const uint32_t u = uint32_t(bits) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}

const double kC = 0.7978845608028654, kA = 0.044715;

double gelu(double z) { return 0.5 * z * (1 + std::tanh(kC * (z + kA * z * z * z))); }
double gelu_slope(double z) {
    const double t = std::tanh(kC * (z + kA * z * z * z));
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * kC * (1 + 3 * kA * z * z);
}

template <class T>
int set(T& to, const void* value, size_t bytes) {
    if (bytes != sizeof(T)) return kInvalid;
    std::memcpy(&to, value, bytes);
    return kOk;
}

int created, asked;

}  // namespace

extern "C" {

int standin_created() { return created; }
int standin_asked() { return asked; }

int cublasLtCreate(void** handle) {
    *handle = &created;
    ++created;
    return kOk;
}

int cublasLtMatmulDescCreate(void** d, int compute, int scale) {
    *d = new Description;
    return compute == 68 && scale == 0 ? kOk : kNotSupported;
}

int cublasLtMatmulDescSetAttribute(void* object, int attribute, const void* value, size_t bytes) {
    Description& d = *static_cast<Description*>(object);
    switch (attribute) {
        case 3:
            return set(d.transpose_a, value, bytes);
        case 7:
            return set(d.epilogue, value, bytes);
        case 8:
            return set(d.bias, value, bytes);
        case 11:
            return set(d.aux, value, bytes);
        case 12:
            return set(d.aux_stride, value, bytes);
    }
    return kInvalid;
}

int cublasLtMatrixLayoutCreate(void** layout, int type, uint64_t rows, uint64_t cols, int64_t stride) {
    *layout = new Layout{type, int64_t(rows), int64_t(cols), stride};
    return stride >= int64_t(rows) ? kOk : kInvalid;
}

int cublasLtMatmulPreferenceCreate(void** p) { return *p = new int64_t(0), kOk; }
int cublasLtMatmulPreferenceSetAttribute(void* p, int attribute, const void* value, size_t bytes) {
    if (attribute == 1) return set(*static_cast<int64_t*>(p), value, bytes);
    return attribute >= 5 && attribute <= 8 && bytes == 4 ? kOk : kInvalid;
}
int cublasLtMatmulPreferenceDestroy(void* p) {
    delete static_cast<int64_t*>(p);
    return kOk;
}

int cublasLtMatmulAlgoGetHeuristic(void*, void*, void* a, void*, void*, void*, void* p, int wanted, Heuristic* results,
                                   int* found) {
    ++asked;
    *found = static_cast<Layout*>(a)->type == 14 && *static_cast<int64_t*>(p) > 0 && wanted == 1;
    results[0].algorithm[0] = 42;
    return kOk;
}

int cublasLtMatmul(void*, void* description, const float* alpha, const uint16_t* a, void* layout_a, const uint16_t* b,
                   void* layout_b, const float* beta, const uint16_t*, void*, uint16_t* out, void* layout_d,
                   const uint64_t* algorithm, void* workspace, size_t, void*) {
    const Description& d = *static_cast<Description*>(description);
    const Layout &la = *static_cast<Layout*>(layout_a), &lb = *static_cast<Layout*>(layout_b),
                 &ld = *static_cast<Layout*>(layout_d);
    const bool reads_aux = d.epilogue & 64, has_aux = d.epilogue & 128, adds_bias = d.epilogue & 4,
               sums = d.epilogue & 16;
    const int64_t m = ld.rows, n = ld.cols, k = lb.rows;
    if (algorithm[0] != 42 || !workspace || *alpha != 1 || *beta != 0) return kInvalid;
    if ((d.transpose_a ? la.cols : la.rows) != m || (d.transpose_a ? la.rows : la.cols) != k || lb.cols != n)
        return kInvalid;
    if ((has_aux && (!d.aux || d.aux_stride < m || d.aux_stride % 8)) || ((adds_bias || sums) && !d.bias))
        return kInvalid;
    uint16_t *aux = static_cast<uint16_t*>(d.aux), *bias = static_cast<uint16_t*>(d.bias);
    std::vector<double> sum(m, 0.0);
    for (int64_t j = 0; j < n; ++j)
        for (int64_t i = 0; i < m; ++i) {
            double x = 0;
            for (int64_t l = 0; l < k; ++l)
                x += from_bf16(a[d.transpose_a ? i * la.stride + l : l * la.stride + i]) *
                     from_bf16(b[j * lb.stride + l]);
            if (adds_bias) x += from_bf16(bias[i]);
            if (reads_aux) {
                x *= gelu_slope(from_bf16(aux[j * d.aux_stride + i]));
                sum[i] += x;
            } else {
                if (has_aux) aux[j * d.aux_stride + i] = to_bf16(x);
                x = gelu(x);
            }
            out[j * ld.stride + i] = to_bf16(x);
        }
    if (sums)
        for (int64_t i = 0; i < m; ++i) bias[i] = to_bf16(sum[i]);
    return kOk;
}
}
