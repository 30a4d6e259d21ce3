"""Fused linear layer and softmax cross-entropy: the (N, V) logits never exist whole.

    logits = x Wᵀ,  lse = log Σ exp(logits)
    loss   = lse - logits[target] + z_loss · lse²
    dlogits = softmax(logits) · (1 + 2 z_loss lse) - onehot(target),  dx = dlogits W,  dW = dlogitsᵀ x

The idea of going through the tokens in chunks and taking the gradients in the forward pass, while a chunk's logits are
there, is Liger-Kernel's (arXiv 2410.10989); the z-loss is PaLM's (arXiv 2204.02311, section 5). Each chunk is three
products, linear's on a CPU and torch's on a GPU, and between them one native pass that makes the losses and turns
logits into dlogits in place.

N tokens, D d_model, V vocab. fp16 is multiplied in fp32: dlogits / N, about 1e-8, is below fp16's range.

Nothing waits for a GPU: counts and sums over the tokens stay there, so a CUDA graph may hold the call.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cgpt_ext import _native
from cgpt_ext.dispatch import implementation, reference_chosen
from cgpt_ext.ops._torch import autocast, direct, on_gpu, register, require_tensors
from cgpt_ext.ops.linear import lines

# A chunk's logits: 1335 tokens of bf16 at V = 50257, enough that summing dW over the chunks costs little beside the
# products, and about what dW itself takes.
LOGITS_BYTES = 128 << 20


def cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    reduction: str = "mean",
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Cross-entropy, in nats, of the logits `x @ weight.T` against `target`.

    Args:
        x: (..., D) in fp32, bf16 or fp16, any strides.
        weight: (V, D) in x's dtype, any strides.
        target: (...) int64, each in [0, vocab_size) or ignore_index. A GPU's targets are not read back: one out of
            range makes its loss and its gradients NaN instead of raising.
        ignore_index: targets of this value have loss and gradient 0 and do not count in the mean.
        z_loss: weight of lse², which keeps the logits from drifting.
        reduction: "mean" over the targets not ignored, "sum", or "none".
        vocab_size: how many rows of a padded weight are real; the others take no part and get gradient 0.
        chunk_tokens: tokens a chunk; by default as many as keep a chunk's logits within 128 MiB.

    Under torch.autocast x and weight are cast first, as torch.nn.functional.linear casts its own.

    Returns:
        fp32: a scalar, or (N,) for "none". The mean of no target at all is NaN with gradient 0, as torch's is.

    With "mean" and "sum" the gradients are computed here and only scaled in the backward pass: three products in all.
    With "none" the backward pass recomputes the logits: four.

    Raises:
        ValueError: for a wrong shape, device, target, vocab_size, reduction or chunk_tokens. TypeError: for a wrong
            dtype.
    """
    require_tensors("cross_entropy", x=x, weight=weight, target=target)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"cross_entropy: reduction must be mean, sum or none, got {reduction}")
    _check_int("ignore_index", ignore_index)
    if vocab_size is not None:
        _check_int("vocab_size", vocab_size)
    if isinstance(z_loss, bool) or not isinstance(z_loss, (int, float)):
        raise TypeError(f"cross_entropy: z_loss must be a number, got {type(z_loss).__name__}")
    if chunk_tokens is not None:
        _check_int("chunk_tokens", chunk_tokens)
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"cross_entropy: chunk_tokens must be at least 1, got {chunk_tokens}")
    x, weight = autocast(x, weight)
    if reference_chosen("cross_entropy"):
        return cross_entropy_ref(x, weight, target, ignore_index, z_loss, reduction, vocab_size)
    if vocab_size is None:
        vocab_size = weight.shape[0] if weight.dim() else 0
    options = (ignore_index, z_loss, reduction, vocab_size, chunk_tokens)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _CrossEntropy.apply(x, weight, target, *options)
    return _fwd(x, weight, target, *options, False, False)[0]


