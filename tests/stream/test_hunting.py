"""The walk has no race: random delays and poisoned memory change no bit of what work in one thread gives."""

from dataclasses import replace

import pytest
from test_streaming import PLACEMENTS, assert_same, train

from cgpt.stream.devices import CpuDevice
from cgpt.stream.devices_simulated import SimulatedDevice
from cgpt.stream.forecast import Rates

ARENA = 1 << 20  # bytes; more than any placement of the toy takes


@pytest.mark.parametrize("activations", ["device", "host"])
@pytest.mark.parametrize("name", ["host", "disk", "kept before the disk", "mixed"])
def test_lanes_give_the_bits_of_one_thread(name, activations, tmp_path):
    def run(device):
        placement = replace(PLACEMENTS[name], activations=activations)
        return train(placement, sizes=(3, 2), steps=4, disk=str(tmp_path / "state"), device=device)

    want = run(CpuDevice(ARENA, serial=True))
    for seed in range(3):
        assert_same(run(CpuDevice(ARENA, hunt=seed)), want)
    assert_same(run(SimulatedDevice(Rates(1e9, 1e6, 1e6, 1e6, 1e6, 1e6), ARENA)), want)
