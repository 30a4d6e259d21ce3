"""Where the arithmetic is done, and the lanes that work beside it.

    compute                the caller's own thread
    down, up               copies between host and device
    optimizer              AdamW on the host
    read, write            the disk's

A lane does its work in the order of submission, each piece once the events it stands behind are done. Events are of
work that was submitted before, so lanes cannot wait for each other in a circle. An error in a lane stops the device:
whoever waits, or submits, or computes gets it, and nothing hangs.

    CpuDevice    lanes are threads; a bounded arena of host memory stands for a device's
    CudaDevice   lanes are threads with a stream each (devices_cuda.py)
    Simulated    everything is done at once, on a clock that counts bytes and FLOPs (devices_simulated.py)

Hunting for races: every piece of work first waits a random moment, and released memory is filled with NaN, so that
whoever reads too early or too late computes something else than in `serial` mode.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import TypeVar

import torch
from torch import Tensor

from cgpt.errors import InputError
from cgpt.stream.timeline import Timeline
from cgpt_ext import _native

LANES = ("down", "up", "optimizer", "read", "write")
ALIGNMENT = 128  # bytes
LONGEST_DELAY = 0.002  # seconds; hunting

Result = TypeVar("Result")


class Event:
    """The end of a piece of work."""

    def __init__(self, device: Device):
        self._device, self._over = device, threading.Event()

    @property
    def done(self) -> bool:
        return self._over.is_set()

    def wait(self) -> None:
        """Until it is done. Raises what stopped the device."""
        self._over.wait()
        self._device.check()

    def settle(self) -> None:
        """Until it is done or the device has stopped; for lanes, which raise nothing."""
        self._over.wait()

    def end(self) -> None:
        self._over.set()


class Device:
    """What all devices have: a bounded arena, lanes, and the memory of the first error.

    torch_device: of tensors that modules compute with. arena_bytes: all that `allocate` will ever give, taken at once.
    timeline: where spans are noted. hunt: a seed, for the mode that looks for races. serial: everything is done when it
    is submitted, on the caller's thread.
    """

    def __init__(
        self,
        torch_device: torch.device,
        arena_bytes: int,
        *,
        timeline: Timeline | None = None,
        hunt: int | None = None,
        serial: bool = False,
    ):
        self.torch_device, self.timeline, self.serial = torch_device, timeline, serial
        self.arena_bytes, self.taken = arena_bytes, 0
        self.hunting = hunt is not None
        self._draws = {lane: random.Random(f"{hunt} {lane}") for lane in ("compute", *LANES)}
        self._error: BaseException | None = None
        self._arena = self._make_arena(arena_bytes)

    def _make_arena(self, nbytes: int) -> Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8, device=self.torch_device)

    def allocate(self, nbytes: int) -> Tensor:
        """uint8, zero, from a multiple of 128 bytes. Raises InputError with both numbers where less is left."""
        start = -(-self.taken // ALIGNMENT) * ALIGNMENT
        if start + nbytes > self.arena_bytes:
            left = max(0, self.arena_bytes - start)
            raise InputError(f"device memory: wanted {nbytes:,} bytes more, got {left:,} of {self.arena_bytes:,}")
        self.taken = start + nbytes
        # .data counts its versions alone: autograd must not take a change of another part for one of this.
        return self._arena[start : self.taken].data

    def check(self) -> None:
        """Raises what stopped the device, if something did."""
        if self._error is not None:
            raise self._error

    def submit(
        self, lane: str, what: str, work: Callable[[], None], after: Sequence[Event] = (), nbytes: int = 0
    ) -> Event:
        """Puts `work` on a lane, behind the events in `after`, all of work submitted before. nbytes: that it moves."""
        raise NotImplementedError

    def compute(
        self, what: str, work: Callable[[], Result], after: Sequence[Event] = (), flops: float = 0.0
    ) -> tuple[Result, Event]:
        """Does `work` on the caller's thread, behind `after`; returns its result and the event behind which it is
        there."""
        raise NotImplementedError

    def copy(self, there: Tensor, here: Tensor) -> None:
        """From host to device or back, within a lane's work; there when that work is done."""
        there.copy_(here)

    def number(self, value: Tensor) -> float:
        """What the arithmetic has come to, for the caller to read."""
        return value.item()

    def poison(self, memory: Tensor) -> None:
        """Hunting: fills released memory with NaN."""
        if self.hunting:
            memory.view(torch.uint8).fill_(255)

    def settle(self) -> None:
        """Waits for everything submitted. Raises what stopped the device."""
        self.check()

    def close(self) -> None:
        """Ends the lanes, once they have settled. Raises nothing; may be called again."""

    def _delay(self, lane: str) -> None:
        if self.hunting and self._draws[lane].random() < 0.5:
            time.sleep(self._draws[lane].random() * LONGEST_DELAY)

    def _note(self, lane: str, what: str, begin: float, end: float, nbytes: int = 0, flops: float = 0.0) -> None:
        if self.timeline is not None:
            self.timeline.record(lane, what, begin, end, nbytes, flops)