def cross_entropy_ref(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    reduction: str = "mean",
    vocab_size: int | None = None,
) -> Tensor:
    """`cross_entropy` in plain torch, in the dtype of its inputs: the truth when they are fp64."""
    logits = x.reshape(-1, x.shape[-1]) @ weight[:vocab_size].T
    target = target.reshape(-1)
    kept = target != ignore_index
    lse = logits.logsumexp(-1)
    picked = logits.gather(1, torch.where(kept, target, 0).unsqueeze(1)).squeeze(1)
    loss = torch.where(kept, lse - picked + z_loss * lse.square(), 0)
    if reduction == "none":
        return loss
    return loss.sum() / kept.sum() if reduction == "mean" else loss.sum()


def _check_int(name, value):
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"cross_entropy: {name} must be an int, got {type(value).__name__}")


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, target, *options):
        recompute = options[2] == "none"
        needs = [wanted and not recompute for wanted in ctx.needs_input_grad[:2]]
        loss, dx, dweight = _fwd(x, weight, target, *options, *needs)
        ctx.options, ctx.recompute, ctx.dtype = options, recompute, x.dtype
        ctx.save_for_backward(*((x, weight, target) if recompute else (dx, dweight)))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        needs = ctx.needs_input_grad[:2]
        if ctx.recompute:
            x, weight, target = ctx.saved_tensors
            ignore_index, z_loss, _, vocab_size, chunk_tokens = ctx.options
            grads = _bwd(dout, x, weight, target, ignore_index, z_loss, vocab_size, chunk_tokens, *needs)
        else:
            grads = ctx.saved_tensors
            # The usual dout is 1 and reading it on a CPU is free: the gradients are then passed on as they are.
            if not (direct(dout) and dout.device.type == "cpu" and dout.item() == 1):
                grads = [g * dout for g in grads]
        dx, dweight = (g.to(ctx.dtype) if wanted else None for g, wanted in zip(grads, needs, strict=True))
        return dx, dweight, *[None] * 6


def _launch_fwd(x, weight, target, ignore_index, z_loss, reduction, vocab_size, chunk_tokens, need_dx, need_dweight):
    target = target.contiguous()
    _native.cross_entropy_check(x, weight, target, ignore_index, vocab_size)
    target = target.view(-1)
    dout = None
    if need_dx or need_dweight:
        dout = torch.ones(target.shape, dtype=torch.float32, device=x.device)
        if reduction == "mean":
            _native.cross_entropy_share(target, ignore_index, dout)
    losses, dx, dweight = _walk(
        x, weight, target, dout, ignore_index, z_loss, vocab_size, chunk_tokens, need_dx, need_dweight
    )
    if reduction == "none":
        return losses, dx, dweight
    loss = torch.empty((), dtype=torch.float32, device=x.device)
    _native.cross_entropy_total(losses, target, ignore_index, reduction == "mean", loss)
    return loss, dx, dweight


def _launch_bwd(dout, x, weight, target, ignore_index, z_loss, vocab_size, chunk_tokens, need_dx, need_dweight):
    target = target.contiguous()
    _native.cross_entropy_check(x, weight, target, ignore_index, vocab_size)
    _, dx, dweight = _walk(
        x,
        weight,
        target.view(-1),
        dout.contiguous(),
        ignore_index,
        z_loss,
        vocab_size,
        chunk_tokens,
        need_dx,
        need_dweight,
    )
    return dx, dweight


