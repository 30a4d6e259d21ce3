"""A CUDA device: a stream for each lane, held by a thread that waits for what stands before and behind its work."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

import torch

from cgpt.stream.cores import usable_cores
from cgpt.stream.devices import CpuDevice, Event

PIECE = 1 << 30  # bytes from the start of a host arena that are registered with CUDA at once (csrc/host/arena.cpp)


class StreamEvent(Event):
    """What has been enqueued on the compute stream by now."""

    def __init__(self, device: CudaDevice, what: str = ""):
        super().__init__(device, what)
        self.recorded = torch.cuda.Event(enable_timing=device.timeline is not None)
        self.recorded.record(torch.cuda.current_stream(device.torch_device))

    @property
    def done(self) -> bool:
        return self.recorded.query()

    def wait(self) -> None:
        self.settle()
        self._device.check()

    def settle(self) -> None:
        self.recorded.synchronize()


class CudaDevice(CpuDevice):
    """Compute is the caller's current stream, and returns as soon as the work is enqueued there.

    A lane's thread waits for its stream before it ends an event, so an event of any lane means data that is there, and
    tensors that a lane's work holds live until it is done with them. Spans of the arithmetic are the device's own
    times, noted when they are known: at the latest by `settle`.
    """

    def __init__(self, index: int, arena_bytes: int, *, optimizer_threads: int | None = None, **options):
        threads = optimizer_threads or max(1, usable_cores() - 2)  # but for this thread, and copies
        self._start(torch.device("cuda", index), arena_bytes, threads, options)
        self._streams: dict[str, torch.cuda.Stream] = {}
        self._unnoted: deque[tuple[str, StreamEvent, StreamEvent, float]] = deque()
        self._reference: tuple[StreamEvent, float] | None = None  # one moment, on the device's clock and on the host's
        self._in_flight = threading.local()  # .tensors: those of a lane's copies that its stream may not be done with
        # The lanes' streams do not wait for the one that has just filled the arena with zeros.
        torch.cuda.current_stream(self.torch_device).synchronize()

    def copy(self, there, here):
        """Both are kept until the lane's stream is done with them: freed before, a gradient's memory would go to the
        next tensor of the compute stream, which knows nothing of this copy. Memory that is registered and memory that
        is not cannot be copied at once (CUDA driver API, "API synchronization behavior"), so a copy ends where a piece
        does."""
        self._in_flight.tensors.append((there, here))
        host = there if _on_host(there) else here
        start = host.data_ptr() - host.untyped_storage().data_ptr()
        if start % PIECE + host.nbytes <= PIECE:
            there.copy_(here, non_blocking=True)
            return
        there, here, done = there.view(-1), here.view(-1), 0
        while done < host.numel():
            end = min(host.numel(), done + (PIECE - (start + done * host.itemsize) % PIECE) // host.itemsize)
            there[done:end].copy_(here[done:end], non_blocking=True)
            done = end

    def numbers(self, value):
        found = super().numbers(value)
        self._note_arithmetic()  # whoever asks next what a step took gets all of it
        return found

    def settle(self):
        super().settle()
        torch.cuda.current_stream(self.torch_device).synchronize()
        self._note_arithmetic()
        if not self._unnoted:
            self._reference = None  # a fresh one keeps rounding from adding up

    def _stand_behind(self, event: Event) -> None:
        if isinstance(event, StreamEvent):  # the stream waits, not the caller, who is to run ahead
            torch.cuda.current_stream(self.torch_device).wait_event(event.recorded)
        else:
            event.wait()

    def _arithmetic(self, what, work, flops):
        if self.timeline is None:
            return work(), StreamEvent(self, f"compute {what}")
        if self._reference is None:
            now = StreamEvent(self)
            now.settle()
            self._reference = now, time.perf_counter()
        begin = StreamEvent(self)
        result = work()
        end = StreamEvent(self, f"compute {what}")
        self._unnoted.append((what, begin, end, flops))
        self._note_arithmetic()
        return result, end

    def _note_arithmetic(self) -> None:
        """Notes what is done. CUDA tells times apart in fp32 milliseconds: exact enough from one span to the next."""
        while self._unnoted and self._unnoted[0][2].done:
            what, begin, end, flops = self._unnoted.popleft()
            reference, at = self._reference
            began = at + reference.recorded.elapsed_time(begin.recorded) / 1e3
            ended = began + begin.recorded.elapsed_time(end.recorded) / 1e3
            self._reference = end, ended
            self._note("compute", what, began, ended, 0, flops)

    def _do(self, lane: str, work: Callable[[], None]) -> None:
        if lane not in self._streams:
            self._streams[lane] = torch.cuda.Stream(self.torch_device)
        # The device by itself: leaving a stream alone would make device 0 current, and give it a context.
        with torch.cuda.device(self.torch_device), torch.cuda.stream(self._streams[lane]):
            self._in_flight.tensors = []
            try:
                work()
            finally:  # what it has enqueued before it failed still uses its tensors
                self._streams[lane].synchronize()
                self._in_flight.tensors = []


def _on_host(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"
