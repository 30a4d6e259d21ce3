"""Softmax cross-entropy of rows of logits in Triton, and its gradient in their place.

    lse  = log sum_j exp(l_j),   p_j = exp(l_j - lse)
    loss = lse - l_target + z_loss lse^2
    dl_j = dout (p_j (1 + 2 z_loss lse) - [j = target])

logits (N, V), target (N,) int64, dout and loss (N,) fp32. One program a row: one reading makes the maximum and the sum
together (Milakov & Gimelshein 2018, arXiv 1805.02867), each lane its own until the end, so that no barrier stands
between two loads; a second, of what is then in the cache, writes the gradient.
"""

import triton.language as tl

import triton
from cgpt_ext.triton._jit import LOG2E, bucket, config, narrow, on_device_of, tuned


@triton.jit(do_not_specialize=["ignore_index", "tuning_V"])
def cross_entropy_kernel(
    logits_ptr, target_ptr, dout_ptr, loss_ptr, stride, V, ignore_index, z_loss, tuning_V, BLOCK_V: tl.constexpr
):
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    target = tl.load(target_ptr + row)
    if target == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        if dout_ptr is not None:
            for start in tl.range(0, V, BLOCK_V):
                cols = start + tl.arange(0, BLOCK_V)
                tl.store(logits_ptr + cols, tl.zeros((BLOCK_V,), dtype), cols < V)
    else:
        # A target outside the vocabulary has loss and gradient NaN: here nothing can be raised.
        known = (target >= 0) & (target < V)
        picked = tl.load(logits_ptr + target, known, float("nan")).to(tl.float32)
        # A finite start: lanes past the end, or of -inf alone, would give inf - inf.
        largest = tl.full((BLOCK_V,), -3.0e38, tl.float32)
        total = tl.zeros((BLOCK_V,), tl.float32)
        for start in tl.range(0, V, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            x = tl.load(logits_ptr + cols, cols < V, float("-inf")).to(tl.float32)
            new = tl.maximum(largest, x)
            total = total * tl.exp2((largest - new) * LOG2E) + tl.exp2((x - new) * LOG2E)
            largest = new
        top = tl.max(largest, 0)
        total = tl.sum(total * tl.exp2((largest - top) * LOG2E), 0)
        log_sum = tl.log(total)
        lse = top + log_sum
        # top - picked first: exact where the logits are large and close.
        tl.store(loss_ptr + row, (top - picked) + log_sum + z_loss * lse * lse)
        if dout_ptr is not None:
            dout = tl.load(dout_ptr + row)
            if not known:
                dout = float("nan")
            slope = 1.0 + 2.0 * z_loss * lse
            factor = dout * slope / total
            for start in tl.range(0, V, BLOCK_V):
                cols = start + tl.arange(0, BLOCK_V)
                x = tl.load(logits_ptr + cols, cols < V, float("-inf")).to(tl.float32)
                e = tl.exp2((x - top) * LOG2E)
                p = e / total
                dx = tl.where(cols == target, dout * ((p - 1.0) + 2.0 * z_loss * lse * p), e * factor)
                tl.store(logits_ptr + cols, narrow(dx, dtype), cols < V)


CONFIGS = [config(4, BLOCK_V=2048), config(8, BLOCK_V=4096), config(16, BLOCK_V=8192), config(8, BLOCK_V=2048)]
TUNED = tuned(cross_entropy_kernel, CONFIGS, ["tuning_V"], {"BLOCK_V": 128}, restore_value=["logits_ptr"])


def cross_entropy_rows_triton(logits, target, dout, loss, ignore_index, z_loss):
    """Fills loss; with dout, which may be None, the logits become their gradient.

    logits (N, V) in fp32, bf16 or fp16, their rows contiguous; a row whose target is `ignore_index` has loss and
    gradient 0. The caller vouches for shapes, dtypes and devices.
    """
    rows, V = logits.shape
    if rows == 0:
        return
    with on_device_of(logits):
        TUNED[rows,](logits, target, dout, loss, logits.stride(0), V, ignore_index, z_loss, bucket(V))
