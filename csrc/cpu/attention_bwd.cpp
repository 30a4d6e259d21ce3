// Backward pass of attention by blocks of queries and keys, fp32 inside (Dao et al. 2022, arXiv 2205.14135; Dao 2023,
// arXiv 2307.08691). P is computed again from lse.
//
//   S = scale * Q K^T - slope * distance,  P = exp(S - lse),  dP = dout V^T,  delta = sum over D of dout * out,  dS = P
//   * (dP - delta) dV = P^T dout,  dK = scale * dS^T Q,  dQ = scale * dS K
//
// dout, q, out, dq (B, Tq, H, D), k, v, dk, dv (B, Tk, Hkv, D), or packed sequences of (total, H, D). A query that sees
// no key has no gradient. Blocks of keys go outermost: their dK and dV stay in cache while the head's queries pass, and
// dQ adds up in scratch in the keys' order. Blocks outside the window are skipped.
#include "attention_blocks.h"
#include "threads.h"

namespace cgpt::CGPT_ISA {
namespace {

// What one task of the backward pass covers: blocks of queries and keys of one key head, query heads [g0, g1) of its
// group, and which gradients of them are wanted.
struct Cut {
    int64_t g0, g1, i0, i1, j0, j1;
    bool dq, dkv;
};

// fp32 copies of the rows of one query head that a cut covers, with dq to be summed over key blocks.
struct Queries {
    float *q, *dout, *dq;      // (rows, ld)
    float *minus_lse, *delta;  // (rows)
    float slope;
};

struct KeyBlock {
    float *k, *kt, *vt;  // (kKeys, ld), (D, kKeys), (D, kKeys)
    float *dk, *dv;      // (kKeys, ld)
};

// P and dS of one block of queries and keys.
void block_gradients(const AttentionShape& s, int64_t query, int64_t rows, int64_t key, const Queries& x,
                     const KeyBlock& y, float* p, float* ds) {
    product(s, query, rows, key, x.q, y.kt, s.scale, p);
    product(s, query, rows, key, x.dout, y.vt, 1.0f, ds);
    for (int64_t r = 0; r < rows; ++r) {
        float *p_row = p + r * kKeys, *ds_row = ds + r * kKeys;
        const vf minus_lse = splat(x.minus_lse[r]), delta = splat(x.delta[r]);
        const int64_t seen = visible(s, query + r, key), unseen = hidden(s, query + r, key);
        if (x.slope != 0.0f) add_alibi(s, x.slope, query + r, key, seen, p_row);
        for (int64_t c = unseen / W * W; c < seen; c += W) {
            const vf e = exp_below(load(p_row + c) + minus_lse);
            store(p_row + c, e);
            store(ds_row + c, e * (load(ds_row + c) - delta));
        }
        std::fill(p_row, p_row + unseen, 0.0f);
        std::fill(ds_row, ds_row + unseen, 0.0f);
        std::fill(p_row + seen, p_row + kKeys, 0.0f);
        std::fill(ds_row + seen, ds_row + kKeys, 0.0f);
    }
}

// C (rows, ld) += the product: what all three gradients are.
template <A order, class ExtentOf>
void accumulate(int64_t rows, int64_t D, const float* a, const float* b, float* c, ExtentOf&& extent) {
    const int64_t ld = padded(D);
    gemm<order>(
        rows, D, a, kKeys, b, ld, extent, [&](int64_t r, int64_t i) { return load(c + r * ld + i); },
        [&](int64_t r, int64_t i, vf value) { store(c + r * ld + i, value); });
}

// One block of queries against one block of keys: adds what it gives to dq, dk and dv.
void backward_block(const AttentionShape& s, const Cut& cut, int64_t query, int64_t rows, int64_t key, const Queries& x,
                    const KeyBlock& y, float* p, float* ds) {
    block_gradients(s, query, rows, key, x, y, p, ds);
    if (cut.dkv) {
        const auto seeing = [&](int64_t first, int64_t last) {
            return Extent{s.D, std::clamp<int64_t>(first_query(s, key + first) - query, 0, rows),
                          std::clamp<int64_t>(end_query(s, key + last - 1) - query, 0, rows)};
        };
        const int64_t keys = std::min(kKeys, s.Tk - key);
        accumulate<A::columns>(keys, s.D, p, x.dout, y.dv, seeing);
        accumulate<A::columns>(keys, s.D, ds, x.q, y.dk, seeing);
    }
    if (cut.dq)
        accumulate<A::rows>(rows, s.D, ds, y.k, x.dq, [&](int64_t first, int64_t last) {
            return Extent{s.D, hidden(s, query + first, key), visible(s, query + last - 1, key)};
        });
}

// Fills x for one query head. delta adds up over D in the order in which the products do, so that where one key has all
// the weight dP - delta is 0 and not a rounding error. y is free memory here.
template <class T>
void widen_queries(const AttentionBwdArgs& a, const Sequence& of, int64_t h, int64_t query, int64_t rows,
                   const Queries& x, const KeyBlock& y) {
    const int64_t D = of.shape.D, ld = padded(D);
    widen_rows(query_row<const T>(a.q, of, query, h), a.q.time, rows, D, x.q, ld);
    for (int64_t r = 0; r < rows; r += kKeys) {
        const int64_t n = std::min(kKeys, rows - r);
        pack(query_row<const T>(a.dout, of, query + r, h), a.dout.time, n, D, x.dout + r * ld, y.kt);
        pack(query_row<const T>(a.out, of, query + r, h), a.out.time, n, D, y.k, y.vt);
        for (int64_t c = 0; c < kKeys; c += W) {
            vf sum{};
            for (int64_t d = 0; d < D; ++d) sum = madd(load(y.kt + d * kKeys + c), load(y.vt + d * kKeys + c), sum);
            store(x.delta + r + c, sum);
        }
    }
    const float* lse = a.lse + lse_at(of, query, h);
    for (int64_t r = 0; r < rows; ++r)
        x.minus_lse[r] = lse[r] == kNone ? kNone : -lse[r];  // a query whose every score is -inf has P = 0
}

template <class T>
void backward(const AttentionBwdArgs& a, const Sequence& of, int64_t hkv, const Cut& cut) {
    const AttentionShape& s = of.shape;
    const int64_t D = s.D, ld = padded(D), group = s.H / s.Hkv, heads = cut.g1 - cut.g0;
    const int64_t first = cut.i0 * kQueries, rows = std::max<int64_t>(0, std::min(s.Tq, cut.i1 * kQueries) - first);
    const int64_t room = blocks_of(rows, kKeys) * kKeys;  // `pack` fills whole blocks
    Scratch scratch(heads * room * (3 * ld + 2) + kKeys * (3 * ld + 2 * D) + 2 * kQueries * kKeys);
    const KeyBlock y = {scratch.take(kKeys * ld), scratch.take(kKeys * D), scratch.take(kKeys * D),
                        scratch.take(kKeys * ld), scratch.take(kKeys * ld)};
    float *p = scratch.take(kQueries * kKeys), *ds = scratch.take(kQueries * kKeys);
    std::vector<Queries> queries(heads);
    for (int64_t g = 0; g < heads; ++g) {
        queries[g] = {scratch.take(room * ld), scratch.take(room * ld), scratch.take(room * ld),
                      scratch.take(room),      scratch.take(room),      of.slope(hkv * group + cut.g0 + g)};
        widen_queries<T>(a, of, hkv * group + cut.g0 + g, first, rows, queries[g], y);
        if (cut.dq) std::fill(queries[g].dq, queries[g].dq + rows * ld, 0.0f);
    }
    for (int64_t j = cut.j0; j < cut.j1; ++j) {
        const int64_t key = j * kKeys, keys = std::min(kKeys, s.Tk - key);
        pack(key_row<const T>(a.v, of, key, hkv), a.v.time, keys, D, y.k, y.vt);
        pack(key_row<const T>(a.k, of, key, hkv), a.k.time, keys, D, y.k, y.kt);
        std::fill(y.dk, y.dk + kKeys * ld, 0.0f);
        std::fill(y.dv, y.dv + kKeys * ld, 0.0f);
        for (const Queries& all : queries) {
            for (int64_t i = cut.i0; i < cut.i1; ++i) {
                const int64_t query = i * kQueries, n = std::min(kQueries, s.Tq - query), at = query - first;
                if (!meet(s, query, n, key)) continue;
                const Queries x = {all.q + at * ld,    all.dout + at * ld, all.dq + at * ld,
                                   all.minus_lse + at, all.delta + at,     all.slope};
                backward_block(s, cut, query, n, key, x, y, p, ds);
            }
        }
        if (cut.dkv) {
            narrow_rows(y.dk, ld, keys, D, s.scale, key_row<T>(a.dk, of, key, hkv), a.dk.time);
            narrow_rows(y.dv, ld, keys, D, 1.0f, key_row<T>(a.dv, of, key, hkv), a.dv.time);
        }
    }
    if (cut.dq)
        for (int64_t g = 0; g < heads; ++g)
            narrow_rows(queries[g].dq, ld, rows, D, s.scale, query_row<T>(a.dq, of, first, hkv * group + cut.g0 + g),
                        a.dq.time);
}

// What piece `piece` of `pieces` of one key head's keys needs: every query that sees one of them.
Cut cut_keys(const AttentionShape& s, int64_t piece, int64_t pieces) {
    const int64_t blocks = blocks_of(s.Tk, kKeys), j0 = blocks * piece / pieces, j1 = blocks * (piece + 1) / pieces;
    const int64_t last = std::min(s.Tk, j1 * kKeys) - 1;
    if (j0 == j1) return {0, 0, 0, 0, 0, 0, false, false};
    return {0,     s.H / s.Hkv, first_query(s, j0 * kKeys) / kQueries, blocks_of(end_query(s, last), kQueries), j0, j1,
            false, true};
}

// The same of query head g's queries: every key that one of them sees.
Cut cut_queries(const AttentionShape& s, int64_t g, int64_t piece, int64_t pieces) {
    const int64_t blocks = blocks_of(s.Tq, kQueries), i0 = blocks * piece / pieces, i1 = blocks * (piece + 1) / pieces;
    const int64_t last = std::min(s.Tq, i1 * kQueries) - 1;
    if (i0 == i1) return {0, 0, 0, 0, 0, 0, false, false};
    return {g, g + 1, i0, i1, first_key(s, i0 * kQueries) / kKeys, blocks_of(end_key(s, last), kKeys), true, false};
}

// Tasks are whole key heads where those keep the threads busy. Otherwise dq is cut by queries and dk, dv by keys: both
// recompute S and dP, 7 products for 5, and add up in the same order, to the same bits.
template <class T>
void backward_all(const AttentionBwdArgs& a) {
    const AttentionShape& s = a.shape;
    const int64_t query_blocks = blocks_of(s.Tq, kQueries), key_blocks = blocks_of(s.Tk, kKeys), group = s.H / s.Hkv;
    const int64_t heads = s.B * s.Hkv, threads = num_threads();
    if (5 * blocks_of(heads, threads) * threads <= 7 * heads) {
        parallel_for(heads, [&](int64_t task) {
            const Sequence of = sequence(s, task / s.Hkv);
            backward<T>(a, of, task % s.Hkv,
                        {0, group, 0, blocks_of(of.shape.Tq, kQueries), 0, blocks_of(of.shape.Tk, kKeys), true, true});
        });
        return;
    }
    const int64_t pieces = blocks_of(3 * threads, heads);
    const int64_t key_pieces = std::clamp<int64_t>(pieces, 1, std::max<int64_t>(1, key_blocks));
    const int64_t query_pieces = std::clamp<int64_t>(pieces, 1, std::max<int64_t>(1, query_blocks));
    const int64_t key_tasks = heads * key_pieces, query_tasks = heads * group * query_pieces;
    parallel_for(key_tasks + query_tasks, [&](int64_t task) {
        const int64_t rest = task < key_tasks ? task : task - key_tasks, head = rest % heads;
        const Sequence of = sequence(s, head / s.Hkv);
        const Cut cut = task < key_tasks
                            ? cut_keys(of.shape, rest / heads, key_pieces)
                            : cut_queries(of.shape, rest / heads % group, rest / heads / group, query_pieces);
        if (cut.dq || cut.dkv) backward<T>(a, of, head % s.Hkv, cut);
    });
}

}  // namespace

void attention_bwd(const AttentionBwdArgs& a) {
    if (a.shape.B == 0 || a.shape.H == 0) return;
    CGPT_WITH_FLOAT_TYPE(a.shape.dtype, T, backward_all<T>(a))
}

}  // namespace cgpt::CGPT_ISA
