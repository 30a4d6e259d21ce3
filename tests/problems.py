"""Every op as one problem: inputs of a size, what we compute, its fp64 reference, and torch's own in the same dtype.

The same problems serve the tests of values, of repeats, of CUDA graphs and of torch.compile, on a GPU with every
implementation and on a CPU with the native one, so that a machine without a GPU keeps the tests themselves alive.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

import cgpt_ext
from cgpt_ext import dispatch
from cgpt_ext.ops.attention import attention_varlen_ref
from numerics import DTYPES, run

GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


@dataclass
class Problem:
    """ours, reference, torchs: functions of `inputs`, tensors of which the floating-point ones get gradients."""

    op: str
    ours: Callable
    reference: Callable
    torchs: Callable
    inputs: list
    dout: torch.Tensor | tuple

    def run(self, function: Callable | None = None) -> list[torch.Tensor]:
        """Outputs and gradients."""
        return run(function or self.ours, *self.inputs, dout=self.dout)


def normal(device, dtype, *shape, scale=1.0):
    return (torch.randn(shape, device=device) * scale).to(dtype)


def attention(device, dtype, B, Tq, Tk, H, Hkv, D, causal):
    q, k, v, dout = (
        normal(device, dtype, *s) for s in ((B, Tq, H, D), (B, Tk, Hkv, D), (B, Tk, Hkv, D), (B, Tq, H, D))
    )

    def torchs(q, k, v):
        k, v = (x.repeat_interleave(H // Hkv, 2) for x in (k, v))
        mask = torch.ones(Tq, Tk, dtype=torch.bool, device=device).tril(Tk - Tq) if causal else None
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    def ours(q, k, v):
        return cgpt_ext.attention(q, k, v, causal)

    def reference(q, k, v):
        return cgpt_ext.attention_ref(q, k, v, causal)

    return Problem("attention", ours, reference, torchs, [q, k, v], dout)


def attention_qkv(device, dtype, B, T, H, D):
    """q, k and v as views of one packed projection, as GPT-2's models hand them."""
    qkv, dout = normal(device, dtype, B, T, 3 * H * D), normal(device, dtype, B, T, H * D)

    def heads(qkv):
        return qkv.view(B, T, 3, H, D).unbind(2)

    def torchs(qkv):
        q, k, v = (x.transpose(1, 2) for x in heads(qkv))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    def ours(qkv):
        return cgpt_ext.attention_qkv(qkv, H, causal=True)

    def reference(qkv):
        return cgpt_ext.attention_ref(*heads(qkv), True).flatten(2)

    return Problem("attention", ours, reference, torchs, [qkv], dout)


