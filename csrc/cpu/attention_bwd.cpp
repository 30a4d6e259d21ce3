// Backward pass of attention by blocks of queries and keys, fp32 inside (Dao et al. 2022, arXiv 2205.14135; Dao 2023,
// arXiv 2307.08691). P is computed again from lse.
//
//   S = scale * Q K^T,  P = exp(S - lse),  dP = dout V^T,  delta = sum over D of dout * out,  dS = P * (dP - delta)
//   dV = P^T dout,  dK = scale * dS^T Q,  dQ = scale * dS K
//
// dout, q, out, dq (B, Tq, H, D), k, v, dk, dv (B, Tk, Hkv, D). A query that sees no key has no gradient. Blocks of
// keys go outermost: their dK and dV stay in cache while the head's queries pass, and dQ adds up in scratch in the
// keys' order.
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
        const int64_t seen = visible(s, query + r, key);
        for (int64_t c = 0; c < seen; c += W) {
            const vf e = exp_below(load(p_row + c) + minus_lse);
            store(p_row + c, e);
            store(ds_row + c, e * (load(ds_row + c) - delta));
        }
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
        // Keys [first, ...) are seen by the queries from the one that stands above `first` on.
        const auto seeing = [&](int64_t first, int64_t) {
            const int64_t start = s.window_right == 0 ? key + first - (s.Tk - s.Tq) - query : 0;
            return Extent{s.D, std::clamp<int64_t>(start, 0, rows), rows};
        };
        const int64_t keys = std::min(kKeys, s.Tk - key);
        accumulate<A::columns>(keys, s.D, p, x.dout, y.dv, seeing);
        accumulate<A::columns>(keys, s.D, ds, x.q, y.dk, seeing);
    }
    if (cut.dq)
        accumulate<A::rows>(rows, s.D, ds, y.k, x.dq,
                            [&](int64_t, int64_t last) { return Extent{s.D, 0, visible(s, query + last - 1, key)}; });
}

// Fills x for one query head. delta adds up over D in the order in which the products do, so that where one key has all
// the weight dP - delta is 0 and not a rounding error. y is free memory here.
template <class T>
void widen_queries(const AttentionBwdArgs& a, int64_t b, int64_t h, int64_t query, int64_t rows, const Queries& x,
                   const KeyBlock& y) {
    const AttentionShape& s = a.shape;
    const int64_t D = s.D, ld = padded(D);
    widen_rows(row_of<const T>(a.q, b, query, h), a.q.time, rows, D, x.q, ld);
    for (int64_t r = 0; r < rows; r += kKeys) {
        const int64_t n = std::min(kKeys, rows - r);
        pack(row_of<const T>(a.dout, b, query + r, h), a.dout.time, n, D, x.dout + r * ld, y.kt);
        pack(row_of<const T>(a.out, b, query + r, h), a.out.time, n, D, y.k, y.vt);
        for (int64_t c = 0; c < kKeys; c += W) {
            vf sum{};
            for (int64_t d = 0; d < D; ++d) sum = madd(load(y.kt + d * kKeys + c), load(y.vt + d * kKeys + c), sum);
            store(x.delta + r + c, sum);
        }
    }
    const float* lse = a.lse + (b * s.H + h) * s.Tq + query;
    for (int64_t r = 0; r < rows; ++r)
        x.minus_lse[r] = lse[r] == kNone ? kNone : -lse[r];  // a query whose every score is -inf has P = 0
}

