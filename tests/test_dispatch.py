import subprocess
import sys

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


def test_unserved_device_is_named():
    with pytest.raises(ValueError, match="layer_norm: tensors must be on cpu or cuda, got mps"):
        dispatch.implementation("layer_norm", "mps")


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
