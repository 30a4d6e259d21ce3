// Backward pass of attention by blocks of queries and keys, fp32 inside (Dao et al. 2022, arXiv 2205.14135; Dao 2023,
// arXiv 2307.08691). P is computed again from lse.
//
//   S = scale * Q K^T - slope * distance,  P = exp(S - lse),  dP = dout V^T,  delta = sum over D of dout * out,
//
//   dS = P * (dP - delta),  dV = P^T dout,  dK = scale * dS^T Q,  dQ = scale * dS K
//
// dout, q, out, dq (B, Tq, H, D), k, v, dk, dv (B, Tk, Hkv, D), or packed sequences of (total, H, D). A query that sees
// no key has no gradient. Blocks of keys go outermost: their dK and dV stay in cache while the head's queries pass, and
// dQ adds up in scratch in the keys' order. Blocks outside the window are skipped.
#include <memory>

#include "attention_blocks.h"
#include "attention_tasks.h"
#include "threads.h"

namespace cgpt::CGPT_ISA {
namespace {

// Transposed, 16 KiB of floats at head dim 64: half a first-level cache, which keys and values share. In bf16 128 keys
// are 4 % faster there and 2 % slower at head dim 128, in fp32 1 % slower at both (Zen 4).
constexpr int64_t kKeys = 64;

// What one task of the backward pass covers: blocks of queries and keys of one key head, query heads [g0, g1) of its
// group, and which gradients of them are wanted.
struct Cut {
    int64_t g0, g1, i0, i1, j0, j1;
    bool dq, dkv;
};

// The rows of one query head that a cut covers, as elements of sums over D and over rows (floats: the same ones), with
// dq to be summed over key blocks.
template <class E>
struct Queries {
    E *q, *dout;                // (rows, ld / kHeld)
    E *q_across, *dout_across;  // (rows / kHeld, ld)
    float* dq;                  // (rows, ld)
    float *minus_lse, *delta;   // (rows)
    float slope;
};

template <class E>
struct KeyBlock {
    E *kt, *vt;          // (D / kHeld, kKeys)
    E *k_across, *rows;  // (kKeys / kHeld, ld); free memory (kKeys, ld / kHeld). Floats: the same
    float *dk, *dv;      // (kKeys, ld)
};

// Where each query head's dk and dv are kept apart, to be added up when all of a group are there: (H, rows, 2, ld),
// rows being all keys of the batch.
struct Apart {
    std::unique_ptr<float[]> data;
    int64_t rows, ld;
    float* dk(const Sequence& of, int64_t h, int64_t key) const {
        return data.get() + (h * rows + of.b * (of.shape.cu_seqlens_k ? 0 : of.shape.Tk) + of.key + key) * 2 * ld;
    }
    float* dv(const Sequence& of, int64_t h, int64_t key) const { return dk(of, h, key) + ld; }
};

// P and dS of one block of queries and keys, (kQueries, kKeys), and as elements of sums over queries, (kQueries /
// kHeld, kKeys) or on tiles, which read rows alone, (kKeys, kQueries / kHeld), and over keys, (kQueries, kKeys /
// kHeld). Floats: the same ones.
template <class E>
struct Weights {
    float *p, *ds;
    E *p_across, *ds_across, *ds_along;
};

// P and dS of one block of queries and keys.
template <class E>
void block_gradients(const AttentionShape& s, int64_t query, int64_t rows, int64_t key, const Queries<E>& x,
                     const KeyBlock<E>& y, float* p, float* ds) {
    product<kKeys>(s, query, rows, key, x.q, y.kt, s.scale, p);
    product<kKeys>(s, query, rows, key, x.dout, y.vt, 1.0f, ds);
    for (int64_t r = 0; r < rows; ++r) {
        float *p_row = p + r * kKeys, *ds_row = ds + r * kKeys;
        const vf minus_lse = splat(x.minus_lse[r]), delta = splat(x.delta[r]);
        const int64_t seen = visible<kKeys>(s, query + r, key), unseen = hidden<kKeys>(s, query + r, key);
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

// How weights summed over queries lie, and how far apart.
template <class E>
inline constexpr A kAcross = kOnTiles<E> ? A::rows : A::columns;
template <class E>
inline constexpr int64_t kAcrossStride = kOnTiles<E> ? kQueries / kHeld<E> : kKeys;

// Weights (rows, kKeys) in pairs of queries. On tiles zeros follow up to a whole step of k.
template <class E>
void pair_across(const float* x, int64_t rows, E* to) {
    const auto pair = [&](int64_t r, int64_t c) {
        const auto row = [&](int64_t i) { return i < rows ? load(x + i * kKeys + c) : vf{}; };
        return across({row(r), row(r + 1)});
    };
    constexpr int64_t step = 2 * kTileDepth<E>, stride = kAcrossStride<E>;
    for (int64_t r = 0; r < rows; r += step) {
        for (int64_t c = 0; c < kKeys; c += W) {
            if constexpr (kOnTiles<E>) {
                vu square[W];
                for (int64_t i = 0; i < W; ++i) square[i] = pair(r + 2 * i, c);
                transpose(square);
                for (int64_t i = 0; i < W; ++i) store(to + (c + i) * stride + r / 2, square[i]);
            } else {
                store(to + r / 2 * stride + c, pair(r, c));
            }
        }
    }
}

// P and dS as elements of the sums that a cut wants of them.
template <class E>
void pair_up(const Cut& cut, int64_t rows, const Weights<E>& w) {
    if constexpr (kHeld<E> == 2) {
        if (cut.dkv) pair_across(w.p, rows, w.p_across), pair_across(w.ds, rows, w.ds_across);
        for (int64_t i = 0; cut.dq && i < rows * kKeys; i += 2 * W)
            store_along(w.ds_along + i / 2, {load(w.ds + i), load(w.ds + i + W)});
    }
}

// C (rows, ld) += the product: what all three gradients are.
template <A order, class E, class ExtentOf>
void accumulate(int64_t rows, int64_t D, const E* a, int64_t lda, const E* b, float* c, ExtentOf&& extent) {
    const int64_t ld = padded(D);
    gemm<order>(
        rows, D, a, lda, b, ld,
        [&](int64_t first, int64_t last) {
            const Extent e = extent(first, last);
            return Extent{e.n, e.k0 / kHeld<E>, blocks_of(e.k1, kHeld<E>)};
        },
        [&](int64_t r, int64_t i) { return load(c + r * ld + i); },
        [&](int64_t r, int64_t i, vf value) { store(c + r * ld + i, value); });
}

// One block of queries against one block of keys: adds what it gives to dq, dk and dv.
template <class E>
void backward_block(const AttentionShape& s, const Cut& cut, int64_t query, int64_t rows, int64_t key,
                    const Queries<E>& x, const KeyBlock<E>& y, const Weights<E>& w) {
    block_gradients(s, query, rows, key, x, y, w.p, w.ds);
    pair_up(cut, rows, w);
    if (cut.dkv) {
        const auto seeing = [&](int64_t first, int64_t last) {
            return Extent{s.D, std::clamp<int64_t>(first_query(s, key + first) - query, 0, rows),
                          std::clamp<int64_t>(end_query(s, key + last - 1) - query, 0, rows)};
        };
        const int64_t keys = std::min(kKeys, s.Tk - key);
        accumulate<kAcross<E>>(keys, s.D, w.p_across, kAcrossStride<E>, x.dout_across, y.dv, seeing);
        accumulate<kAcross<E>>(keys, s.D, w.ds_across, kAcrossStride<E>, x.q_across, y.dk, seeing);
    }
    if (cut.dq)
        accumulate<A::rows>(
            rows, s.D, w.ds_along, kKeys / kHeld<E>, y.k_across, x.dq, [&](int64_t first, int64_t last) {
                return Extent{s.D, hidden<kKeys>(s, query + first, key), visible<kKeys>(s, query + last - 1, key)};
            });
}

// W sums of D products of equal rows, of a (W, lda) and what `at` and `bt` hold transposed, (D, kKeys) from the same
// row on: the diagonal of a product, added up as `product` does. Tiles know no other order than their own.
template <class E>
vf diagonal(int64_t D, const E* a, int64_t lda, const E* at, const E* bt) {
    vf sums{};
    if constexpr (kOnTiles<E>) {
        gemm_tile<W, 1, A::rows>(
            0, 0, 0, D / kHeld<E>, a, lda, bt, kKeys, [](int64_t, int64_t) { return vf{}; },
            [&](int64_t r, int64_t, vf x) { sums[r] = x[r]; });
    } else {
        for (int64_t d = 0; d < D / kHeld<E>; ++d) sums = madd(load(at + d * kKeys), load(bt + d * kKeys), sums);
    }
    return sums;
}

// Fills x for one query head. delta adds up over D in the order in which the products do, so that where one key has all
// the weight dP - delta is 0 and not a rounding error. y is free memory here.
template <class T, class E>
void pack_queries(const AttentionBwdArgs& a, const Sequence& of, int64_t h, int64_t query, int64_t rows,
                  const Queries<E>& x, const KeyBlock<E>& y) {
    const int64_t D = of.shape.D, ld = padded(D);
    for (int64_t r = 0; r < rows; r += kKeys) {
        const int64_t n = std::min(kKeys, rows - r), at = r * ld / kHeld<E>;
        const T *q = query_row<const T>(a.q, of, query + r, h), *dout = query_row<const T>(a.dout, of, query + r, h);
        rows_along(q, a.q.time, n, D, x.q + at, ld / kHeld<E>);
        pack<kKeys>(dout, a.dout.time, n, D, x.dout + at, y.kt);
        if (kHeld<E> == 2) {
            rows_across<kKeys>(q, a.q.time, n, D, x.q_across + at, ld);
            rows_across<kKeys>(dout, a.dout.time, n, D, x.dout_across + at, ld);
        }
        pack<kKeys>(query_row<const T>(a.out, of, query + r, h), a.out.time, n, D, y.rows, y.vt);
        for (int64_t c = 0; c < kKeys; c += W)
            store(x.delta + r + c, diagonal(D, x.dout + at + c * ld / kHeld<E>, ld / kHeld<E>, y.kt + c, y.vt + c));
    }
    const float* lse = a.lse + lse_at(of, query, h);
    for (int64_t r = 0; r < rows; ++r)
        x.minus_lse[r] = lse[r] == kNone ? kNone : -lse[r];  // a query whose every score is -inf has P = 0
}

// to (rows, ld) += from.
void add_rows(const float* from, int64_t from_ld, int64_t rows, int64_t ld, float* to) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < ld; i += W)
            store(to + r * ld + i, load(to + r * ld + i) + load(from + r * from_ld + i));
}

template <class T, class E>
void backward(const AttentionBwdArgs& a, const Sequence& of, int64_t hkv, const Cut& cut, const Apart& apart) {
    const AttentionShape& s = of.shape;
    const int64_t D = s.D, ld = padded(D), group = s.H / s.Hkv, heads = cut.g1 - cut.g0;
    const Tiles<E> tiles;
    const int64_t first = cut.i0 * kQueries, rows = std::max<int64_t>(0, std::min(s.Tq, cut.i1 * kQueries) - first);
    const int64_t room = blocks_of(rows, kKeys) * kKeys;  // `pack` fills whole blocks
    Scratch scratch(heads * room * (3 * ld + 2) + kKeys * 7 * ld + 4 * kQueries * kKeys);
    const auto take = [&](int64_t values) { return scratch.take<E>(values / kHeld<E>); };
    const auto other = [&](auto* same, int64_t values) {  // the same values by another grouping, if there is one
        return kHeld<E> == 1 ? reinterpret_cast<E*>(same) : take(values);
    };
    KeyBlock<E> y = {take(kKeys * ld), take(kKeys * ld),         take(kKeys * ld),
                     nullptr,          scratch.take(kKeys * ld), scratch.take(kKeys * ld)};
    y.rows = other(y.k_across, kKeys * ld);
    float *const dk = y.dk, *const dv = y.dv;  // the group's, to which the other heads' are added one by one
    float *const next_dk = scratch.take(kKeys * ld), *const next_dv = scratch.take(kKeys * ld);
    Weights<E> w = {scratch.take(kQueries * kKeys), scratch.take(kQueries * kKeys), nullptr, nullptr, nullptr};
    w.p_across = other(w.p, kQueries * kKeys);
    w.ds_across = other(w.ds, kQueries * kKeys), w.ds_along = other(w.ds, kQueries * kKeys);
    std::vector<Queries<E>> queries(heads);
    for (int64_t g = 0; g < heads; ++g) {
        Queries<E>& x = queries[g];
        x = {take(room * ld),
             take(room * ld),
             nullptr,
             nullptr,
             scratch.take(room * ld),
             scratch.take(room),
             scratch.take(room),
             of.slope(hkv * group + cut.g0 + g)};
        x.q_across = other(x.q, room * ld), x.dout_across = other(x.dout, room * ld);
        pack_queries<T>(a, of, hkv * group + cut.g0 + g, first, rows, queries[g], y);
        if (cut.dq) std::fill(queries[g].dq, queries[g].dq + rows * ld, 0.0f);
    }
    for (int64_t j = cut.j0; j < cut.j1; ++j) {
        const int64_t key = j * kKeys, keys = std::min(kKeys, s.Tk - key);
        pack<kKeys>(key_row<const T>(a.v, of, key, hkv), a.v.time, keys, D, y.rows, y.vt);
        pack<kKeys>(key_row<const T>(a.k, of, key, hkv), a.k.time, keys, D, y.rows, y.kt);
        if (kHeld<E> == 2) rows_across<kKeys>(key_row<const T>(a.k, of, key, hkv), a.k.time, keys, D, y.k_across, ld);
        for (int64_t g = 0; g < heads; ++g) {
            const Queries<E>& all = queries[g];
            y.dk = g ? next_dk : dk, y.dv = g ? next_dv : dv;
            std::fill(y.dk, y.dk + kKeys * ld, 0.0f);
            std::fill(y.dv, y.dv + kKeys * ld, 0.0f);
            for (int64_t i = cut.i0; i < cut.i1; ++i) {
                const int64_t query = i * kQueries, n = std::min(kQueries, s.Tq - query), at = query - first;
                if (!meet<kKeys>(s, query, n, key)) continue;
                const int64_t e = at * ld / kHeld<E>;
                const Queries<E> x = {all.q + e,        all.dout + e,       all.q_across + e, all.dout_across + e,
                                      all.dq + at * ld, all.minus_lse + at, all.delta + at,   all.slope};
                backward_block(s, cut, query, n, key, x, y, w);
            }
            if (g && cut.dkv) add_rows(next_dk, ld, keys, ld, dk), add_rows(next_dv, ld, keys, ld, dv);
        }
        if (cut.dkv && apart.data) {
            const int64_t h = hkv * group + cut.g0;
            for (int64_t r = 0; r < keys; ++r) {
                std::copy(dk + r * ld, dk + (r + 1) * ld, apart.dk(of, h, key + r));
                std::copy(dv + r * ld, dv + (r + 1) * ld, apart.dv(of, h, key + r));
            }
        } else if (cut.dkv) {
            narrow_rows(dk, ld, keys, D, s.scale, key_row<T>(a.dk, of, key, hkv), a.dk.time);
            narrow_rows(dv, ld, keys, D, 1.0f, key_row<T>(a.dv, of, key, hkv), a.dv.time);
        }
    }
    if (cut.dq)
        for (int64_t g = 0; g < heads; ++g)
            narrow_rows(queries[g].dq, ld, rows, D, s.scale, query_row<T>(a.dq, of, first, hkv * group + cut.g0 + g),
                        a.dq.time);
}

template <class T>
void backward(const AttentionBwdArgs& a, const Sequence& of, int64_t hkv, const Cut& cut, const Apart& apart) {
    if (of.shape.Tq <= kFew)
        backward<T, float>(a, of, hkv, cut, apart);
    else
        backward<T, Element<T>>(a, of, hkv, cut, apart);
}

// dk and dv of a block of keys, from what the query heads of a group have left apart.
template <class T>
void add_up(const AttentionBwdArgs& a, const Sequence& of, int64_t hkv, int64_t j, const Apart& apart) {
    const AttentionShape& s = of.shape;
    const int64_t ld = apart.ld, group = s.H / s.Hkv, key = j * kKeys, keys = std::min(kKeys, s.Tk - key);
    Scratch scratch(2 * kKeys * ld);
    float *dk = scratch.take(kKeys * ld), *dv = scratch.take(kKeys * ld);
    for (int64_t r = 0; r < keys; ++r) {
        std::copy_n(apart.dk(of, hkv * group, key + r), ld, dk + r * ld);
        std::copy_n(apart.dv(of, hkv * group, key + r), ld, dv + r * ld);
    }
    for (int64_t h = hkv * group + 1; h < (hkv + 1) * group; ++h) {
        add_rows(apart.dk(of, h, key), 2 * ld, keys, ld, dk);
        add_rows(apart.dv(of, h, key), 2 * ld, keys, ld, dv);
    }
    narrow_rows(dk, ld, keys, s.D, s.scale, key_row<T>(a.dk, of, key, hkv), a.dk.time);
    narrow_rows(dv, ld, keys, s.D, 1.0f, key_row<T>(a.dv, of, key, hkv), a.dv.time);
}

// What piece `piece` of `pieces` of one key head's keys needs of query heads [g0, g1): every query that sees one of
// them.
Cut cut_keys(const AttentionShape& s, int64_t g0, int64_t g1, int64_t piece, int64_t pieces) {
    const int64_t blocks = blocks_of(s.Tk, kKeys), j0 = blocks * piece / pieces, j1 = blocks * (piece + 1) / pieces;
    const int64_t last = std::min(s.Tk, j1 * kKeys) - 1;
    if (j0 == j1) return {0, 0, 0, 0, 0, 0, false, false};
    return {g0,    g1,  first_query(s, j0 * kKeys) / kQueries, blocks_of(end_query(s, last), kQueries), j0, j1,
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
// recompute S and dP, 7 products for 5, and add up in the same order, to the same bits. Where there are too few keys
// for the threads, each query head of a group has its own pieces of dk and dv.
template <class T>
void backward_all(const AttentionBwdArgs& a) {
    const AttentionShape& s = a.shape;
    const int64_t query_blocks = blocks_of(s.Tq, kQueries), key_blocks = blocks_of(s.Tk, kKeys), group = s.H / s.Hkv;
    const int64_t heads = s.B * s.Hkv, threads = num_threads();
    const bool whole = 5 * blocks_of(heads, threads) * threads <= 7 * heads;
    const bool split = !whole && group > 1 && heads * key_blocks < kTasks * threads;
    const auto pieces = [&](int64_t parts, int64_t most) {  // of each of `parts`
        return whole ? 1 : std::clamp<int64_t>(blocks_of(kTasks * threads, parts), 1, std::max<int64_t>(1, most));
    };
    const int64_t key_pieces = pieces(split ? s.B * s.H : heads, key_blocks);
    const int64_t query_pieces = pieces(s.B * s.H, query_blocks);
    Apart apart = {nullptr, s.cu_seqlens_k ? s.total_k : s.B * s.Tk, padded(s.D)};
    if (split) apart.data.reset(new float[s.H * apart.rows * 2 * apart.ld]);
    struct Task {
        int64_t head;
        Cut cut;
    };
    Tasks<Task> tasks;
    for (int64_t head = 0; head < heads; ++head) {
        const AttentionShape of = sequence(s, head / s.Hkv).shape;
        const auto add = [&](const Cut& cut) {
            const int64_t products = 2 + 2 * cut.dkv + cut.dq;
            if (!cut.dkv && !cut.dq) return;
            tasks.add({head, cut},
                      products * (cut.g1 - cut.g0) * block_pairs<kKeys>(of, cut.i0, cut.i1, cut.j0, cut.j1));
        };
        if (whole) {
            add({0, group, 0, blocks_of(of.Tq, kQueries), 0, blocks_of(of.Tk, kKeys), true, true});
            continue;
        }
        for (int64_t g = 0; g < group; g += split ? 1 : group)
            for (int64_t piece = 0; piece < key_pieces; ++piece)
                add(cut_keys(of, g, split ? g + 1 : group, piece, key_pieces));
        for (int64_t g = 0; g < group; ++g)
            for (int64_t piece = 0; piece < query_pieces; ++piece) add(cut_queries(of, g, piece, query_pieces));
    }
    tasks.run(
        [&](const Task& task) { backward<T>(a, sequence(s, task.head / s.Hkv), task.head % s.Hkv, task.cut, apart); });
    if (!split) return;
    parallel_for(heads * key_blocks, [&](int64_t i) {
        const int64_t head = i / key_blocks, j = i % key_blocks;
        const Sequence of = sequence(s, head / s.Hkv);
        if (j * kKeys < of.shape.Tk) add_up<T>(a, of, head % s.Hkv, j, apart);
    });
}

}  // namespace

void attention_bwd(const AttentionBwdArgs& a) {
    if (a.shape.B == 0 || a.shape.H == 0) return;
    CGPT_WITH_FLOAT_TYPE(a.shape.dtype, T, backward_all<T>(a))
}

}  // namespace cgpt::CGPT_ISA
