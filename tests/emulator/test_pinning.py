"""HostArena.register_cuda against a driver that pins as much as it is told to."""

import ctypes
import gc

import pytest
import torch

from emulator import device, native

GIB = 1 << 30
ANY = ctypes.c_size_t(-1)


class Driver:
    def __init__(self):
        library = device().library
        library.emulator_pinned_bytes.restype = library.emulator_pinned_pieces.restype = ctypes.c_size_t
        library.emulator_pin_at_most.argtypes = [ctypes.c_size_t]
        self.pins_at_most = library.emulator_pin_at_most
        self.pinned = lambda: (library.emulator_pinned_bytes(), library.emulator_pinned_pieces())


@pytest.fixture
def driver():
    driver = Driver()
    yield driver
    driver.pins_at_most(ANY)


def test_all_is_pinned_in_pieces_of_a_gibibyte_and_let_go_at_the_end(driver):
    arena = native().HostArena(2 * GIB + 5)
    assert arena.why_not_pinned == "register_cuda() was not called"
    assert arena.register_cuda() == arena.pinned_bytes == arena.nbytes
    assert arena.why_not_pinned is None
    assert driver.pinned() == (arena.mapped_bytes, 3)
    assert arena.register_cuda() == arena.nbytes
    assert driver.pinned()[1] == 3
    memory = torch.frombuffer(arena, dtype=torch.uint8)
    del arena
    gc.collect()
    assert driver.pinned()[1] == 3  # a tensor still lies there
    del memory
    gc.collect()
    assert driver.pinned() == (0, 0)


def test_a_driver_that_stops_part_way(driver):
    driver.pins_at_most(GIB + 4096)
    arena = native().HostArena(3 * GIB)
    assert arena.register_cuda() == arena.pinned_bytes == GIB
    said = f"pinned {GIB} of {3 * GIB} bytes, the next {GIB} refused: CUDA error 2 (out of memory); RLIMIT_MEMLOCK is "
    assert arena.why_not_pinned.startswith(said)
    driver.pins_at_most(ANY)
    assert arena.register_cuda() == arena.nbytes
    assert arena.why_not_pinned is None
    del arena
    assert driver.pinned() == (0, 0)


def test_a_driver_that_pins_nothing(driver):
    driver.pins_at_most(0)
    arena = native().HostArena(4096)
    assert arena.register_cuda() == 0
    assert "pinned 0 of 4096 bytes" in arena.why_not_pinned


@pytest.mark.parametrize("index", [-1, 1, 2**31 - 1])
def test_no_such_device(driver, index):
    arena = native().HostArena(4096)
    assert arena.register_cuda(index) == 0
    assert driver.pinned() == (0, 0)
    assert f"device {index} is not among the 1 there are" in arena.why_not_pinned
