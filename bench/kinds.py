"""The dtypes and instruction sets that every op's bench has rows of.

In a row of an older instruction set our kernels keep to it; torch, the peer and what we leave to it alike, does not.
bench/train_step.py --isa holds both to one.
"""

import pytest
import torch

# Where neither AVX-512 nor AMX is, torch multiplies bf16 by loops of scalars, some 1 GFLOP/s: nobody's choice.
TORCH_MULTIPLIES_BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()

KINDS = pytest.mark.parametrize(
    ("dtype", "isa"),
    [(torch.bfloat16, None), (torch.float32, None), (torch.float32, "avx2")],
    ids=["bf16", "fp32", "fp32-avx2"],
)


def skip_without_a_peer(dtype: torch.dtype) -> None:
    """For benches whose peer is torch's matrix product, which would take minutes a call."""
    if dtype == torch.bfloat16 and not TORCH_MULTIPLIES_BF16:
        pytest.skip("torch has no bf16 product on this processor")
