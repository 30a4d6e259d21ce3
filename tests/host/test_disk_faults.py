"""DiskFile: everything that can go wrong is one error that says so, and harms nothing."""

import errno
import os
import re
import shutil
import signal

import pytest
from cgpt_ext._native import DiskFile
from child import lines, start
from records import BLOCK, MIB, memory, noise


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
