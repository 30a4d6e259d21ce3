import os

import pytest
import torch

# Triton decides when a kernel is decorated whether to interpret it, so without a GPU it is told before anybody, such as
# transformers, imports it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from cgpt_ext import _native, dispatch


@pytest.fixture(params=_native.cpu_isas())
def isa(request):
    """Runs the test once per instruction set this machine has."""
    with dispatch.cpu_isa(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
