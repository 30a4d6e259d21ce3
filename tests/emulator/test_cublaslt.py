"""The way through cuBLASLt, against a stand-in for its library that computes what NVIDIA's manual says."""

import ctypes
import os
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch

from cgpt_ext import gelu_mlp, gelu_mlp_ref
from cgpt_ext.dispatch import use
from emulator import emulated
from numerics import compare, run
from test_gelu_mlp import make, torch_gelu_mlp  # tests/ops/test_gelu_mlp.py


@pytest.fixture(autouse=True)
def on_gpu():
    with mock.patch("cgpt_ext.ops.gelu_mlp.on_gpu", return_value=True):
        yield


@pytest.fixture(scope="module")
def standin(tmp_path_factory):
    path = tmp_path_factory.mktemp("cublaslt") / "standin.so"
    source = Path(__file__).parent / "standin" / "cublaslt.cpp"
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, "-std=c++17", "-O1", "-shared", "-fPIC", source, "-o", path], check=True)
    return path


def test_without_the_library_it_says_so(tmp_path):
    inputs, _ = make((4, 16), 24, torch.bfloat16)
    missing = str(tmp_path / "libcublasLt.so.13")
    for path, said in (("", "none is installed beside it"), (missing, "did not open")):
        with (
            emulated(),
            use(gelu_mlp="cublaslt"),
            mock.patch("cgpt_ext.ops.gelu_mlp._cublaslt_library", return_value=path),
            pytest.raises(RuntimeError, match=f"gelu_mlp: cublaslt needs libcublasLt.so of CUDA 11, 12 or 13.*{said}"),
        ):
            gelu_mlp(*inputs, "gelu_tanh")


@pytest.fixture
def served(standin):
    path = mock.patch("cgpt_ext.ops.gelu_mlp._cublaslt_library", return_value=str(standin))
    with emulated(), use(gelu_mlp="cublaslt"), path:
        yield ctypes.CDLL(str(standin))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "hidden"), [((1, 8), 8), ((2, 33, 24), 72), ((0, 16), 24)])
def test_values_and_gradients(served, shape, hidden, bias, transposed):
    (x, w1, b1, w2, b2), dy = make(shape, hidden, torch.bfloat16)
    if transposed:
        w1, w2 = w1.t().contiguous().t(), w2.t().contiguous().t()
    inputs = (x, w1, b1 if bias else None, w2, b2, "gelu_tanh")
    compare(gelu_mlp, gelu_mlp_ref, torch_gelu_mlp, inputs, dy)
    y = run(gelu_mlp, *inputs, dout=dy)[0]
    with torch.no_grad():
        assert torch.equal(gelu_mlp(*inputs), y)


def test_a_shape_is_asked_about_once(served):
    inputs, dy = make((5, 16), 40, torch.bfloat16)
    run(gelu_mlp, *inputs, "gelu_tanh", dout=dy)
    asked = served.standin_asked()
    first = run(gelu_mlp, *inputs, "gelu_tanh", dout=dy)
    assert served.standin_asked() == asked
    assert served.standin_created() == 1
    again = [t.clone() for t in inputs]  # the same shape elsewhere: pointers are the call's own
    assert all(
        torch.equal(a, b) for a, b in zip(first, run(gelu_mlp, *again, "gelu_tanh", dout=dy.clone()), strict=True)
    )


def test_what_it_does_not_serve_is_named(served):
    inputs, _ = make((4, 16), 24, torch.bfloat16)
    for activation in ("gelu", "swiglu"):
        with pytest.raises(ValueError, match=f"activation must be gelu_tanh for cublaslt, got {activation}"):
            gelu_mlp(*inputs, activation)
    with pytest.raises(TypeError, match="x must be bfloat16 or float16, got float32"):
        gelu_mlp(*(t.float() for t in inputs), "gelu_tanh")
    with pytest.raises(RuntimeError, match="cuBLASLt has no algorithm for m 24, n 4, k 16 with epilogue 36"):
        gelu_mlp(*(t.half() for t in inputs), "gelu_tanh")  # the stand-in knows bf16 alone
