import pytest
import torch


@pytest.fixture(autouse=True, scope="module")  # before what a module makes once
def one_thread():
    """A team of threads that spins at every operator's end leaves the lanes of a small machine no core: 12 x slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
