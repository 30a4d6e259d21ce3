"""The walk has no race: random delays and poisoned memory change no bit of what work in one thread gives.

CGPT_TEST_HUNTS is the number of seeds; races that are planted must be found by the few that are the default.
"""

import os
import time
from dataclasses import replace

import pytest
from test_streaming import PLACEMENTS, assert_same, train

from cgpt.stream.buffers import Buffer
from cgpt.stream.devices import CpuDevice
from cgpt.stream.devices_simulated import SimulatedDevice
from cgpt.stream.gradients import Sums
from cgpt.stream.host import DiskTier
from cgpt.stream.optimizer import AdamW
from cgpt.stream.rates import Rates
from cgpt.stream.store import Store

ARENA = 1 << 20  # bytes; more than any placement of the toy takes
HUNTS = int(os.environ.get("CGPT_TEST_HUNTS", "6"))
STEPS = [{"sizes": (3, 2)}, {"sizes": (3,)}, {"sizes": (2, 1, 3), "together": False}]


def run(name, device, tmp_path, activations="device", **step):
    placement = replace(PLACEMENTS[name], activations=activations)
    return train(placement, steps=4, disk=str(tmp_path / "state"), device=device, **step)


@pytest.mark.parametrize("activations", ["device", "host"])
@pytest.mark.parametrize("name", ["host", "disk", "kept before the disk", "mixed"])
def test_lanes_give_the_bits_of_one_thread(name, activations, tmp_path):
    want = [run(name, CpuDevice(ARENA, serial=True), tmp_path, activations, **step) for step in STEPS]
    for seed in range(HUNTS):
        kind = seed % len(STEPS)
        got = run(name, CpuDevice(ARENA, hunt=seed), tmp_path, activations, **STEPS[kind])
        assert_same(got, want[kind])
    simulated = SimulatedDevice(Rates(1e9, 1e6, 1e6, 1e6, 1e6, 1e6), ARENA)
    assert_same(run(name, simulated, tmp_path, activations, **STEPS[0]), want[0])


def slot_released_before_its_arithmetic(patch):
    get = Store.get

    def early(self, index):
        layer, after = get(self, index)
        for event in after:
            event.wait()
        if index in self._held:
            self.release(index, after[-1])
        return layer, after

    patch.setattr(Store, "get", early)


def arithmetic_ahead_of_the_copy(patch):
    get = Store.get
    patch.setattr(Store, "get", lambda self, index: (get(self, index)[0], []))


def gather_ahead_of_the_update(patch):
    submit = Store._submit_updates

    def forgets(self, *until):
        submit(self, *until)
        self._working = [None] * len(self._working)

    patch.setattr(Store, "_submit_updates", forgets)


def update_ahead_of_its_gradients(patch):
    step = AdamW.step

    def forgets(self, gradients, lr):
        gradients.ready.clear()
        return step(self, gradients, lr)

    patch.setattr(AdamW, "step", forgets)


def buffers_reused_early(kind):
    def plant(patch):
        fill = Buffer.fill

        def early(self, holder, version, start):
            fill(self, holder, version, lambda after: start([] if self.name.startswith(kind) else after))

        patch.setattr(Buffer, "fill", early)

    plant.__name__ = f"{kind}_reused_early"
    return plant


def gradients_overwritten_on_their_way(patch):
    """Three things: with backward behind its last gradients but one no buffer is reused early, and the disk is fast."""
    buffers_reused_early("sending")(patch)
    patch.setattr(Sums, "after", lambda self: [])
    writer = DiskTier.writer

    def slow(self, offset, memory):  # random delays alone put a write behind two layers' backward once in thirty runs
        write = writer(self, offset, memory)
        return lambda: (time.sleep(0.01), write())

    patch.setattr(DiskTier, "writer", slow)


@pytest.mark.parametrize(
    ("race", "name"),
    [
        (slot_released_before_its_arithmetic, "host"),
        (arithmetic_ahead_of_the_copy, "host"),
        (arithmetic_ahead_of_the_copy, "state on the host"),
        (gather_ahead_of_the_update, "host"),
        (gather_ahead_of_the_update, "state on the disk"),
        (update_ahead_of_its_gradients, "host"),
        (update_ahead_of_its_gradients, "disk"),
        (buffers_reused_early("fetching"), "disk"),
        (buffers_reused_early("staging"), "disk"),
        (gradients_overwritten_on_their_way, "disk"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_planted_races_are_caught(race, name, tmp_path, monkeypatch):
    want = run(name, CpuDevice(ARENA, serial=True), tmp_path, **STEPS[0])
    race(monkeypatch)
    for seed in range(6):
        device = CpuDevice(ARENA, hunt=seed)
        try:
            assert_same(run(name, device, tmp_path, **STEPS[0]), want)
        except (AssertionError, RuntimeError):
            return
        finally:
            device.close()
    pytest.fail("six seeds found nothing")
