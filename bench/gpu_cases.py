"""What bench/gpu.py times: every op and every implementation of it, against every rival that is installed.

A part (an op) is a generator of cases, the ones that matter most first, so that a part out of time has told the most.
A case's rivals come first: their first result is what the others' are held against. Data are random. `tiny` sizes are
for dry runs on a CPU, where torch.compile only traces.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import cgpt_ext
from cgpt.model.gpt import GPT
from cgpt.model.presets import PRESETS
from cgpt_ext import dispatch

OURS = "cgpt_ext "  # in front of an implementation's name
BF16 = torch.bfloat16

FAMILY = ("111M", "1.3B", "13B", "2.7B", "590M", "256M", "6.7B")


@dataclass
class Case:
    """One comparison. flops, bytes: of one call, what must be computed and moved at least."""

    group: str
    name: str
    contenders: dict[str, Callable[[], Callable]]
    flops: float = 0.0
    bytes: float = 0.0


def ours(op: str, device: str, build: Callable[[], Callable]) -> dict[str, Callable[[], Callable]]:
    """`build` once for each implementation of `op`, made and called with that one in force."""

    def chosen(name):
        def make():
            with dispatch.use(**{op: name}):
                call = build()

            def run():
                with dispatch.use(**{op: name}):
                    return call()

            return run

        return make

    return {OURS + name: chosen(name) for name in dispatch.implementations(op, device)}


def forward(function: Callable) -> Callable[[], Callable]:
    return lambda: function


def backward(function: Callable, leaves, dout) -> Callable[[], Callable]:
    """Builds the graph once and times its gradients."""

    def build():
        out = function()
        return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)

    return build


def both(function: Callable, leaves) -> Callable[[], Callable]:
    """Forward and backward of a scalar."""
    return lambda: lambda: torch.autograd.grad(function(), leaves)


def compiled(function: Callable, device: str) -> Callable:
    torch._dynamo.config.recompile_limit = 64  # each shape is a compilation of its own
    torch._functorch.config.donated_buffer = False  # a graph is gone through more than once
    return torch.compile(function, dynamic=False, backend="inductor" if device == "cuda" else "eager")


def randn(*shape, device, dtype=BF16, grad=True):
    return torch.randn(*shape, device=device, dtype=dtype).requires_grad_(grad)


def attention(device: str, tiny: bool) -> Iterator[Case]:
    """Causal, 16,384 tokens of width 2,048 whatever the length: the convention of FlashAttention's papers."""
    tokens, width = (32, 128) if tiny else (16384, 2048)
    for T in (16,) if tiny else (2048, 1024, 8192, 512, 4096, 16384):
        for D in (64, 128):
            yield from attention_at(device, tokens // T, T, width // D, D)


def attention_at(device: str, B: int, T: int, H: int, D: int) -> Iterator[Case]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = leaves = [randn(B, T, H, D, device=device) for _ in range(3)]
    dout = randn(B, T, H, D, device=device, grad=False)

    def sdpa(backend):
        with sdpa_kernel(backend):
            heads = (x.transpose(1, 2) for x in leaves)
            return F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)

    def flash_attn():
        from flash_attn import flash_attn_func

        return flash_attn_func(q, k, v, causal=True)

    def flash_attn_3():
        from flash_attn_interface import flash_attn_func

        out = flash_attn_func(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out

    rivals = {"sdpa flash": lambda: sdpa(SDPBackend.FLASH_ATTENTION)}
    if device == "cuda":
        rivals["sdpa cudnn"] = lambda: sdpa(SDPBackend.CUDNN_ATTENTION)
        rivals |= {"flash-attn": flash_attn, "flash-attn 3": flash_attn_3}
    if T in (16, 2048, 8192):  # each length and direction is half a minute of compilation
        rivals["flex"] = flex(leaves, T)
    flops = 2 * B * H * T * T * D  # half of the square

    def mine():
        return cgpt_ext.attention(q, k, v, causal=True)

    yield from directions("attention", f"T{T} d{D}", device, rivals, mine, leaves, dout, flops=(flops, 2.5 * flops))


def flex(leaves, T: int) -> Callable:
    """FlexAttention, compiled by its first call."""
    made = []

    def run():
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        if not made:
            device = leaves[0].device.type
            mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=device)
            made.extend((compiled(flex_attention, device), mask))
        return made[0](*(x.transpose(1, 2) for x in leaves), block_mask=made[1]).transpose(1, 2)

    return run


