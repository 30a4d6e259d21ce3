"""AdamW in Triton: the sequence of csrc/adamw.h, element by element, one launch a parameter.

The bits are the other owners': fma, division and square root are the IEEE ones by name, and nothing else is fused
(`enable_fp_fusion=False`). Numbers that must arrive in double travel as the int64 with their bits, because Triton
takes a Python float for an fp32.
"""

import struct

import torch
import triton.language as tl

import triton

BLOCK = 1024


@triton.jit
def _double(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _power(x, n):
    y = tl.full((), 1.0, tl.float64)
    while n > 0:
        y = tl.where((n & 1) == 1, y * x, y)
        x = x * x
        n = n >> 1
    return y


@triton.jit
def _bfloat16(bits, nan):
    """To nearest even; written out because the interpreter truncates."""
    rounded = tl.where(nan, (bits >> 16) | 0x40, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
    return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit(do_not_specialize=["step", "lr", "beta1", "beta2", "eps", "weight_decay"])
def adamw_kernel(
    param_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    master_ptr,
    low_ptr,
    step_ptr,
    lr_ptr,
    grad_scale_ptr,
    numel,
    step: tl.int64,
    lr: tl.int64,
    beta1: tl.int64,
    beta2: tl.int64,
    eps: tl.int64,
    weight_decay: tl.int64,
    MAXIMIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t = step.to(tl.int64)
    if step_ptr is not None:
        t = tl.load(step_ptr).to(tl.int64)
    if t >= 1:
        rate = _double(lr)
        if lr_ptr is not None:
            rate = tl.load(lr_ptr).to(tl.float64)
        scale = tl.full((), 1.0, tl.float32)
        if grad_scale_ptr is not None:
            scale = tl.load(grad_scale_ptr)
        if MAXIMIZE:
            scale = -scale
        c2 = tl.sqrt(1.0 - _power(_double(beta2), t))
        minus_step_size = (-(rate * c2 / (1.0 - _power(_double(beta1), t)))).to(tl.float32)
        decay = (1.0 - rate * _double(weight_decay)).to(tl.float32)
        one_minus_beta1 = (1.0 - _double(beta1)).to(tl.float32)
        one_minus_beta2 = (1.0 - _double(beta2)).to(tl.float32)
        beta2_ = _double(beta2).to(tl.float32)
        eps_ = (_double(eps) * c2).to(tl.float32)

        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = i < numel
        zero = tl.zeros((BLOCK,), tl.float32)
        g = tl.load(grad_ptr + i, inside, 0).to(tl.float32) * scale
        m = tl.load(exp_avg_ptr + i, inside, 0)
        v = tl.load(exp_avg_sq_ptr + i, inside, 0)
        if master_ptr is not None:
            p = tl.load(master_ptr + i, inside, 0)
        elif low_ptr is not None:
            high = tl.load(param_ptr + i, inside, 0).to(tl.uint16, bitcast=True).to(tl.uint32)
            low = tl.load(low_ptr + i, inside, 0).to(tl.int32).to(tl.uint32, bitcast=True)
            p = ((high << 16) + low).to(tl.float32, bitcast=True)
        else:
            p = tl.load(param_ptr + i, inside, 0).to(tl.float32)

        m = tl.fma(one_minus_beta1 + zero, g - m, m)
        v = tl.fma(beta2_ + zero, v, one_minus_beta2 * g * g)
        d = tl.div_rn(m, tl.sqrt_rn(v) + eps_)
        p = tl.fma(minus_step_size + zero, d, p * decay)

        tl.store(exp_avg_ptr + i, m, inside)
        tl.store(exp_avg_sq_ptr + i, v, inside)
        bits = p.to(tl.uint32, bitcast=True)
        if low_ptr is not None:
            high = tl.where(p != p, (bits >> 16) | 0x40, (bits + 0x8000) >> 16)
            low = tl.where(p != p, 0, bits & 0xFFFF)
            tl.store(param_ptr + i, high.to(tl.uint16).to(tl.bfloat16, bitcast=True), inside)
            tl.store(low_ptr + i, low.to(tl.uint16).to(tl.int16, bitcast=True), inside)
        else:
            if param_ptr.dtype.element_ty == tl.bfloat16:
                tl.store(param_ptr + i, _bfloat16(bits, p != p), inside)
            else:
                tl.store(param_ptr + i, p.to(param_ptr.dtype.element_ty), inside)
            if master_ptr is not None:
                tl.store(master_ptr + i, p, inside)


def adamw_triton(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    step,
    *,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    masters=None,
    lows=None,
    grad_scale=None,
    maximize=False,
):
    """`cgpt_ext.adamw_`, whose caller vouches for shapes, dtypes and layouts; CPU tensors need Triton's interpreter."""
    lr_tensor = lr if isinstance(lr, torch.Tensor) else None
    for i, param in enumerate(params):
        if param.numel() == 0:
            continue
        at = step[i] if isinstance(step, (list, tuple)) else step
        step_tensor = at if isinstance(at, torch.Tensor) else None
        adamw_kernel[triton.cdiv(param.numel(), BLOCK),](
            param.detach(),
            grads[i].detach(),
            exp_avgs[i],
            exp_avg_sqs[i],
            masters[i] if masters else None,
            lows[i] if lows else None,
            step_tensor,
            lr_tensor,
            grad_scale,
            param.numel(),
            0 if step_tensor is not None else at,
            _bits(0.0 if lr_tensor is not None else lr),
            _bits(beta1),
            _bits(beta2),
            _bits(eps),
            _bits(weight_decay),
            MAXIMIZE=maximize,
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        )


def _bits(x: float) -> int:
    return struct.unpack("<q", struct.pack("<d", x))[0]
