"""DiskFile: what is written is what is read, and everything that can go wrong is one error that says so."""

import errno
import os
import random
import re
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from cgpt_ext._native import DiskFile, HostArena
from child import lines, start

BLOCK = 4096
MIB = 1 << 20


@pytest.fixture
def path(tmp_path):
    return tmp_path / "records"


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
def direct(request):
    return request.param


def noise(nbytes, seed=0):
    return bytearray(random.Random(seed).randbytes(nbytes))


def memory(nbytes, shift=0):
    """Writable bytes `shift` past a page."""
    arena = HostArena(nbytes + shift)
    return memoryview(arena)[shift : shift + nbytes]


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


def damage(path, at, what=None):
    data = bytearray(path.read_bytes())
    data[at] = data[at] ^ 0x10 if what is None else what
    path.write_bytes(data)


def refused(path, match, nbytes=MIB, identity="me"):
    before = path.read_bytes()
    with pytest.raises(ValueError, match=match) as caught:
        DiskFile(path, nbytes, identity)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


def test_every_damaged_byte_of_the_header_is_found(path):
    DiskFile(path, MIB, "me").close()
    whole = path.read_bytes()
    for at in [*range(40), *range(40, BLOCK - 8, 131), *range(BLOCK - 8, BLOCK)]:
        damage(path, at)
        refused(path, "does not begin with CGPTDISK" if at < 8 else "its checksum does not fit")
        path.write_bytes(whole)
    DiskFile(path, MIB, "me").close()


def test_foreign_files_are_refused_and_left(path):
    path.write_bytes(b"#!/bin/sh\n")
    refused(path, "must be a disk file, got 10 bytes")
    path.write_bytes(noise(3 * BLOCK))
    refused(path, "does not begin with CGPTDISK")
    path.unlink()
    DiskFile(path, MIB, "one\nmodel").close()
    refused(path, "must be the disk file of 'me', got that of 'one[?]model'")
    refused(path, f"must be a disk file of {2 * MIB} bytes of records, got {MIB}", 2 * MIB, "one\nmodel")
    os.truncate(path, MIB)
    refused(path, f"must be {MIB + BLOCK} bytes long, got {MIB}", identity="one\nmodel")


def test_what_is_no_file(tmp_path):
    with pytest.raises(IsADirectoryError) as caught:
        DiskFile(tmp_path, MIB, "me")
    assert caught.value.filename == str(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        DiskFile(tmp_path / "no" / "folder", MIB, "me")
    assert caught.value.filename == str(tmp_path / "no" / "folder")
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(ValueError, match="/dev/full must be a regular file"):
        DiskFile("/dev/full", MIB, "me")


def test_one_owner(path):
    file = DiskFile(path, MIB, "me")
    with pytest.raises(BlockingIOError, match="another DiskFile has this file open"):
        DiskFile(path, MIB, "me")
    file.close()
    DiskFile(path, MIB, "me")


def test_an_empty_file_is_taken(path):
    path.touch()
    assert DiskFile(path, MIB, "me").created


def test_a_full_disk_is_said_at_once_with_both_numbers(path):
    free = shutil.disk_usage(path.parent).free
    wanted = 2**50
    assert free < wanted
    with pytest.raises(OSError, match=rf"the disk file takes {wanted + BLOCK} bytes, free are \d+") as caught:
        DiskFile(path, wanted, "me")
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(path)
    assert not path.exists()
    given = int(re.search(r"free are (\d+)", str(caught.value))[1])
    assert abs(given - free) < max(free // 10, 1 << 30)


def test_a_file_size_limit_refuses_the_file_and_leaves_none(path):
    code = """
        import resource, sys
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        try:
            DiskFile(sys.argv[1], 2 << 20, "me")
        except OSError as error:
            print(error.errno, error.filename, error.strerror)
    """
    (line,) = lines(code, path)
    assert line.startswith(f"{errno.EFBIG} {path} the disk file takes {2 * MIB + BLOCK} bytes")
    assert not path.exists()


def test_a_write_that_the_system_cuts_short_is_continued_and_then_an_error(path, direct):
    """A limit in the middle of a write makes it short; what is left is then refused."""
    DiskFile(path, 4 * MIB, "me").close()
    code = """
        import resource, sys
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        file = DiskFile(sys.argv[1], 4 << 20, "me", sys.argv[2] == "True")
        arena = HostArena(4 << 20)
        memoryview(arena)[:] = bytes([7]) * len(memoryview(arena))
        try:
            file.write(0, arena)
        except OSError as error:
            print(error.errno, error.filename, error.strerror)
    """
    (line,) = lines(code, path, direct)
    place = f"cannot write {3 * MIB + BLOCK} bytes at offset {MIB - BLOCK} of the records"
    assert line.startswith(f"{errno.EFBIG} {path} {place}")
    data = path.read_bytes()
    assert data[BLOCK:MIB] == bytes([7]) * (MIB - BLOCK)
    assert not any(data[MIB:])


@pytest.mark.parametrize("kept", [0, 10, BLOCK, MIB, MIB + 10])
def test_a_file_cut_behind_its_back(path, direct, kept):
    file = DiskFile(path, 4 * MIB, "me", direct)
    os.truncate(path, BLOCK + kept)
    got = memory(4 * MIB)
    with pytest.raises(
        OSError, match=r"the file ends (before|within) \d+ bytes at offset \d+ of the records"
    ) as caught:
        file.read(0, got)
    assert caught.value.errno == errno.EIO
    assert caught.value.filename == str(path)
    with pytest.raises(OSError, match="the file ends"):
        file.read(2 * MIB, memory(100, 1))


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


def test_what_is_synced_survives_a_kill(path):
    code = """
        import os, signal, sys
        file = DiskFile(sys.argv[1], 1 << 20, "me")
        file.write(4096, b"kept")
        file.sync()
        print("synced", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = start(code, path)
    assert (done.stdout, done.returncode) == ("synced\n", -signal.SIGKILL), done
    got = bytearray(4)
    DiskFile(path, MIB, "me").read(BLOCK, got)
    assert got == b"kept"
