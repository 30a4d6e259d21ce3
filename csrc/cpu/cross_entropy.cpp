// Softmax cross-entropy of rows of logits, and its gradient in their place, in one visit.
//
//   lse  = max + log(sum_j exp(l_j - max)),   p_j = exp(l_j - lse)
//   loss = lse - l_target + z_loss * lse^2
//   dl_j = dout * (p_j * (1 + 2 z_loss lse) - [j = target])
//
// An ignored row has loss 0 and gradient 0. A row of 50257 bf16 logits is 100 kB and its exponentials in fp32 are twice
// that, so a row stays in the second-level cache over its three passes, and each exponential is computed once. A row
// is one thread's, so the bits do not depend on the thread count.
#include "../cross_entropy.h"

#include <algorithm>
#include <memory>

#include "threads.h"
#include "vec.h"

namespace cgpt::CGPT_ISA {
namespace {

// e^x for x <= 0 to about 2 ulp; below -88.03, where even the smallest normal float is larger, 0. NaN stays NaN.
// 2^(n + r) with |r| <= 1/2: a degree-5 polynomial in r with the least relative error (9e-8) among those that are 1 at
// 0, and 2^n by the exponent field: the shift leaves n + 127 in the low bits of the mantissa.
CGPT_INLINE vf exp_nonpositive(vf x) {
    const vf shift = splat(0x1.8p23f + 127.0f), log2e = splat(0x1.715476p+0f);
    const vf least = splat(-88.0296919f);  // -127 ln2: there the exponent field is 0
    x = least > x ? least : x;
    const vf shifted = madd(x, log2e, shift);
    const vf r = madd(x, log2e, shift - shifted);
    vf p = splat(0x1.5bba14p-10f);
    p = madd(p, r, splat(0x1.3cea88p-7f));
    p = madd(p, r, splat(0x1.c6b752p-5f));
    p = madd(p, r, splat(0x1.ebf9bcp-3f));
    p = madd(p, r, splat(0x1.62e42ap-1f));
    p = madd(p, r, splat(1.0f));
    return p * as_float(as_int(shifted) << 23);
}

template <class T>
float max_of(const T* x, int64_t size) {
    vf largest[4] = {splat(-INFINITY), splat(-INFINITY), splat(-INFINITY), splat(-INFINITY)};
    int64_t i = 0;
    for (; i + 4 * W <= size; i += 4 * W)
        for (int k = 0; k < 4; ++k) largest[k] = max(load(x + i + k * W), largest[k]);
    float tail = -INFINITY;
    for (; i < size; ++i) {
        const float v = load_one(x + i);
        tail = v > tail ? v : tail;
    }
    const float rest = hmax(max(max(largest[0], largest[1]), max(largest[2], largest[3])));
    return rest > tail ? rest : tail;
}

// The sum of exp(x - largest); the exponentials themselves go to `e` where there is one. Summed in blocks, so that
// the rounding error does not grow with the vocabulary.
template <bool kKeep, class T>
float sum_of_exponentials(const T* x, int64_t size, float largest, float* e) {
    constexpr int64_t kBlock = 64 * W;
    vf sum{};
    for (int64_t begin = 0; begin < size; begin += kBlock) {
        vf partial{};
        for_lanes(std::min(kBlock, size - begin), [&](int64_t i, auto n) {
            vf v = exp_nonpositive(get(x + begin + i, n) - largest);
            if constexpr (kKeep) put(e + begin + i, v, n);
            partial += keep_n(v, n);
        });
        sum += partial;
    }
    return hsum(sum);
}

template <class T>
void rows(const CrossEntropyArgs& a, int64_t begin, int64_t end) {
    const int64_t V = a.cols;
    const std::unique_ptr<float[]> e(a.dout ? new float[V] : nullptr);
    for (int64_t r = begin; r < end; ++r) {
        T* logits = static_cast<T*>(a.logits) + r * a.row_stride;
        const int64_t target = a.target[r];
        if (target == a.ignore_index) {
            a.loss[r] = 0;
            if (a.dout) std::fill(logits, logits + V, T{});
            continue;
        }
        const float largest = max_of(logits, V);
        const float sum = e ? sum_of_exponentials<true>(logits, V, largest, e.get())
                            : sum_of_exponentials<false>(logits, V, largest, nullptr);
        const float log_sum = std::log(sum), lse = largest + log_sum;
        // largest - l_target first: exact where the logits are large and close
        a.loss[r] = (largest - load_one(logits + target)) + log_sum + a.z_loss * lse * lse;
        if (!a.dout) continue;
        const float dout = a.dout[r];
        const float factor = dout * (1.0f + 2.0f * a.z_loss * lse) / sum;
        for_lanes(V, [&](int64_t i, auto n) { put(logits + i, get(e.get() + i, n) * factor, n); });
        const float p = e[target] / sum;
        store_one(logits + target, dout * ((p - 1.0f) + 2.0f * a.z_loss * lse * p));
    }
}

}  // namespace

void cross_entropy_rows(const CrossEntropyArgs& a) {
    const int64_t grain = std::max<int64_t>(1, (1 << 18) / a.cols);
    parallel_ranges(a.rows, grain, [&](int64_t begin, int64_t end) {
        if (a.dtype == DType::bf16)
            rows<bf16>(a, begin, end);
        else
            rows<float>(a, begin, end);
    });
}

}  // namespace cgpt::CGPT_ISA
