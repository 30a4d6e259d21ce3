"""One valid call of every native function, and what to put in an argument's place to break it."""

import torch

from cgpt_ext import _native


def layer_norm_fwd():
    x, w = torch.randn(6, 16), torch.randn(16)
    return [x, x.clone(), w, w.clone(), 1e-5, torch.empty(6, 16), torch.empty(6, 16), torch.empty(6), torch.empty(6)]


def layer_norm_bwd():
    x, w = torch.randn(6, 16), torch.randn(16)
    return [
        x,
        x.clone(),
        x.clone(),
        w,
        torch.zeros(6),
        torch.ones(6),
        torch.empty(6, 16),
        torch.empty(16),
        torch.empty(16),
        torch.empty(0, 2, 16),
    ]


def layer_norm_workspace():
    return [torch.randn(6, 16)]


def attention_fwd():
    q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 7, 2, 8)
    options = [3, 0, 0.5, torch.rand(2, 4), None, None, 0, 0]
    return [q, k, k.clone(), *options, torch.zeros_like(q), torch.zeros(2, 4, 5)]


def attention_check():
    return attention_fwd()


def attention_bwd():
    q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 7, 2, 8)
    inputs = [q, q.clone(), k, k.clone(), q.clone(), torch.zeros(2, 4, 5)]
    options = [3, 0, 0.5, torch.rand(4), None, None, 0, 0]
    return [*inputs, *options, torch.zeros(2, 4, 5), torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(k)]


def attention_fwd_varlen():
    q, k = torch.randn(5, 4, 8), torch.randn(7, 2, 8)
    seqlens = [torch.tensor([0, 2, 2, 5], dtype=torch.int32), torch.tensor([0, 0, 6, 7], dtype=torch.int32)]
    return [q, k, k.clone(), 3, 0, 0.5, torch.rand(3, 4), *seqlens, 3, 6, torch.zeros_like(q), torch.zeros(4, 5)]


def attention_bwd_varlen():
    q, k, v, *options, out, lse = attention_fwd_varlen()
    gradients = [torch.zeros_like(x) for x in (q, k, v)]
    return [q.clone(), q, k, v, out, lse, *options, torch.zeros(4, 5), *gradients]


def linear_check():
    return [torch.randn(3, 8), torch.randn(16, 8), torch.randn(16)]


def linear():
    a, b = torch.randn(3, 8).bfloat16(), torch.randn(16, 8).bfloat16()
    return [a, b, torch.randn(16).bfloat16(), 0.5, torch.randn(3, 16), torch.zeros(3, 16).bfloat16()]


def gelu_mlp_check():
    return [torch.randn(3, 8), torch.randn(16, 8), torch.randn(16), torch.randn(8, 16), torch.randn(8), "gelu"]


def gelu_mlp_fwd():
    return [torch.randn(3, 16), torch.empty(3, 8), "swiglu"]


def gelu_mlp_bwd():
    pre, dact = torch.randn(3, 16), torch.randn(3, 8)
    outputs = [torch.zeros(3, 8), torch.zeros(3, 16), torch.zeros(16), torch.zeros(1, 16)]
    return [pre, dact, *outputs, "swiglu"]


def gelu_mlp_bias_grad():
    return [torch.randn(5, 16), torch.zeros(16), torch.zeros(1, 16)]


def gelu_mlp_product():
    a, b, bias = torch.randn(3, 16).bfloat16(), torch.randn(24, 16).bfloat16(), torch.randn(24).bfloat16()
    return [a, b, bias, torch.zeros(3, 24).bfloat16(), "auto"]


def gelu_mlp_linear_fwd():
    x, w1, b1 = torch.randn(3, 16).bfloat16(), torch.randn(48, 16).bfloat16(), torch.randn(48).bfloat16()
    outputs = [torch.zeros(3, 48).bfloat16() for _ in range(2)]
    return [x, w1, b1, *outputs, "gelu", "128x128"]


def gelu_mlp_linear_bwd():
    dout, w2, pre = torch.randn(3, 16).bfloat16(), torch.randn(16, 24).bfloat16(), torch.randn(3, 24).bfloat16()
    sums = [torch.zeros(24).bfloat16(), torch.zeros(1, 24)]
    return [dout, w2, pre, torch.zeros_like(pre), torch.zeros(3, 24).bfloat16(), *sums, "gelu_tanh", "auto"]


def gelu_mlp_cublaslt_fwd():
    x, w1, b1 = torch.randn(3, 16).bfloat16(), torch.randn(24, 16).bfloat16(), torch.randn(24).bfloat16()
    outputs = [torch.zeros(3, 24).bfloat16() for _ in range(2)]
    return [x, w1, b1, *outputs, torch.zeros(64, dtype=torch.uint8), ""]


def gelu_mlp_cublaslt_bwd():
    dout, w2, pre = torch.randn(3, 16).bfloat16(), torch.randn(16, 24).bfloat16(), torch.randn(3, 24).bfloat16()
    return [dout, w2, pre, torch.zeros_like(pre), torch.zeros(24).bfloat16(), torch.zeros(64, dtype=torch.uint8), ""]


def embedding_fwd():
    return [torch.randint(0, 9, (2, 5)), torch.randn(9, 16), torch.randn(5, 16), torch.zeros(2, 5, 16)]


def embedding_bwd():
    return [
        torch.randn(2, 5, 16),
        torch.randint(0, 9, (2, 5)),
        torch.zeros(9, 16),
        torch.zeros(5, 16),
        -1,
        None,
        None,
        None,
    ]


def embedding_workspace():
    return [torch.randint(0, 9, (2, 5))]


def cross_entropy_check():
    return [torch.randn(5, 16), torch.randn(9, 16), torch.randint(0, 9, (5,)), -100, 9]


