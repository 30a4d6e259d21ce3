"""Threads: they change no bit of any op, nor does who else computes; kernels let other Python threads run.

Shapes are such that every kernel cuts its work into several tasks, of unequal size and not a multiple of the threads.
"""

import re
import threading
import time
from pathlib import Path

import pytest
import torch

from cgpt.model.init import init_parameter
from cgpt.model.presets import PRESETS
from cgpt.stream.build import build
from cgpt.stream.executor import Executor
from cgpt.stream.format import Format
from cgpt.stream.optimizer import AdamW
from cgpt_ext import (
    _native,
    adamw_,
    attention,
    attention_varlen,
    cross_entropy,
    dispatch,
    embedding,
    gelu_mlp,
    grad_norm,
    grad_square_sums,
    join_master,
    layer_norm,
    linear,
    rotary,
    split_master,
)
from numerics import run

HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def own_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def adamw(dtype, master=False, **options):
    sizes = 70000, 300
    params, grads = ([torch.randn(n).to(dtype) for n in sizes] for _ in range(2))
    moments = [[torch.rand(n) for n in sizes] for _ in range(2)]
    masters = [p.float() for p in params] if master else None
    adamw_(params, grads, *moments, 3, **HYPER, masters=masters, **options)
    return [*params, *moments[0], *moments[1], *(masters or [])]


def adamw_split(dtype):
    high, low = split_master(torch.randn(150000))
    moments = torch.zeros(150000), torch.zeros(150000)
    adamw_([high], [torch.randn(150000).to(dtype)], *([m] for m in moments), 1, **HYPER, lows=[low])
    return [high, low, *moments, join_master(high, low)]


def heads(n_key, time, dtype, causal=True):
    q, k, v = (torch.randn(1, time, n, 16).to(dtype) for n in (6, n_key, n_key))
    return run(lambda q, k, v: attention(q, k, v, causal), q, k, v, dout=torch.randn_like(q))


def sequences(dtype):
    ends = torch.tensor([0, 130, 137, 400], dtype=torch.int32)
    q, k, v = (torch.randn(400, n, 16).to(dtype) for n in (4, 2, 2))
    op = lambda q, k, v: attention_varlen(q, k, v, ends, ends, 263, 263, True, window_size=(100, 0))  # noqa: E731
    return run(op, q, k, v, dout=torch.randn_like(q))


def positions(dtype, interleaved):
    cos, sin = torch.randn(2, 300, 8).unbind()
    x = torch.randn(2, 300, 3, 24).to(dtype)
    return run(lambda x: rotary(x, cos, sin, interleaved), x, dout=torch.randn_like(x))


def mlp(dtype, activation):
    wide = 2 * 96 if activation == "swiglu" else 96
    shapes = (300, 40), (wide, 40), (wide,), (40, 96), (40,)
    x, *weights = (torch.randn(shape).mul(0.3).to(dtype) for shape in shapes)
    return run(lambda *inputs: gelu_mlp(*inputs, activation), x, *weights, dout=torch.randn_like(x))


def product(dtype):
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((300, 96), (200, 96), (200,)))
    return run(lambda *inputs: linear(*inputs, 0.5), x, weight, bias, dout=torch.randn(300, 200))


def loss(dtype):
    x, weight = torch.randn(300, 32).to(dtype), torch.randn(5000, 32).to(dtype)
    target = torch.randint(5000, (300,))
    op = lambda x, w: cross_entropy(x, w, target, z_loss=1e-4, chunk_tokens=128)  # noqa: E731
    return run(op, x, weight, dout=torch.tensor(1.0))


def tokens(dtype):
    ids, wte, wpe = torch.randint(50, (3, 300)), torch.randn(50, 96).to(dtype), torch.randn(300, 96).to(dtype)
    return run(lambda a, b: embedding(ids, a, b), wte, wpe, dout=torch.randn(3, 300, 96))


def norm(dtype):
    x, residual = torch.randn(2, 300, 768).to(dtype).unbind()
    weight, bias = torch.randn(2, 768).to(dtype).unbind()
    dout = torch.randn(300, 768), torch.randn(300, 768)
    return run(lambda x, w, b, r: layer_norm(x, w, b, 1e-5, r), x, weight, bias, residual, dout=dout)


def lengths(dtype):
    grads = [torch.randn(90000).to(dtype), torch.randn(77, 3).to(dtype)]
    return [grad_norm(grads), grad_square_sums(grads)]


