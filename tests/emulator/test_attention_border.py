"""What attention's border asks of CUDA tensors, and what the kernels do with cu_seqlens that nobody has read."""

import pytest
import torch

from cgpt_ext import _native as cpu
from cgpt_ext import attention, attention_varlen
from emulator import emulated, native


def misaligned(x):
    return torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)


def odd_strides(x):
    return torch.zeros(*x.shape[:-1], x.shape[-1] + 4, dtype=x.dtype)[..., : x.shape[-1]]


@pytest.mark.parametrize(
    ("place", "spoil", "message"),
    [
        (0, misaligned, "q must be aligned to 16 bytes, got an address that is not"),
        (2, odd_strides, "v must be given with strides that are multiples of 8, got 20"),
        (11, misaligned, "out must be aligned to 16 bytes, got an address that is not"),
    ],
)
def test_what_cannot_be_read_16_bytes_at_a_time(place, spoil, message):
    q, k, v, out = torch.randn(4, 1, 5, 2, 16).bfloat16()
    call = [q, k, v, -1, -1, 0.25, None, None, None, 0, 0, out, None]
    call[place] = spoil(call[place])
    cpu.attention_fwd(*call)
    with pytest.raises(ValueError, match=f"^attention: {message}$"):
        native().attention_fwd(*call)


def test_one_row_may_have_any_stride():
    q, k, v = (odd_strides(torch.zeros(1, 1, 1, 16).bfloat16()).normal_() for _ in range(3))
    with emulated():
        assert torch.equal(attention(q, k, v), v)


def test_fp32_is_another_kernels():
    q = torch.randn(1, 5, 2, 16)
    with emulated(), pytest.raises(TypeError) as caught:
        attention(q, q, q)
    assert str(caught.value) == (
        "attention: q must be bfloat16 or float16 for the CUDA kernel (float32 is Triton's), got float32"
    )


@pytest.mark.parametrize(
    "cu_seqlens",
    [[0, 3, 2**31 - 1], [0, 10**6, 7], [-5, 3, 7], [-(2**31), -(2**31), 2**31 - 1], [7, 3, 0], [0, 7, 7]],
    ids=str,
)
def test_hostile_cu_seqlens_touch_nothing_outside(cu_seqlens):
    """The emulator would end a launch that reads or writes outside a tensor."""
    hostile = torch.tensor(cu_seqlens, dtype=torch.int32)
    good = torch.tensor([0, 3, 7], dtype=torch.int32)
    for cu_q, cu_k in ((hostile, good), (good, hostile), (hostile, hostile)):
        q, k, v = (torch.randn(7, 1, 16).bfloat16().requires_grad_() for _ in range(3))
        with emulated():
            out = attention_varlen(q, k, v, cu_q, cu_k, 4, 4, True)
            out.sum().backward()
        assert out.shape == q.shape
