"""HostArena: exact memory between guard pages, as a buffer, pinned where a device takes it."""

import gc
import mmap
import signal

import pytest
import torch
from cgpt_ext._native import HostArena
from child import lines, start

PAGE = mmap.PAGESIZE
HUGE = 2 << 20


def mapping(address):
    """(begin, end, permissions) of the mapping that holds an address."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, permissions, *_ = line.split()
            begin, end = (int(x, 16) for x in span.split("-"))
            if begin <= address < end:
                return begin, end, permissions
    return None


@pytest.mark.parametrize("nbytes", [1, 127, PAGE - 1, PAGE, PAGE + 1, 3 * HUGE, 3 * HUGE + 5])
def test_size_zeros_and_guards(nbytes):
    arena = HostArena(nbytes)
    assert arena.nbytes == nbytes
    assert arena.mapped_bytes == -(-nbytes // PAGE) * PAGE
    assert arena.address % (HUGE if nbytes >= HUGE else PAGE) == 0
    memory = torch.frombuffer(arena, dtype=torch.uint8)
    assert memory.data_ptr() == arena.address
    assert memory.numel() == nbytes
    assert not memory.any()
    memory.fill_(255)
    assert memory[-1] == 255
    begin, end, permissions = mapping(arena.address)
    assert (begin, end, permissions[:3]) == (arena.address, arena.address + arena.mapped_bytes, "rw-")
    before, behind = mapping(begin - 1), mapping(end)
    assert before[1] - before[0] >= PAGE
    assert before[2][:3] == "---"
    assert behind[1] - behind[0] >= PAGE
    assert behind[2][:3] == "---"


@pytest.mark.parametrize("at", ["arena.address - 1", "arena.address + arena.mapped_bytes"])
@pytest.mark.parametrize("touch", ["ctypes.memset({}, 1, 1)", "ctypes.string_at({}, 1)"])
def test_past_the_ends_is_a_fault(at, touch):
    code = f"""
        import ctypes
        arena = HostArena(10000)
        ctypes.memset(arena.address, 1, arena.nbytes)
        print("inside", flush=True)
        {touch.format(at)}
        print("outside")
    """
    done = start(code)
    assert (done.stdout, done.returncode) == ("inside\n", -signal.SIGSEGV), done


def test_a_tensor_keeps_the_memory_and_the_last_reference_frees_it():
    arena = HostArena(3 * HUGE)
    address = arena.address
    view = torch.frombuffer(arena, dtype=torch.float32, offset=HUGE, count=100)
    del arena
    gc.collect()
    view.copy_(torch.arange(100.0))
    assert view.sum() == 4950
    assert mapping(address) is not None
    del view
    gc.collect()
    left = mapping(address)
    assert left is None or left[:2] != (address, address + 3 * HUGE)


def test_memory_comes_as_it_is_written():
    def resident():
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * PAGE

    before = resident()
    arena = HostArena(1 << 30)
    assert resident() - before < 8 * HUGE
    torch.frombuffer(arena, dtype=torch.uint8, count=64 * HUGE).fill_(1)
    assert 60 * HUGE < resident() - before < 80 * HUGE


@pytest.mark.parametrize("nbytes", [0, -1, -(2**63), 2**46 + 1, 2**62])
def test_impossible_sizes(nbytes):
    with pytest.raises(ValueError, match=f"nbytes must be from 1 to {2**46}, got {nbytes}$"):
        HostArena(nbytes)


@pytest.mark.parametrize("nbytes", [None, "1", 1.5, float("nan"), 2**63, -(2**63) - 1, [1], object()])
def test_what_is_no_size(nbytes):
    with pytest.raises(TypeError):
        HostArena(nbytes)


def test_more_than_the_limit_is_a_memory_error_with_the_bytes():
    code = """
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (20 << 30, 20 << 30))
        small = HostArena(1 << 20)
        for wanted in (1 << 40, 1 << 46):
            try:
                HostArena(wanted)
            except MemoryError as error:
                print(error)
    """
    said = f"HostArena: the system must give {1 << 40} bytes, got error 12 (Cannot allocate memory)"
    assert lines(code) == [said, said.replace(str(1 << 40), str(1 << 46))]


def test_a_refused_arena_leaves_no_addresses_behind():
    """RLIMIT_DATA bites when the memory is made writable, after the addresses are taken."""
    code = """
        import resource
        def size():
            return int(open("/proc/self/statm").read().split()[0])
        HostArena(1 << 20)
        resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))
        before = size()
        for _ in range(10):
            try:
                HostArena(2 << 30)
            except MemoryError:
                continue
            raise SystemExit("2 GiB of data under a limit of 1")
        assert size() == before, (before, size())
    """
    assert lines(code) == []


def test_where_there_is_no_cuda_nothing_is_pinned_and_it_says_why():
    arena = HostArena(3 * HUGE)
    assert arena.pinned_bytes == 0
    assert arena.why_not_pinned == "register_cuda() was not called"
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    assert arena.register_cuda() == 0
    assert arena.pinned_bytes == 0
    assert arena.why_not_pinned
    assert "\n" not in arena.why_not_pinned
    for bad in (None, "cuda", 1.5, 2**31):
        with pytest.raises(TypeError):
            arena.register_cuda(bad)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_memory_is_copied_without_waiting():
    arena = HostArena((1 << 30) + 3 * PAGE)  # two pieces
    assert arena.register_cuda() == arena.nbytes, arena.why_not_pinned
    assert arena.why_not_pinned is None
    assert arena.register_cuda() == arena.nbytes
    memory = torch.frombuffer(arena, dtype=torch.uint8)
    across = memory[(1 << 30) - PAGE : (1 << 30) + PAGE].random_()
    assert across.is_pinned()
    assert memory[-1:].is_pinned()
    there = across.to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(there.cpu(), across)
    assert arena.register_cuda(-1) == arena.nbytes
    over = HostArena(PAGE)
    assert over.register_cuda(torch.cuda.device_count()) == 0
    assert "is not among" in over.why_not_pinned
