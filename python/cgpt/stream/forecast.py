"""How long a step will take, lane by lane, from what each lane has to move: the executor's walk on a virtual clock.

P parameters that a layer multiplies, T tokens a visit, w bytes of a weight. From when on lanes hide, says rates.py.

    compute      2 P T forward, 4 P T backward, 2 P T more where recomputed; the head 6 P T at once; an embedding none
    down         w P forward and w P backward where streamed; inputs where they wait on the host; partial sums, 4 P,
                 from the second visit on
    up           w P of gradients in the last visit, 4 P of partial sums in those before; inputs in forward
    optimizer    2 x the record + w bytes an element (26 with a split master), in forward order, ahead of the weights
    read, write  whole records, and their gradients in a step of one visit; weights that wait on the disk

Of N ranks this is the first, whose shards and micro-batches are as large as any's: it has ceil(m / N) of a step's m
micro-batches. down, up, AdamW and the disk move its shards, 1 / N of the above; with s = (N - 1) / N,

    wire         s w P where weights are kept on the device, once a step ahead of their first use; forward and backward
                 where streamed, once the rank's own shard has come down; s w P for each micro-batch's gradients;
                 8 s bytes a chunk for the norm

What is exchanged takes no time to add up, behind the next micro-batch's arithmetic.

Each lane does one thing at a time, in order, once what it needs is there; a layer's weights come as soon as one of two
slots is free. The step is the time between the ends of two consecutive ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from cgpt.stream.layout import CHUNK, LayerPlan, Layout, shard_size
from cgpt.stream.needs import AHEAD, SLOTS, STAGING, disk_bytes, streamed, sums_size
from cgpt.stream.placement import Placement
from cgpt.stream.rates import LANES, Forecast, Rates, Work

STEPS = 3  # until the virtual clock has settled
VISITS = 3  # simulated: the first, one for all in the middle, the last
ROWS = 4  # simulated: of a visit's micro-batches where ranks exchange each one's gradients; more go in groups

When = tuple[float, str]  # when something is done, and the lane that it waited for last


def forecast(plans: Sequence[LayerPlan], placement: Placement, rates: Rates, work: Work) -> Forecast:
    """One step in its steady state: simulated, but for visits in the middle, which are alike."""
    return _Walk(plans, placement, rates, work).forecast()


def arithmetic_seconds(plans: Sequence[LayerPlan], placement: Placement, rates: Rates, work: Work) -> float:
    """Of a step: what no forecast is below, and known at once."""
    walk = _Walk(plans, placement, rates, work)
    flops = sum(walk.arithmetic(index, backward) for index in range(walk.head) for backward in (False, True))
    return placement.visits * (flops + walk.arithmetic(walk.head, False)) / rates.flops


def exposed_optimizer(plans: Sequence[LayerPlan], placement: Placement, rates: Rates, work: Work) -> float:
    """Seconds that a step would save if AdamW on the host took no time."""
    there, free = (forecast(plans, placement, r, work) for r in (rates, replace(rates, memory=math.inf)))
    return max(0.0, there.seconds - free.seconds)


class _Walk:
    """The virtual clock: one time a lane at which it is free, and what the executor hands to each, in its order."""

    def __init__(self, plans: Sequence[LayerPlan], placement: Placement, rates: Rates, work: Work):
        self.plans, self.place, self.rates, self.work = plans, placement, rates, work
        self.ranks = placement.ranks
        rounds, tokens = placement.visits * placement.micro_batches, work.tokens / self.ranks
        asked = rounds * self.ranks
        if work.micro_batch_tokens is not None:
            asked = math.ceil(work.tokens / work.micro_batch_tokens)
            rounds = -(-asked // self.ranks)
            tokens = min(work.tokens, rounds * work.micro_batch_tokens)
        idle = max(0, rounds * self.ranks - asked - 1)  # of the last round, beside whoever else receives
        others = self.ranks - 1 - idle / rounds  # that a rank gets gradients from in a round
        self.rows, self.tokens = rounds / placement.visits, tokens / placement.visits  # of this rank, a visit
        self.visits = min(placement.visits, VISITS)
        self.working, self.record, self.traffic = work.format.working, work.format.record, work.format.traffic
        self.streamed = [streamed(plan, placement) for plan in plans]
        self.owners = [plan.owners for plan in plans]
        self.reads = [plan.reads.parameters for plan in plans]
        self.shards = [shard_size(plan.owned.size, self.ranks) for plan in plans]
        self.owned = [_within(plan.owned, shard) for plan, shard in zip(plans, self.shards, strict=True)]
        self.given = [
            [others * self.working * _share(plan, plans[i].owned, self.shards[i]) for i in plan.owners]
            for plan in plans
        ]  # bytes that the gradients of a micro-batch come with, from other ranks
        self.sums = [4 * sums_size(plan, self.shards) for plan in plans]
        self.head = len(plans) - 1
        self.between = self.tokens * work.width * self.working
        self.free = dict.fromkeys(LANES, 0.0)
        self.caller = 0.0  # the clock of whoever submits: it waits for what arithmetic needs, and for the norm
        self.begin: When = (0.0, "compute")
        self.later: list[int] = []  # layers on the disk whose updates wait for the walk to come near
        n = len(plans)
        self.weights: list[When] = [self.begin] * n  # the record's weights are up to date
        self.written: list[When] = [self.begin] * n  # and all of the record, on the disk too
        self.exchanged: tuple[int, bool, When] | None = None  # a layer's gradients to add up; whether they are its last
        self.gradients: list[When] = [self.begin] * n  # where AdamW wants them, in the next step too
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
            moved["wire"],
        )

    def step(self) -> float:
        """All visits, then the updates; returns when the gradients' norm is known."""
        self.sent: list[When] = []
        self.until: list[tuple[float, dict[str, dict[str, float]]]] = []  # clock and counts at the end of each visit
        self.parked: dict[int, When] = {}
        for left in reversed(range(self.visits)):
            self.visit(last=left == 0)
            self.until.append((self.free["compute"], {kind: dict(row) for kind, row in self.counts.items()}))
        if self.ranks > 1:
            numbers = self.rows * self.place.visits + sum(self.shards) / CHUNK  # losses and sums of squares
            told = self.move("wire", 8 * (self.ranks - 1) * numbers, (self.free["compute"], "compute"))
            self.run("compute", 0.0, told)
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

    def move(self, lane: str, nbytes: float, *after: When, times: float = 1) -> When:
        """One transfer, or several in a row; both directions of a half-duplex link are one lane in two books."""
        links = ("down", "up")
        if self.rates.half_duplex and lane in links:
            self.free[lane] = max(self.free[link] for link in links)
        self.counts["bytes"][lane] += nbytes
        rate = getattr(self.rates, "memory" if lane == "optimizer" else lane)
        latency = times * (self.rates.latency if lane in links else self.rates.wire_latency if lane == "wire" else 0.0)
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
            seconds = self.arithmetic(index, backward) / self.rates.flops
            if self.ranks > 1 and place >= self.head:
                self.exchange(index, seconds, here, last)
            else:
                self.made = self.run("compute", seconds, *here, *self.in_flight(backward))
            if place == 1 and self.fill is None:
                self.fill = sum(self.counts["stalls"].values())
            self.ends.append(self.made)
            if self.streamed[index]:
                self.users.append(self.made)
            if place < self.head and self.away(index):
                before, rows = self.ends[place - 1], self.place.micro_batches
                self.saved[index] = self.move("up", self.between, before, times=rows)
            if self.ranks == 1 and place >= self.head:
                self.send(index, last)
        self.add_up(last)

    def exchange(self, index: int, seconds: float, here: list[When], last: bool) -> None:
        """A layer's backward, and each micro-batch's gradients on their way to the ranks that own them; the sum of one
        is made behind the next one's arithmetic."""
        groups = min(math.ceil(self.rows), ROWS)
        times = self.rows / groups
        for row in range(groups):
            self.made = self.run("compute", seconds / groups, *here, *self.in_flight(index < self.head))
            for nbytes in self.given[index]:
                arrived = self.move("wire", times * nbytes, self.made, times=times)
            self.add_up(last)
            self.exchanged = index, row == groups - 1, arrived

    def in_flight(self, backward: bool) -> list[When]:
        """Gradients on their way up, which must not pile up."""
        return self.sent[-2:-1] if backward else []

    def add_up(self, last: bool) -> None:
        """The sum of what was exchanged before, for which the arithmetic waits; a layer's last is sent on."""
        if self.exchanged is not None:
            index, whole, arrived = self.exchanged
            end = self.run("compute", 0.0, arrived)
            if whole:
                self.send(index, last, end)
        self.exchanged = None

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
            if self.place.weights[owner] == "device":
                if self.fresh[owner] is None:
                    self.fresh[owner] = self.renew(owner)
                after.append(self.fresh[owner])
        if self.streamed[index]:
            held = place > 0 and bool(self.streamed[order[place - 1]])  # one slot, by the turn that begins
            after.append(self.fetch(index, self.users[held - SLOTS]))
        if place > self.head and index in self.saved:
            free, rows = self.ends[place - 2], self.place.micro_batches
            after.append(self.move("down", self.between, self.saved.pop(index), free, times=rows))
        if place >= self.head and index in self.parked:
            room = self.free["compute"], "compute"  # torch's allocator gives it in the order of the arithmetic
            after.append(self.move("down", self.sums[index], self.parked.pop(index), room))
        return after

    def renew(self, owner: int) -> When:
        """The copy that is kept on the device."""
        ready = self.weights[owner]
        if self.place.state[owner] != "device":
            ready = self.move("down", self.shards[owner] * self.working, ready)
        return self.collect(owner, ready)

    def collect(self, owner: int, ready: When) -> When:
        """The other ranks' shards of a layer's weights."""
        if self.ranks == 1:
            return ready
        return self.move("wire", (self.ranks - 1) * self.shards[owner] * self.working, ready)

    def fetch(self, index: int, free: When) -> When:
        """A layer's weights into a slot, once it is free."""
        for owner in self.streamed[index]:
            nbytes, after = self.shards[owner] * self.working, [free]
            if self.place.weights[owner] == "disk":
                after.append(self.move("read", disk_bytes(nbytes), self.written[owner], self.fetching[-SLOTS]))
            elif self.place.weights[owner] == "host":
                after.append(self.weights[owner])
            done = self.move("down", nbytes, *after)
            if self.place.weights[owner] == "disk":
                self.fetching.append(done)  # free once copied
            done = self.collect(owner, done)
        return done

    def send(self, index: int, last: bool, made: When | None = None) -> None:
        """A layer's gradients, or their partial sums, to the host."""
        if self.place.state[index] == "device":
            return
        made = made or self.made
        nbytes = self.owned[index] * self.working if last else self.sums[index]
        if self.beside(index):
            nbytes = self.shards[index] * self.working
            sent = self.move("up", nbytes, made, self.sending[-SLOTS])
            done = self.move("write", disk_bytes(nbytes), sent, self.written[index])
            self.sending.append(done)
        else:
            done = self.move("up", nbytes, made, self.written[index])
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
        size, home = self.shards[index], self.place.state[index]
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


def _within(layout: Layout, elements: int) -> int:
    """Elements of parameters among the first `elements` of a layout."""
    ends = [start + math.prod(shape) for start, shape in zip(layout.starts, layout.shapes, strict=True)]
    return sum(max(0, min(end, elements) - start) for start, end in zip(layout.starts, ends, strict=True))


def _share(plan: LayerPlan, owned: Layout, shard: int) -> int:
    """Elements of a rank's share of what a layer reads of an owner."""
    places = [i for i, name in enumerate(owned.names) if name in plan.reads.names]
    end = owned.starts[places[-1]] + math.prod(owned.shapes[places[-1]])
    return min(shard, end - owned.starts[places[0]])
