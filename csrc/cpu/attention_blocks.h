// What both directions of attention are made of: this thread's scratch, packing, and the product of a block of queries
// with a block of keys.
//
// Operands are widened to fp32 once per head into scratch, keys (and in the backward pass values) also transposed,
// since a product's lanes run along keys. A block's arithmetic depends on its place alone, never on how blocks are
// shared out, so the bits do not depend on the thread count.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "../attention.h"
#include "gemm.h"
#include "vec.h"

namespace cgpt::CGPT_ISA {

// A block of 64 keys, transposed, is 16 KiB at head dim 64: half a first-level cache. Queries are a multiple of every
// kTileRows and W. Measured on Zen 4, 48 to 192 queries and 64 or 128 keys lie within 5 % of each other.
inline constexpr int64_t kKeys = 64, kQueries = 96;
inline constexpr float kNone = -std::numeric_limits<float>::infinity();

inline int64_t padded(int64_t n) { return (n + W - 1) / W * W; }
inline int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Pieces of this thread's scratch, each a multiple of a cache line here. It lives as long as the thread: fresh memory
// costs a page fault every 4 KiB.
class Scratch {
  public:
    explicit Scratch(int64_t floats) {
        static thread_local std::vector<float> memory;
        if (static_cast<int64_t>(memory.size()) < floats + kLine) memory = {}, memory.resize(floats + kLine);
        const auto address = reinterpret_cast<uintptr_t>(memory.data());
        next_ = memory.data() + (kLine * 4 - address % (kLine * 4)) % (kLine * 4) / 4;
    }
    float* take(int64_t floats) {
        float* p = next_;
        next_ += floats;
        return p;
    }

