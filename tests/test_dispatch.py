import subprocess
import sys
import threading

import pytest
import torch

import cgpt_ext
from cgpt_ext import _native, dispatch, layer_norm


def test_every_op_is_in_the_table_and_says_why():
    ops = {name.removesuffix("_") for name in cgpt_ext.__all__ if f"{name.removesuffix('_')}_ref" in cgpt_ext.__all__}
    assert set(dispatch.TABLE) == ops
    for op, devices in dispatch.report()["ops"].items():
        assert "cpu" in devices, op
        assert all(row["why"] for row in devices.values()), op


def test_use_is_scoped_and_refuses_what_is_not_there():
    x, weight = torch.randn(3, 8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    with dispatch.use(layer_norm="reference"):
        assert layer_norm(x, weight).dtype == torch.float64  # no kernel takes fp64
    with pytest.raises(TypeError, match="layer_norm: x must be float32"):
        layer_norm(x, weight)
    with (
        pytest.raises(ValueError, match="grad_norm must be native or reference, got triton"),
        dispatch.use(grad_norm="triton"),
    ):
        pass
    with pytest.raises(ValueError, match=r"op must be one of .*, got softmax"), dispatch.use(softmax="native"):
        pass


def test_use_holds_in_the_threads_that_autograd_starts():
    """On a GPU the backward pass runs on one of them."""
    seen = []
    with dispatch.use(adamw="triton"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.implementation("adamw", "cuda")))
        thread.start()
        thread.join()
    assert seen == ["triton"]
    assert dispatch.implementation("adamw", "cuda") == "native"


def test_the_narrower_row_stands_first(monkeypatch):
    rows = {key: (name, "why") for key, name in (("cpu", "native"), ("cuda", "native"), ("cuda sm_90", "triton"))}
    rows["cuda float32"] = ("reference", "why")
    monkeypatch.setitem(dispatch.TABLE, "layer_norm", rows)
    monkeypatch.setitem(dispatch.BESIDES, "layer_norm", ("triton",))
    for here, wanted in (("sm_90", "triton"), ("sm_80", "native"), (None, "native")):
        monkeypatch.setattr(dispatch, "architecture", lambda here=here: here)
        assert dispatch.implementation("layer_norm", "cuda") == wanted
        assert dispatch.implementation("layer_norm", "cuda", torch.bfloat16) == wanted
        assert dispatch.implementation("layer_norm", "cuda", torch.float32) == "reference"
        assert dispatch.implementation("layer_norm", "cpu") == "native"
        assert sorted(dispatch.implementations("layer_norm", "cuda")) == ["native", "triton"]
    assert dispatch.implementations("layer_norm", "cpu") == ["native"]
    assert dispatch.report()["ops"]["layer_norm"]["cuda sm_90"] == {"implementation": "triton", "why": "why"}


def test_unserved_device_is_named():
    with pytest.raises(ValueError, match=r"layer_norm: tensors must be on cpu.*, got mps"):
        dispatch.implementation("layer_norm", "mps")


def test_a_dtype_may_have_its_own_row():
    assert dispatch.implementation("attention", "cuda", torch.bfloat16) == "native"
    assert dispatch.implementation("attention", "cuda", torch.float32) == "triton"
    assert dispatch.implementation("attention", "cpu", torch.float32) == "native"
    with dispatch.use(attention="native"):
        assert dispatch.implementation("attention", "cuda", torch.float32) == "native"
    with pytest.raises(ValueError, match="attention: tensors must be on cpu or cuda, got mps"):
        dispatch.implementation("attention", "mps", torch.float32)


def test_cpu_isa_is_scoped_and_refuses_by_name():
    before = _native.cpu_isa()
    with dispatch.cpu_isa("scalar"):
        assert _native.cpu_isa() == "scalar"
    assert _native.cpu_isa() == before
    with (
        pytest.raises(ValueError, match=r"name must be one of scalar.* on this machine, got sse9"),
        dispatch.cpu_isa("sse9"),
    ):
        pass


def test_module_prints_the_table():
    done = subprocess.run([sys.executable, "-m", "cgpt_ext"], capture_output=True, text=True, check=True)
    for op in dispatch.TABLE:
        assert op in done.stdout
    assert _native.cpu_isa() in done.stdout