def gelu_mlp(device: str, tiny: bool) -> Iterator[Case]:
    """8,192 tokens at the widths of the family, by erf, and forward by tanh beside cuBLASLt's own epilogue."""
    for model in FAMILY[: 1 if tiny else None]:
        shape = PRESETS[model].config
        sizes = (32, 16, 64) if tiny else (8192, shape.d_model, shape.d_ff)
        yield from gelu_mlp_at(device, model, *sizes)


def gelu_mlp_at(device: str, model: str, N: int, D: int, H: int) -> Iterator[Case]:
    x, w1, b1, w2, b2 = leaves = [randn(*s, device=device) for s in ((N, D), (H, D), (H,), (D, H), (D,))]
    with torch.no_grad():  # activations of order one, as in a model
        w1.mul_(D**-0.5)
        w2.mul_(H**-0.5)
    dout = randn(N, D, device=device, grad=False)

    def torchs(approximate="none"):
        return F.linear(F.gelu(F.linear(x, w1, b1), approximate=approximate), w2, b2)

    def epilogue():
        with torch.no_grad():
            return F.linear(torch._addmm_activation(b1, x, w1.t(), use_gelu=True), w2, b2)

    traced, flops = compiled(torchs, device), 4 * N * D * H
    rivals = {"torch": torchs, "torch.compile": traced}

    def mine():
        return cgpt_ext.gelu_mlp(*leaves)

    yield from directions("gelu_mlp", model, device, rivals, mine, leaves, dout, flops=(flops, 2 * flops))
    contenders = {"torch": lambda: torchs("tanh"), "torch.compile": lambda: traced("tanh")}
    if device == "cuda":
        contenders["cublaslt"] = epilogue
    contenders = {name: forward(call) for name, call in contenders.items()}
    contenders |= ours("gelu_mlp", device, forward(lambda: cgpt_ext.gelu_mlp(*leaves, "gelu_tanh")))
    yield Case("gelu_mlp forward, tanh", model, contenders, flops=flops)


def layer_norm(device: str, tiny: bool) -> Iterator[Case]:
    for D in (16,) if tiny else (2048, 768, 5120, 1088):
        yield from layer_norm_at(device, 8 if tiny else 16384, D)


def on_a_gpu(device: str, **rivals) -> dict:
    """`rivals`, which are Triton's, where there is a GPU; a dry run has none."""
    return rivals if device == "cuda" else {}


def layer_norm_at(device: str, N: int, D: int) -> Iterator[Case]:
    x, residual, weight, bias = (randn(*s, device=device) for s in ((N, D), (N, D), (D,), (D,)))
    dout, dh = (randn(N, D, device=device, grad=False) for _ in range(2))

    def torchs():
        return F.layer_norm(x, (D,), weight, bias)

    def torchs_added():
        h = x + residual
        return F.layer_norm(h, (D,), weight, bias), h

    def liger():
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        return LigerLayerNormFunction.apply(x, weight, bias, 1e-5)

    row = N * D * x.element_size()
    rivals = {"torch": torchs, "torch.compile": compiled(torchs, device), **on_a_gpu(device, liger=liger)}

    def mine():
        return cgpt_ext.layer_norm(x, weight, bias)

    leaves = (x, weight, bias)
    yield from directions("layer_norm", f"{N}x{D}", device, rivals, mine, leaves, dout, bytes=(2 * row, 3 * row))
    rivals = {"torch": torchs_added, "torch.compile": compiled(torchs_added, device)}

    def mine_added():
        return cgpt_ext.layer_norm(x, weight, bias, residual=residual)

    leaves, size = (x, residual, weight, bias), f"{N}x{D} + residual"
    yield from directions("layer_norm", size, device, rivals, mine_added, leaves, (dout, dh), bytes=(4 * row, 4 * row))