  private:
    static constexpr int64_t kLine = 16;  // floats in a cache line
    float* next_;
};

// One sequence of the batch, as a batch of its own: what the kernels below work on.
struct Sequence {
    AttentionShape shape;
    int64_t b, query, key;  // its place in the batch, its first rows among the packed ones
    float slope(int64_t h) const { return shape.alibi_slopes ? shape.alibi_slopes[h] : 0.0f; }
};

inline Sequence sequence(const AttentionShape& all, int64_t b) {
    Sequence one = {all, b, 0, 0};
    AttentionShape& s = one.shape;
    if (all.alibi_slopes) s.alibi_slopes += b * all.alibi_stride;
    if (!all.cu_seqlens_q) return one;
    one.query = all.cu_seqlens_q[b], one.key = all.cu_seqlens_k[b];
    s.Tq = all.cu_seqlens_q[b + 1] - one.query, s.Tk = all.cu_seqlens_k[b + 1] - one.key;
    return one;
}

template <class T>
T* query_row(const Heads& t, const Sequence& of, int64_t i, int64_t h) {
    return static_cast<T*>(t.data) + of.b * t.batch + (of.query + i) * t.time + h * t.head;
}

template <class T>
T* key_row(const Heads& t, const Sequence& of, int64_t j, int64_t h) {
    return static_cast<T*>(t.data) + of.b * t.batch + (of.key + j) * t.time + h * t.head;
}

// Where a query's statistics stand in lse.
inline int64_t lse_at(const Sequence& of, int64_t i, int64_t h) {
    return of.b * of.shape.lse_batch + h * of.shape.lse_head + of.query + i;
}

// Rows of one head to fp32, each `ld` long, zeros after D.
template <class T>
void widen_rows(const T* from, int64_t stride, int64_t rows, int64_t D, float* to, int64_t ld) {
    for (int64_t r = 0; r < rows; ++r) {
        for_lanes(D, [&](int64_t i, auto n) { store(to + r * ld + i, get(from + r * stride + i, n)); });
    }
}

template <class T>
void narrow_rows(const float* from, int64_t ld, int64_t rows, int64_t D, float scale, T* to, int64_t stride) {
    for (int64_t r = 0; r < rows; ++r)
        for_lanes(D, [&](int64_t i, auto n) { put(to + r * stride + i, load(from + r * ld + i) * scale, n); });
}

// (kKeys, D) to (D, kKeys), four by four.
inline void transpose(const float* from, int64_t ld, int64_t D, float* to) {
    for (int64_t r = 0; r < kKeys; r += 4) {
        for (int64_t d = 0; d < D; d += 4) {
            const float* x = from + r * ld + d;
            float* y = to + d * kKeys + r;
#if defined(__x86_64__)
            __m128 a = _mm_loadu_ps(x), b = _mm_loadu_ps(x + ld);
            __m128 c = _mm_loadu_ps(x + 2 * ld), e = _mm_loadu_ps(x + 3 * ld);
            _MM_TRANSPOSE4_PS(a, b, c, e);
            _mm_storeu_ps(y, a);
            _mm_storeu_ps(y + kKeys, b);
            _mm_storeu_ps(y + 2 * kKeys, c);
            _mm_storeu_ps(y + 3 * kKeys, e);
#else
            for (int64_t i = 0; i < 4; ++i)
                for (int64_t k = 0; k < 4; ++k) y[i * kKeys + k] = x[k * ld + i];
#endif
        }
    }
}

// A block of keys or values to fp32, as rows and, where `turned` is given, as columns too; zeros beyond `rows`.
template <class T>
void pack(const T* from, int64_t stride, int64_t rows, int64_t D, float* to, float* turned) {
    const int64_t ld = padded(D);
    widen_rows(from, stride, rows, D, to, ld);
    std::fill(to + rows * ld, to + kKeys * ld, 0.0f);
    if (turned) transpose(to, ld, D, turned);
}

// e^x for what softmax asks of it, x <= 0 give or take a rounding: nothing overflows, so half of vec.h's work is saved.
// The same polynomial; -inf and all below e^-86 give 0, NaN stays.
CGPT_INLINE vf exp_below(vf x) {
    const vf shift = splat(0x1.8p23f);
    const vf y = x < -86.0f ? splat(-86.0f) : x;
    const vf n = madd(y, splat(0x1.715476p+0f), shift);  // the integer sits in the low mantissa bits
    vf r = madd(n - shift, splat(-0x1.62e400p-1f), y);
    r = madd(n - shift, splat(-0x1.7f7d1cp-20f), r);
    vf p = splat(0x1.6c16c2p-10f);
    p = madd(p, r, splat(0x1.111112p-7f));
    p = madd(p, r, splat(0x1.555556p-5f));
    p = madd(p, r, splat(0x1.555556p-3f));
    p = madd(p, r, splat(0.5f));
    p = madd(p, r, splat(1.0f));
    p = madd(p, r, splat(1.0f));
    p *= as_float((as_int(n) + 127) << 23);
    return x < -86.0f ? vf{} : p;
}

// Query i sees keys [first_key, end_key), key j is seen by queries [first_query, end_query).
inline int64_t first_key(const AttentionShape& s, int64_t i) {
    return s.window_left < 0 ? 0 : std::clamp<int64_t>(i + s.Tk - s.Tq - s.window_left, 0, s.Tk);
}
inline int64_t end_key(const AttentionShape& s, int64_t i) {
    return s.window_right < 0 ? s.Tk : std::clamp<int64_t>(i + s.Tk - s.Tq + s.window_right + 1, 0, s.Tk);
}
inline int64_t first_query(const AttentionShape& s, int64_t j) {
    return s.window_right < 0 ? 0 : std::clamp<int64_t>(j - (s.Tk - s.Tq) - s.window_right, 0, s.Tq);
}
inline int64_t end_query(const AttentionShape& s, int64_t j) {
    return s.window_left < 0 ? s.Tq : std::clamp<int64_t>(j - (s.Tk - s.Tq) + s.window_left + 1, 0, s.Tq);
}

// Of the block of keys that starts at `key`, query i sees columns [hidden, visible).
inline int64_t hidden(const AttentionShape& s, int64_t i, int64_t key) {
    return std::clamp<int64_t>(first_key(s, i) - key, 0, kKeys);
}
inline int64_t visible(const AttentionShape& s, int64_t i, int64_t key) {
    return std::clamp<int64_t>(end_key(s, i) - key, 0, kKeys);
}

// Whether any of the queries sees any key of the block.
inline bool meet(const AttentionShape& s, int64_t query, int64_t rows, int64_t key) {
    return hidden(s, query, key) < visible(s, query + rows - 1, key);
}

// Query i's scores of a block of keys, of which it sees no more than `seen`, with their distance's part.
inline void add_alibi(const AttentionShape& s, float slope, int64_t i, int64_t key, int64_t seen, float* scores) {
    vf lanes;
    for (int l = 0; l < W; ++l) lanes[l] = static_cast<float>(l);
    const vf first = splat(static_cast<float>(i + s.Tk - s.Tq - key)) - lanes;
    for (int64_t c = 0; c < seen; c += W) {
        const vf distance = first - static_cast<float>(c);
        store(scores + c, madd(splat(-slope), max(distance, -distance), load(scores + c)));
    }
}

// C (rows, kKeys) = scale * A B: queries (rows, ld) against transposed keys, or dout against transposed values. Only
// the columns that a group of rows sees are computed, up to whole vectors.
inline void product(const AttentionShape& s, int64_t query, int64_t rows, int64_t key, const float* a, const float* b,
                    float scale, float* c) {
    const vf factor = splat(scale);
    gemm<A::rows>(
        rows, kKeys, a, padded(s.D), b, kKeys,
        [&](int64_t, int64_t last) { return Extent{visible(s, query + last - 1, key), 0, s.D}; },
        [](int64_t, int64_t) { return vf{}; },
        [&](int64_t r, int64_t i, vf x) { store(c + r * kKeys + i, x * factor); });
}

}  // namespace cgpt::CGPT_ISA
