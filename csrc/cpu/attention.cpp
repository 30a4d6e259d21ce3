// Attention by blocks of queries and keys (Dao et al. 2022, arXiv 2205.14135; Dao 2023, arXiv 2307.08691), fp32 inside.
//
//   S = scale * Q K^T,  lse = log sum over keys of exp(S),  P = exp(S - lse),  out = P V
//
//   dP = dout V^T,  delta = sum over D of dout * out,  dS = P * (dP - delta)
//   dV = P^T dout,  dK = scale * dS^T Q,  dQ = scale * dS K
//
// q, out (B, Tq, H, D), k, v (B, Tk, Hkv, D); causal aligns the last query with the last key. A query that sees no key
// has out = 0, lse = -inf and no gradient. Operands are widened to fp32 once per head into this thread's scratch, keys
// also transposed, since the product's lanes run along keys. A block's arithmetic depends on its place alone, never on
// how blocks are shared out, so the bits do not depend on the thread count.
#include "../attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "gemm.h"
#include "threads.h"
#include "vec.h"

namespace cgpt::CGPT_ISA {
namespace {

constexpr int64_t kKeys = 64;     // keys a block: a transposed block of 64-wide heads is 16 KiB, half a first-level cache
constexpr int64_t kQueries = 96;  // queries a block, a multiple of kTileRows
constexpr float kNone = -std::numeric_limits<float>::infinity();

int64_t padded(int64_t n) { return (n + W - 1) / W * W; }
int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Pieces of this thread's scratch, each a multiple of a cache line here. It lives as long as the thread: fresh memory
// costs a page fault every 4 KiB.
class Scratch {
  public:
    explicit Scratch(int64_t floats) {
        static thread_local std::vector<float> memory;
        if (static_cast<int64_t>(memory.size()) < floats + kLine) memory = std::vector<float>(floats + kLine);
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

template <class T>
T* row_of(const Heads& t, int64_t b, int64_t i, int64_t h) {
    return static_cast<T*>(t.data) + b * t.batch + i * t.time + h * t.head;
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
void transpose(const float* from, int64_t ld, int64_t D, float* to) {
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

// How many keys of the block that starts at `key` query i sees.
int64_t visible(const AttentionShape& s, int64_t i, int64_t key) {
    const int64_t end = s.causal ? std::min(s.Tk, i + s.Tk - s.Tq + 1) : s.Tk;
    return std::clamp<int64_t>(end - key, 0, kKeys);
}

// Sets what query r of a tile may not see to `value`.
void hide(float* row, int64_t seen, float value) { std::fill(row + seen, row + kKeys, value); }

const auto kZero = [](int64_t, int64_t) { return vf{}; };

// One block of queries against one block of keys: scores (rows, kKeys), scaled and not yet masked.
void score(const AttentionShape& s, int64_t query, int64_t rows, int64_t key, const float* q, const float* kt,
           float* scores) {
    const vf scale = splat(s.scale);
    gemm<A::rows>(
        rows, kKeys, q, s.D, kt, kKeys,
        [&](int64_t, int64_t last) {
            return Extent{visible(s, query + last - 1, key), 0, s.D};
        },
        kZero, [&](int64_t r, int64_t c, vf x) { store(scores + r * kKeys + c, x * scale); });
}

// A block of queries as its keys go by: running maximum, sum of exponentials by lane, unnormalised output.
struct Running {
    float *top, *from, *grown;  // (kQueries): maximum, the same or 0 for none, what it scales the past by
    float *sum, *out;           // (kQueries, W), (kQueries, padded D)
};

void absorb(const AttentionShape& s, int64_t query, int64_t rows, int64_t key, const float* q, const float* kt,
            const float* v, float* p, const Running& run) {
    const int64_t ld = padded(s.D);
    score(s, query, rows, key, q, kt, p);
    for (int64_t r = 0; r < rows; ++r) {
        float* row = p + r * kKeys;
        const int64_t seen = visible(s, query + r, key);
        if (seen < kKeys) hide(row, seen, kNone);
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
        [&](int64_t, int64_t last) {
            return Extent{s.D, 0, visible(s, query + last - 1, key)};
        },
        [&](int64_t r, int64_t c) { return load(run.out + r * ld + c) * run.grown[r]; },
        [&](int64_t r, int64_t c, vf x) { store(run.out + r * ld + c, x); });
}

// Query blocks [begin, end) of one head.
template <class T>
void forward(const AttentionFwdArgs& a, int64_t b, int64_t h, int64_t begin, int64_t end) {
    const AttentionShape& s = a.shape;
    const int64_t D = s.D, ld = padded(D), hkv = h / (s.H / s.Hkv);
    const int64_t last = std::min(s.Tq, end * kQueries) - 1;
    const int64_t keys = s.causal ? std::clamp<int64_t>(last + s.Tk - s.Tq + 1, 0, s.Tk) : s.Tk;
    const int64_t key_blocks = blocks_of(keys, kKeys);
    Scratch scratch(key_blocks * kKeys * (D + ld) + kQueries * (D + 2 * ld + kKeys + W + 3) + kKeys * ld);
    float *kt = scratch.take(key_blocks * kKeys * D), *v = scratch.take(key_blocks * kKeys * ld);
    float *q = scratch.take(kQueries * ld), *p = scratch.take(kQueries * kKeys), *rows_of_k = scratch.take(kKeys * ld);
    const Running run = {scratch.take(kQueries), scratch.take(kQueries), scratch.take(kQueries),
                         scratch.take(kQueries * W), scratch.take(kQueries * ld)};
    for (int64_t j = 0; j < key_blocks; ++j) {
        const int64_t key = j * kKeys, n = std::min(kKeys, keys - key);
        pack(row_of<const T>(a.k, b, key, hkv), a.k.time, n, D, rows_of_k, kt + key * D);
        pack(row_of<const T>(a.v, b, key, hkv), a.v.time, n, D, v + key * ld, nullptr);
    }
    for (int64_t i = begin; i < end; ++i) {
        const int64_t query = i * kQueries, rows = std::min(kQueries, s.Tq - query);
        for (int64_t r = 0; r < rows; ++r)
            for_lanes(D, [&](int64_t c, auto n) {
                put(q + r * D + c, get(row_of<const T>(a.q, b, query + r, h) + c, n), n);
            });
        std::fill(run.top, run.top + rows, kNone);
        std::fill(run.sum, run.sum + rows * W, 0.0f);
        std::fill(run.out, run.out + rows * ld, 0.0f);
        for (int64_t j = 0; j < key_blocks && visible(s, query + rows - 1, j * kKeys) > 0; ++j)
            absorb(s, query, rows, j * kKeys, q, kt + j * kKeys * D, v + j * kKeys * ld, p, run);
        for (int64_t r = 0; r < rows; ++r) {
            const float sum = hsum(load(run.sum + r * W));
            const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
            narrow_rows(run.out + r * ld, ld, 1, D, inverse, row_of<T>(a.out, b, query + r, h), 0);
            if (a.lse) a.lse[(b * s.H + h) * s.Tq + query + r] = run.top[r] + std::log(sum);
        }
    }
}

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
    const int64_t ld = padded(s.D);
    const vf scale = splat(s.scale);
    const auto extent = [&](int64_t, int64_t last) { return Extent{visible(s, query + last - 1, key), 0, s.D}; };
    gemm<A::rows>(rows, kKeys, x.q, ld, y.kt, kKeys, extent, kZero,
                  [&](int64_t r, int64_t c, vf value) { store(p + r * kKeys + c, value); });
    gemm<A::rows>(rows, kKeys, x.dout, ld, y.vt, kKeys, extent, kZero,
                  [&](int64_t r, int64_t c, vf value) { store(ds + r * kKeys + c, value); });
    for (int64_t r = 0; r < rows; ++r) {
        float *p_row = p + r * kKeys, *ds_row = ds + r * kKeys;
        const vf minus_lse = splat(x.minus_lse[r]), delta = splat(x.delta[r]);
        const int64_t seen = visible(s, query + r, key);
        for (int64_t c = 0; c < seen; c += W) {
            const vf e = exp_below(load(p_row + c) * scale + minus_lse);  // rounded twice, as lse was: one key gives 1
            store(p_row + c, e);
            store(ds_row + c, e * (load(ds_row + c) - delta));
        }
        if (seen < kKeys) {
            std::fill(p_row + seen, p_row + kKeys, 0.0f);
            std::fill(ds_row + seen, ds_row + kKeys, 0.0f);
        }
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
            const int64_t start = s.causal ? key + first - (s.Tk - s.Tq) - query : 0;
            return Extent{s.D, std::clamp<int64_t>(start, 0, rows), rows};
        };
        const int64_t keys = std::min(kKeys, s.Tk - key);
        accumulate<A::columns>(keys, s.D, p, x.dout, y.dv, seeing);
        accumulate<A::columns>(keys, s.D, ds, x.q, y.dk, seeing);
    }
    if (cut.dq)
        accumulate<A::rows>(rows, s.D, ds, y.k, x.dq, [&](int64_t, int64_t last) {
            return Extent{s.D, 0, visible(s, query + last - 1, key)};
        });
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
            narrow_rows(queries[g].dq, ld, rows, D, s.scale,
                        row_of<T>(a.dq, b, first, hkv * group + cut.g0 + g), a.dq.time);
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
            const int64_t sees = s.causal ? std::max<int64_t>(0, j0 * kKeys - (s.Tk - s.Tq)) / kQueries : 0;
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

void attention_fwd(const AttentionFwdArgs& a) {
    const AttentionShape& s = a.shape;
    const int64_t blocks = blocks_of(s.Tq, kQueries), heads = s.B * s.H;
    if (heads == 0 || blocks == 0) return;
    // A head is one task where heads keep the threads busy; otherwise it is cut, and each piece packs its keys again.
    const int64_t pieces = std::clamp<int64_t>(blocks_of(3 * num_threads(), heads), 1, blocks);
    CGPT_WITH_FLOAT_TYPE(s.dtype, T, {
        parallel_for(heads * pieces, [&](int64_t task) {
            const int64_t head = task % heads, piece = pieces - 1 - task / heads;  // the longest rows first
            forward<T>(a, head / s.H, head % s.H, blocks * piece / pieces, blocks * (piece + 1) / pieces);
        });
    })
}

void attention_bwd(const AttentionBwdArgs& a) {
    if (a.shape.B == 0 || a.shape.H == 0) return;
    CGPT_WITH_FLOAT_TYPE(a.shape.dtype, T, backward_all<T>(a))
}

}  // namespace cgpt::CGPT_ISA
