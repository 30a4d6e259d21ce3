"""A device with a clock instead of time: what a schedule takes on links and processors of given speed.

    lane      start = max(the caller's clock, end of the lane's last work, ends of what it stands behind)
    compute   start = max(end of its last work, ends of what it stands behind)
    end       = start + bytes / rate, or FLOPs / rate

As with a GPU, the caller enqueues arithmetic and goes on: its own clock moves only where it waits for a lane, or reads
a number. Everything is done at once on the caller's thread, so numbers are right while the clock runs as the lanes
would, which too do one thing at a time, in the order of submission.
"""

from __future__ import annotations

import torch

from cgpt.stream.devices import Device, Event
from cgpt.stream.forecast import Rates


class ClockEvent(Event):
    """Done at a moment of the device's clock."""

    def __init__(self, device: SimulatedDevice, at: float):
        super().__init__(device)
        self.at = at
        self.end()

    def wait(self) -> None:
        self._device.caller = max(self._device.caller, self.at)


class SimulatedDevice(Device):
    """rates: bytes and FLOPs a second of every lane. caller: the clock of whoever submits and computes, seconds."""

    def __init__(self, rates: Rates, arena_bytes: int, **options):
        super().__init__(torch.device("cpu"), arena_bytes, **options)
        self.rates, self.caller = rates, 0.0
        self._free: dict[str, float] = {}

    @property
    def now(self) -> float:
        """When the arithmetic enqueued so far will be done."""
        return self._free.get("compute", 0.0)

    def submit(self, lane, what, work, after=(), nbytes=0):
        rates = self.rates
        speed = rates.memory if lane == "optimizer" else getattr(rates, lane)
        latency = rates.latency if lane in ("down", "up") else 0.0
        row = "link" if rates.half_duplex and lane in ("down", "up") else lane
        begin = max([self.caller, self._free.get(row, 0.0), *(event.at for event in after)])
        end = self._free[row] = begin + (latency + nbytes / speed if nbytes else 0.0)
        work()
        self._note(lane, what, begin, end, nbytes)
        return ClockEvent(self, end)

    def compute(self, what, work, after=(), flops=0.0):
        begin = max([self.now, *(event.at for event in after)])
        self.caller = max([self.caller, *(event.at for event in after)])
        end = self._free["compute"] = begin + flops / self.rates.flops
        result = work()
        self._note("compute", what, begin, end, 0, flops)
        return result, ClockEvent(self, end)

    def number(self, value):
        self.caller = max(self.caller, self.now)
        return super().number(value)

    def settle(self):
        self.caller = max([self.caller, *self._free.values()])
