"""How long a step will take, lane by lane, from what each lane has to move: the executor's walk on a virtual clock.

P parameters that a layer multiplies, T tokens a visit, F FLOP/s, w bytes of a weight, B bytes/s of the link, W of DRAM.

    compute      2 P T forward, 4 P T backward, 2 P T more where recomputed; the head 6 P T at once; an embedding none
    down         w P forward and w P backward where streamed; inputs where they wait on the host; partial sums, 4 P,
                 from the second visit on
    up           w P of gradients in the last visit, 4 P of partial sums in those before; inputs in forward
    optimizer    2 x the record + w bytes an element (26 with a split master), in forward order, ahead of the weights
    read, write  whole records, and their gradients in a step of one visit; weights that wait on the disk

    weights hide behind forward    T >= F w / 2B        and behind backward    T >= F w / 6B
    AdamW hides behind backward    T >= 26 F / 6W       behind the next forward    T >= 26 F / 2W

Each lane does one thing at a time, in order, once what it needs is there; a layer's weights come as soon as one of two
slots is free. The step is the time between the ends of two consecutive ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cgpt.stream.format import Format
from cgpt.stream.layout import LayerPlan
from cgpt.stream.needs import AHEAD, SLOTS, STAGING, disk_bytes, streamed
from cgpt.stream.placement import Placement

LANES = ("compute", "down", "up", "optimizer", "read", "write")
STEPS = 3  # until the virtual clock has settled
VISITS = 3  # simulated: the first, one for all in the middle, the last
BOUND = 0.02  # of a step: arithmetic that waits less than this is what binds

When = tuple[float, str]  # when something is done, and the lane that it waited for last


@dataclass(frozen=True)
class Rates:
    """What a device does in a second: flops sustained; bytes down to it and up from it, of host memory (the
    optimizer's), read from and written to the disk. latency: seconds a transfer."""

    flops: float
    down: float
    up: float
    memory: float
    read: float
    write: float
    latency: float = 0.0
    half_duplex: bool = False


@dataclass(frozen=True)
class Forecast:
    """One step in its steady state. Seconds, but where said.

    lanes: each lane's busy time. stalls: how long the arithmetic waits, by the lane that it waits for. fill: of that,
    before the first block's arithmetic. disk_read, disk_written: bytes.
    """

    seconds: float
    tokens: float
    lanes: dict[str, float]
    stalls: dict[str, float]
    fill: float
    disk_read: float
    disk_written: float

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
    """A step's work beside the placement. tokens: of a step. width: of activations between layers. attention: FLOPs a
    token of a block's forward beside 2 P. device_memory: bytes/s, for AdamW on the device; None: it takes no time."""

    format: Format
    tokens: float
    width: int
    attention: float = 0.0
    device_memory: float | None = None


def forecast(plans: Sequence[LayerPlan], placement: Placement, rates: Rates, work: Work) -> Forecast:
    """One step in its steady state: simulated, but for visits in the middle, which are alike."""
    return _Walk(plans, placement, rates, work).forecast()


def exposed_optimizer(plans: Sequence[LayerPlan], placement: Placement, rates: Rates, work: Work) -> float:
    """Seconds that a step would save if AdamW on the host took no time."""
    there, free = (forecast(plans, placement, r, work) for r in (rates, replace(rates, memory=math.inf)))
    return max(0.0, there.seconds - free.seconds)


def hides(rates: Rates, format: Format | None = None, away: float = 1.0, visits: int = 1) -> dict[str, float]:
    """Tokens a visit from which on each lane hides; away: the share of weights that is streamed (section heads)."""
    format = format or Format()
    working = format.working
    down = working * away + (4 if visits > 1 else 0)
    up = 4 if visits > 1 else working
    return {
        "down in forward": working * away * rates.flops / (2 * rates.down),
        "down in backward": down * rates.flops / (6 * rates.down),
        "up in backward": up * rates.flops / (6 * rates.up),
        "optimizer in forward": format.traffic * rates.flops / (2 * rates.memory),
    }


class _Walk:
    """The virtual clock: one time a lane at which it is free, and what the executor hands to each, in its order."""

    def __init__(self, plans: Sequence[LayerPlan], placement: Placement, rates: Rates, work: Work):
        self.plans, self.place, self.rates, self.work = plans, placement, rates, work
        self.tokens = work.tokens / placement.visits
        self.visits = min(placement.visits, VISITS)
        self.working, self.record, self.traffic = work.format.working, work.format.record, work.format.traffic
        self.slots = [sum(plans[i].owned.size for i in streamed(plan, placement)) * self.working for plan in plans]
        self.owners = [plan.owners for plan in plans]
        self.reads = [plan.reads.parameters for plan in plans]
        self.owned = [plan.owned.parameters for plan in plans]
        self.head = len(plans) - 1
        self.between = self.tokens * work.width * self.working
        self.free = dict.fromkeys(LANES, 0.0)
        self.caller = 0.0  # the clock of whoever submits: it waits for what arithmetic needs, and for the norm
        self.begin: When = (0.0, "compute")
        self.later: list[int] = []  # layers on the disk whose updates wait for the walk to come near
        n = len(plans)
        self.weights: list[When] = [self.begin] * n  # the record's weights are up to date
        self.written: list[When] = [self.begin] * n  # and all of the record, on the disk too
        self.fresh: list[When | None] = [None] * n  # the kept copy, None: to be renewed
        self.users: list[When] = [self.begin] * SLOTS  # ends of the last uses of the slots
        self.staging: list[When] = [self.begin] * STAGING
        self.fetching: list[When] = [self.begin] * SLOTS
        self.sending: list[When] = [self.begin] * SLOTS
        self.reset()

    def reset(self) -> None:
        """Counts of a step begin anew."""
        self.counts = {kind: dict.fromkeys(LANES, 0.0) for kind in ("busy", "stalls", "bytes")}
        self.fill: float | None = None

    def forecast(self) -> Forecast:
        end = 0.0
        for _ in range(STEPS):
            self.reset()
            before, end = end, self.step()
        more = self.place.visits - self.visits
        first, middle = (self.until[0], self.until[1]) if more else (self.until[0], self.until[0])

        def whole(kind: str) -> dict[str, float]:
            counts = self.counts[kind]
            return {lane: counts[lane] + more * (middle[1][kind][lane] - first[1][kind][lane]) for lane in LANES}

        moved = whole("bytes")
        return Forecast(
            end - before + more * (middle[0] - first[0]),
            self.work.tokens,
            whole("busy"),
            whole("stalls"),
            self.fill or 0.0,
            moved["read"],
            moved["write"],
        )

    def step(self) -> float:
        """All visits, then the updates; returns when the gradients' norm is known."""
        self.sent: list[When] = []
        self.until: list[tuple[float, dict[str, dict[str, float]]]] = []  # clock and counts at the end of each visit
        self.gradients = [self.begin] * len(self.plans)
        self.parked: dict[int, When] = {}
        for left in reversed(range(self.visits)):
            self.visit(last=left == 0)
            self.until.append((self.free["compute"], {kind: dict(row) for kind, row in self.counts.items()}))
        end = self.free["compute"]
        self.caller, self.begin = end, (end, "compute")
        for index, home in enumerate(self.place.state):
            if home == "disk":
                self.later.append(index)
            else:
                self.update(index)
        return end

    def run(self, lane: str, seconds: float, *after: When) -> When:
        """Occupies a lane; the lane named is the one that held it up last."""
        start, why = self.free[lane] if lane == "compute" else max(self.free[lane], self.caller), lane
        for end, cause in after:
            if end > start:
                start, why = end, lane if cause == "compute" else cause
        if lane == "compute":
            self.caller = max([self.caller, *(end for end, _ in after)])
            self.counts["stalls"][why] += start - self.free[lane]
        self.counts["busy"][lane] += seconds
        self.free[lane] = start + seconds
        return self.free[lane], why

    def move(self, lane: str, nbytes: float, *after: When, times: int = 1) -> When:
        """One transfer, or several in a row; both directions of a half-duplex link are one lane in two books."""
        links = ("down", "up")
        if self.rates.half_duplex and lane in links:
            self.free[lane] = max(self.free[link] for link in links)
        self.counts["bytes"][lane] += nbytes
        rate = getattr(self.rates, "memory" if lane == "optimizer" else lane)
        latency = times * self.rates.latency if lane in links else 0.0
        done = self.run(lane, nbytes / rate + latency, *after)
        if self.rates.half_duplex and lane in links:
            self.free |= dict.fromkeys(links, done[0])
        return done

    def visit(self, last: bool) -> None:
        order = [*range(self.head + 1), *reversed(range(self.head))]
        self.made: When = self.begin
        self.ends: list[When] = []  # of the turns
        self.saved: dict[int, When] = {}
        ahead = self.gather(order, 0)
        for place, index in enumerate(order):
            here, ahead = ahead, self.gather(order, place + 1)
            backward = place > self.head
            if backward:
                here = [*here, *self.sent[-2:-1]]
            self.made = self.run("compute", self.arithmetic(index, backward) / self.rates.flops, *here)
            if place == 1 and self.fill is None:
                self.fill = sum(self.counts["stalls"].values())
            self.ends.append(self.made)
            if self.slots[index]:
                self.users.append(self.made)
            if place < self.head and self.away(index):
                before, rows = self.ends[place - 1], self.place.micro_batches
                self.saved[index] = self.move("up", self.between, before, times=rows)
            if place >= self.head:
                self.send(index, last)

    def away(self, index: int) -> bool:
        """Whether a layer's inputs wait on the host."""
        inside = 0 < index < self.head
        return inside and self.place.activations == "host" and self.place.recompute[index]

    def arithmetic(self, index: int, backward: bool) -> float:
        multiplied = self.reads[index] if index else 0
        if index == self.head:
            return 6 * multiplied * self.tokens
        passes = (3 if self.place.recompute[index] else 2) if backward else 1
        return passes * (2 * multiplied + (self.work.attention if index else 0.0)) * self.tokens

    def gather(self, order: list[int], place: int) -> list[When]:
        """Everything that the turn at `place` must wait for."""
        if place == len(order):
            return []
        index, after = order[place], []
        while self.later and self.later[0] <= index + AHEAD:
            self.update(self.later.pop(0))
        for owner in self.owners[index]:
            if self.place.weights[owner] == "device" and self.place.state[owner] != "device":
                if self.fresh[owner] is None:
                    nbytes = self.plans[owner].owned.size * self.working
                    self.fresh[owner] = self.move("down", nbytes, self.weights[owner])
                after.append(self.fresh[owner])
            elif self.place.weights[owner] == "device":
                after.append(self.weights[owner])
        if self.slots[index]:
            after.append(self.fetch(index))
        if place > self.head and index in self.saved:
            free, rows = self.ends[place - 2], self.place.micro_batches
            after.append(self.move("down", self.between, self.saved.pop(index), free, times=rows))
        if place >= self.head and index in self.parked:
            nbytes = self.reads[index] * 4
            room = self.free["compute"], "compute"  # torch's allocator gives it in the order of the arithmetic
            after.append(self.move("down", nbytes, self.parked.pop(index), room))
        return after

    def fetch(self, index: int) -> When:
        """A layer's weights into the slot that has been free longest."""
        ready, reads = [self.users[-SLOTS]], 0
        for owner in self.owners[index]:
            if self.place.weights[owner] == "disk":
                nbytes = disk_bytes(self.plans[owner].owned.size * self.working)
                read = self.move("read", nbytes, self.written[owner], self.fetching[-SLOTS])
                self.fetching.append(read)
                ready.append(read)
                reads += 1
            elif self.place.weights[owner] == "host":
                ready.append(self.weights[owner])
        away = [owner for owner in self.owners[index] if self.place.weights[owner] != "device"]
        done = self.move("down", self.slots[index], *ready, times=len(away))
        self.fetching[len(self.fetching) - reads :] = [done] * reads  # free once copied
        return done

    def send(self, index: int, last: bool) -> None:
        """A layer's gradients, or their partial sums, to the host."""
        if self.place.state[index] == "device":
            return
        nbytes = self.owned[index] * self.working if last else self.reads[index] * 4
        if self.beside(index):
            sent = self.move("up", nbytes, self.made, self.sending[-SLOTS])
            nbytes = disk_bytes(self.plans[index].owned.size * self.working)
            done = self.move("write", nbytes, sent, self.written[index])
            self.sending.append(done)
        else:
            done = self.move("up", nbytes, self.made, self.written[index])
        self.sent.append(done)
        if last:
            self.gradients[index] = done
        else:
            self.parked[index] = done

    def beside(self, index: int) -> bool:
        """Whether a layer's gradients wait on the disk, behind its record."""
        return self.place.state[index] == "disk" and self.place.visits == 1

    def update(self, index: int) -> None:
        """AdamW on a record, where it lives."""
        size, home = self.plans[index].owned.size, self.place.state[index]
        self.fresh[index] = None
        if home == "device":
            rate = self.work.device_memory
            done = self.run("compute", size * self.traffic / rate if rate else 0.0)
            self.weights[index] = self.written[index] = done
            return
        after = [self.gradients[index]]
        if home == "disk":
            nbytes = disk_bytes(size * self.record)
            if self.beside(index):
                with_gradients = nbytes + disk_bytes(size * self.working)
                after = [self.move("read", with_gradients, *after, self.staging[-STAGING], self.written[index])]
            else:
                after.append(self.move("read", nbytes, self.staging[-STAGING], self.written[index]))
        done = self.move("optimizer", size * self.traffic, *after)
        self.weights[index] = self.written[index] = done
        if home == "disk":
            self.written[index] = self.move("write", nbytes, done)
            self.staging.append(self.written[index])
            if self.place.weights[index] == "disk":
                self.weights[index] = self.written[index]
