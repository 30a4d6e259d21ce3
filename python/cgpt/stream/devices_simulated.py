"""A device with a clock instead of time: what a schedule takes on links and processors of given speed.

    lane      start = max(the caller's clock, end of the lane's last work, ends of what it stands behind)
    compute   the same, but the caller waits for the lanes that it stands behind
    end       = start + latency + bytes / rate, or FLOPs / rate; host memory knows no latency

As with a GPU, the caller enqueues arithmetic and goes on: its own clock moves only where it waits for a lane, or reads
a number. With half duplex, down and up take turns. Everything is done at once on the caller's thread, so numbers are
right while the clock runs as the lanes would, which too do one thing at a time, in the order of submission.

Ranks are threads, each with its device; `together` starts them. What they exchange is real. A collective begins when
the last rank comes to it and ends for all when the one that receives most has it all.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from cgpt.stream.devices import Device, Event
from cgpt.stream.rates import Rates
from cgpt.world import World

Result = TypeVar("Result")


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
    """rates: bytes and FLOPs a second of every lane. caller: the clock of whoever submits and computes, seconds. world:
    whose collectives the lane `wire` is for."""

    def __init__(self, rates: Rates, arena_bytes: int, *, world: SimulatedWorld | None = None, **options):
        super().__init__(torch.device("cpu"), arena_bytes, **options)
        self.rates, self.caller, self.world = rates, 0.0, world
        if world is not None:
            world.device = self
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
        if lane == "wire":  # a rank that receives nothing takes part
            latency = rates.wire_latency
        row = "link" if rates.half_duplex and lane in ("down", "up") else lane
        begin = max([self.caller, self._free.get(row, 0.0), *(event.at for event in after)])
        longest = nbytes
        try:
            if lane == "wire" and self.world is not None:
                begin, longest = map(max, zip(*self.world.meet((begin, nbytes)), strict=True))
            work()
        except BaseException as error:
            self._errors.append(error)
            raise
        end = self._free[row] = begin + latency + longest / speed
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


class SimulatedWorld(World):
    """One of several ranks in one process, on one machine. device: its own, once there is one."""

    def __init__(self, rank: int, meeting: _Meeting):
        self.rank = self.local_rank = rank
        self.count = self.local_count = meeting.count
        self.sent, self.device, self._meeting = 0, None, meeting

    def meet(self, value: Result) -> list[Result]:
        """What every rank brings, in rank order, once all have come. Raises BrokenBarrierError where one never will."""
        return self._meeting.meet(self.rank, value)

    def all_gather(self, whole, part):
        parts = self.meet(part)
        if {self.count * len(piece) for piece in parts} != {whole.numel()}:
            raise ValueError(
                f"all_gather: wanted equal parts of {whole.numel()}, got {[len(piece) for piece in parts]}"
            )
        for there, piece in zip(whole.tensor_split(self.count), parts, strict=True):
            if there.data_ptr() != piece.data_ptr():
                there.copy_(piece)
        self.sent += part.nbytes * (self.count - 1)
        self.meet(None)  # nobody changes a part that another has still to copy

    def exchange(
        self, received: Tensor, sent: Tensor, received_sizes: Sequence[int], sent_sizes: Sequence[int]
    ) -> None:
        pieces = [tensor.split(list(sizes))[self.rank] for tensor, sizes in self.meet((sent, sent_sizes))]
        if [len(piece) for piece in pieces] != list(received_sizes):
            raise ValueError(f"exchange: wanted {list(received_sizes)} elements, got {[len(p) for p in pieces]}")
        for there, piece in zip(received.split(list(received_sizes)), pieces, strict=True):
            there.copy_(piece)
        self.sent += (sum(sent_sizes) - sent_sizes[self.rank]) * sent.itemsize
        self.meet(None)

    def tell(self, value: Any) -> list[Any]:
        told = self.meet((json.dumps(value), self.device.caller if self.device else 0.0))
        if self.device is not None:
            self.device.caller = max(at for _, at in told)
        return [json.loads(text) for text, _ in told]


class _Meeting:
    """Where `count` threads wait for one another."""

    def __init__(self, count: int):
        self.count = count
        self._changed = threading.Condition()
        self._come: dict[int, Any] = {}
        self._last: list[Any] = []
        self._times = 0
        self._left: list[int] = []

    def meet(self, rank: int, value: Any) -> list[Any]:
        with self._changed:
            this = self._times
            self._come[rank] = value
            if len(self._come) == self.count:
                self._last = [self._come[r] for r in range(self.count)]  # until all have come again
                self._come, self._times = {}, this + 1
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._times > this or self._left)
            if self._times == this:
                raise threading.BrokenBarrierError(f"rank {rank} waits for rank {self._left[0]}, which has left")
            return self._last

    def leave(self, rank: int) -> None:
        with self._changed:
            self._left.append(rank)
            self._changed.notify_all()


def together(count: int, work: Callable[[SimulatedWorld], Result]) -> list[Result]:
    """`work` of every rank, on a thread each; their results in rank order. Raises what the first rank to fail did."""
    meeting = _Meeting(count)
    results: list[Any] = [None] * count
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(SimulatedWorld(rank, meeting))
        except BaseException as error:  # of any kind: whoever started the ranks must get it
            errors.append(error)
        finally:
            meeting.leave(rank)

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
