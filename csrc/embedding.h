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
    int64_t vocabulary;
    DType dtype;
};

struct EmbeddingBwdArgs {
    const void* dout;
    const int64_t* ids;
    void *dwte, *dwpe;  // either may be null; only rows that a token or position has used are written
    int64_t tokens, time, cols;
    int64_t padding_idx;  // the id whose row gets no gradient, or -1
    int64_t vocabulary;   // dwte's rows
    DType dtype;
    const int64_t *sorted, *order;  // the ids in ascending order, and which token each is; CUDA only, as parts:
    float* parts;                   // (segments, 2, cols), sums of runs that cross from segment to segment
};

inline constexpr int64_t kEmbeddingSegment = 32;  // sorted tokens

inline constexpr int64_t embedding_segments(int64_t tokens) {
    return (tokens + kEmbeddingSegment - 1) / kEmbeddingSegment;
}

void embedding_fwd(const View& ids, const View& wte, const std::optional<View>& wpe, const View& out);

// On a GPU ids are not read back: one out of range looks up NaN and has no gradient. With dwte the ids come sorted as
// well: `sorted` and `order` (tokens,) as a stable sort gives them, and `workspace` (embedding_workspace, 2, D) fp32.
void embedding_bwd(const View& dout, const View& ids, const std::optional<View>& dwte, const std::optional<View>& dwpe,
                   int64_t padding_idx, const std::optional<View>& sorted, const std::optional<View>& order,
                   const std::optional<View>& workspace);

// How many (2, D) fp32 partial sums embedding_bwd's workspace must hold: 0 on a CPU, which sorts by itself.
int64_t embedding_workspace(const View& ids);

#if defined(CGPT_CUDA)
void embedding_fwd_cuda(const EmbeddingFwdArgs& args, int device_id);
void embedding_bwd_cuda(const EmbeddingBwdArgs& args, int device_id);
#endif

}  // namespace cgpt

CGPT_CPU_KERNEL(embedding_fwd, EmbeddingFwdArgs)
CGPT_CPU_KERNEL(embedding_bwd, EmbeddingBwdArgs)
