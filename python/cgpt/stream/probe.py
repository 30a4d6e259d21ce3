"""What the lanes of this machine do in a second, measured before a run, for the forecast that stands beside what the
run then measures.

    down, up       copies of 64 MiB between host and device
    optimizer      AdamW on 4M parameters of a split master, 26 bytes each, on as many threads as its lane has
    read, write    64 MiB of the disk tier, before anything lies there
    compute        the first step's own FLOPs over its own seconds: no model of a GEMM is needed
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from cgpt.stream.forecast import Rates
from cgpt.stream.store import Store
from cgpt.stream.timeline import Timeline
from cgpt_ext import adamw_

COPY_BYTES, PARAMETERS, REPEATS = 64 << 20, 4 << 20, 5
NO_DISK = 1e15  # of a placement without one


def probe(store: Store) -> Rates:
    """Rates of `store`'s lanes but for compute's, which is 1. The disk tier's first bytes are overwritten."""
    lanes, nbytes = store.lanes, COPY_BYTES
    here = torch.zeros(nbytes, dtype=torch.uint8)
    there = torch.zeros(nbytes, dtype=torch.uint8, device=store.device)
    read = write = NO_DISK
    if store.disk is not None:
        part = here[: min(nbytes, store.disk.nbytes)]
        write = part.nbytes / _seconds(store, "write", store.disk.writer(0, part))
        read = part.nbytes / _seconds(store, "read", store.disk.reader(0, part))
    down = nbytes / _seconds(store, "down", lambda: lanes.copy(there, here))
    up = nbytes / _seconds(store, "up", lambda: lanes.copy(here, there))
    weights = [torch.zeros(PARAMETERS, dtype=dtype) for dtype in (torch.bfloat16, torch.int16, torch.bfloat16)]
    moments = [torch.zeros(PARAMETERS) for _ in range(2)]

    def step() -> None:
        high, low, gradient = weights
        numbers = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
        adamw_([high], [gradient], [moments[0]], [moments[1]], 1, lows=[low], **numbers)

    return Rates(1.0, down, up, 26 * PARAMETERS / _seconds(store, "optimizer", step), read, write)


def flops_of(timeline: Timeline, step: int) -> float:
    """FLOP/s of the arithmetic in a step that was marked."""
    spans = [span for span in timeline.spans(step) if span.lane == "compute" and span.flops]
    return sum(span.flops for span in spans) / max(1e-9, sum(span.end - span.begin for span in spans))


def _seconds(store: Store, lane: str, work: Callable[[], None]) -> float:
    """Median of a few runs on the lane's own thread, after one that touches the memory."""

    def once() -> float:
        begin = time.perf_counter()
        store.lanes.submit(lane, "probe", work).wait()
        return time.perf_counter() - begin

    once()
    return statistics.median(once() for _ in range(REPEATS))
