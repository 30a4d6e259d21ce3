"""DiskFile: what is written is what is read, from any memory, by any number of threads, past the page cache."""

import random
import threading
from pathlib import Path

import pytest
import torch
from cgpt_ext._native import DiskFile
from child import lines
from records import BLOCK, MIB, memory, noise


@pytest.mark.parametrize("nbytes", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * MIB + 5, 20 * MIB])
@pytest.mark.parametrize("shift", [0, 1, 128, 512])
def test_round_trip(path, direct, nbytes, shift):
    file = DiskFile(path, nbytes, "me", direct)
    given, got = memory(nbytes, shift), memory(nbytes, (shift + 1) % 3)
    given[:] = noise(nbytes)
    file.write(0, given)
    file.read(0, got)
    assert got == given
    file.close()
    assert path.stat().st_size == BLOCK + -(-nbytes // BLOCK) * BLOCK
    assert path.read_bytes()[BLOCK : BLOCK + nbytes] == given


def test_a_model_of_the_file(path, direct):
    """Writes and reads of any length at any block, against a bytearray."""
    rng, size = random.Random(1), 5 * MIB + 100
    file, model = DiskFile(path, size, "me", direct), bytearray(size)
    for i in range(80):
        offset = rng.randrange(0, size // BLOCK + 1) * BLOCK
        length = min(size - offset, rng.choice([0, 1, 100, BLOCK, 3 * BLOCK + 7, MIB, MIB + 1, size]))
        shift = rng.choice([0, 0, 1, 128])
        piece = memory(length, shift) if length else memoryview(bytearray(0))
        if rng.random() < 0.6:
            piece[:] = noise(length, i)
            file.write(offset, piece)
            model[offset : offset + length] = piece
        else:
            file.read(offset, piece)
            assert piece == model[offset : offset + length]
    file.sync()
    file.close()
    assert path.read_bytes()[BLOCK : BLOCK + size] == model


def test_new_records_are_zero_and_a_second_run_finds_the_first_ones(path, direct):
    file = DiskFile(path, 2 * MIB, "gpt2 bf16 layer 7: \N{GREEK SMALL LETTER PI}", direct)
    got = memory(2 * MIB)
    got[:] = noise(2 * MIB)
    file.read(0, got)
    assert file.created
    assert not any(got)
    file.write(MIB, b"here")
    file.close()
    again = DiskFile(str(path), 2 * MIB, file.identity, direct)
    assert not again.created
    assert again.identity == file.identity
    assert again.nbytes == 2 * MIB
    assert again.path == str(path)
    again.read(MIB, got[:4])
    assert bytes(got[:4]) == b"here"


def test_says_which_way_it_goes(path, direct):
    file = DiskFile(path, MIB, "me", direct)
    if not direct:
        assert not file.direct
        assert file.why_buffered == "direct I/O was not asked for"
    else:
        assert file.direct == (file.why_buffered is None)


def test_takes_any_contiguous_memory(path):
    file = DiskFile(path, MIB, "me")
    tensor = torch.randn(1000)
    file.write(0, tensor.numpy())
    back = torch.zeros(1000)
    file.read(0, back.numpy())
    assert torch.equal(back, tensor)
    file.write(0, b"bytes")
    with pytest.raises(ValueError, match=r"read: buffer must be writable contiguous memory, got other memory"):
        file.read(0, b"bytes")
    with pytest.raises(ValueError, match="contiguous memory"):
        file.write(0, memoryview(bytearray(10))[::2])
    for what in (None, 3, "text", [1], object()):
        for call in (file.read, file.write):
            with pytest.raises(TypeError, match=r"DiskFile\.\w+: buffer must be .*, got"):
                call(0, what)


@pytest.mark.parametrize("offset", [-BLOCK, -1, 1, 512, BLOCK + 1, 2**62, -(2**63)])
def test_offsets(path, offset):
    file = DiskFile(path, MIB, "me")
    for call in (file.read, file.write):
        with pytest.raises(ValueError, match=r"^DiskFile\.(read|write): offset .* must|^DiskFile\.\w+: offset must"):
            call(offset, bytearray(8))


@pytest.mark.parametrize(("offset", "length"), [(0, MIB + 1), (MIB, 1), (MIB - BLOCK, BLOCK + 1), (2 * MIB, 0)])
def test_past_the_end(path, direct, offset, length):
    file = DiskFile(path, MIB, "me", direct)
    for call in (file.read, file.write):
        with pytest.raises(ValueError, match=f"must end within {MIB} bytes, got {offset} and {length}"):
            call(offset, bytearray(length))
    file.read(MIB, bytearray(0))


def test_wrong_arguments(path):
    for nbytes in (0, -1, -(2**63), 2**62):
        with pytest.raises(ValueError, match=f"nbytes must be from 1 to .*, got {nbytes}"):
            DiskFile(path, nbytes, "me")
    for bad in ((None, MIB, "me"), (path, "1", "me"), (path, 1.5, "me"), (path, 2**63, "me"), (path, MIB, None)):
        with pytest.raises(TypeError):
            DiskFile(*bad)
    with pytest.raises(ValueError, match="null"):
        DiskFile("a\0b", MIB, "me")
    with pytest.raises(ValueError, match="identity must be at most 4000 bytes, got 4001"):
        DiskFile(path, MIB, "x" * 4001)
    assert not path.exists()
    DiskFile(path, MIB, "x" * 4000)


def test_closed(path):
    file = DiskFile(path, MIB, "me")
    file.close()
    file.close()
    assert file.closed
    for call in (lambda: file.read(0, bytearray(1)), lambda: file.write(0, b"1"), file.sync):
        with pytest.raises(ValueError, match="the file must be open, got a closed one"):
            call()


def test_many_threads_at_once(path, direct):
    file, size = DiskFile(path, 8 * MIB, "me", direct), MIB + 100
    errors = []

    def work(k):
        try:
            rng = random.Random(k)
            for i in range(10):
                piece = memory(size - rng.randrange(5000), rng.choice([0, 1]))
                piece[:] = noise(len(piece), 100 * k + i)
                file.write(2 * k * MIB, piece)
                got = memory(len(piece))
                file.read(2 * k * MIB, got)
                assert got == piece
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_closing_waits_for_calls_under_way(path):
    """Calls before the close are whole, those after it are refused; no call meets another file under its number."""
    file = DiskFile(path, 64 * MIB, "me", False)
    piece = memory(64 * MIB)
    piece[:] = noise(MIB) * 64
    started, outcome = threading.Event(), []

    def write():
        started.set()
        try:
            while True:
                file.write(0, piece)
                outcome.append("whole")
        except ValueError as error:
            outcome.append(str(error))

    thread = threading.Thread(target=write)
    thread.start()
    started.wait()
    while not outcome:
        thread.join(0.01)
    file.close()
    thread.join()
    assert outcome[0] == "whole"
    assert "closed" in outcome[-1]
    assert path.read_bytes()[BLOCK:] == piece


def test_other_threads_run_while_one_waits_for_the_disk(path):
    file = DiskFile(path, 256 * MIB, "me", False)
    piece, ticks, done = memory(256 * MIB), [0], threading.Event()

    def count():
        while not done.is_set():
            ticks[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    before = ticks[0]
    file.write(0, piece)
    passed = ticks[0] - before
    done.set()
    thread.join()
    assert passed > 100


def cached_bytes(path):
    """What of a file is in the page cache, by mincore."""
    code = """
        import ctypes, mmap, os, sys
        size = os.path.getsize(sys.argv[1])
        with open(sys.argv[1], "r+b") as file:
            pages = mmap.mmap(file.fileno(), size)
        seen = (ctypes.c_ubyte * (size // mmap.PAGESIZE))()
        at = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(at), ctypes.c_size_t(size), seen) == 0
        print(sum(x & 1 for x in seen) * mmap.PAGESIZE)
    """
    return int(lines(code, path)[0])


def file_system(path):
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    return max((len(at), kind) for at, kind in mounts if path.is_relative_to(at))[1]


def test_the_page_cache_stays_empty(path, direct):
    file = DiskFile(path, 64 * MIB, "me", direct)
    if file_system(path) == "tmpfs":
        pytest.skip("this file system is its own page cache")
    piece = memory(64 * MIB)
    piece[:] = noise(MIB) * 64
    file.write(0, piece)
    assert cached_bytes(path) < 4 * MIB
    file.read(0, piece)
    assert cached_bytes(path) < 4 * MIB
