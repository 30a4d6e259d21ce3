// attention forward in f16, a file of its own so that compilers run side by side.
#include "attention_fwd.cuh"

namespace cgpt::cuda {
template void attention_fwd_launch<f16>(const AttentionFwdArgs&, void*);
}
