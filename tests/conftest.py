import os

import pytest

# pytest-xdist runs a process a core, whose threads would wait for the others' in busy loops: one, before torch and
# OpenBLAS count cores. Tests that want more set them.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Triton decides when a kernel is decorated whether to interpret it, so without a GPU it is told before anybody, such as
# transformers, imports it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from cgpt_ext import _native, dispatch


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """A process a core up to four, each with gigabytes of its own; this one alone for a single file, whose output and
    breakpoints stay in sight, and where there is a GPU, which they would have to share."""
    one_file = len(config.args) == 1 and ".py" in config.args[0]
    return 0 if one_file or torch.cuda.is_available() else min(len(os.sched_getaffinity(0)), 4)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests stay in one process, which makes its fixtures once; so do all of a folder that compiles kernels
    for itself: the emulator's last test asks what the others have run."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            compiling = (folder for folder in ("tests/emulator/", "tests/tiles/") if nodeid.startswith(folder))
            return next(compiling, super()._split_scope(nodeid))

    return Scheduling(config, log)


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
    from cgpt import heap
    from cgpt.model import presets
    from nano import NANO, write_corpus  # which needs tyro; the tests of a GPU do without

    monkeypatch.setitem(presets.PRESETS, "nano", NANO)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(heap, "keep_large_buffers", lambda: None)  # for whole processes, not for a test runner's
    write_corpus(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a step of nano is too small to share
    yield tmp_path
    torch.set_num_threads(threads)
