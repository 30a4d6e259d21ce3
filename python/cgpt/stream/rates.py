"""What a forecast is given and what it says; and from how many tokens on each lane hides behind the arithmetic.

P parameters of a layer, T tokens a visit, F FLOP/s, w bytes of a weight, B bytes/s of the link, W of DRAM:

    weights hide behind forward    T >= F w / 2B        and behind backward    T >= F w / 6B
    AdamW hides behind backward    T >= 26 F / 6W       behind the next forward    T >= 26 F / 2W

Of N ranks, T are a rank's tokens in k micro-batches of t; s = (N - 1) / N; V bytes/s of the wire each way. What the
link and DRAM have to hide is 1 / N of the above, and

    weights hide behind forward    T >= s w F / 2V
    and gradients behind backward  T >= s w F k / 4V where kept and not recomputed
                                   T >= s w F max(1 + k, 3k / 2) / 6V where streamed: what a layer exchanges in all,
                                   and that weights between two exchanges leave two micro-batches for all three
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cgpt.stream.format import Format

LANES = ("compute", "down", "up", "wire", "optimizer", "read", "write")
BOUND = 0.02  # of a step: arithmetic that waits less than this is what binds


@dataclass(frozen=True)
class Rates:
    """What a device does in a second: flops sustained; bytes down to it and up from it, of host memory (the
    optimizer's), read from and written to the disk. latency: seconds a transfer. wire: bytes received from the other
    ranks while as much is sent to them. wire_latency: seconds a collective of all ranks."""

    flops: float
    down: float
    up: float
    memory: float
    read: float
    write: float
    latency: float = 0.0
    half_duplex: bool = False
    wire: float = math.inf
    wire_latency: float = 0.0


@dataclass(frozen=True)
class Forecast:
    """One step in its steady state. Seconds, but where said.

    lanes: each lane's busy time. stalls: how long the arithmetic waits, by the lane that it waits for. fill: of that,
    before the first block's arithmetic. disk_read, disk_written: bytes, and received: from other ranks.
    """

    seconds: float
    tokens: float
    lanes: dict[str, float]
    stalls: dict[str, float]
    fill: float
    disk_read: float
    disk_written: float
    received: float = 0.0

    @property
    def bound(self) -> float:
        """No schedule is faster than its busiest lane."""
        return max(self.lanes.values())

    @property
    def binding(self) -> str:
        """The lane to make faster: "compute" where the arithmetic hardly waits."""
        if sum(self.stalls.values()) <= BOUND * self.seconds:
            return "compute"
        return max(self.stalls, key=self.stalls.get)


@dataclass(frozen=True)
class Work:
    """A step's work beside the placement. tokens: of a step, of all ranks. width: of activations between layers.
    attention: FLOPs a token of a block's forward beside 2 P. device_memory: bytes/s, for AdamW on the device; None: it
    takes no time. micro_batch_tokens: None where the placement's visits and micro-batches are all full."""

    format: Format
    tokens: float
    width: int
    attention: float = 0.0
    device_memory: float | None = None
    micro_batch_tokens: float | None = None


def hides(
    rates: Rates, format: Format | None = None, away: float = 1.0, visits: int = 1, ranks: int = 1, rows: int = 1
) -> dict[str, float]:
    """A rank's tokens a visit from which on each lane hides; away: the share of weights that is streamed, and so
    recomputed (section heads). rows: micro-batches a visit. Latencies come on top."""
    format = format or Format()
    working, flops = format.working, rates.flops / ranks
    down = working * away + (4 if visits > 1 else 0)
    up = 4 if visits > 1 else working
    received, passes = working * (ranks - 1), 6 if away else 4
    return {
        "down in forward": working * away * flops / (2 * rates.down),
        "down in backward": down * flops / (6 * rates.down),
        "up in backward": up * flops / (6 * rates.up),
        "wire in forward": received * flops / (2 * rates.wire),
        "wire in backward": received * max(away + rows, rows * (1 + away / 2)) * flops / (passes * rates.wire),
        "optimizer in forward": format.traffic * flops / (2 * rates.memory),
    }