def _walk(x, weight, target, dout, ignore_index, z_loss, vocab_size, chunk_tokens, need_dx, need_dweight):
    """Losses (N,), and with `dout` (N,) the gradients asked for, chunk by chunk of tokens.

    dW's half-precision products are summed in fp32 and rounded once: the first chunk's lies in dweight itself, an fp32
    buffer is needed only from the third chunk on.
    """
    rows_of = _native.cross_entropy_rows
    if implementation("cross_entropy", x.device.type) == "triton":
        from cgpt_ext.triton.cross_entropy import cross_entropy_rows_triton as rows_of
    product = _product_gpu if on_gpu(x) else _product_cpu
    shape, width, padded = x.shape, x.shape[-1], weight.shape[0]
    x, weight = x.reshape(-1, width), weight[:vocab_size]
    if x.dtype == torch.float16:
        x, weight = x.float(), weight.float()
    rows, dtype = x.shape[0], x.dtype
    chunk = _chunk_size(rows, vocab_size, dtype.itemsize, chunk_tokens)
    chunks = -(-rows // chunk)

    losses = x.new_empty(rows, dtype=torch.float32)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_dx else x.new_empty(0)
    dweight = x.new_empty(padded, width) if need_dweight else x.new_empty(0)
    if need_dweight:
        dweight[vocab_size if chunks else 0 :].zero_()
        narrow = x.new_empty(vocab_size if on_gpu(x) and chunks > 1 and dtype != torch.float32 else 0, width)
        wide = x.new_empty(vocab_size if chunks > 2 and dtype != torch.float32 else 0, width, dtype=torch.float32)
    scratch = x.new_empty(min(chunk, rows), _row_stride(vocab_size, dtype.itemsize))

    for c in range(chunks):
        span = slice(c * chunk, min(rows, (c + 1) * chunk))
        tokens = x[span]
        logits = scratch[: tokens.shape[0], :vocab_size]
        product(tokens, weight.T, logits)
        factors = None if dout is None else dout[span]
        rows_of(logits, target[span], factors, losses[span], ignore_index, z_loss)
        if need_dx:
            product(logits, weight, dx[span])
        if need_dweight:
            out = dweight[:vocab_size]
            before = None if c == 0 else out if c == 1 or dtype == torch.float32 else wide
            after = out if c in (0, chunks - 1) or dtype == torch.float32 else wide
            product(logits.T, tokens, after, before, narrow)
    return losses, dx.view(shape) if need_dx else dx, dweight


def _product_cpu(a, b, out, before=None, _=None):
    """out = a b, or a b + before; out and before may be the same tensor, and fp32."""
    _native.linear(lines(a), lines(b.T), None, 1.0, before, out)


def _product_gpu(a, b, out, before=None, narrow=None):
    """The same, through `narrow` where torch's product cannot add to an fp32 tensor."""
    if before is None:
        torch.mm(a, b, out=out)
    elif a.dtype == torch.float32:
        out.addmm_(a, b)
    else:
        _native.cross_entropy_add(before, torch.mm(a, b, out=narrow), out)


def _chunk_size(rows, vocab_size, itemsize, chunk_tokens):
    """Tokens a chunk: within the budget, and all chunks about equal."""
    most = chunk_tokens or max(64, LOGITS_BYTES // (vocab_size * itemsize))
    chunks = max(1, -(-rows // most))
    return max(1, -(-rows // chunks))


def _row_stride(vocab_size, itemsize):
    """Logits' row stride: whole cache lines, but no multiple of a page, which would put a column into one cache set."""
    line = 64 // itemsize
    stride = -(-vocab_size // line) * line
    return stride + line if stride * itemsize % 4096 == 0 else stride


def _gradients_like(x, weight, need_dx, need_dweight, dtype):
    dx = x.new_empty(x.shape if need_dx else 0, dtype=dtype)
    return dx, weight.new_empty(weight.shape if need_dweight else 0, dtype=dtype)


def _fake_fwd(x, weight, target, ignore_index, z_loss, reduction, vocab_size, chunk_tokens, need_dx, need_dweight):
    loss = x.new_empty(target.numel() if reduction == "none" else (), dtype=torch.float32)
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    return loss, *_gradients_like(x, weight, need_dx, need_dweight, dtype)


def _fake_bwd(dout, x, weight, target, ignore_index, z_loss, vocab_size, chunk_tokens, need_dx, need_dweight):
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    return _gradients_like(x, weight, need_dx, need_dweight, dtype)


_fwd = register(
    "cross_entropy_fwd(Tensor x, Tensor weight, Tensor target, int ignore_index, float z_loss, str reduction,"
    " SymInt vocab_size, int? chunk_tokens, bool need_dx, bool need_dweight)"
    " -> (Tensor loss, Tensor dx, Tensor dweight)",
    _launch_fwd,
    _fake_fwd,
)
_bwd = register(
    "cross_entropy_bwd(Tensor dout, Tensor x, Tensor weight, Tensor target, int ignore_index, float z_loss,"
    " SymInt vocab_size, int? chunk_tokens, bool need_dx, bool need_dweight) -> (Tensor dx, Tensor dweight)",
    _launch_bwd,
    _fake_bwd,
)
