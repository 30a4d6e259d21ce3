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


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder with a corpus, a cache of its own and the nano preset."""
    from cgpt import opening  # which needs tyro; the tests of a GPU do without
    from cgpt.model import presets
    from nano import NANO, write_corpus

    monkeypatch.setitem(presets.PRESETS, "nano", NANO)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(opening, "keep_large_buffers", lambda: None)  # for whole processes, not for a test runner's
    write_corpus(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a step of nano is too small to share
    yield tmp_path
    torch.set_num_threads(threads)