def directions(op, size, device, rivals, mine, leaves, dout, flops=(0, 0), bytes=(0, 0)) -> Iterator[Case]:
    """An op's forward case, with what training keeps, and its backward case; flops, bytes: of the one and the other."""
    fwd = {name: forward(call) for name, call in rivals.items()} | ours(op, device, forward(mine))
    yield Case(f"{op} forward", size, fwd, flops[0], bytes[0])
    bwd = {name: backward(call, leaves, dout) for name, call in rivals.items()}
    yield Case(f"{op} backward", size, bwd | ours(op, device, backward(mine, leaves, dout)), flops[1], bytes[1])


def cross_entropy(device: str, tiny: bool) -> Iterator[Case]:
    """The tied head and its loss, forward and backward together: three products of N x D x V."""
    for N, D, V in ((8, 16, 50),) if tiny else ((8192, 2048, 50257), (8192, 768, 50257)):
        yield cross_entropy_at(device, N, D, V)


def cross_entropy_at(device: str, N: int, D: int, V: int) -> Case:
    x, weight = randn(N, D, device=device), randn(V, D, device=device)
    with torch.no_grad():
        weight.mul_(0.02)
    target = torch.randint(V, (N,), device=device)

    def torchs():
        return F.cross_entropy(F.linear(x, weight).float(), target)

    def liger():
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss()(weight, x, target)

    rivals = {"torch": torchs, "torch.compile": compiled(torchs, device), **on_a_gpu(device, liger=liger)}
    contenders = {name: both(call, (x, weight)) for name, call in rivals.items()}
    contenders |= ours("cross_entropy", device, both(lambda: cgpt_ext.cross_entropy(x, weight, target), (x, weight)))
    return Case("cross_entropy forward+backward", f"{N}x{D}x{V}", contenders, flops=6 * N * D * V)


def parameters_of(model: str, device: str, dtype) -> list[torch.Tensor]:
    """Random tensors in the shapes of a model's parameters."""
    with torch.device("meta"):
        shapes = [p.shape for p in GPT(PRESETS[model].config).parameters()]
    return [torch.randn(shape, device=device).mul_(0.02).to(dtype) for shape in shapes]


def adamw(device: str, tiny: bool) -> Iterator[Case]:
    """fp32 parameters, and bf16 ones with their fp32 masters, which torch keeps as fp32 parameters and a copy.

    The moments are fp32, or bf16 in the last case, where torch's stay fp32.
    """
    for split, half in ((False, False), (True, False), (True, True)):
        yield adamw_at(device, "tiny" if tiny else "590M", split, half)


