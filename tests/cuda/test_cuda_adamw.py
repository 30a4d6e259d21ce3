"""The CUDA kernel without a GPU: its text compiled as C++ and run thread by thread, against the CPU kernel's bits.

On a machine with a GPU the kernel itself is compared, too.
"""

import ctypes
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cgpt_ext import _native, adamw_, split_master

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
HYPER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int64: 6}
KINDS = [
    (torch.float32, "plain"),
    (torch.bfloat16, "plain"),
    (torch.float16, "plain"),
    (torch.bfloat16, "master"),
    (torch.float16, "master"),
    (torch.bfloat16, "split"),
]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if not compiler:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("adamw") / "adamw_host.so"
    flags = "-std=c++17 -O1 -ffp-contract=off -fno-math-errno -fPIC -shared -DCGPT_CUDA -Wno-unknown-pragmas".split()
    command = [
        *shlex.split(compiler),
        *flags,
        f"-I{HERE / 'standin'}",
        f"-I{CSRC}",
        HERE / "adamw_host.cpp",
        "-o",
        library,
    ]
    subprocess.run(command, check=True)
    return ctypes.CDLL(library).adamw_host


def make(shapes, dtype, kept, grad_dtype, offset=0):
    torch.manual_seed(0)

    def shifted(x):  # at an address that is no multiple of 16
        return torch.cat([x.new_zeros(offset), x.reshape(-1)])[offset:]

    weights = [torch.randn(n) for n in shapes]
    state = SimpleNamespace(params=[shifted(w.to(dtype)) for w in weights], rests=[], kept=kept)
    if kept == "master":
        state.rests = [shifted(w) for w in weights]
    if kept == "split":
        state.params, state.rests = (
            [shifted(x) for x in half] for half in zip(*map(split_master, weights), strict=True)
        )
    state.grads = [shifted(torch.randn(n).to(grad_dtype)) for n in shapes]
    state.grads[0][0] = float("nan")
    state.exp_avgs, state.exp_avg_sqs = ([shifted(torch.zeros(n)) for n in shapes] for _ in range(2))
    return state


def by_cpu(s, step, **options):
    rest = {} if s.kept == "plain" else {"masters" if s.kept == "master" else "lows": s.rests}
    adamw_(s.params, s.grads, s.exp_avgs, s.exp_avg_sqs, step, **HYPER, **rest, **options)


def by_host(host, s, step, grad_scale=None, maximize=False):
    rows = []
    for i, p in enumerate(s.params):
        own = step[i] if isinstance(step, list) else None
        tensors = [p, s.grads[i], s.exp_avgs[i], s.exp_avg_sqs[i], s.rests[i] if s.rests else None, own]
        rows += [0 if t is None else t.data_ptr() for t in tensors]
        rows += [p.numel(), DTYPES[p.dtype], DTYPES[s.grads[i].dtype]]
    return host(
        (ctypes.c_int64 * len(rows))(*rows),
        ctypes.c_int64(len(s.params)),
        ["plain", "master", "split"].index(s.kept),
        (ctypes.c_double * 5)(*(HYPER[name] for name in ("lr", "beta1", "beta2", "eps", "weight_decay"))),
        ctypes.c_int64(step if isinstance(step, int) else 0),
        DTYPES[step[0].dtype] if isinstance(step, list) else 0,
        None,
        None if grad_scale is None else ctypes.c_void_p(grad_scale.data_ptr()),
        int(maximize),
    )


def assert_same_bits(a, b):
    for name in ("params", "exp_avgs", "exp_avg_sqs", "rests"):
        for x, y in zip(getattr(a, name), getattr(b, name), strict=True):
            x, y = x.cpu(), y.cpu()
            assert torch.equal(x.isnan(), y.isnan())
            assert torch.equal(x[~x.isnan()], y[~y.isnan()])


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dtype", "kept"), KINDS)
def test_bits_are_the_cpus(host, dtype, kept, grad_dtype):
    args = ([1, 7, 8, 16385, 130], dtype, kept, grad_dtype)
    ours, cpus = make(*args), make(*args)
    for step in (1, 2, 3):
        assert by_host(host, ours, step) == 1
        by_cpu(cpus, step)
    assert_same_bits(ours, cpus)


def test_unaligned_tensors_steps_of_their_own_and_a_scale(host):
    args = ([5, 33, 4001], torch.float32, "plain", torch.float32, 1)
    ours, cpus = make(*args), make(*args)
    assert ours.params[0].data_ptr() % 16 == 4
    steps = [torch.tensor(t) for t in (1.0, 0.0, 4000.0)]
    options = {"grad_scale": torch.tensor(0.37), "maximize": True}
    by_host(host, ours, steps, **options)
    by_cpu(cpus, steps, **options)
    assert_same_bits(ours, cpus)


def test_mixed_gradients_and_many_tensors(host):
    """One launch for each gradient dtype, and one for every 448 tensors."""
    args = ([3] * 500, torch.bfloat16, "split", torch.bfloat16)
    ours, cpus = make(*args), make(*args)
    for s in (ours, cpus):
        s.grads[1::2] = [g.float() for g in s.grads[1::2]]
    assert by_host(host, ours, 2) == 2
    by_cpu(cpus, 2)
    assert_same_bits(ours, cpus)
    args = ([3] * 500, torch.float32, "plain", torch.float32)
    ours, cpus = make(*args), make(*args)
    assert by_host(host, ours, 2) == 2
    by_cpu(cpus, 2)
    assert_same_bits(ours, cpus)


class OnGPU(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    device = SimpleNamespace(type="cuda", index=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a driver")
def test_without_a_driver_a_launch_says_so():
    x = [[torch.zeros(8).as_subclass(OnGPU)] for _ in range(4)]
    scalars = (1, 1e-3, None, 0.9, 0.95, 1e-8, 0.1)
    _native.use_python_attributes(True)
    wanted = (RuntimeError, r"^adamw: CUDA error 35 \(CUDA driver version is insufficient for CUDA runtime version\)$")
    if not _native.has_cuda_kernels:
        wanted = (ValueError, "^adamw: no kernel in this build for device cuda:0$")
    try:
        with pytest.raises(wanted[0], match=wanted[1]):
            _native.adamw(*x, [], *scalars, [], [], None, False)
    finally:
        _native.use_python_attributes(False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "kept"), KINDS)
def test_bits_are_the_cpus_on_a_gpu(dtype, kept):
    args = ([1, 7, 8, 16385, 130], dtype, kept, torch.bfloat16)
    ours, cpus = make(*args), make(*args)
    for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "rests"):
        setattr(ours, name, [x.cuda() for x in getattr(ours, name)])
    step = torch.ones((), device="cuda")
    by_cpu(ours, step)  # warm-up outside the graph
    by_cpu(cpus, 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        by_cpu(ours, step)
    for t in (2, 3):
        step.fill_(t)
        graph.replay()
        by_cpu(cpus, t)
    assert_same_bits(ours, cpus)
