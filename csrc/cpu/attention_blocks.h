// What both directions of attention are made of: packing, and the product of a block of queries with a block of keys.
//
// Operands are brought into scratch once per head as a product's elements: widened to fp32, or paired along what the
// product sums over. Keys (and in the backward pass values) are also transposed, since a product's lanes run along
// keys. A block's arithmetic depends on its place alone, never on how blocks are shared out, so the bits do not depend
// on the thread count.
#pragma once

#include <algorithm>
#include <limits>

#include "../attention.h"
#include "gemm.h"
#include "scratch.h"
#include "vec.h"

namespace cgpt::CGPT_ISA {

// A block of queries, a multiple of every kTileRows and W, 48 to 192 of which lie within 5 % of each other (Zen 4). A
// block of keys, kKeys below, is each direction's own.
inline constexpr int64_t kQueries = 96;
// Up to so many queries, as where text is generated, the forward pass does not pack keys (measured on Zen 4), and both
// directions are all fp32: rounded weights show most in short sums.
inline constexpr int64_t kFew = 4;
inline constexpr float kNone = -std::numeric_limits<float>::infinity();

inline int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }
// Floats, or twice as many bf16, that whole vectors hold, and whole tiles along k.
inline int64_t padded(int64_t n) {
    constexpr int64_t step = std::max<int64_t>(W, 2 * kTileDepth<Element<bf16>>);
    return blocks_of(n, step) * step;
}
// Elements that a sum over D reads.
template <class E>
int64_t depth_of(int64_t D) {
    return blocks_of(D / kHeld<E>, kTileDepth<E>) * kTileDepth<E>;
}

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

// Rows of one head as elements of sums over D, each `ld` long, zeros up to what the sum reads.
template <class T>
void rows_along(const T* from, int64_t stride, int64_t rows, int64_t D, float* to, int64_t ld) {
    widen_rows(from, stride, rows, D, to, ld);
}
inline void rows_along(const bf16* from, int64_t stride, int64_t rows, int64_t D, bf16x2* to, int64_t ld) {
    for (int64_t r = 0; r < rows; ++r) {
        std::memcpy(to + r * ld, from + r * stride, D * sizeof(bf16));
        std::fill(to + r * ld + D / 2, to + r * ld + depth_of<bf16x2>(D), bf16x2{});
    }
}

// Rows as elements of sums over the rows themselves: (kKeys / kHeld, ld), zeros beyond `rows`.
template <int64_t kKeys, class T, class E>
void rows_across(const T* from, int64_t stride, int64_t rows, int64_t D, E* to, int64_t ld) {
    constexpr int64_t held = kHeld<E>;
    for (int64_t r = 0; r < rows; r += held) {
        for_lanes(D, [&](int64_t i, auto n) {
            vf x[held];
            for (int64_t j = 0; j < held; ++j) x[j] = r + j < rows ? get(from + (r + j) * stride + i, n) : vf{};
            store_across(to + r / held * ld + i, x);
        });
    }
    std::fill(to + blocks_of(rows, held) * ld, to + kKeys / held * ld, E{});
}

// (kKeys, n) to (n, kKeys), four by four.
template <int64_t kKeys, class E>
void transpose(const E* source, int64_t ld, int64_t n, E* target) {
    const float* from = reinterpret_cast<const float*>(source);
    float* to = reinterpret_cast<float*>(target);
    for (int64_t r = 0; r < kKeys; r += 4) {
        for (int64_t d = 0; d < n; d += 4) {
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

// A block of keys or values as elements of sums over D, as rows and as columns too; zeros beyond `rows`.
template <int64_t kKeys, class T, class E>
void pack(const T* from, int64_t stride, int64_t rows, int64_t D, E* to, E* turned) {
    const int64_t ld = padded(D) / kHeld<E>;
    rows_along(from, stride, rows, D, to, ld);
    std::fill(to + rows * ld, to + kKeys * ld, E{});
    transpose<kKeys>(to, ld, depth_of<E>(D), turned);
}

// e^x for what softmax asks of it, x <= 0 give or take a rounding: nothing overflows, so half of vec.h's work is saved.
// The same polynomial; -inf and all below e^-86 give 0, NaN stays.
CGPT_INLINE vf exp_below(vf x) {
    const vf shift = splat(0x1.8p23f);
#if defined(__AVX512F__)
    const vf y = x;  // what lies below is masked in the end, whatever it has become
#else
    const vf y = x < -86.0f ? splat(-86.0f) : x;
#endif
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
#if defined(__AVX512F__)
    const __mmask16 counts = _mm512_cmp_ps_mask((__m512)x, (__m512)splat(-86.0f), _CMP_NLT_UQ);
    return (vf)_mm512_maskz_scalef_ps(counts, (__m512)p, (__m512)(n - shift));
#else
    p *= as_float((as_int(n) + 127) << 23);
    return x < -86.0f ? vf{} : p;
#endif
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
template <int64_t kKeys>
int64_t hidden(const AttentionShape& s, int64_t i, int64_t key) {
    return std::clamp<int64_t>(first_key(s, i) - key, 0, kKeys);
}
template <int64_t kKeys>
int64_t visible(const AttentionShape& s, int64_t i, int64_t key) {
    return std::clamp<int64_t>(end_key(s, i) - key, 0, kKeys);
}

// Whether any of the queries sees any key of the block.
template <int64_t kKeys>
bool meet(const AttentionShape& s, int64_t query, int64_t rows, int64_t key) {
    return hidden<kKeys>(s, query, key) < visible<kKeys>(s, query + rows - 1, key);
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
template <int64_t kKeys, class E>
void product(const AttentionShape& s, int64_t query, int64_t rows, int64_t key, const E* a, const E* b, float scale,
             float* c) {
    const vf factor = splat(scale);
    gemm<A::rows>(
        rows, kKeys, a, padded(s.D) / kHeld<E>, b, kKeys,
        [&](int64_t, int64_t last) { return Extent{visible<kKeys>(s, query + last - 1, key), 0, s.D / kHeld<E>}; },
        [](int64_t, int64_t) { return vf{}; },
        [&](int64_t r, int64_t i, vf x) { store(c + r * kKeys + i, x * factor); });
}

}  // namespace cgpt::CGPT_ISA
