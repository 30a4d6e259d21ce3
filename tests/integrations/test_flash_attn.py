"""flash-attn's functions: its signatures, the reference's values and gradients, and one line for what is refused."""

import inspect

import pytest
import torch
from torch.nn import functional as F

from cgpt_ext import attention_ref
from cgpt_ext.integrations import flash_attn
from cgpt_ext.integrations.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_qkvpacked_func,
)
from cgpt_ext.ops.attention import attention_varlen_ref
from numerics import assert_as_good_as_torch, run

SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
MASKS = [
    {},
    {"causal": True},
    {"causal": True, "window_size": (4, 7)},  # causal makes the right one 0
    {"window_size": (2, 3), "softmax_scale": 0.3},
    {"causal": True, "alibi_slopes": SLOPES},
]
OPTIONS = [
    "dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes", "deterministic",
    "return_attn_probs",
]  # fmt: skip


def inputs(*shapes):
    return [torch.randn(shape) for shape in shapes]


def hold(function, reference, tensors, dout):
    """Values and gradients in fp32 against the fp64 reference; torch's bar is the reference in fp32."""
    want = run(reference, *(x.double() for x in tensors), dout=dout.double())
    theirs = run(reference, *tensors, dout=dout)
    for i, (g, w, t) in enumerate(zip(run(function, *tensors, dout=dout), want, theirs, strict=True)):
        assert_as_good_as_torch(g, w, t, what=f"output or gradient {i}")


@pytest.mark.parametrize("options", MASKS, ids=lambda options: "-".join(options) or "full")
@pytest.mark.parametrize("lengths", [(9, 9), (3, 11), (11, 3)])  # the last: queries that see nothing
def test_func(lengths, options):
    Tq, Tk = lengths
    tensors = inputs((2, Tq, 4, 16), (2, Tk, 2, 16), (2, Tk, 2, 16))
    hold(
        lambda q, k, v: flash_attn_func(q, k, v, **options, deterministic=True),
        lambda q, k, v: attention_ref(q, k, v, **options),
        tensors,
        torch.randn(2, Tq, 4, 16),
    )


@pytest.mark.parametrize("options", MASKS, ids=lambda options: "-".join(options) or "full")
def test_packed(options):
    qkv, dout = inputs((2, 9, 3, 4, 16), (2, 9, 4, 16))
    hold(
        lambda qkv: flash_attn_qkvpacked_func(qkv, **options),
        lambda qkv: attention_ref(*qkv.unbind(2), **options),
        [qkv],
        dout,
    )
    q, kv = inputs((2, 5, 4, 16), (2, 9, 2, 2, 16))
    hold(
        lambda q, kv: flash_attn_kvpacked_func(q, kv, **options),
        lambda q, kv: attention_ref(q, *kv.unbind(2), **options),
        [q, kv],
        dout[:, :5],
    )


@pytest.mark.parametrize("options", MASKS, ids=lambda options: "-".join(options) or "full")
def test_varlen(options):
    seqlens = torch.tensor([0, 4, 4, 11, 12], dtype=torch.int32)
    longer = torch.tensor([0, 6, 7, 14, 20], dtype=torch.int32)
    q, k, v = inputs((12, 4, 16), (20, 2, 16), (20, 2, 16))
    hold(
        lambda q, k, v: flash_attn_varlen_func(q, k, v, seqlens, longer, 7, 8, **options),
        lambda q, k, v: attention_varlen_ref(q, k, v, seqlens, longer, 7, 8, **options),
        [q, k, v],
        torch.randn(12, 4, 16),
    )
    hold(
        lambda qkv: flash_attn_varlen_qkvpacked_func(qkv, seqlens, 7, **options),
        lambda qkv: attention_varlen_ref(*qkv.unbind(1), seqlens, seqlens, 7, 7, **options),
        inputs((12, 3, 4, 16)),
        torch.randn(12, 4, 16),
    )


@pytest.mark.parametrize("window_size", [(-1, -1), (None, None), (-5, -2), [-1, -1]])
def test_no_window(window_size):
    q = torch.randn(1, 6, 2, 8)
    assert torch.equal(flash_attn_func(q, q, q, window_size=window_size), flash_attn_func(q, q, q))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_against_sdpa(dtype):
    q, k, v = (torch.randn(2, 33, 4, 32).to(dtype) for _ in range(3))
    got = flash_attn_func(q, k, v, causal=True)
    want = F.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (q, k, v)), is_causal=True)
    theirs = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
    assert_as_good_as_torch(got, want.transpose(1, 2), theirs.transpose(1, 2))


def test_signatures():
    """Positions too: callers pass dropout and scale without names."""
    leading = {
        "flash_attn_func": ["q", "k", "v"],
        "flash_attn_kvpacked_func": ["q", "kv"],
        "flash_attn_qkvpacked_func": ["qkv"],
        "flash_attn_varlen_func": ["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"],
        "flash_attn_varlen_qkvpacked_func": ["qkv", "cu_seqlens", "max_seqlen"],
    }
    assert sorted(leading) == sorted(flash_attn.__all__)
    for name, first in leading.items():
        parameters = inspect.signature(getattr(flash_attn, name)).parameters
        last = ["block_table"] if name == "flash_attn_varlen_func" else []
        assert list(parameters) == first + OPTIONS + last
        defaults = [parameters[option].default for option in OPTIONS]
        assert defaults == [0.0, None, False, (-1, -1), 0.0, None, False, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout_p": 0.1}, "flash_attn_func: dropout_p must be 0.0, got 0.1"),
        ({"softcap": 30.0}, "flash_attn_func: softcap must be 0.0, got 30.0"),
        ({"return_attn_probs": True}, "flash_attn_func: return_attn_probs must be False, got True"),
    ],
)
def test_refused(options, message):
    q = torch.randn(1, 6, 2, 8)
    with pytest.raises(ValueError, match=f"^{message}$"):
        flash_attn_func(q, q, q, **options)


def test_bad_input():
    seqlens = torch.tensor([0, 3], dtype=torch.int32)
    q = torch.randn(3, 2, 8)
    with pytest.raises(ValueError, match=r"block_table must be None, got shape \(1, 1\)$"):
        flash_attn_varlen_func(q, q, q, seqlens, seqlens, 3, 3, block_table=torch.zeros(1, 1))
    with pytest.raises(ValueError, match=r"^flash_attn_qkvpacked_func: qkv must be \(B, T, 3, H, D\), got \(3, 2, 8"):
        flash_attn_qkvpacked_func(q)
    with pytest.raises(ValueError, match=r"kv must be \(B, T, 2, H, D\), got \(1, 3, 3, 2, 8\)$"):
        flash_attn_kvpacked_func(q[None], torch.randn(1, 3, 3, 2, 8))
    with pytest.raises(TypeError, match=r"^flash_attn_varlen_qkvpacked_func: qkv must be a torch.Tensor, got list$"):
        flash_attn_varlen_qkvpacked_func([q], seqlens, 3)
    with pytest.raises(TypeError, match="window_size must be two ints"):
        flash_attn_func(q[None], q[None], q[None], window_size=3)
    with pytest.raises(TypeError, match="float64"):
        flash_attn_func(*(q[None].double(),) * 3)
