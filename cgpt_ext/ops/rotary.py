"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864).

    out_1 = x_1 cos - x_2 sin,  out_2 = x_2 cos + x_1 sin

for pairs (x_1, x_2) of the first R values of each head; the other D - R pass. The gradient is the rotation by the
negative angle. B batch, T time, H heads, D head dim.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cgpt_ext import _native
from cgpt_ext.dispatch import implementation, reference_chosen
from cgpt_ext.ops._torch import register, require_tensors


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Turns the queries or keys `x` by their positions' angles: row t of `cos` and `sin` serves position t.

    Args:
        x: (B, T, H, D) in fp32, bf16 or fp16, any strides with the last dimension contiguous.
        cos, sin: (at least T, R / 2) fp32, R <= D, contiguous; they get no gradient. For keys and queries at other
            positions than 0..T-1 pass those rows.
        interleaved: a pair is values (2i, 2i + 1), as in the paper and GPT-J; else (i, i + R / 2), as in GPT-NeoX and
            Llama.

    Returns:
        (B, T, H, D), contiguous, in x's dtype, computed in fp32.

    Raises:
        ValueError: for a wrong shape, stride or device. TypeError: for a wrong dtype.
    """
    require_tensors("rotary", x=x, cos=cos, sin=sin)
    if reference_chosen("rotary"):
        return rotary_ref(x, cos, sin, interleaved)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rotary.apply(x, cos, sin, interleaved)
    return _run(x, cos, sin, interleaved, False)


def rotary_ref(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """`rotary` in plain torch, in the dtype of its inputs: the truth when they are fp64."""
    half = cos.shape[-1]
    cos, sin = (angles[: x.shape[1], None].to(x.dtype) for angles in (cos, sin))
    turning, passing = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        first, second = turning[..., ::2], turning[..., 1::2]
    else:
        first, second = turning[..., :half], turning[..., half:]
    pair = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((turned, passing), -1)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, interleaved):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _run(x, cos, sin, interleaved, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        return _run(dout, *ctx.saved_tensors, ctx.interleaved, True), None, None, None


def _launch(x, cos, sin, interleaved, inverse):
    implementation("rotary", x.device.type)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _native.rotary(x, cos, sin, out, interleaved, inverse)
    return out


_run = register(
    "rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> Tensor",
    _launch,
    lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
)
