// attention backward in bf16, a file of its own so that compilers run side by side.
#include "attention_bwd.cuh"

namespace cgpt::cuda {
template void attention_bwd_launch<bf16>(const AttentionBwdArgs&, void*);
}
