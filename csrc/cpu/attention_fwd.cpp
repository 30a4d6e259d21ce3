// Forward pass of attention by blocks of queries and keys, fp32 inside (Dao et al. 2022, arXiv 2205.14135; Dao 2023,
// arXiv 2307.08691).
//
//   S = scale * Q K^T - slope * distance,  lse = log sum over keys of exp(S),  out = exp(S - lse) V
//
// q, out (B, Tq, H, D), k, v (B, Tk, Hkv, D), or packed sequences of (total, H, D). Blocks of keys outside the window
// are skipped. A query that sees no key has out = 0 and lse = -inf.
#include <cmath>

#include "attention_blocks.h"
#include "threads.h"

namespace cgpt::CGPT_ISA {
namespace {

// Up to so many queries, as where text is generated, keys are not packed. Measured on Zen 4.
constexpr int64_t kFew = 4;

// A block of queries as its keys go by: running maximum, sum of exponentials by lane, unnormalised output.
struct Running {
    float *top, *from, *grown;  // (kQueries): maximum, the same or 0 for none, what it scales the past by
    float *sum, *out;           // (kQueries, W), (kQueries, padded D)
};

// Scores of a block of keys, p (rows, kKeys), to their exponentials, and the running maximum and sum with them.
void weigh(const AttentionShape& s, float slope, int64_t query, int64_t rows, int64_t key, float* p,
           const Running& run) {
    for (int64_t r = 0; r < rows; ++r) {
        float* row = p + r * kKeys;
        const int64_t seen = visible(s, query + r, key);
        if (slope != 0.0f) add_alibi(s, slope, query + r, key, seen, row);
        std::fill(row, row + hidden(s, query + r, key), kNone);
        std::fill(row + seen, row + kKeys, kNone);
        vf high = load(row);
        for (int64_t c = W; c < kKeys; c += W) high = max(high, load(row + c));
        run.grown[r] = hmax(high);
    }
    for (int64_t r = 0; r < rows; r += W) {
        const vf before = load(run.top + r), top = max(before, load(run.grown + r));
        store(run.top + r, top);
        store(run.from + r, top == kNone ? vf{} : top);
        store(run.grown + r, exp_below(before - load(run.from + r)));
    }
    for (int64_t r = 0; r < rows; ++r) {
        float* row = p + r * kKeys;
        vf sum{};
        for (int64_t c = 0; c < kKeys; c += W) {
            const vf e = exp_below(load(row + c) - run.from[r]);
            store(row + c, e);
            sum += e;
        }
        store(run.sum + r * W, madd(load(run.sum + r * W), splat(run.grown[r]), sum));
    }
}

void absorb(const AttentionShape& s, float slope, int64_t query, int64_t rows, int64_t key, const float* q,
            const float* kt, const float* v, float* p, const Running& run) {
    const int64_t ld = padded(s.D);
    product(s, query, rows, key, q, kt, s.scale, p);
    weigh(s, slope, query, rows, key, p, run);
    gemm<A::rows>(
        rows, s.D, p, kKeys, v, ld,
        [&](int64_t first, int64_t last) {
            return Extent{s.D, hidden(s, query + first, key), visible(s, query + last - 1, key)};
        },
        [&](int64_t r, int64_t c) { return load(run.out + r * ld + c) * run.grown[r]; },
        [&](int64_t r, int64_t c, vf x) { store(run.out + r * ld + c, x); });
}

// The same for a few queries, which do not repay packing: keys and values are read where they lie, each once a query.
template <class T>
void absorb_few(const AttentionShape& s, float slope, int64_t query, int64_t rows, int64_t key, const float* q,
                const T* k, int64_t k_stride, const T* v, int64_t v_stride, float* p, const Running& run) {
    const int64_t ld = padded(s.D);
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t seen = visible(s, query + r, key);
        for (int64_t j = hidden(s, query + r, key); j < seen; ++j) {
            vf sum{};
            for_lanes(s.D,
                      [&](int64_t i, auto n) { sum = madd(load(q + r * ld + i), get(k + j * k_stride + i, n), sum); });
            p[r * kKeys + j] = hsum(sum) * s.scale;
        }
    }
    weigh(s, slope, query, rows, key, p, run);
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t first = hidden(s, query + r, key), seen = visible(s, query + r, key);
        const float* weight = p + r * kKeys;
        for_lanes(s.D, [&](int64_t i, auto n) {
            vf even = load(run.out + r * ld + i) * run.grown[r], odd{};  // two chains of additions
            int64_t j = first;
            for (; j + 1 < seen; j += 2) {
                even = madd(splat(weight[j]), get(v + j * v_stride + i, n), even);
                odd = madd(splat(weight[j + 1]), get(v + (j + 1) * v_stride + i, n), odd);
            }
            if (j < seen) even = madd(splat(weight[j]), get(v + j * v_stride + i, n), even);
            store(run.out + r * ld + i, even + odd);
        });
    }
}

