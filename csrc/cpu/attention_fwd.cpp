// Forward pass of attention by blocks of queries and keys, fp32 inside (Dao et al. 2022, arXiv 2205.14135; Dao 2023,
// arXiv 2307.08691).
//
//   S = scale * Q K^T - slope * distance,  lse = log sum over keys of exp(S),  out = exp(S - lse) V
//
// q, out (B, Tq, H, D), k, v (B, Tk, Hkv, D), or packed sequences of (total, H, D). Blocks of keys outside the window
// are skipped. A query that sees no key has out = 0 and lse = -inf.
#include <cmath>

#include "attention_blocks.h"
#include "attention_tasks.h"
#include "threads.h"

namespace cgpt::CGPT_ISA {
namespace {

// In bf16 64 keys are 3 to 6 % slower, in fp32 up to 3 % (Zen 4): each block scales the output once more.
constexpr int64_t kKeys = 128;

// A block of queries as its keys go by: running maximum, sum of exponentials by lane, unnormalised output.
struct Running {
    float *top, *from, *grown;  // (kQueries): maximum, the same or 0 for none, what it scales the past by
    float *sum, *out;           // (kQueries, W), (kQueries, padded D)
};

// Scores of a block of keys, p (rows, kKeys), to their exponentials, and the running maximum and sum with them. The
// exponentials are left as elements of sums over keys, rows still kKeys apart. Where those are rounded the sum is not:
// lse keeps fp32's accuracy, and the output gains next to nothing by a rounded sum.
template <class E>
void weigh(const AttentionShape& s, float slope, int64_t query, int64_t rows, int64_t key, float* p,
           const Running& run) {
    for (int64_t r = 0; r < rows; ++r) {
        float* row = p + r * kKeys;
        const int64_t seen = visible<kKeys>(s, query + r, key);
        if (slope != 0.0f) add_alibi(s, slope, query + r, key, seen, row);
        std::fill(row, row + hidden<kKeys>(s, query + r, key), kNone);
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
        for (int64_t c = 0; c < kKeys; c += W * kHeld<E>) {
            vf e[kHeld<E>];
            for (int64_t i = 0; i < kHeld<E>; ++i) {
                e[i] = exp_below(load(row + c + i * W) - run.from[r]);
                sum += e[i];
            }
            store_along(reinterpret_cast<E*>(row) + c / kHeld<E>, e);
        }
        store(run.sum + r * W, madd(load(run.sum + r * W), splat(run.grown[r]), sum));
    }
}

template <class E>
void absorb(const AttentionShape& s, float slope, int64_t query, int64_t rows, int64_t key, const E* q, const E* kt,
            const E* v, float* p, const Running& run) {
    const int64_t ld = padded(s.D);
    product<kKeys>(s, query, rows, key, q, kt, s.scale, p);
    weigh<E>(s, slope, query, rows, key, p, run);
    gemm<A::rows>(
        rows, s.D, reinterpret_cast<const E*>(p), kKeys, v, ld,
        [&](int64_t first, int64_t last) {
            return Extent{s.D, hidden<kKeys>(s, query + first, key) / kHeld<E>,
                          blocks_of(visible<kKeys>(s, query + last - 1, key), kHeld<E>)};
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
        const int64_t seen = visible<kKeys>(s, query + r, key);
        for (int64_t j = hidden<kKeys>(s, query + r, key); j < seen; ++j) {
            vf sum{};
            for_lanes(s.D,
                      [&](int64_t i, auto n) { sum = madd(load(q + r * ld + i), get(k + j * k_stride + i, n), sum); });
            p[r * kKeys + j] = hsum(sum) * s.scale;
        }
    }
    weigh<float>(s, slope, query, rows, key, p, run);
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t first = hidden<kKeys>(s, query + r, key), seen = visible<kKeys>(s, query + r, key);
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
    using E = Element<T>;
    const Tiles<E> tiles;
    const int64_t k_size = kKeys * depth_of<E>(D), v_size = kKeys * ld / kHeld<E>;
    Scratch scratch(packed * (k_size + v_size) + kQueries * (2 * ld + kKeys + W + 3) + kKeys * ld);
    E *kt = scratch.take<E>(packed * k_size), *v = scratch.take<E>(packed * v_size);
    E *q = scratch.take<E>(kQueries * ld), *rows_of_k = scratch.take<E>(kKeys * ld);
    float *p = scratch.take(kQueries * kKeys), *few_q = reinterpret_cast<float*>(q);
    const Running run = {scratch.take(kQueries), scratch.take(kQueries), scratch.take(kQueries),
                         scratch.take(kQueries * W), scratch.take(kQueries * ld)};
    for (int64_t j = 0; j < packed; ++j) {
        const int64_t key = start + j * kKeys, n = std::min(kKeys, keys - key);
        pack<kKeys>(key_row<const T>(a.k, of, key, hkv), a.k.time, n, D, rows_of_k, kt + j * k_size);
        rows_across<kKeys>(key_row<const T>(a.v, of, key, hkv), a.v.time, n, D, v + j * v_size, ld);
    }
    for (int64_t i = begin; i < end; ++i) {
        const int64_t query = i * kQueries, rows = std::min(kQueries, s.Tq - query);
        if (few)
            widen_rows(query_row<const T>(a.q, of, query, h), a.q.time, rows, D, few_q, ld);
        else
            rows_along(query_row<const T>(a.q, of, query, h), a.q.time, rows, D, q, ld / kHeld<E>);
        std::fill(run.top, run.top + rows, kNone);
        std::fill(run.sum, run.sum + rows * W, 0.0f);
        std::fill(run.out, run.out + rows * ld, 0.0f);
        for (int64_t j = 0; j < key_blocks; ++j) {
            const int64_t key = start + j * kKeys;
            if (!meet<kKeys>(s, query, rows, key)) continue;
            if (few)
                absorb_few(s, of.slope(h), query, rows, key, few_q, key_row<const T>(a.k, of, key, hkv), a.k.time,
                           key_row<const T>(a.v, of, key, hkv), a.v.time, p, run);
            else
                absorb(s, of.slope(h), query, rows, key, q, kt + j * k_size, v + j * v_size, p, run);
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
    const int64_t pieces = std::clamp<int64_t>(blocks_of(kTasks * num_threads(), heads), 1, longest);
    struct Task {
        int64_t head, begin, end;
    };
    Tasks<Task> tasks;
    for (int64_t head = 0; head < heads; ++head) {
        const Sequence of = sequence(s, head / s.H);
        const int64_t blocks = blocks_of(of.shape.Tq, kQueries);
        for (int64_t piece = 0; piece < pieces; ++piece) {
            const Task task = {head, blocks * piece / pieces, blocks * (piece + 1) / pieces};
            tasks.add(task, block_pairs<kKeys>(of.shape, task.begin, task.end, 0, blocks_of(of.shape.Tk, kKeys)));
        }
    }
    CGPT_WITH_FLOAT_TYPE(s.dtype, T, {
        tasks.run([&](const Task& task) {
            if (task.begin < task.end)
                forward<T>(a, sequence(s, task.head / s.H), task.head % s.H, task.begin, task.end);
        });
    })
}

}  // namespace cgpt::CGPT_ISA