template <class T>
void backward(const AttentionBwdArgs& a, int64_t b, int64_t hkv, const Cut& cut) {
    const AttentionShape& s = a.shape;
    const int64_t D = s.D, ld = padded(D), group = s.H / s.Hkv, heads = cut.g1 - cut.g0;
    const int64_t first = cut.i0 * kQueries, rows = std::min(s.Tq, cut.i1 * kQueries) - first;
    const int64_t room = blocks_of(rows, kKeys) * kKeys;  // `pack` fills whole blocks
    Scratch scratch(heads * room * (3 * ld + 2) + kKeys * (3 * ld + 2 * D) + 2 * kQueries * kKeys);
    const KeyBlock y = {scratch.take(kKeys * ld), scratch.take(kKeys * D), scratch.take(kKeys * D),
                        scratch.take(kKeys * ld), scratch.take(kKeys * ld)};
    float *p = scratch.take(kQueries * kKeys), *ds = scratch.take(kQueries * kKeys);
    std::vector<Queries> queries(heads);
    for (int64_t g = 0; g < heads; ++g) {
        queries[g] = {scratch.take(room * ld), scratch.take(room * ld), scratch.take(room * ld), scratch.take(room),
                      scratch.take(room)};
        widen_queries<T>(a, b, hkv * group + cut.g0 + g, first, rows, queries[g], y);
        if (cut.dq) std::fill(queries[g].dq, queries[g].dq + rows * ld, 0.0f);
    }
    for (int64_t j = cut.j0; j < cut.j1; ++j) {
        const int64_t key = j * kKeys, keys = std::min(kKeys, s.Tk - key);
        pack(row_of<const T>(a.v, b, key, hkv), a.v.time, keys, D, y.k, y.vt);
        pack(row_of<const T>(a.k, b, key, hkv), a.k.time, keys, D, y.k, y.kt);
        std::fill(y.dk, y.dk + kKeys * ld, 0.0f);
        std::fill(y.dv, y.dv + kKeys * ld, 0.0f);
        for (const Queries& all : queries) {
            for (int64_t i = cut.i0; i < cut.i1; ++i) {
                const int64_t query = i * kQueries, n = std::min(kQueries, s.Tq - query), at = query - first;
                if (visible(s, query + n - 1, key) == 0) continue;
                const Queries x = {all.q + at * ld, all.dout + at * ld, all.dq + at * ld, all.minus_lse + at,
                                   all.delta + at};
                backward_block(s, cut, query, n, key, x, y, p, ds);
            }
        }
        if (cut.dkv) {
            narrow_rows(y.dk, ld, keys, D, s.scale, row_of<T>(a.dk, b, key, hkv), a.dk.time);
            narrow_rows(y.dv, ld, keys, D, 1.0f, row_of<T>(a.dv, b, key, hkv), a.dv.time);
        }
    }
    if (cut.dq)
        for (int64_t g = 0; g < heads; ++g)
            narrow_rows(queries[g].dq, ld, rows, D, s.scale, row_of<T>(a.dq, b, first, hkv * group + cut.g0 + g),
                        a.dq.time);
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
            backward<T>(a, task / s.Hkv, task % s.Hkv, {0, group, 0, query_blocks, 0, key_blocks, true, true});
        });
        return;
    }
    const int64_t pieces = blocks_of(3 * threads, heads);
    const int64_t key_pieces = std::clamp<int64_t>(pieces, 1, std::max<int64_t>(1, key_blocks));
    const int64_t query_pieces = std::clamp<int64_t>(pieces, 1, std::max<int64_t>(1, query_blocks));
    const int64_t key_tasks = heads * key_pieces, query_tasks = heads * group * query_pieces;
    parallel_for(key_tasks + query_tasks, [&](int64_t task) {
        if (task < key_tasks) {
            const int64_t head = task % heads, piece = task / heads;
            const int64_t j0 = key_blocks * piece / key_pieces, j1 = key_blocks * (piece + 1) / key_pieces;
            // The first query that sees key j0 * kKeys.
            const int64_t sees = s.window_right == 0 ? std::max<int64_t>(0, j0 * kKeys - (s.Tk - s.Tq)) / kQueries : 0;
            backward<T>(a, head / s.Hkv, head % s.Hkv,
                        {0, group, std::min(sees, query_blocks), query_blocks, j0, j1, false, true});
        } else {
            task -= key_tasks;
            const int64_t head = task % heads, g = task / heads % group, piece = task / heads / group;
            const int64_t i0 = query_blocks * piece / query_pieces, i1 = query_blocks * (piece + 1) / query_pieces;
            backward<T>(a, head / s.Hkv, head % s.Hkv, {g, g + 1, i0, i1, 0, key_blocks, true, false});
        }
    });
}

}  // namespace

void attention_bwd(const AttentionBwdArgs& a) {
    if (a.shape.B == 0 || a.shape.H == 0) return;
    CGPT_WITH_FLOAT_TYPE(a.shape.dtype, T, backward_all<T>(a))
}

}  // namespace cgpt::CGPT_ISA