class CpuDevice(Device):
    """The CPU, with a thread a lane.

    optimizer_threads: that AdamW's lane may use beside itself (default: half the cores this process may use). Copies
    take one: OpenMP's idle threads spin, and pools of several lanes on two cores cost twelve times the work.
    """

    def __init__(self, arena_bytes: int, *, optimizer_threads: int | None = None, **options):
        super().__init__(torch.device("cpu"), arena_bytes, **options)
        self.optimizer_threads = optimizer_threads or max(1, len(os.sched_getaffinity(0)) // 2)
        self._queues: dict[str, SimpleQueue] = {}
        self._threads: dict[str, threading.Thread] = {}
        self._last: dict[str, Event] = {}

    def submit(self, lane, what, work, after=(), nbytes=0):
        self.check()
        event = Event(self)
        if self.serial:
            self._do(lane, what, work, nbytes)
            event.end()
            self.check()
            return event
        if lane not in self._threads:
            self._open(lane)
        self._last[lane] = event
        self._queues[lane].put((what, work, tuple(after), nbytes, event))
        return event

    def compute(self, what, work, after=(), flops=0.0):
        for event in after:
            event.wait()
        self.check()
        self._delay("compute")
        begin = time.perf_counter()
        result = work()
        self._note("compute", what, begin, time.perf_counter(), 0, flops)
        return result, self._computed()

    def settle(self):
        for event in list(self._last.values()):
            event.settle()
        self.check()

    def close(self):
        for lane, thread in self._threads.items():
            self._queues[lane].put(None)
            thread.join()
        self._threads.clear()
        self._queues.clear()

    def _computed(self) -> Event:
        event = Event(self)
        event.end()
        return event

    def _open(self, lane: str) -> None:
        queue = self._queues[lane] = SimpleQueue()
        thread = threading.Thread(target=self._run, args=(lane, queue), name=f"cgpt {lane}", daemon=True)
        self._threads[lane] = thread
        thread.start()

    def _run(self, lane: str, queue: SimpleQueue) -> None:
        _native.set_thread_count(self.optimizer_threads if lane == "optimizer" else 1)
        while (item := queue.get()) is not None:
            what, work, after, nbytes, event = item
            for before in after:
                before.settle()
            if self._error is None:
                self._do(lane, what, work, nbytes)
            event.end()
            item = what = work = after = event = before = None  # a waiting lane must not keep tensors alive

    def _do(self, lane: str, what: str, work: Callable[[], None], nbytes: int) -> None:
        self._delay(lane)
        begin = time.perf_counter()
        try:
            work()
        except BaseException as error:  # of any kind: whoever waits must get it
            if self._error is None:
                self._error = error
        self._note(lane, what, begin, time.perf_counter(), nbytes)


def open_device(name: str, arena_bytes: int, **options) -> Device:
    """The device torch calls `name`, "cpu" or "cuda" or "cuda:1"."""
    kind = torch.device(name)
    if kind.type == "cpu":
        return CpuDevice(arena_bytes, **options)
    from cgpt.stream.devices_cuda import CudaDevice

    return CudaDevice(kind.index or 0, arena_bytes, **options)
