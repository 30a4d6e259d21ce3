// embedding: arguments and launchers. Shapes and dtypes are in embedding.cpp, which checks them.
#pragma once

#include <optional>

#include "cpu/isa.h"
#include "view.h"

namespace cgpt {

struct EmbeddingFwdArgs {
    const int64_t* ids;
    const void *wte, *wpe;           // wpe may be null
    int64_t wte_stride, wpe_stride;  // elements from one row to the next
    void* out;
    int64_t tokens, time, cols;  // token i stands at position i % time
    DType dtype;
};

struct EmbeddingBwdArgs {
    const void* dout;
    const int64_t* ids;
    void *dwte, *dwpe;  // either may be null; only rows that a token or position has used are written
    int64_t tokens, time, cols;
    int64_t padding_idx;  // the id whose row gets no gradient, or -1
    DType dtype;
};

void embedding_fwd(const View& ids, const View& wte, const std::optional<View>& wpe, const View& out);

void embedding_bwd(const View& dout, const View& ids, const std::optional<View>& dwte, const std::optional<View>& dwpe,
                   int64_t padding_idx);

}  // namespace cgpt

CGPT_CPU_KERNEL(embedding_fwd, EmbeddingFwdArgs)
CGPT_CPU_KERNEL(embedding_bwd, EmbeddingBwdArgs)
