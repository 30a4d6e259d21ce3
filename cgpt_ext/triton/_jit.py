"""What the Triton kernels share: their choice of configs, products and roundings, and the device they launch on.

Under Triton's interpreter (TRITON_INTERPRET=1, a CPU) a kernel runs its first config in small tiles, and two things it
gets wrong are written out: `tl.dot` takes bf16 for integers, and a conversion to bf16 truncates.
"""

from contextlib import nullcontext

import torch
import triton.language as tl

import triton

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def config(num_warps: int, num_stages: int = 1, **tile: int) -> triton.Config:
    return triton.Config(tile, num_warps=num_warps, num_stages=num_stages)


def tuned(kernel, configs: list, key: list[str], small: dict[str, int], restore_value: list[str] | None = None):
    """`kernel` with the fastest of `configs` for every value of `key`, timed at the first call and kept on disk.

    Kept, because another config may add in another order: runs on one machine give the same bits. A call that is
    captured into a CUDA graph must have run before. The interpreter gets the tile `small`.
    """
    if INTERPRETED.value:
        configs = [triton.Config(small)]
    return triton.autotune(configs, key=key, restore_value=restore_value, cache_results=True)(kernel)


def on_device_of(x: torch.Tensor):
    """Makes x's GPU the current one, which is where Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def bucket(n: int) -> int:
    """n up to the next power of two: what a size counts as in a tuning key."""
    return triton.next_power_of_2(max(n, 1))


@triton.jit
def dot(a, b, c=None):
    """a b (+ c) in fp32; fp32 operands are multiplied as fp32, not as tf32."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if c is None:
        return tl.dot(a, b, input_precision="ieee")
    else:
        return tl.dot(a, b, c, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 to `dtype`, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = tl.where(x != x, (bits >> 16) | 0x40, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)