// Query blocks [begin, end) of one head.
template <class T>
void forward(const AttentionFwdArgs& a, const Sequence& of, int64_t h, int64_t begin, int64_t end) {
    const AttentionShape& s = of.shape;
    const int64_t D = s.D, ld = padded(D), hkv = h / (s.H / s.Hkv);
    const int64_t start = first_key(s, begin * kQueries) / kKeys * kKeys;
    const int64_t keys = end_key(s, std::min(s.Tq, end * kQueries) - 1), key_blocks = blocks_of(keys - start, kKeys);
    const bool few = s.Tq <= kFew;
    const int64_t packed = few ? 0 : key_blocks;
    Scratch scratch(packed * kKeys * (D + ld) + kQueries * (2 * ld + kKeys + W + 3) + kKeys * ld);
    float *kt = scratch.take(packed * kKeys * D), *v = scratch.take(packed * kKeys * ld);
    float *q = scratch.take(kQueries * ld), *p = scratch.take(kQueries * kKeys), *rows_of_k = scratch.take(kKeys * ld);
    const Running run = {scratch.take(kQueries), scratch.take(kQueries), scratch.take(kQueries),
                         scratch.take(kQueries * W), scratch.take(kQueries * ld)};
    for (int64_t j = 0; j < packed; ++j) {
        const int64_t key = start + j * kKeys, n = std::min(kKeys, keys - key);
        pack(key_row<const T>(a.k, of, key, hkv), a.k.time, n, D, rows_of_k, kt + j * kKeys * D);
        pack(key_row<const T>(a.v, of, key, hkv), a.v.time, n, D, v + j * kKeys * ld, nullptr);
    }
    for (int64_t i = begin; i < end; ++i) {
        const int64_t query = i * kQueries, rows = std::min(kQueries, s.Tq - query);
        widen_rows(query_row<const T>(a.q, of, query, h), a.q.time, rows, D, q, ld);
        std::fill(run.top, run.top + rows, kNone);
        std::fill(run.sum, run.sum + rows * W, 0.0f);
        std::fill(run.out, run.out + rows * ld, 0.0f);
        for (int64_t j = 0; j < key_blocks; ++j) {
            const int64_t key = start + j * kKeys;
            if (!meet(s, query, rows, key)) continue;
            if (few)
                absorb_few(s, of.slope(h), query, rows, key, q, key_row<const T>(a.k, of, key, hkv), a.k.time,
                           key_row<const T>(a.v, of, key, hkv), a.v.time, p, run);
            else
                absorb(s, of.slope(h), query, rows, key, q, kt + j * kKeys * D, v + j * kKeys * ld, p, run);
        }
        for (int64_t r = 0; r < rows; ++r) {
            const float sum = hsum(load(run.sum + r * W));
            const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
            narrow_rows(run.out + r * ld, ld, 1, D, inverse, query_row<T>(a.out, of, query + r, h), 0);
            if (a.lse) a.lse[lse_at(of, query + r, h)] = run.top[r] + std::log(sum);
        }
    }
}

}  // namespace

void attention_fwd(const AttentionFwdArgs& a) {
    const AttentionShape& s = a.shape;
    const int64_t longest = blocks_of(s.Tq, kQueries), heads = s.B * s.H;
    if (heads == 0 || longest == 0) return;
    // A head is one task where heads keep the threads busy; otherwise it is cut, and each piece packs its keys again.
    const int64_t pieces = std::clamp<int64_t>(blocks_of(3 * num_threads(), heads), 1, longest);
    CGPT_WITH_FLOAT_TYPE(s.dtype, T, {
        parallel_for(heads * pieces, [&](int64_t task) {
            const int64_t head = task % heads, piece = pieces - 1 - task / heads;  // the longest rows first
            const Sequence of = sequence(s, head / s.H);
            const int64_t blocks = blocks_of(of.shape.Tq, kQueries);
            const int64_t begin = blocks * piece / pieces, end = blocks * (piece + 1) / pieces;
            if (begin < end) forward<T>(a, of, head % s.H, begin, end);
        });
    })
}

}  // namespace cgpt::CGPT_ISA
