// The border of embedding: ids int64 of any shape, or (B, T) where positions are added, contiguous, every one in
// [0, V); wte (V, D) and wpe (T_max, D) in one of fp32, bf16, fp16 with contiguous rows any stride apart; out and
// dout (ids' shape, D), dwte (V, D) and dwpe (T_max, D) contiguous in that dtype.
#include "embedding.h"

#include "check.h"

namespace cgpt {
namespace {

constexpr const char* kOp = "embedding";

void check_table(const char* name, const View& table) {
    Arg(kOp, name, table).dtype(kFloats).ndim(2).last_dim_contiguous();
    if (table.size[1] == 0) fail(kOp, name, "non-empty in its last dimension", shape_of(table));
}

void check_positions(const char* name, const View& table, const View& ids) {
    Arg(kOp, "ids", ids).ndim(2);
    if (ids.size[1] > table.size[0])
        fail(kOp, name, "at least " + std::to_string(ids.size[1]) + " rows for ids " + shape_of(ids),
             std::to_string(table.size[0]));
}

void check_rows(const char* name, const View& rows, const View& ids, int64_t cols) {
    Arg(kOp, name, rows).on(ids).dtype(kFloats).contiguous();
    bool same = rows.ndim == ids.ndim + 1 && rows.size[ids.ndim] == cols;
    for (int i = 0; same && i < ids.ndim; ++i) same = rows.size[i] == ids.size[i];
    if (same) return;
    std::string wanted = "(";
    for (int i = 0; i < ids.ndim; ++i) wanted += std::to_string(ids.size[i]) + ", ";
    fail(kOp, name, wanted + std::to_string(cols) + (ids.ndim ? ")" : ",)"), shape_of(rows));
}

// One pass without a branch: the sign bit of `wrong` is set if any id is negative or past the last row.
void check_range(const View& ids, int64_t vocabulary) {
    const int64_t *id = ids.as<int64_t>(), n = ids.numel();
    const uint64_t last = static_cast<uint64_t>(vocabulary - 1);
    uint64_t wrong = 0;
    for (int64_t i = 0; i < n; ++i) wrong |= static_cast<uint64_t>(id[i]) | (last - static_cast<uint64_t>(id[i]));
    if (!(wrong >> 63)) return;
    for (int64_t i = 0; i < n; ++i)
        if (id[i] < 0 || id[i] >= vocabulary)
            fail(kOp, "ids", "in [0, " + std::to_string(vocabulary) + ")", std::to_string(id[i]));
}

int64_t time_of(const View& ids) { return ids.ndim ? ids.size[ids.ndim - 1] : 1; }

}  // namespace

void embedding_fwd(const View& ids, const View& wte, const std::optional<View>& wpe, const View& out) {
    Arg(kOp, "ids", ids).dtype({DType::i64}).contiguous();
    check_table("wte", wte);
    Arg(kOp, "wte", wte).on(ids);
    if (wpe) {
        check_table("wpe", *wpe);
        Arg(kOp, "wpe", *wpe).on(ids).dtype({wte.dtype}).shape({-1, wte.size[1]});
        check_positions("wpe", *wpe, ids);
    }
    check_rows("out", out, ids, wte.size[1]);
    Arg(kOp, "out", out).dtype({wte.dtype});
    const EmbeddingFwdArgs args = {ids.as<int64_t>(),
                                   wte.data,
                                   data_or_null<void>(wpe),
                                   wte.stride[0],
                                   wpe ? wpe->stride[0] : 0,
                                   out.data,
                                   ids.numel(),
                                   time_of(ids),
                                   wte.size[1],
                                   wte.size[0],
                                   wte.dtype};
#if defined(CGPT_CUDA)
    if (ids.device == Device::cuda && ids.numel() > INT32_MAX)
        fail(kOp, "ids", "fewer than 2^31 tokens on a GPU", shape_of(ids));
    if (ids.device == Device::cuda) return embedding_fwd_cuda(args, ids.device_id);
#endif
    if (ids.device != Device::cpu) fail_device(kOp, ids);
    check_range(ids, wte.size[0]);
    embedding_fwd_cpu(args);
}

void embedding_bwd(const View& dout, const View& ids, const std::optional<View>& dwte, const std::optional<View>& dwpe,
                   int64_t padding_idx, const std::optional<View>& sorted, const std::optional<View>& order,
                   const std::optional<View>& workspace) {
    Arg(kOp, "ids", ids).dtype({DType::i64}).contiguous();
    const int64_t cols = dout.ndim ? dout.size[dout.ndim - 1] : 0;
    check_rows("dout", dout, ids, cols);
    if (cols == 0) fail(kOp, "dout", "non-empty in its last dimension", shape_of(dout));
    if (dwte) Arg(kOp, "dwte", *dwte).on(ids).dtype({dout.dtype}).shape({-1, cols}).contiguous();
    if (dwpe) {
        Arg(kOp, "dwpe", *dwpe).on(ids).dtype({dout.dtype}).shape({-1, cols}).contiguous();
        check_positions("dwpe", *dwpe, ids);
    }
    const int64_t segments = embedding_workspace(ids), tokens = ids.numel();
    auto check_sorted = [&](const char* name, const std::optional<View>& v) {
        if (v) Arg(kOp, name, *v).on(ids).dtype({DType::i64}).shape({tokens}).contiguous();
        if (!v && dwte && segments != 0) fail(kOp, name, "given with dwte on a GPU", "None");
    };
    check_sorted("sorted", sorted);
    check_sorted("order", order);
    if (workspace)
        Arg(kOp, "workspace", *workspace).on(ids).dtype({DType::f32}).shape({segments, 2, cols}).contiguous();
    else if (dwte && segments != 0)
        fail(kOp, "workspace", "given with dwte on a GPU", "None");
    const EmbeddingBwdArgs args = {dout.data,
                                   ids.as<int64_t>(),
                                   data_or_null<void>(dwte),
                                   data_or_null<void>(dwpe),
                                   tokens,
                                   time_of(ids),
                                   cols,
                                   padding_idx,
                                   dwte ? dwte->size[0] : 0,
                                   dout.dtype,
                                   data_or_null<int64_t>(sorted),
                                   data_or_null<int64_t>(order),
                                   data_or_null<float>(workspace)};
#if defined(CGPT_CUDA)
    if (ids.device == Device::cuda) return embedding_bwd_cuda(args, ids.device_id);
#endif
    if (ids.device != Device::cpu) fail_device(kOp, ids);
    if (dwte) check_range(ids, dwte->size[0]);
    embedding_bwd_cpu(args);
}

int64_t embedding_workspace(const View& ids) {
    Arg(kOp, "ids", ids).dtype({DType::i64}).contiguous();
#if defined(CGPT_CUDA)
    if (ids.device == Device::cuda) return embedding_segments(ids.numel());
#endif
    return 0;
}

}  // namespace cgpt
