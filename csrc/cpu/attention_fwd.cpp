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

// A block of queries as its keys go by: running maximum, sum of exponentials by lane, unnormalised output.
struct Running {
    float *top, *from, *grown;  // (kQueries): maximum, the same or 0 for none, what it scales the past by
    float *sum, *out;           // (kQueries, W), (kQueries, padded D)
};

void absorb(const AttentionShape& s, float slope, int64_t query, int64_t rows, int64_t key, const float* q,
            const float* kt, const float* v, float* p, const Running& run) {
    const int64_t ld = padded(s.D);
    product(s, query, rows, key, q, kt, s.scale, p);
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
    gemm<A::rows>(
        rows, s.D, p, kKeys, v, ld,
        [&](int64_t first, int64_t last) {
            return Extent{s.D, hidden(s, query + first, key), visible(s, query + last - 1, key)};
        },
        [&](int64_t r, int64_t c) { return load(run.out + r * ld + c) * run.grown[r]; },
        [&](int64_t r, int64_t c, vf x) { store(run.out + r * ld + c, x); });
}

// Query blocks [begin, end) of one head.
template <class T>
void forward(const AttentionFwdArgs& a, const Sequence& of, int64_t h, int64_t begin, int64_t end) {
    const AttentionShape& s = of.shape;
    const int64_t D = s.D, ld = padded(D), hkv = h / (s.H / s.Hkv);
    const int64_t start = first_key(s, begin * kQueries) / kKeys * kKeys;
    const int64_t keys = end_key(s, std::min(s.Tq, end * kQueries) - 1), key_blocks = blocks_of(keys - start, kKeys);
    Scratch scratch(key_blocks * kKeys * (D + ld) + kQueries * (2 * ld + kKeys + W + 3) + kKeys * ld);
    float *kt = scratch.take(key_blocks * kKeys * D), *v = scratch.take(key_blocks * kKeys * ld);
    float *q = scratch.take(kQueries * ld), *p = scratch.take(kQueries * kKeys), *rows_of_k = scratch.take(kKeys * ld);
    const Running run = {scratch.take(kQueries), scratch.take(kQueries), scratch.take(kQueries),
                         scratch.take(kQueries * W), scratch.take(kQueries * ld)};
    for (int64_t j = 0; j < key_blocks; ++j) {
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
        for (int64_t j = 0; j < key_blocks; ++j)
            if (meet(s, query, rows, start + j * kKeys))
                absorb(s, of.slope(h), query, rows, start + j * kKeys, q, kt + j * kKeys * D, v + j * kKeys * ld, p,
                       run);
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
