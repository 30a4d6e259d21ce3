"""What a probe measures is what lanes do: their own rates, apart and together."""

import threading
import time

import pytest
from ranks import on_ranks
from toy import Plain, layers

from cgpt.stream import probe as room
from cgpt.stream.devices import CpuDevice
from cgpt.stream.format import Format
from cgpt.stream.placement import Placement
from cgpt.stream.store import Store

DISK = Placement(("disk",) * 5, ("disk",) * 5, (True,) * 5)
RATE = 50e6
BUILDING = threading.Lock()  # torch has one generator for all threads


class Slow(CpuDevice):
    """Its copies take as long as RATE says."""

    def copy(self, there, here):
        time.sleep(here.nbytes / RATE)
        super().copy(there, here)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(room, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(room, "PARAMETERS", (64, 64))


def probed(tmp_path, format, device):
    store = Store(layers(Plain()), format, device, placement=DISK, disk=str(tmp_path))
    try:
        return room.probe(store)
    finally:
        store.close()


def test_copies_are_timed_by_the_lane_that_does_them(small, tmp_path):
    rates = probed(tmp_path, Format(), Slow(1 << 20))
    assert 0.5 * RATE < rates.down <= RATE
    assert 0.5 * RATE < rates.up <= RATE


def test_ranks_time_what_they_gather_from_one_another(small):
    """A call takes 5 ms, and a byte as long as RATE says: no call may seem faster, nor much slower."""
    largest = []

    def work(world):
        gather = world.all_gather

        def slow(whole, part):
            largest[:] = [max(part.nbytes, *largest)] if largest else [part.nbytes]
            time.sleep(0.005 + (world.count - 1) * part.nbytes / RATE)
            gather(whole, part)

        world.all_gather = slow
        with BUILDING:
            model = Plain()
        placement = Placement.resident(5, world.count)
        store = Store(layers(model), Format(), CpuDevice(1 << 20), placement=placement, world=world)
        try:
            return room.probe(store)
        finally:
            store.close()

    for rates in on_ranks(3, work):
        least = 0.005 + 2 * largest[0] / RATE
        assert least <= 1.001 * (2 * largest[0] / rates.wire + rates.wire_latency) < 2 * least
        assert 0.005 <= rates.wire_latency < 0.02


@pytest.mark.parametrize("format", [Format(), Format("fp16"), Format("fp32"), Format("bf16", "bf16")])
def test_every_format_has_a_rate_of_the_optimizer_and_of_the_disk(small, tmp_path, format):
    rates = probed(tmp_path, format, CpuDevice(1 << 20))
    assert all(0 < rate < room.NO_DISK for rate in (rates.memory, rates.read, rates.write, rates.down, rates.up))


def test_works_of_two_lanes_run_at_once(tmp_path):
    store = Store(layers(Plain()), Format(), CpuDevice(1 << 20), placement=DISK, disk=str(tmp_path))
    running, seen = set(), []

    def work(lane):
        running.add(lane)
        time.sleep(0.02)
        seen.append(len(running))
        running.discard(lane)

    taken = room._seconds(store, {lane: lambda lane=lane: work(lane) for lane in ("read", "write")})
    store.close()
    assert max(seen) == 2
    assert all(0.02 <= seconds < 0.2 for seconds in taken.values())