def adamw_at(device: str, model: str, split: bool, half: bool) -> Case:
    masters = parameters_of(model, device, torch.float32)
    grads = parameters_of(model, device, BF16 if split else torch.float32)
    hyper = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}

    def torchs():
        params = [p.clone() for p in masters]
        for p, g in zip(params, grads, strict=True):
            p.grad = g.float()
        lows = [p.to(BF16) for p in params] if split else []
        optimizer = torch.optim.AdamW(params, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

        def step():
            if split:
                torch._foreach_copy_([p.grad for p in params], grads)
            optimizer.step()
            if split:
                torch._foreach_copy_(lows, params)

        return step

    def mine():
        params, rest = [p.clone() for p in masters], {}
        if split:
            params, lows = (list(half) for half in zip(*map(cgpt_ext.split_master, masters), strict=True))
            rest = {"lows": lows}
        if half:
            rest["stochastic_rounding_seed"] = 1
        kind = BF16 if half else torch.float32
        moments = [[torch.zeros_like(p, dtype=kind) for p in masters] for _ in range(2)]
        step = torch.ones((), device=device)
        return lambda: cgpt_ext.adamw_(params, grads, *moments, step, **hyper, **rest)

    # The gradient is read; the weight and two moments are read and written.
    moved = ((26 if split else 28) - (8 if half else 0)) * sum(p.numel() for p in masters)
    name = f"{model} {'bf16, split master' if split else 'fp32'}{', bf16 moments' if half else ''}"
    contenders = {"torch fused": torchs} | ours("adamw", device, mine)
    if half:
        contenders.pop(OURS + "triton", None)  # it takes fp32 moments alone
    return Case("adamw", name, contenders, bytes=moved)


def grad_norm(device: str, tiny: bool) -> Iterator[Case]:
    for dtype, kind in ((BF16, "bf16"), (torch.float32, "fp32")):
        yield grad_norm_at(device, "tiny" if tiny else "590M", dtype, kind)


def grad_norm_at(device: str, model: str, dtype: torch.dtype, kind: str) -> Case:
    grads = parameters_of(model, device, dtype)
    contenders = {"torch foreach": forward(lambda: torch.nn.utils.get_total_norm(grads, foreach=True))}
    contenders |= ours("grad_norm", device, forward(lambda: cgpt_ext.grad_norm(grads)))
    return Case("grad_norm", f"{model} {kind}", contenders, bytes=sum(g.nbytes for g in grads))


def embedding(device: str, tiny: bool) -> Iterator[Case]:
    B, T, V, D = (2, 8, 50, 16) if tiny else (8, 2048, 50257, 2048)
    wte, wpe = randn(V, D, device=device), randn(T, D, device=device)
    ids = torch.randint(V, (B, T), device=device)
    dout = randn(B, T, D, device=device, grad=False)

    def torchs():
        return F.embedding(ids, wte) + wpe

    def mine():
        return cgpt_ext.embedding(ids, wte, wpe)

    rivals = {"torch": torchs, "torch.compile": compiled(torchs, device)}
    row = B * T * D * wte.element_size()
    moved = (2 * row + wpe.nbytes, row + wte.nbytes + wpe.nbytes)
    size = f"{B}x{T}x{D} of {V}"
    yield from directions("embedding", size, device, rivals, mine, (wte, wpe), dout, bytes=moved)


def rotary(device: str, tiny: bool) -> Iterator[Case]:
    """Both halves of a head turned, as Llama has them."""
    B, T, H, D = (2, 8, 2, 16) if tiny else (8, 2048, 16, 128)
    x, dout = randn(B, T, H, D, device=device), randn(B, T, H, D, device=device, grad=False)
    angles = torch.arange(T, device=device)[:, None] * 10_000.0 ** -torch.linspace(0, 1, D // 2, device=device)
    cos, sin = angles.cos(), angles.sin()

    def torchs():
        return cgpt_ext.rotary_ref(x, cos, sin)

    def flash_attn():
        from flash_attn.layers.rotary import apply_rotary_emb

        return apply_rotary_emb(x, cos.to(x.dtype), sin.to(x.dtype))

    def mine():
        return cgpt_ext.rotary(x, cos, sin)

    rivals = {"torch": torchs, "torch.compile": compiled(torchs, device), "flash-attn": flash_attn}
    yield from directions("rotary", f"{B}x{T}x{H}x{D}", device, rivals, mine, (x,), dout, bytes=(2 * x.nbytes,) * 2)


PARTS = {
    "layer_norm": layer_norm,
    "attention": attention,
    "adamw": adamw,
    "cross_entropy": cross_entropy,
    "gelu_mlp": gelu_mlp,
    "grad_norm": grad_norm,
    "embedding": embedding,
    "rotary": rotary,
}
