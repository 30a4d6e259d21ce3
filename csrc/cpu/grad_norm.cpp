// The global gradient norm, or its chunks' sums, on the CPU. grad_norm.h states the order of the sums.
#include "../grad_norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "threads.h"
#include "vec.h"

namespace cgpt::CGPT_ISA {
namespace {

constexpr int64_t kTask = 1 << 15;    // elements of the chunks that a thread takes together, where they are shorter
constexpr int kSums = kGradNormSums;  // two of the widest vectors, so that every instruction set adds in one order
constexpr int kHalf = W / 2;

// The doubles that half a vector of floats widens to; gcc 12 converts these by halves or elements without being told.
typedef double vd __attribute__((vector_size(8 * kHalf)));

// A square is exact, so the fused and the separate form give the same sum.
CGPT_INLINE void add_squares(vd* sums, vf x) {
#if defined(__AVX512F__)
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x, 1));
    sums[0] = (vd)_mm512_fmadd_pd(low, low, (__m512d)sums[0]);
    sums[1] = (vd)_mm512_fmadd_pd(high, high, (__m512d)sums[1]);
#elif defined(__AVX2__)
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x));
    const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x, 1));
    sums[0] = (vd)_mm256_fmadd_pd(low, low, (__m256d)sums[0]);
    sums[1] = (vd)_mm256_fmadd_pd(high, high, (__m256d)sums[1]);
#else
    const vd low = {x[0], x[1]}, high = {x[2], x[3]};
    sums[0] += low * low;
    sums[1] += high * high;
#endif
}

double folded(double* sums, int n) {
    for (int half = n / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    return sums[0];
}

template <class T>
double sum_of_squares(const T* x, int64_t n) {
    constexpr int kVectors = kSums / kHalf;
    vd sums[kVectors] = {};
    int64_t i = 0;
    for (; i + kSums <= n; i += kSums)
        for (int lane = 0; lane < kSums; lane += W) add_squares(sums + lane / kHalf, load(x + i + lane));
    for (int lane = 0; i < n; lane += W, i += W) add_squares(sums + lane / kHalf, load_n(x + i, n - i < W ? n - i : W));
    for (int half = kVectors / 2; half > 0; half /= 2)  // the tree's first levels, a vector at a time
        for (int v = 0; v < half; ++v) sums[v] += sums[v + half];
    double lanes[kHalf];
    std::memcpy(lanes, sums, sizeof lanes);
    return folded(lanes, kHalf);
}

}  // namespace

void grad_norm(const GradNormArgs& a) {
    struct Task {
        int64_t tensor, begin;
        double* sums;
    };
    const int64_t length = std::max(kTask / a.chunk, int64_t(1)) * a.chunk;
    std::vector<Task> tasks;
    double* sums = a.sums;
    for (int64_t t = 0; t < a.count; ++t) {
        for (int64_t begin = 0; begin < a.tensors[t].numel; begin += length)
            tasks.push_back({t, begin, sums + begin / a.chunk});
        sums += grad_norm_chunks(a.tensors[t].numel, a.chunk);
    }
    parallel_for(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
        const Task& task = tasks[i];
        const GradNormTensor& t = a.tensors[task.tensor];
        const int64_t end = std::min(task.begin + length, t.numel);
        CGPT_WITH_FLOAT_TYPE(t.dtype, T, {
            double* sum = task.sums;
            for (int64_t begin = task.begin; begin < end; begin += a.chunk)
                *sum++ = sum_of_squares(static_cast<const T*>(t.data) + begin, std::min(a.chunk, end - begin));
        })
    });
    if (!a.norm) return;
    double totals[kGradNormTotals] = {};
    for (int64_t i = 0; i < sums - a.sums; ++i) totals[i % kGradNormTotals] += a.sums[i];
    *a.norm = static_cast<float>(std::sqrt(folded(totals, kGradNormTotals)));
}

}  // namespace cgpt::CGPT_ISA