# By op of dispatch.TABLE: what returns its values and gradients in a dtype.
OPS = {
    "adamw": (
        adamw,
        adamw_split,
        lambda dtype: adamw(torch.bfloat16, master=True),
        lambda dtype: adamw(torch.bfloat16, stochastic_rounding_seed=5),
    ),
    "grad_norm": (lengths,),
    "attention": (
        lambda dtype: heads(6, 330, dtype),
        lambda dtype: heads(2, 330, dtype),
        lambda dtype: heads(1, 330, dtype),
        lambda dtype: heads(3, 100, dtype, causal=False),
        lambda dtype: heads(2, 3, dtype),
        sequences,
    ),
    "embedding": (tokens,),
    "gelu_mlp": (lambda dtype: mlp(dtype, "gelu"), lambda dtype: mlp(dtype, "swiglu")),
    "cross_entropy": (loss,),
    "layer_norm": (norm,),
    "rotary": (lambda dtype: positions(dtype, False), lambda dtype: positions(dtype, True)),
    "linear": (product,),
}


def on_threads(count, work, *inputs):
    """The bytes of what `work` returns, on so many threads, the same random numbers drawn each time."""
    torch.set_num_threads(count)
    torch.manual_seed(1)
    return [x.detach().contiguous().view(-1).view(torch.uint8) for x in work(*inputs)]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_every_op_is_here():
    assert set(dispatch.TABLE) <= set(OPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("op", OPS)
def test_bits_do_not_depend_on_the_number_of_threads(isa, op, dtype):
    for place, work in enumerate(OPS[op]):
        one = on_threads(1, work, dtype)
        assert any(x.any() for x in one)
        for count in (2, 3, 11):  # eleven cut attention finest
            assert same(on_threads(count, work, dtype), one), (op, place, count)


def test_two_python_threads_at_once():
    """Each has a team of its own, and scratch memory of its own."""
    torch.set_num_threads(2)
    q, k, v, dout = (torch.randn(1, 330, n, 16).bfloat16() for n in (6, 2, 2, 6))
    x, weight, bias, dy = (torch.randn(shape) for shape in ((300, 768), (768,), (768,), (300, 768)))
    works = [
        lambda: run(lambda q, k, v: attention(q, k, v, True), q, k, v, dout=dout),
        lambda: run(layer_norm, x, weight, bias, dout=dy),
    ]
    wanted = [work() for work in works]
    wrong = []

    def repeat(work, want):
        _native.set_thread_count(2)
        wrong.extend(1 for _ in range(10) if not all(torch.equal(a, b) for a, b in zip(work(), want, strict=True)))

    threads = [threading.Thread(target=repeat, args=pair) for pair in zip(works, wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_is_the_same_on_any_number_of_threads(precision):
    def train():
        shape = PRESETS["tiny"].config
        _, store = build(shape, Format(precision), "cpu")
        store.initialise(lambda name, tensor: init_parameter(name, tensor, shape, seed=0))
        executor, optimizer = Executor(store), AdamW(store)
        losses = []
        for _ in range(3):
            ids = torch.randint(shape.vocab_size, (1, shape.seq_len + 1))
            gradients = executor.gradients([[(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())]])
            optimizer.step(gradients, 1e-3)
            losses.append(gradients.loss)
        return [torch.tensor(losses, dtype=torch.float64), *(store.read(name).clone() for name in store.names())]

    one = on_threads(1, train)
    for count in (2, 3):
        assert same(on_threads(count, train), one), count


def test_a_kernel_lets_python_go_on():
    torch.set_num_threads(1)
    q = torch.randn(1, 2048, 4, 64)
    out, lse = torch.empty_like(q), torch.empty(1, 4, 2048)
    ticks, over = [], threading.Event()

    def tick():
        while not over.wait(0.001):
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        while not ticks:
            time.sleep(0.001)
        with dispatch.cpu_isa("scalar"):
            begin = time.perf_counter()
            _native.attention_fwd(q, q, q, -1, -1, 0.125, None, None, None, 2048, 2048, out, lse)
            end = time.perf_counter()
    finally:
        over.set()
        thread.join()
    assert end - begin > 0.05
    assert sum(begin + 0.005 < at < end - 0.005 for at in ticks) >= 3


def test_every_kernel_is_bound_without_the_gil():
    source = Path(__file__).parents[2] / "csrc/module.cpp"
    bound = re.findall(r"m\.def\(\"(\w+)\", ([^;]*?)\);", source.read_text(), re.DOTALL)
    assert len(bound) > 30
    holding = {name for name, rest in bound if not rest.endswith(", nogil")}
    quick = {"cpu_isa", "cpu_isas", "set_cpu_isa", "num_threads", "set_thread_count", "use_python_attributes"}
    assert holding <= quick
