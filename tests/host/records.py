"""What the tests write into a DiskFile."""

import random

from cgpt_ext._native import HostArena

BLOCK = 4096
MIB = 1 << 20


def noise(nbytes: int, seed: int = 0) -> bytearray:
    return bytearray(random.Random(seed).randbytes(nbytes))


def memory(nbytes: int, shift: int = 0) -> memoryview:
    """Writable bytes `shift` past a page."""
    arena = HostArena(nbytes + shift)
    return memoryview(arena)[shift : shift + nbytes]
