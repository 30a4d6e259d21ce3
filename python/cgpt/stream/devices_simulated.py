"""A device with a clock instead of time: what a schedule takes on links and processors of given speed.

    lane      start = max(the caller's clock, end of the lane's last work, ends of what it stands behind)
    compute   the same, but the caller waits for the lanes that it stands behind
    end       = start + latency + bytes / rate, or FLOPs / rate; host memory knows no latency

As with a GPU, the caller enqueues arithmetic and goes on: its own clock moves only where it waits for a lane, or reads
a number. With half duplex, down and up take turns. Everything is done at once on the caller's thread, so numbers are
right while the clock runs as the lanes would, which too do one thing at a time, in the order of submission.
"""

from __future__ import annotations

import torch

from cgpt.stream.devices import Device, Event
from cgpt.stream.forecast import Rates


class ClockEvent(Event):
    """Done at a moment of the device's clock, on `lane`."""

    def __init__(self, device: SimulatedDevice, lane: str, at: float):
        super().__init__(device)
        self.lane, self.at = lane, at
        self.end()

    @property
    def done(self) -> bool:
        return self.at <= self._device.caller

    def wait(self) -> None:
        self.settle()
        self._device.check()

    def settle(self) -> None:
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
        self._want_lane(lane)
        self.check()
        rates = self.rates
        speed = rates.memory if lane == "optimizer" else getattr(rates, lane)
        latency = 0.0 if lane == "optimizer" or not nbytes else rates.latency
        row = "link" if rates.half_duplex and lane in ("down", "up") else lane
        begin = max([self.caller, self._free.get(row, 0.0), *(event.at for event in after)])
        try:
            work()
        except BaseException as error:
            self._errors.append(error)
            raise
        end = self._free[row] = begin + latency + nbytes / speed
        self._note(lane, what, begin, end, nbytes)
        return ClockEvent(self, lane, end)

    def compute(self, what, work, after=(), flops=0.0):
        self.check()
        for event in after:
            if event.lane != "compute":
                event.wait()
        begin = max([self.caller, self.now, *(event.at for event in after)])
        result = work()
        end = self._free["compute"] = begin + flops / self.rates.flops
        self._note("compute", what, begin, end, 0, flops)
        return result, ClockEvent(self, "compute", end)

    def numbers(self, value):
        self.caller = max(self.caller, self.now)
        return super().numbers(value)

    def settle(self):
        self.caller = max([self.caller, *self._free.values()])
        self.check()
