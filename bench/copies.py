"""Memory's own speed on some threads, to hold kernels that do nothing but read and write against (STREAM's idea,
McCalpin 1995): bytes read and bytes written are counted once each, as the program asks for them."""

import ctypes
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cgpt_ext._native import HostArena

SOURCE = Path(__file__).with_name("copies.cpp")
# A loop over lines must stay one: as memcpy it would choose its stores by itself.
FLAGS = "-O3 -march=native -shared -fPIC -Wno-psabi -fno-tree-loop-distribute-patterns".split()
LINE, HUGE = 64, 2 << 20


def library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "copies.so"
        subprocess.run([os.environ.get("CXX", "g++"), *FLAGS, SOURCE, "-o", path], check=True)
        loaded = ctypes.CDLL(str(path))
    for function in (loaded.copy, loaded.copy_past_caches, loaded.update):
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
        function.restype = None
    return loaded


def copies(moved: int, threads: int) -> dict:
    """Calls that move `moved` bytes each, half of them read and half written, cut evenly among `threads`."""
    half = -(-moved // 2 // (threads * HUGE)) * threads * HUGE
    source, target = HostArena(half), HostArena(half)
    for arena in (source, target):
        ctypes.memset(arena.address, 1, half)
    pool, loaded, share = ThreadPoolExecutor(threads), library(), half // threads

    def call(function):
        def part(i):
            function(target.address + i * share, source.address + i * share, share // LINE)

        return lambda: list(pool.map(part, range(threads)))

    names = {"copy": loaded.copy, "copy past caches": loaded.copy_past_caches, "update in place": loaded.update}
    return {name: call(function) for name, function in names.items()}
