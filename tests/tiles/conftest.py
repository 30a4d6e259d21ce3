from pathlib import Path

import pytest
import torch

from cgpt_ext import _native


def pytest_collection_modifyitems(items):
    """amx computes its vectors with AVX-512, which nothing here plays."""
    if "avx512bf16" not in _native.cpu_isas():
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs a CPU with AVX-512 and its bf16 instructions"))


@pytest.fixture(autouse=True)
def one_thread():
    """Operands are small, and the tiles that a test asks about are its own thread's."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