def cross_entropy_rows():
    return [torch.randn(5, 9), torch.randint(0, 9, (5,)), torch.ones(5), torch.zeros(5), -100, 0.0]


def cross_entropy_share():
    return [torch.randint(0, 9, (5,)), -100, torch.zeros(5)]


def cross_entropy_total():
    return [torch.randn(5), torch.randint(0, 9, (5,)), -100, True, torch.zeros(())]


def cross_entropy_add():
    return [torch.randn(5, 9), torch.randn(5, 9).bfloat16(), torch.zeros(5, 9)]


def adamw():
    shapes = [(3, 5), (8,)]
    high, grads = ([torch.randn(shape).bfloat16() for shape in shapes] for _ in range(2))
    states = [[torch.zeros(shape) for shape in shapes] for _ in range(2)]
    steps, lows = [torch.ones(()) for _ in shapes], [torch.zeros(shape, dtype=torch.int16) for shape in shapes]
    scalars = [0, 1e-3, torch.tensor(1e-3), 0.9, 0.95, 1e-8, 0.1]
    return [high, grads, *states, steps, *scalars, [], lows, torch.tensor(0.5), False, None, None, [0, 0, 7, 1024]]


def rotary():
    x = torch.randn(2, 5, 4, 8)
    return [x, torch.randn(6, 3), torch.randn(6, 3), torch.zeros_like(x), False, True]


def set_thread_count():
    return [_native.num_threads()]


def split_master():
    return [torch.randn(3, 5), torch.zeros(3, 5).bfloat16(), torch.zeros(3, 5, dtype=torch.int16)]


def join_master():
    return [torch.randn(3, 5).bfloat16(), torch.zeros(3, 5, dtype=torch.int16), torch.zeros(3, 5)]


def grad_norm():
    return [[torch.randn(3, 5), torch.randn(8).bfloat16()], torch.zeros(()), torch.zeros(2, dtype=torch.float64)]


def grad_norm_workspace():
    return [[torch.randn(3, 5), torch.randn(8).bfloat16()]]


def grad_square_sums():
    return [[torch.randn(3, 50), torch.randn(8).bfloat16()], torch.zeros(4, dtype=torch.float64), 64]


# (native function, what makes its arguments)
CALLS = [
    (f.__name__.removesuffix("_varlen"), f)
    for f in (
        adamw,
        attention_fwd,
        attention_fwd_varlen,
        attention_bwd,
        attention_bwd_varlen,
        attention_check,
        cross_entropy_add,
        cross_entropy_check,
        cross_entropy_rows,
        cross_entropy_share,
        cross_entropy_total,
        embedding_bwd,
        embedding_fwd,
        embedding_workspace,
        gelu_mlp_bias_grad,
        gelu_mlp_bwd,
        gelu_mlp_check,
        gelu_mlp_cublaslt_bwd,
        gelu_mlp_cublaslt_fwd,
        gelu_mlp_fwd,
        gelu_mlp_linear_bwd,
        gelu_mlp_linear_fwd,
        gelu_mlp_product,
        grad_norm,
        grad_norm_workspace,
        grad_square_sums,
        join_master,
        layer_norm_bwd,
        layer_norm_fwd,
        layer_norm_workspace,
        linear,
        linear_check,
        rotary,
        set_thread_count,
        split_master,
    )
]

# On a CPU their valid calls end at the device, behind every other check.
ONLY_ON_GPU = {
    "cross_entropy_add",
    "gelu_mlp_cublaslt_bwd",
    "gelu_mlp_cublaslt_fwd",
    "gelu_mlp_product",
}

NUMBERS = [-1, 0, 1, 3, 2**31, 2**62, -(2**63), 1e30, float("nan"), float("inf"), True]


def hostile(value):
    """Replacements for one argument, chosen by what it is."""
    yield from (None, "text", object(), [], [None], [3])
    if isinstance(value, torch.Tensor):
        yield from tensors(value)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield [*value[:i], *value[i + 1 :]]
            if isinstance(item, torch.Tensor):
                for bad in tensors(item):
                    yield [*value[:i], bad, *value[i + 1 :]]
    else:
        yield from NUMBERS


def tensors(t):
    """Tensors that are like `t` but for dtype, shape, strides, device or memory."""
    yield from NUMBERS
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int16, torch.bool, torch.complex64):
        if dtype != t.dtype:
            yield t.to(dtype)
    yield t.new_empty(0)
    yield t.new_zeros(())
    yield t.unsqueeze(0)
    yield t.reshape(-1)
    yield t.to("meta")
    yield torch.zeros(t.shape).to_sparse()
    yield t.new_zeros((1,) * 12)
    if t.dim() and t.numel():
        yield t.new_zeros(1).expand(t.shape)  # every stride 0
        yield torch.as_strided(t.new_zeros(4 * t.numel()), t.shape, [2 * s for s in t.stride()])
        yield t.flip(0)
        for d in range(t.dim()):
            yield t.narrow(d, 0, t.shape[d] - 1)
            yield torch.cat([t, t], d)
            yield t.narrow(d, 0, 0)
            yield t.transpose(0, d).contiguous().transpose(0, d)
    if t.dtype in (torch.int32, torch.int64):
        for bad in (-1, -101, 2**31 - 1, 2**31, 2**62, -(2**31), -(2**63)):
            if torch.iinfo(t.dtype).min <= bad <= torch.iinfo(t.dtype).max:
                yield torch.full_like(t, bad)
                if t.dim() == 1 and len(t) > 1:
                    for i in range(len(t)):
                        yield torch.cat([t[:i], t.new_tensor([bad]), t[i + 1 :]])
