"""What the lanes of this machine do in a second, measured before a run, for the forecast that stands beside what the
run then measures.

    down, up       copies of 64 MiB between host and device
    wire           64 MiB gathered from all ranks, and a few bytes, for what any call costs; every rank probes at once
    optimizer      AdamW on 4M parameters in the run's own format, on as many threads as its lane has
    read, write    64 MiB each of the disk tier, both at once as in a run; only what has been written costs a disk
                   anything to read
    compute        the first step's own FLOPs over its own seconds: no model of a GEMM is needed
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from cgpt.stream.devices import ALIGNMENT
from cgpt.stream.format import Format
from cgpt.stream.layout import Layout
from cgpt.stream.needs import BLOCK
from cgpt.stream.rates import Rates
from cgpt.stream.record import Record, dtype_of
from cgpt.stream.store import Store
from cgpt.stream.timeline import Timeline
from cgpt_ext import adamw_

COPY_BYTES, PARAMETERS, REPEATS = 64 << 20, (2048, 2048), 5
NO_DISK = 1e15  # of a placement without one


def probe(store: Store) -> Rates:
    """Rates of `store`'s lanes but for compute's, which is 1. The disk tier's first bytes are overwritten."""
    lanes, nbytes = store.lanes, COPY_BYTES
    pinned = store.device.type == "cuda" and store.host.why_not_pinned is None
    here = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=pinned)
    there = torch.zeros(nbytes, dtype=torch.uint8, device=store.device)
    copies = {"down": lambda: lanes.copy(there, here), "up": lambda: lanes.copy(here, there)}
    rates = {lane: nbytes / _seconds(store, {lane: work})[lane] for lane, work in copies.items()}
    rates |= {"read": NO_DISK, "write": NO_DISK}
    if store.disk is not None:
        size = min(nbytes, store.disk.nbytes // (2 * BLOCK) * BLOCK)  # a tier has several records, each some blocks
        part = here[:size]
        store.disk.writer(size, part)()
        works = {"write": store.disk.writer(0, part), "read": store.disk.reader(size, torch.empty_like(part))}
        rates |= {lane: size / seconds for lane, seconds in _seconds(store, works).items()}
    if store.world.count > 1:
        rates |= _wire(store, there)
    step, moved = _adamw(store.format)
    return Rates(1.0, memory=moved / _seconds(store, {"optimizer": step})["optimizer"], **rates)


def _wire(store: Store, whole: torch.Tensor) -> dict[str, float]:
    """Bytes a second that this rank receives in large collectives, and seconds of the smallest."""
    rank, ranks = store.world.rank, store.world.count

    def gather(size: int) -> float:
        part = whole[rank * size : (rank + 1) * size]
        return _seconds(store, {"wire": lambda: store.world.all_gather(whole[: ranks * size], part)})["wire"]

    size = whole.numel() // ranks
    latency = gather(ALIGNMENT)
    return {"wire": (ranks - 1) * size / max(1e-9, gather(size) - latency), "wire_latency": latency}


def _adamw(format: Format) -> tuple[Callable[[], None], int]:
    """A step on PARAMETERS, and the bytes that it moves."""
    layout = Layout.of({"weight": PARAMETERS})
    record = Record(layout, format, torch.zeros(layout.size * format.record, dtype=torch.uint8))
    group, _ = record.groups()
    gradients = [torch.zeros(PARAMETERS, dtype=dtype_of(format))]
    options = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    options |= {"masters": group.masters, "lows": group.lows}
    if format.moments == "bf16":
        options["stochastic_rounding_seed"] = 0

    def step() -> None:
        adamw_(group.working, gradients, group.exp_avg, group.exp_avg_sq, 1, **options)

    return step, layout.size * format.traffic


def flops_of(timeline: Timeline, step: int) -> float:
    """FLOP/s of the arithmetic in a step that was marked."""
    spans = [span for span in timeline.spans(step) if span.lane == "compute" and span.flops]
    return sum(span.flops for span in spans) / max(1e-9, sum(span.end - span.begin for span in spans))


def _seconds(store: Store, works: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Medians of a few runs of all the works at once, after one that touches the memory. The clock is read by the lane
    itself, before and after: a lane's next job begins when the last has ended, copies on a stream among them."""
    read: dict[str, list[float]] = {lane: [] for lane in works}
    for _ in range(REPEATS + 1):
        events = []
        for lane, work in works.items():
            clock = read[lane]
            for job in (lambda clock=clock: clock.append(time.perf_counter()), work):
                store.lanes.submit(lane, "probe", job)
            events.append(store.lanes.submit(lane, "probe", lambda clock=clock: clock.append(time.perf_counter())))
        for event in events:
            event.wait()
    return {
        lane: statistics.median(end - begin for begin, end in zip(clock[2::2], clock[3::2], strict=True))
        for lane, clock in read.items()
    }
