"""The dtypes and instruction sets that every op's bench has rows of.

In a row of an older instruction set our kernels keep to it; torch, the peer and what we leave to it alike, does not.
bench/train_step.py --isa holds both to one.
"""

import pytest
import torch

KINDS = pytest.mark.parametrize(
    ("dtype", "isa"),
    [(torch.bfloat16, None), (torch.float32, None), (torch.float32, "avx2")],
    ids=["bf16", "fp32", "fp32-avx2"],
)
