"""What a probe measures is what lanes do: their own rates, apart and together."""

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


def test_the_wire_is_timed_by_all_ranks(small):
    """Collectives that wait 4 ms each, and 20 ns a byte more that each rank receives."""

    def work(world):
        gather = world.all_gather

        def slow(whole, part):
            time.sleep(4e-3 + (whole.nbytes - part.nbytes) / RATE)
            gather(whole, part)

        world.all_gather = slow
        store = Store(layers(Plain()), placement=Placement.resident(5, 2), world=world)
        try:
            return room.probe(store)
        finally:
            store.close()

    for rates in on_ranks(2, work):
        assert rates.wire == pytest.approx(RATE, rel=0.3)
        assert 4e-3 <= rates.wire_latency < 12e-3
