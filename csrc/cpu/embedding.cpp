// Token embedding with learned positions, and its gradient.
//
//   out[b, t] = wte[ids[b, t]] + wpe[t]               added in fp32, rounded once
//   dwte[v] = sum over tokens i with ids[i] = v of dout[i],  dwpe[t] = sum over b of dout[b, t]
//
// The backward pass sorts the tokens by id, keeping their order, and gives each id's run to one thread, which sums
// it in fp32 in token order and writes the row once: no atomics, and bits that depend on nothing but the input.
#include "../embedding.h"

#include <algorithm>
#include <array>
#include <vector>

#include "threads.h"
#include "vec.h"

namespace cgpt::CGPT_ISA {
namespace {

struct Token {
    int64_t id, row;
};

// Tokens by ascending id, equal ids in ascending row: a radix sort, 11 bits a pass (linear; V never matters).
std::vector<Token> sorted(const int64_t* ids, int64_t n) {
    constexpr int kBits = 11;
    constexpr int64_t kBuckets = 1 << kBits;
    std::vector<Token> from(n), to(n);
    int64_t largest = 0;
    for (int64_t i = 0; i < n; ++i) {
        from[i] = {ids[i], i};
        largest = std::max(largest, ids[i]);
    }
    for (int shift = 0; shift < 63 && largest >> shift; shift += kBits) {
        std::array<int64_t, kBuckets + 1> start{};
        for (const Token& t : from) ++start[((t.id >> shift) & (kBuckets - 1)) + 1];
        for (int64_t b = 0; b < kBuckets; ++b) start[b + 1] += start[b];
        for (const Token& t : from) to[start[(t.id >> shift) & (kBuckets - 1)]++] = t;
        from.swap(to);
    }
    return from;
}

// out = the fp32 sum over i < n of dout[row(i)], summed in that order.
template <class T, class F>
void sum_rows(const T* dout, int64_t cols, int64_t n, const F& row, float* sum, T* out) {
    for (int64_t i = 0; i < n; ++i) {
        const T* d = dout + row(i) * cols;
        for_lanes(cols, [&](int64_t c, auto m) {
            const vf v = get(d + c, m);
            put(sum + c, i == 0 ? v : get(sum + c, m) + v, m);
        });
    }
    for_lanes(cols, [&](int64_t c, auto m) { put(out + c, get(sum + c, m), m); });
}

template <class T>
void forward_rows(const EmbeddingFwdArgs& a, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        const T* token = static_cast<const T*>(a.wte) + a.ids[i] * a.wte_stride;
        T* out = static_cast<T*>(a.out) + i * a.cols;
        if (!a.wpe) {
            std::memcpy(out, token, a.cols * sizeof(T));
            continue;
        }
        const T* position = static_cast<const T*>(a.wpe) + i % a.time * a.wpe_stride;
        for_lanes(a.cols, [&](int64_t c, auto n) { put(out + c, get(token + c, n) + get(position + c, n), n); });
    }
}

template <class T>
void backward(const EmbeddingBwdArgs& a, int64_t grain) {
    const T* dout = static_cast<const T*>(a.dout);
    if (a.dwte) {
        const std::vector<Token> tokens = sorted(a.ids, a.tokens);
        parallel_ranges(a.tokens, grain, [&](int64_t begin, int64_t end) {
            std::vector<float> sum(a.cols);
            for (int64_t i = begin; i < end;) {
                const int64_t id = tokens[i].id, first = i;
                const bool begun_further_left = first > 0 && tokens[first - 1].id == id;
                const int64_t last = begun_further_left ? end : a.tokens;
                while (i < last && tokens[i].id == id) ++i;
                if (begun_further_left || id == a.padding_idx) continue;
                T* row = static_cast<T*>(a.dwte) + id * a.cols;
                sum_rows(dout, a.cols, i - first, [&](int64_t k) { return tokens[first + k].row; }, sum.data(), row);
            }
        });
    }
    if (a.dwpe && a.tokens) {
        parallel_ranges(a.time, std::max<int64_t>(1, grain * a.time / a.tokens), [&](int64_t begin, int64_t end) {
            std::vector<float> sum(a.cols);
            for (int64_t t = begin; t < end; ++t) {
                T* row = static_cast<T*>(a.dwpe) + t * a.cols;
                sum_rows(dout, a.cols, a.tokens / a.time, [&](int64_t b) { return b * a.time + t; }, sum.data(), row);
            }
        });
    }
}

}  // namespace

void embedding_fwd(const EmbeddingFwdArgs& a) {
    const int64_t grain = std::max<int64_t>(1, 12288 / a.cols);
    CGPT_WITH_FLOAT_TYPE(a.dtype, T, {
        parallel_ranges(a.tokens, grain, [&](int64_t begin, int64_t end) { forward_rows<T>(a, begin, end); });
    })
}

void embedding_bwd(const EmbeddingBwdArgs& a) {
    const int64_t grain = std::max<int64_t>(1, 12288 / a.cols);
    CGPT_WITH_FLOAT_TYPE(a.dtype, T, { backward<T>(a, grain); })
}

}  // namespace cgpt::CGPT_ISA