def attention_masked(device, dtype, B, Tq, Tk, H, Hkv, D, left, right, alibi):
    """A window, and ALiBi's slopes where `alibi`: powers of two, so that torch's mask holds them in every dtype."""
    q, k, v, dout = (
        normal(device, dtype, *s) for s in ((B, Tq, H, D), (B, Tk, Hkv, D), (B, Tk, Hkv, D), (B, Tq, H, D))
    )
    slopes = 2.0 ** -torch.arange(1, H + 1, device=device) if alibi else None
    ahead = torch.arange(Tk, device=device) - torch.arange(Tq, device=device)[:, None] - (Tk - Tq)
    mask = torch.zeros(H, Tq, Tk, device=device)
    if alibi:
        mask -= slopes[:, None, None] * ahead.abs()
    for hidden in (ahead < -left if left >= 0 else None, ahead > right if right >= 0 else None):
        mask = mask if hidden is None else mask.masked_fill(hidden, -torch.inf)

    def torchs(q, k, v):
        k, v = (x.repeat_interleave(H // Hkv, 2) for x in (k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype)).transpose(1, 2)

    def ours(q, k, v):
        return cgpt_ext.attention(q, k, v, False, None, (left, right), slopes)

    def reference(q, k, v):
        return cgpt_ext.attention_ref(q, k, v, False, None, (left, right), slopes)

    return Problem("attention", ours, reference, torchs, [q, k, v], dout)


def attention_varlen(device, dtype, H, Hkv, D, *lengths):
    """Causal, in packed sequences of these lengths."""
    total = sum(lengths)
    q, k, v, dout = (normal(device, dtype, total, heads, D) for heads in (H, Hkv, Hkv, H))
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    seqlens = (cu_seqlens, cu_seqlens, max(lengths), max(lengths))

    def torchs(q, k, v):
        k, v = (x.repeat_interleave(H // Hkv, 1) for x in (k, v))
        parts = zip(*(x.transpose(0, 1).split(lengths, 1) for x in (q, k, v)), strict=True)
        outs = [F.scaled_dot_product_attention(*(x[None] for x in part), is_causal=True)[0] for part in parts]
        return torch.cat(outs, 1).transpose(0, 1)

    def ours(q, k, v):
        return cgpt_ext.attention_varlen(q, k, v, *seqlens, True)

    def reference(q, k, v):
        return attention_varlen_ref(q, k, v, *seqlens, True)

    return Problem("attention", ours, reference, torchs, [q, k, v], dout)


def gelu_mlp(device, dtype, N, D, H, activation, transposed):
    width = 2 * H if activation == "swiglu" else H
    w1, w2 = normal(device, dtype, width, D, scale=D**-0.5), normal(device, dtype, D, H, scale=H**-0.5)
    if transposed:  # as the (in, out) parameters of GPT-2 are handed over
        w1, w2 = (w.t().contiguous().t() for w in (w1, w2))
    x, b1, b2, dout = (normal(device, dtype, *s) for s in ((N, D), (width,), (D,), (N, D)))

    def ours(*inputs):
        return cgpt_ext.gelu_mlp(*inputs, activation)

    def reference(*inputs):
        return cgpt_ext.gelu_mlp_ref(*inputs, activation)

    return Problem("gelu_mlp", ours, reference, reference, [x, w1, b1, w2, b2], dout)


def linear(device, dtype, N, D, H, transposed):
    weight = normal(device, dtype, H, D, scale=D**-0.5)
    if transposed:
        weight = weight.t().contiguous().t()
    x, bias, dout = (normal(device, dtype, *s) for s in ((N, D), (H,), (N, H)))
    return Problem("linear", cgpt_ext.linear, cgpt_ext.linear_ref, F.linear, [x, weight, bias], dout)


def layer_norm(device, dtype, N, D, residual):
    x, h, dout, dh = (normal(device, dtype, N, D) for _ in range(4))
    weight, bias = (normal(device, dtype, D) for _ in range(2))

    def torchs(x, weight, bias, h=None):
        if h is None:
            return F.layer_norm(x, (D,), weight, bias)
        return F.layer_norm(x + h, (D,), weight, bias), x + h

    def ours(x, weight, bias, h=None):
        return cgpt_ext.layer_norm(x, weight, bias, residual=h)

    def reference(x, weight, bias, h=None):
        return cgpt_ext.layer_norm_ref(x, weight, bias, residual=h)

    inputs = [x, weight, bias, h] if residual else [x, weight, bias]
    return Problem("layer_norm", ours, reference, torchs, inputs, (dout, dh) if residual else dout)


def cross_entropy(device, dtype, N, D, V, z_loss):
    x, weight = normal(device, dtype, N, D), normal(device, dtype, V, D, scale=D**-0.5)
    target = torch.randint(V, (N,), device=device)
    target[::5] = -100
    target[0] = 0

    def torchs(x, weight, target):
        logits = F.linear(x, weight).float()
        loss = F.cross_entropy(logits, target, reduction="none")
        lse = torch.where(target == -100, 0, logits.logsumexp(-1).square())
        return (loss + z_loss * lse).sum() / (target != -100).sum()

    def ours(x, weight, target):
        return cgpt_ext.cross_entropy(x, weight, target, z_loss=z_loss, chunk_tokens=max(1, N // 3))

    def reference(x, weight, target):
        return cgpt_ext.cross_entropy_ref(x, weight, target, z_loss=z_loss)

    return Problem("cross_entropy", ours, reference, torchs, [x, weight, target], torch.ones((), device=device))


def embedding(device, dtype, B, T, V, D):
    wte, wpe, dout = normal(device, dtype, V, D), normal(device, dtype, T + 3, D), normal(device, dtype, B, T, D)
    ids = torch.randint(V, (B, T), device=device)

    def torchs(ids, wte, wpe):
        return F.embedding(ids, wte) + wpe[:T]

    return Problem("embedding", cgpt_ext.embedding, cgpt_ext.embedding_ref, torchs, [ids, wte, wpe], dout)


def rotary(device, dtype, B, T, H, D, R, interleaved):
    x, dout = (normal(device, dtype, B, T, H, D) for _ in range(2))
    angles = torch.arange(T, device=device)[:, None] * 10_000.0 ** -torch.linspace(0, 1, R // 2, device=device)
    cos, sin = angles.cos(), angles.sin()

    def ours(x):
        return cgpt_ext.rotary(x, cos, sin, interleaved)

    def reference(x):
        return cgpt_ext.rotary_ref(x, cos, sin, interleaved)

    return Problem("rotary", ours, reference, reference, [x], dout)


# (what builds it, its sizes): a tile and one more, primes, 1, the family's widths and head dims
SIZES: list[tuple[Callable, tuple]] = [
    *((attention, size) for size in (
        (1, 1, 1, 1, 1, 64, True), (2, 129, 129, 3, 3, 64, True), (1, 127, 257, 4, 2, 128, True),
        (1, 65, 65, 2, 2, 80, False), (2, 67, 131, 2, 1, 96, False), (1, 97, 97, 1, 1, 256, True),
        (1, 1000, 1000, 2, 2, 64, True),
    )),
    (attention_qkv, (2, 129, 2, 64)), (attention_qkv, (1, 200, 3, 80)),
    *((attention_masked, size) for size in (
        (2, 129, 129, 4, 2, 64, -1, 0, True), (1, 257, 257, 2, 2, 64, 64, 0, False),
        (1, 67, 131, 2, 1, 128, 30, 5, True), (1, 200, 200, 2, 2, 80, -1, -1, True),
    )),
    (attention_varlen, (4, 2, 64, 129, 1, 64, 200)), (attention_varlen, (2, 2, 40, 67, 131)),
    *((gelu_mlp, size) for size in (
        (1, 8, 16, "gelu", False), (129, 64, 256, "gelu", True), (67, 96, 136, "gelu_tanh", True),
        (257, 768, 1024, "gelu", True), (128, 128, 512, "gelu_tanh", False), (67, 96, 136, "swiglu", True),
    )),
    *((linear, size) for size in ((1, 8, 16, False), (129, 64, 200, True), (67, 1100, 136, False))),
    *((layer_norm, size) for size in (
        (1, 1, False), (7, 13, True), (129, 768, False), (65, 1088, True), (33, 5120, True), (3, 20000, False),
    )),
    *((cross_entropy, size) for size in ((1, 8, 2, 0.0), (13, 64, 101, 1e-3), (257, 64, 50257, 0.0))),
    *((embedding, size) for size in ((1, 1, 2, 8), (3, 67, 50, 96), (2, 129, 50257, 64))),
    *((rotary, size) for size in ((1, 1, 1, 8, 8, False), (2, 67, 3, 80, 80, False), (1, 130, 2, 64, 24, True))),
]  # fmt: skip

# The sizes that the tests of repeats, graphs and compilation take: one an op, large enough for several blocks.
ONE_EACH: list[tuple[Callable, tuple]] = [
    (attention, (2, 129, 129, 4, 2, 64, True)),
    (attention_qkv, (1, 200, 2, 64)),
    (attention_masked, (1, 131, 200, 4, 2, 64, 70, 0, True)),
    (attention_varlen, (2, 1, 64, 129, 3, 70)),
    (gelu_mlp, (129, 64, 256, "gelu", True)),
    (linear, (129, 64, 200, True)),
    (layer_norm, (129, 768, True)),
    (cross_entropy, (65, 64, 1003, 1e-3)),
    (embedding, (3, 67, 50, 96)),
    (rotary, (2, 67, 3, 80, 64, False)),
]

OP = {attention_qkv: "attention", attention_masked: "attention", attention_varlen: "attention"}


def everywhere(sizes, dtypes=DTYPES) -> list:
    """pytest parameters (device, implementation, build, size, dtype): the CPU's native one, and all of a GPU's."""
    found = []
    for build, size in sizes:
        op = OP.get(build, build.__name__)
        for device in dispatch.devices(op):
            for name in dispatch.implementations(op, device):
                for dtype in dtypes:
                    words = [build.__name__, *map(str, size), str(dtype).removeprefix("torch."), device, name]
                    marks = GPU if device == "cuda" else ()
                    found.append(pytest.param(device, name, build, size, dtype, marks=marks, id="-".join(words)))
    return found


def chosen(op: str, device: str, name: str):
    """The implementation in force. The table's own choice is not asked for by name: it must serve every dtype."""
    return nullcontext() if dispatch.implementation(op, device) == name else dispatch.use(**{op: name})


def attempt(op: str, device: str, name: str, call: Callable):
    """What `call` returns. An implementation asked for by name may refuse a problem, in a line that names the op."""
    with chosen(op, device, name):
        try:
            return call()
        except (TypeError, ValueError) as error:
            if name != dispatch.implementation(op, device) and str(error).startswith(f"{op}: "):
                pytest.skip(f"refused by name: {error}")
            raise
