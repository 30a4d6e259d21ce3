import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """The references' tensors are tiny: torch's threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items):
    """test_kernels.py asks what the others have run."""
    items.sort(key=lambda item: item.path.name == "test_kernels.py")
