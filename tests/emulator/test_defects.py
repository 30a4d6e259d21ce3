"""The emulator's own proof: mistakes planted in small kernels are caught and named; without them the kernels pass.

`pytest tests/emulator/test_defects.py -rP` prints the list of what was reported.
"""

import ctypes
import re

import pytest
import torch

from emulator import HERE, defects

SOURCE = HERE / "defects" / "defects.cu"
LINES = {
    m[1]: number
    for number, line in enumerate(SOURCE.read_text().splitlines(), 1)
    if (m := re.search(r"// caught: (\w+)$", line))
}
SAYS = {
    "missing_barrier": "race on shared memory",
    "missing_syncwarp": "race on shared memory",
    "overwritten_tile": "race on shared memory",
    "missing_async_wait": "read before the wait for its asynchronous copy",
    "read_past_the_end": "read of 4 bytes at byte 16384 past the end of a tensor of 16384 bytes",
    "write_past_shared_memory": "write of 4 bytes past the end of shared memory",
    "uninitialised_shared_memory": "uninitialised read of byte 68 of shared memory",
    "divergent_shuffle": "divergent warp",
    "divergent_barrier": "divergent __syncthreads",
    "misaligned_vector_load": "misaligned access: 16 bytes wanted",
    "deadlock": "deadlock; 32 threads wait for a barrier",
    "race_between_blocks": "race on global memory",
    "overflowing_index": "overflow of a signed product",
    "spinning": "spinning",
}
WRONG = {"off_by_one_mask": torch.cumsum, "wrong_swizzle": None}  # only their results tell
SLOW = {"bank_conflict"}  # right, but at the price of more passes over the banks
N = 64 * 64


def run(name, planted, seed=0):
    """(what the device said, input, output, the device)"""
    device = defects()
    device.seed(seed)
    x = torch.randint(-8, 8, (N,)).float()
    out = torch.zeros(N)
    for t in (x, out):
        device.library.emulator_add_tensor(t.data_ptr(), t.nbytes)
    call = device.library.run_defect
    call.restype = ctypes.c_char_p
    blocks = 1 if name in ("wrong_swizzle", "bank_conflict", "overwritten_tile") else N // 64
    said = call(name.encode(), ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()), N, blocks, planted)
    return said.decode(), x, out, device


def want(name, x):
    return x.cumsum(0) if name == "off_by_one_mask" else x


def test_every_kernel_is_listed():
    assert set(LINES) == set(SAYS) | set(WRONG) | SLOW


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", sorted(LINES))
def test_silent_without_the_mistake(name, seed):
    said, x, out, device = run(name, False, seed)
    assert said == ""
    if name in WRONG or name in SLOW:
        assert torch.equal(out, want(name, x))
    assert device.counters()["bank_conflicts"] == 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", sorted(SAYS))
def test_caught(name, seed):
    said, *_ = run(name, True, seed)
    print(said)
    assert SAYS[name] in said
    assert f"tests/emulator/defects/defects.cu:{LINES[name]}" in said
    assert re.search(r"block \(\d+, 0, 0\) thread \d+", said)


@pytest.mark.parametrize("name", sorted(WRONG))
def test_wrong_results_are_traced_to_their_writer(name):
    said, x, out, device = run(name, True)
    assert said == ""
    assert not torch.equal(out, want(name, x))
    blamed = device.blame(out, want(name, x))
    print(f"{name}: {blamed}")
    lines = f"({LINES[name]}|{LINES[name] + 1})"
    assert re.search(rf"defects\.cu:{lines}( \(from .*\))? by block \(\d+, 0, 0\) thread \d+$", blamed)


def test_bank_conflicts_are_counted_and_placed():
    said, x, out, device = run("bank_conflict", True)
    assert said == ""
    assert torch.equal(out, x)
    counters = device.counters()
    assert counters["bank_conflicts"] == 7 * 4 * counters["ldmatrix"]  # eight rows of 128 bytes start at one bank
    assert f"defects.cu:{LINES['bank_conflict']}" in device.conflict()
    print(f"bank_conflict: {counters['bank_conflicts']} extra passes, at {device.conflict()}")
