import pytest
import torch

from cgpt_ext import _native, dispatch


@pytest.fixture(params=_native.cpu_isas())
def isa(request):
    """Runs the test once per instruction set this machine has."""
    with dispatch.cpu_isa(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
