"""set_thread_count: one thread's own count, which neither the others nor torch sees or takes back."""

import threading

import pytest
import torch

from cgpt_ext import _native


def in_thread(work):
    got = []
    thread = threading.Thread(target=lambda: got.append(work()))
    thread.start()
    thread.join()
    return got[0]


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_the_calling_thread_alone():
    def work():
        before = _native.set_thread_count(5)
        torch.ones(1 << 18).add_(1)  # the first parallel work of a thread, where torch would set its own count
        return before, _native.num_threads(), _native.set_thread_count(3), torch.get_num_threads()

    assert in_thread(work) == (2, 5, 5, 3)
    assert _native.num_threads() == torch.get_num_threads() == 2


def test_this_thread():
    assert _native.set_thread_count(1) == 2
    assert torch.get_num_threads() == _native.num_threads() == 1
    assert _native.set_thread_count(2) == 1


@pytest.mark.parametrize("n", [0, -1, 4097, 2**62, -(2**63)])
def test_impossible_counts(n):
    with pytest.raises(ValueError, match=rf"^set_thread_count: n must be from 1 to 4096, got {n}$"):
        _native.set_thread_count(n)
    assert _native.num_threads() == 2
